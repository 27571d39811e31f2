"""What lies in the bodies of conditional nodes: read, compared between captures, each difference named with its body. On a stand-in for the driver
that holds the same graphs, and on a GPU."""

import re
from dataclasses import replace

import pytest
import torch

from gkernels.graph import Buckets, Burst, ChoosingRunner, GraphRunner, Loop, PiecewiseRunner, eager
from gkernels.graph.check import CASES, check_runner
from gkernels.graph.nodes import Node, compare_nodes, nodes_of, unread, unsafe_nodes
from gkernels.model.sampling import Sampling
from gkernels.model.step import Row, Step
from tests.gallery import N, _double_kernel, _first_column_kernel
from tests.test_graph import eager_memory
from tests.test_loop import DEPTH, PLACES, build_step

CUDA = torch.cuda.is_available()
on_a_stand_in = pytest.mark.skipif(CUDA, reason="a stand-in for CUDA, where the same runs on a GPU")
ROWS = 4
LAUNCH = {GraphRunner: "bucket 4", Burst: "bucket 4", Loop: "bucket 4", ChoosingRunner: "all buckets"}
BODY = {Loop: "body 0 of node 1 (WHILE)", ChoosingRunner: "body 1 of node 1 (SWITCH)"}


class Doubling:
    """A step that doubles rows and leaves none running. For the bucket of 4 it takes one decision on the host: the one that `bakes` names."""

    def __init__(self, device, bakes=""):
        self.bakes, self.case = bakes, CASES[0]
        self.x, self.out = torch.ones(ROWS, N, device=device), torch.zeros(ROWS, N, device=device)
        self.lens, self.one, self.live = (torch.ones(n, dtype=torch.int32, device=device) for n in (ROWS, 1, 1))
        self.left, self.running = (torch.ones(1, dtype=torch.int32, device=device) for _ in range(2))

    def stage(self, case):
        self.case = case
        lens = case.batch(ROWS, N)
        self.lens.copy_(torch.tensor(lens + [0] * (ROWS - len(lens)), dtype=torch.int32))

    def __call__(self, bucket):
        follows = lambda what, capacity, live: live if (bucket, self.bakes) == (4, what) and self.case is not CASES[0] else capacity
        if follows("kernel", False, True):
            _first_column_kernel[(ROWS,)](self.x, self.out, N)
        else:
            _double_kernel[(follows("grid", ROWS, 1),)](self.x, self.lens, self.out, follows("scalar", N, 1), N, num_warps=follows("block", 4, 2))
        self.running.fill_(0)
        return self.out


def runner_of(kind, step, device):
    buckets = Buckets([4]) if kind is not ChoosingRunner else Buckets([1, 4])
    if kind is Loop:
        return Loop(step, step.left, step.running, buckets, device, steps=2)
    if kind is ChoosingRunner:
        return ChoosingRunner(step, step.live, buckets, device)
    return Burst(step, 2, buckets, device) if kind is Burst else kind(step, buckets, device)


def check_clean(kind, device):
    """Nothing is found, and what was proven says how many nodes it looked at, and how many of them inside bodies."""
    step = Doubling(device)
    runner = runner_of(kind, step, "cuda")
    report = check_runner(runner, step.stage, CASES[:3])
    assert report.clean and not report.unproven, report
    words = rf"(\d+) nodes of {LAUNCH[kind]}, (\d+) of them in conditional bodies, all safe, are the same in 5 captures of 3 cases$"
    count, inside = map(int, re.match(words, report.proven[0]).groups())
    kernels = 2                                             # a call's
    assert (count, inside) == {GraphRunner: (kernels, 0), Burst: (2 * kernels, 0), ChoosingRunner: (2 + 2 * (kernels + 1), 2 * (kernels + 1)),
                               Loop: (4 + 3 * (kernels + 1) + 2, 3 * (kernels + 1) + 2)}[kind]
    assert len(runner.graphs) == len(runner.buckets)
    runner.release()


def check_named(kind, device, bakes, finding, words):
    """The host's decision is found, in the case that differs, with its kernel, its body and the line of the launch."""
    step = Doubling(device, bakes)
    runner = runner_of(kind, step, "cuda")
    report = check_runner(runner, step.stage, CASES[:2])
    runner.release()
    assert report.names == {finding} and not report.proven, report
    what = next(f for f in report.errors if re.search(words, f.what))
    assert what.what.startswith(f"{LAUNCH[kind]}: node ") and what.cases == ("all of length 1",)
    assert kind not in BODY or f"in {BODY[kind]}" in what.what
    file, _, line = what.place.rpartition(":")
    assert file == __file__ and "_kernel[(" in open(file).read().splitlines()[int(line) - 1]


BAKED = [("scalar", "baked-scalar", "kernel _double_kernel.*: n is 0x8 in one capture, 0x1 in another"),
         ("grid", "data-dependent-grid", r"kernel _double_kernel.*: grid \(4, 1, 1\) in one capture, \(1, 1, 1\) in another"),
         ("kernel", "kernel-by-data", "is kernel _double_kernel.* in one capture and kernel _first_column_kernel.* in another")]


@on_a_stand_in
@pytest.mark.parametrize("kind", LAUNCH)
def test_a_runner_that_decides_nothing_is_clean(cuda, kind):
    check_clean(kind, "cpu")
    assert cuda.idle and not cuda.reserved and not cuda.driver.executables


@on_a_stand_in
@pytest.mark.parametrize("kind", LAUNCH)
@pytest.mark.parametrize("bakes, finding, words", BAKED)
def test_a_decision_of_the_host_is_named_with_its_body(cuda, kind, bakes, finding, words):
    check_named(kind, "cpu", bakes, finding, words)
    assert cuda.idle and not cuda.reserved and not cuda.driver.executables


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LAUNCH)
def test_a_runner_that_decides_nothing_is_clean_on_a_gpu(device, kind):
    check_clean(kind, device)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LAUNCH)
@pytest.mark.parametrize("bakes, finding, words", [*BAKED, ("block", "different-node", r"block \(128, 1, 1\) in one capture, \(64, 1, 1\)")])
def test_a_decision_of_the_host_is_named_with_its_body_on_a_gpu(device, kind, bakes, finding, words):
    check_named(kind, device, bakes, finding, words)


@pytest.fixture(scope="module")
def model_step():
    return build_step()


def model_loop(step):
    b = step.buffers
    return Loop(step, b["turns"], b["running"], Buckets([PLACES]), "cuda", (b.check_addresses,), steps=2)


def stage_model(step):
    """Stages decoding rows of a case, on pages of their own."""
    def stage(case):
        lens = case.batch(PLACES, 16)
        step.stage([Row([17 + i], n, [1 + 8 * i + j for j in range(8)], Sampling(9), True, 0, 32, (), i) for i, n in enumerate(lens)], DEPTH)
    return stage


def check_model(step):
    """The model's own step, in a loop: all its kernels lie in the body, and none follows the batch."""
    loop = model_loop(step)
    with eager_memory():
        report = check_runner(loop, stage_model(step), CASES[:2])
    inside = int(re.search(r"(\d+) of them in conditional bodies", " ".join(report.proven)).group(1)) if report.clean else 0
    assert report.clean and not report.unproven and inside > 3 * 10, report
    loop.release()


class LastOnHost(Step):
    """Multiplies its logits by the number of rows, which the host knows."""

    def __call__(self, bucket):
        logits = super().__call__(bucket)
        logits.mul_(float(self.live))
        return logits

    def stage(self, rows, turns=1):
        self.live = len(rows)
        return super().stage(rows, turns)


def check_model_that_looks(step):
    loop, known = model_loop(step), step.__class__
    step.__class__ = LastOnHost
    try:
        with eager_memory():
            report = check_runner(loop, stage_model(step), (CASES[0], CASES[2]))
    finally:
        step.__class__ = known
        loop.release()
    assert report.names == {"baked-scalar"} and "in body 0 of node 1 (WHILE)" in report.errors[0].what, report


@on_a_stand_in
@pytest.mark.parametrize("checked", [check_model, check_model_that_looks])
def test_the_models_loop_is_clean_and_one_that_looks_is_not(cuda, model_step, checked):
    checked(model_step)
    assert cuda.idle and not cuda.driver.executables


@pytest.mark.gpu
@pytest.mark.parametrize("checked", [check_model, check_model_that_looks])
def test_the_models_loop_is_clean_and_one_that_looks_is_not_on_a_gpu(model_step, checked):
    checked(model_step)


@on_a_stand_in
def test_a_piecewise_runner_is_read_graph_by_graph(cuda):
    step = Doubling("cpu", "scalar")
    between = eager(lambda: None)

    def cut(bucket):
        step(bucket)
        between()
        return step(bucket)
    runner = PiecewiseRunner(cut, Buckets([4]), "cuda")
    report = check_runner(runner, step.stage, CASES[:2])
    assert report.names == {"baked-scalar"} and [*runner.nodes()] == ["bucket 4, graph 0", "bucket 4, graph 1"]
    runner.release()


@on_a_stand_in
def test_a_loop_holds_what_it_should(cuda):
    step = Doubling("cpu")
    loop = runner_of(Loop, step, "cuda")
    assert loop.nodes() == {}
    loop.capture(progress=False)
    nodes = loop.nodes()["bucket 4"]
    first, second = "body 0 of node 1 (WHILE)", "body 0 of node 10 (WHILE)"
    call = ["graph", "kernel _double_kernel", "kernel fill_.Scalar"]
    assert [(f"{n.kind} {n.name}".strip(), n.within) for n in nodes] == [
        ("kernel go_on", ""), ("conditional WHILE of 1 bodies", ""), *((word, first) for word in [*call, *call, "kernel go_on"]),
        ("kernel go_on", ""), ("conditional WHILE of 1 bodies", ""), *((word, second) for word in [*call, "kernel go_on"])]
    ends = [int.from_bytes(word, "little") for word in nodes[0].parameters]         # without the handle, which each making has anew
    assert ends == [step.left.data_ptr(), step.running.data_ptr(), 0, 2] and loop.nodes()["bucket 4"] == nodes


@on_a_stand_in
def test_a_failed_capture_is_told_and_leaves_no_graphs(cuda):
    step = Doubling("cpu")

    def failing(bucket):
        if cuda.capturing and step.case is CASES[1]:
            raise RuntimeError("called a synchronizing CUDA operation")
        return step(bucket)
    loop = Loop(failing, step.left, step.running, Buckets([4]), "cuda")
    report = check_runner(loop, step.stage, CASES[:3])
    (finding,) = report.errors
    assert finding.name == "hidden-sync" and finding.cases == ("all of length 1",)
    assert report.unproven == ["the nodes of its graphs: a capture failed"]
    assert not loop.graphs and cuda.idle and not cuda.reserved and not cuda.driver.executables


def test_without_cuda_nothing_is_proven():
    step = Doubling("cpu")
    report = check_runner(runner_of(Loop, step, "cpu"), step.stage)
    assert report.clean and not report.proven and report.unproven == [
        "the nodes of its graphs: there are none without CUDA; check the step, which needs none"]
    with pytest.raises(ValueError, match="check_runner: cases: got 1, expected at least 2"):
        check_runner(runner_of(Loop, step, "cpu"), step.stage, CASES[:1])


@on_a_stand_in
def test_without_bindings_no_node_is_read(cuda, monkeypatch):
    cuda.lose_bindings(monkeypatch)
    step = Doubling("cpu", "scalar")
    report = check_runner(runner_of(Loop, step, "cuda"), step.stage)
    assert report.clean and not report.proven and report.unproven == [
        "the nodes of its graphs: cuda.bindings, which reads them, is not installed; pip install 'gkernels[loop]'"]


@on_a_stand_in
@pytest.mark.parametrize("version, told", [(13000, False), (13020, True)])
def test_the_driver_tells_the_bodies_of_others_nodes(cuda, version, told):
    """Of a graph that another library made, as far as the driver knows how."""
    graph, handle = cuda.driver.cuGraphCreate(0)[1], None
    params = cuda.driver.CUgraphNodeParams()
    params.type, kinds = cuda.driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL, cuda.driver.CUgraphConditionalNodeType
    params.conditional.type, params.conditional.size, params.conditional.handle = kinds.CU_GRAPH_COND_TYPE_SWITCH, 2, handle
    cuda.driver.cuGraphAddNode(graph, [], None, 0, params)
    body = torch.cuda.CUDAGraph(keep_graph=True)
    step = Doubling("cpu")
    with torch.cuda.stream(torch.cuda.Stream("cuda")):
        body.capture_begin(pool=(0, 1))
        step(4)
        body.capture_end()
    cuda.driver.cuGraphAddChildGraphNode(params.conditional.phGraph_out[1], None, 0, body.raw_cuda_graph())
    cuda.driver.version = version
    nodes = nodes_of(cuda.driver, graph)
    within = "body 1 of node 0 (SWITCH)"
    inside = [Node("graph", within=within)] + [node for node in nodes if node.kind == "kernel"]
    assert nodes == ([Node("conditional", "SWITCH of 2 bodies"), *inside] if told else [Node("conditional")])
    assert len(nodes) == (4 if told else 1) and {node.within for node in nodes[1:]} <= {within} and unread(nodes) == (not told)
    cuda.driver.cuGraphDestroy(graph)


KERNEL = Node("kernel", "attend", (4, 2, 1), (128, 1, 1), 1024, (b"\x01\0\0\0",), "body 1 of node 0 (SWITCH)")


@pytest.mark.parametrize("change, finding, words", [
    (dict(block=(64, 1, 1)), "different-node", r"node 1, kernel attend in body 1 of node 0 \(SWITCH\): block"),
    (dict(shared=0), "different-node", r"in body 1 of node 0 \(SWITCH\): shared 1024 in one capture, 0"),
    (dict(parameters=(b"\x02\0\0\0",)), "baked-scalar", r"in body 1 of node 0 \(SWITCH\): n is 0x1 in one capture, 0x2"),
    (dict(within="body 0 of node 0 (SWITCH)"), "kernel-by-data", r"attend in body 1 of node 0 .* attend in body 0 of node 0")])
def test_nodes_of_a_body_that_differ_are_named(change, finding, words):
    first, other = ([Node("conditional", "SWITCH of 2 bodies"), node] for node in (KERNEL, replace(KERNEL, **change)))
    (found,) = compare_nodes(first, other, names={1: ["n"]})
    assert found.finding == finding and re.search(words, found.what) and not compare_nodes(first, first)


def test_another_number_of_bodies_is_named():
    (found,) = compare_nodes([Node("conditional", "SWITCH of 2 bodies")], [Node("conditional", "SWITCH of 3 bodies")])
    assert found.finding == "kernel-by-data" and "conditional SWITCH of 3 bodies in another" in found.what


@pytest.mark.parametrize("kind, inside, outside", [("wait_event", True, False), ("event_record", True, False), ("host", True, True),
                                                   ("mem_alloc", True, True), ("conditional", False, False), ("memset", False, False)])
def test_a_body_may_hold_less_than_a_graph(kind, inside, outside):
    assert [d.what for d in unsafe_nodes([Node(kind, within=KERNEL.within)])] == [f"node 0 is {kind} in {KERNEL.within}"] * inside
    assert [d.what for d in unsafe_nodes([Node(kind)])] == [f"node 0 is {kind}"] * outside
