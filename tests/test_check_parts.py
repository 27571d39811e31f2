"""The parts of the capture-safety checker by themselves: the lint, nodes of graphs, records done again, findings."""

import ast
import ctypes
import json
import re
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from gkernels.graph import captures
from gkernels.graph.compare import differences
from gkernels.graph.findings import Finding, Report, shown
from gkernels.graph.launches import classes_of, options_of, record, specialisation
from gkernels.graph.lint import findings, lint
from gkernels.graph.memory import Memory, different, fill_with_junk, is_poison, named_tensors, poison, span
from gkernels.graph.nodes import Node, compare_nodes, different_words, missing_kernels, read_nodes, unsafe_nodes
from gkernels.graph.recaptures import Sources, compare
from gkernels.graph.trace import NotReplayable, tracing

CUDA = torch.cuda.is_available()
on_cpu = pytest.mark.skipif(CUDA, reason="looks at the CPU interpreter")


@gluon.jit
def _boxes_kernel(boxes, n):
    pass


@triton.jit(do_not_specialize=["n", 3])
def _fill_kernel(out_ptr, n, step, m, BLOCK: tl.constexpr = 8):
    tl.store(out_ptr + tl.arange(0, BLOCK), step * 1.0, tl.arange(0, BLOCK) < n)


# the lint

@pytest.mark.parametrize("text, name", [
    ("n = lens.max().item()", "hidden-sync"), ("n = lens.tolist()", "hidden-sync"), ("n = lens.cpu()", "hidden-sync"),
    ("n = lens.to('cpu')", "hidden-sync"), ("print(lens)", "hidden-sync"), ("torch.cuda.synchronize()", "hidden-sync"),
    ("rows = lens.nonzero()", "data-dependent-shape"), ("rows = torch.masked_select(x, m)", "data-dependent-shape"),
    ("rows = x[lens > 0]", "data-dependent-shape"), ("rows = x[~mask]", "data-dependent-shape"),
    ("kernel[(lens.max(), 1)](x)", "data-dependent-grid"), ("kernel[lambda meta: (lens.sum(),)](x)", "data-dependent-grid"),
    ("table = torch.tensor(pages)", "host-constant"), ("x = torch.rand(3)", "host-rng"), ("x = random.random()", "host-rng"),
    ("x = np.random.rand()", "host-rng"), ("gc.collect()", "gc-in-capture"),
    ("@triton.autotune(configs=[], key=[])\n@triton.jit\ndef kernel(x_ptr): pass", "autotune")])
def test_the_text_betrays(text, name):
    assert [found for found, _, _ in findings(ast.parse(text))] == [name]


@pytest.mark.parametrize("text", [
    "kernel[(triton.cdiv(max(n, 1), BLOCK),)](x, num_warps=4)", "rows = x[:n]", "y = x.to(torch.float32)", "y = x.to(device)", "x[i] = 0",
    "y = torch.where(lens > 0, x, 0)", "y = x.max()"])
def test_the_text_of_sound_code_is_left_alone(text):
    assert not list(findings(ast.parse(text)))


class Launcher:
    calls = 0

    def __call__(self, inputs):
        return self.helper(inputs)

    def helper(self, inputs):
        if inputs is None:
            return untaken(inputs)
        return inputs

    @property
    def trap(self):
        raise AssertionError("the lint runs no property")


def untaken(inputs):
    return inputs.item()


class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, inputs):
        return self.inner(inputs)


class Inner(torch.nn.Module):
    def forward(self, inputs):
        return untaken(inputs)


def test_the_lint_follows_calls_and_names_lines():
    (name, place, what), = lint(Launcher())
    file, _, line = place.rpartition(":")
    assert name == "hidden-sync" and file == __file__ and "inputs.item()" in open(file).read().splitlines()[int(line) - 1] and "inputs.item()" in what
    assert all(lint(other) == lint(Launcher()) for other in (Launcher().helper, untaken, Outer()))
    assert lint(len) == [] and lint(_fill_kernel) == []


# nodes

KERNEL = Node("kernel", "attend", (4, 2, 1), (128, 1, 1), 1024, (b"\x01\0\0\0", bytes(8), bytes(range(20))))


@pytest.mark.parametrize("change, finding, words", [
    (dict(name="merge"), "kernel-by-data", "node 1 is kernel attend in one capture and kernel merge in another"),
    (dict(kind="memset"), "kernel-by-data", "and memset attend"), (dict(grid=(3, 2, 1)), "data-dependent-grid", r"grid \(4, 2, 1\) .* \(3, 2, 1\)"),
    (dict(block=(64, 1, 1)), "different-node", r"block \(128, 1, 1\)"), (dict(shared=0), "different-node", "shared 1024 in one capture, 0"),
    (dict(parameters=(b"\x02\0\0\0", *KERNEL.parameters[1:])), "baked-scalar", "n is 0x1 in one capture, 0x2 in another"),
    (dict(parameters=(*KERNEL.parameters[:2], bytes(16) + KERNEL.parameters[2][16:])), "baked-scalar", "parameter 2, word [01] is"),
    (dict(parameters=KERNEL.parameters[:2]), "specialisation", "takes other parameters")])
def test_nodes_that_differ_are_named(change, finding, words):
    first, other = [Node("memset"), KERNEL], [Node("memset"), replace(KERNEL, **change)]
    found = compare_nodes(first, other, names={1: ["n", "x_ptr"]})
    assert {f.finding for f in found} == {finding} and all(f.node == 1 for f in found)
    assert any(re.search(words, f.what) for f in found), found
    assert compare_nodes(first, first) == []


def test_what_differs_between_captures_of_one_batch_is_noise():
    moved = replace(KERNEL, parameters=(KERNEL.parameters[0], b"\x10" * 8, KERNEL.parameters[2]))
    again = replace(KERNEL, parameters=(KERNEL.parameters[0], b"\x20" * 8, KERNEL.parameters[2]))
    noise = list(different_words([KERNEL], [moved]))
    assert noise == [(0, 1, 0)] and compare_nodes([KERNEL], [again], noise) == [] and compare_nodes([KERNEL], [again]) != []
    baked = replace(moved, parameters=(b"\x09\0\0\0", *moved.parameters[1:]))
    assert [f.finding for f in compare_nodes([KERNEL], [baked], noise)] == ["baked-scalar"]


@pytest.mark.parametrize("values, finds", [("11222", False), ("12345", False), ("11212", False), ("11221", True), ("11111", False), ("11211", True)])
def test_what_changes_with_time_alone_is_noise(values, finds):
    """A word in five captures, of cases a, a, b, c and a: bytes that nobody writes may change once, and then stay."""
    node = lambda value: replace(KERNEL, parameters=(int(value).to_bytes(4, "little"),))
    made = [(case, {"bucket 1": [node(value)]}) for case, value in zip("aabca", values, strict=True)]
    report = Report("", "cuda", [])
    compare(report, Sources("home.py:1", []), made)
    assert report.names == ({"baked-scalar"} if finds else set()), report


def test_bytes_of_empty_objects_are_passed_over():
    first, other, truth = (replace(KERNEL, parameters=(*KERNEL.parameters, bytes([byte]))) for byte in (0x40, 0x41, 1))
    assert compare_nodes([first], [other]) == [] and compare_nodes([replace(first, parameters=(b"\0",))], [replace(first, parameters=(b"\1",))]) != []
    (found,) = compare_nodes([first], [other], names={0: ["n", "x_ptr", "strides", "flag"]})
    assert found.finding == "baked-scalar" and "flag is 0x40" in found.what and compare_nodes([first], [truth]) == []


def test_more_or_fewer_nodes_are_named():
    for first, other in (([KERNEL], [KERNEL, Node("memcpy")]), ([KERNEL, Node("memcpy")], [KERNEL])):
        (found,) = compare_nodes(first, other)
        assert found.finding == "kernel-by-data" and found.node == 1 and "node 1 is memcpy" in found.what


def test_unsafe_and_missing_nodes_are_named():
    nodes = [KERNEL, Node("memset"), Node("host"), Node("mem_alloc")]
    assert [(f.finding, f.node) for f in unsafe_nodes(nodes)] == [("forbidden-node", 2), ("forbidden-node", 3)]
    assert missing_kernels(["attend", "attend", "norm"], nodes) == {"attend": 1, "norm": 1} and missing_kernels(["attend"], nodes) == {}


def test_launches_are_paired_with_nodes_by_name_and_order():
    launch = lambda symbol, **classes: SimpleNamespace(symbol=symbol, classes=classes, place=symbol)
    capture = SimpleNamespace(nodes=[Node("memset"), KERNEL, Node("kernel", "of_torch"), replace(KERNEL, grid=(1,))],
                              launches=[launch("attend", n="i32", one="constexpr:1", x_ptr="*fp32:16"), launch("attend", n="i32")])
    assert captures.parameter_names(capture) == {1: ["n", "x_ptr"], 3: ["n"]}


class FakeDriver:
    """What cuda.bindings.driver answers, for a graph of a memset, a kernel loaded as a function, and a child that holds one of a library."""

    CUgraphNodeType = SimpleNamespace(**{name: SimpleNamespace(name=name) for name in (
        "CU_GRAPH_NODE_TYPE_KERNEL", "CU_GRAPH_NODE_TYPE_MEMSET", "CU_GRAPH_NODE_TYPE_GRAPH")})
    graphs = {5: ["memset", "function", "child"], 6: ["kernel"]}
    types = dict(memset="MEMSET", child="GRAPH", function="KERNEL", kernel="KERNEL")
    sizes = {7: (4, 8), 9: (8,)}

    def __init__(self, refuses=0):
        self.refuses = refuses
        self.arguments = [ctypes.c_int32(3), ctypes.c_uint64(0xABCDEF), ctypes.c_double(0.5)]
        pointers = [ctypes.cast(ctypes.pointer(a), ctypes.c_void_p).value for a in self.arguments]
        self.tables = (ctypes.c_void_p * 2)(*pointers[:2]), (ctypes.c_void_p * 1)(pointers[2])

    def CUgraph(self, init_value):
        return init_value

    def cuGraphGetNodes(self, graph, count=0):
        return self.refuses, self.graphs[graph][:count], len(self.graphs[graph])

    def cuGraphChildGraphNodeGetGraph(self, node):
        return 0, 6

    def cuGraphNodeGetType(self, node):
        return 0, getattr(self.CUgraphNodeType, f"CU_GRAPH_NODE_TYPE_{self.types[node]}")

    def cuGraphKernelNodeGetParams(self, node):
        i = node == "kernel"
        return 0, SimpleNamespace(func=0 if i else 7, kern=9 if i else 0, gridDimX=4, gridDimY=2, gridDimZ=1, blockDimX=64, blockDimY=1, blockDimZ=1,
                                  sharedMemBytes=256, kernelParams=ctypes.addressof(self.tables[i]))

    def cuFuncGetName(self, function):
        return 0, b"attend"

    def cuKernelGetName(self, kernel):
        return 0, b"of_a_library"

    def cuFuncGetParamInfo(self, function, i):
        return (0, 0, self.sizes[function][i]) if i < len(self.sizes[function]) else (1, 0, 0)

    cuKernelGetParamInfo = cuFuncGetParamInfo


def test_nodes_are_read_as_the_driver_gives_them(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    assert read_nodes(5) == [Node("memset"), Node("kernel", "attend", (4, 2, 1), (64, 1, 1), 256, (b"\3\0\0\0", b"\xef\xcd\xab\0\0\0\0\0")),
                             Node("graph"), Node("kernel", "of_a_library", (4, 2, 1), (64, 1, 1), 256, (np.float64(0.5).tobytes(),))]
    driver.refuses = 700
    with pytest.raises(RuntimeError, match="the CUDA driver answered 700"):
        read_nodes(5)


@pytest.mark.parametrize("words, finding", [("operation would result in unjoined work", "unjoined-stream"),
                                            ("called a synchronizing CUDA operation", "hidden-sync"), ("operation not permitted", "capture-fails")])
def test_a_failed_capture_is_named_by_its_first_error(words, finding):
    try:
        try:
            raise RuntimeError(words)
        finally:
            raise ValueError("the capture is invalid")
    except ValueError as error:
        assert captures.why(captures.first_of(error)) == finding


def test_hooks_name_what_compiles_and_loads_late():
    report, hook = Report("s", "cuda", []), triton.knobs.runtime.jit_post_compile_hook
    with captures.armed(report):
        triton.knobs.runtime.jit_post_compile_hook(repr="_fill_kernel[...]")
        triton.knobs.runtime.kernel_load_start_hook(None, None, "_fill_kernel", None, "hash")
    triton.knobs.runtime.kernel_load_start_hook(None, None, "another", None, "hash")
    assert triton.knobs.runtime.jit_post_compile_hook is hook
    assert [f.name for f in report.findings] == ["late-compile", "late-module-load"] and all(f.place.startswith(__file__) for f in report.findings)


# records

@pytest.mark.parametrize("value, in_value, in_alignment, want", [
    (1, True, True, "constexpr:1"), (16, True, True, "i32:16"), (15, True, True, "i32"), (2**31, True, True, "i64:16"), (1, False, False, "i32"),
    (16, False, False, "i32"), (16, True, False, "i32"), (True, True, True, "u1"), (0.5, True, True, "fp32")])
def test_classes_are_tritons(value, in_value, in_alignment, want):
    assert specialisation(value, in_value, in_alignment) == want


def test_a_record_tells_which_binary_is_taken(device):
    out = torch.zeros(64, device=device)
    with record() as launches:
        _fill_kernel[(1,)](out, 1, 16, 16)
        _fill_kernel[(1,)](out[1:], 16, 1, 3)
    a, b = launches
    assert a.classes == {"out_ptr": "*fp32:16", "n": "i32", "step": "i32:16", "m": "i32"}
    assert b.classes == {"out_ptr": "*fp32", "n": "i32", "step": "constexpr:1", "m": "i32"}
    assert a.scalars["BLOCK"] == 8 and a.symbol == "_fill_kernel" and a.place.startswith(f"{__file__}:") and a.thread == threading.get_ident()
    out.zero_()
    a.again()
    assert out[0] == 16 and not out[1:].any()


def test_a_compiled_kernel_is_classed_as_an_interpreted_one():
    compiled = JITFunction(_fill_kernel.fn, do_not_specialize=["n", 3])
    bound = dict(out_ptr=torch.zeros(64), n=1, step=16, m=16, BLOCK=8)
    assert classes_of(compiled, bound) == {"out_ptr": "*fp32:16", "n": "i32", "step": "i32:16", "m": "i32"}
    assert options_of(compiled)["repr"] is None and options_of(JITFunction(_fill_kernel.fn, repr=lambda _: "own"))["repr"]


def test_descriptors_are_several_arguments():
    """Triton passes a map of 128 bytes, then each size in 4 bytes and each stride in 8: names of a node's arguments have to keep in step."""
    boxes = TensorDescriptor(torch.zeros(32, 64), [32, 64], [64, 1], [16, 32], NVMMASharedLayout.get_default_for([16, 32], gl.float32))
    got = classes_of(_boxes_kernel, {"boxes": boxes, "n": 3})
    assert list(got) == ["boxes", "boxes.shape[0]", "boxes.shape[1]", "boxes.strides[0]", "boxes.strides[1]", "n"]
    assert got["boxes"].startswith("tensordesc<fp32[16, 32]") and [*got.values()][1:] == ["i32", "i32", "i64", "i64", "i32"]



def trace_of(fn, *writable):
    with tracing(Memory(), Memory((f"w{i}", span(t)) for i, t in enumerate(writable))) as trace:
        trace.result = fn()
    return trace


@on_cpu
def test_a_trace_does_the_call_again():
    x, y = torch.arange(8.0), torch.zeros(8)

    def call():
        scratch = torch.empty(8)
        _fill_kernel[(1,)](scratch, 4, 3, 5)
        scratch[4:] = x[:4] * 2                       # a view, written in place
        y.copy_(scratch.view(2, 4).flip(0).flatten())
        return y + 1
    trace = trace_of(call, y)
    assert not trace.hits and len(trace.launches) == 1
    x.add_(100)
    y.fill_(-1)
    trace.replay()
    assert y.tolist() == [200, 202, 204, 206, 3, 3, 3, 3] and torch.equal(trace.result, y + 1)


@on_cpu
def test_a_trace_goes_on_with_the_hosts_decisions():
    x = torch.tensor([1.0, 2.0, 0.0])
    trace = trace_of(lambda: x * len(x.nonzero()))
    x.copy_(torch.tensor([1.0, 0.0, 0.0]))
    with pytest.raises(NotReplayable, match=r"nonzero gave \[2, 1\] when it was recorded and gives \[1, 1\] now"):
        trace.replay()
    trace = trace_of(lambda: x * float(x.sum()))
    x.fill_(5)
    trace.replay()
    assert trace.result.tolist() == [5.0, 5.0, 5.0] and {name for name, _, _ in trace.hits} == {"hidden-sync"}


@on_cpu
def test_an_operation_of_another_library_is_done_again_whole():
    library = torch.library.Library("checked", "DEF")
    library.define("twice(Tensor x, Tensor(a!) out) -> ()")

    def twice(x, out):
        _fill_kernel[(1,)](out, 8, 1, 1)
        out.mul_(x * 2)
    library.impl("twice", twice, "CPU")
    x, out = torch.ones(8), torch.zeros(8)
    trace = trace_of(lambda: torch.ops.checked.twice(x, out), out)
    assert [event.name for event in trace.events] == ["_fill_kernel", "checked::twice"] and not trace.hits
    x.fill_(4)
    trace.replay()
    assert out.tolist() == [8.0] * 8
    assert [name for name, _, what in trace_of(lambda: torch.ops.checked.twice(x, out)).hits] == ["undeclared-write"]


@on_cpu
def test_inference_mode_hides_nothing():
    def call():
        with torch.inference_mode():
            return x.reshape(2, 4).to(torch.float64).sum().item(), x[x > 2].clone()
    x = torch.arange(8.0)
    assert {name for name, _, _ in trace_of(call).hits} == {"hidden-sync", "data-dependent-shape"}


@on_cpu
def test_only_what_draws_is_said_to_draw():
    q = torch.zeros(1, 2, 4, 8)
    draws = lambda p: lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=p)
    generator = torch.Generator()
    hits = lambda call: [name for name, _, _ in trace_of(call).hits]
    assert hits(draws(0.0)) == [] and hits(draws(0.5)) == ["host-rng"] and hits(lambda: torch.rand(3, generator=generator)) == ["host-rng"]


@on_cpu
def test_records_differ_where_they_must_and_nowhere_else():
    x = torch.zeros(8)
    fill = lambda n, t=x: trace_of(lambda: _fill_kernel[(1,)](t, n, n, 3))
    same = list(differences(fill(2), fill(2), "twice"))
    (a, _, scalar), (b, _, _), (c, _, _) = differences(fill(2), fill(16), "with other data")
    assert same == [] and (a, b, c) == ("baked-scalar", "baked-scalar", "specialisation") and "n is 2 in one call, 16 in another with" in scalar
    assert [name for name, _, _ in differences(fill(2), fill(2, x.clone()), "")] == ["stale-pointer"]
    assert [name for name, _, _ in differences(fill(2), trace_of(lambda: x + 1), "")] == ["kernel-by-data"]
    assert [name for name, _, _ in differences(fill(2), trace_of(lambda: None), "")] == ["kernel-by-data"]


def test_host_generators_are_put_back():
    state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first, again = (trace_of(lambda: (np.random.rand(), torch.rand(2).tolist())) for _ in range(2))
    assert first.result == again.result and (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state
    assert [name for name, _, _ in first.hits if name == "host-rng"] == ["host-rng"] * 2


# memory and findings

@given(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.int64, torch.uint8, torch.bool]),
       st.booleans())
def test_poison_is_known_and_never_alike(dtype, again):
    t = torch.zeros(5).to(dtype)
    poison(t, again)
    assert is_poison(t, again).all() and not is_poison(t, not again).any()
    assert different(t, torch.zeros(5).to(dtype)).all() or dtype == torch.bool


def test_bits_tell_zero_from_minus_zero_and_nan_equals_itself():
    a, b = torch.tensor([0.0, float("nan"), 1.0]), torch.tensor([-0.0, float("nan"), 1.0])
    assert different(a, b).tolist() == [True, False, False]
    assert different(torch.view_as_complex(a.repeat(2).view(3, 2)), torch.view_as_complex(b.repeat(2).view(3, 2))).tolist() == [True, True, False]


def test_names_and_spans_of_tensors():
    t = torch.zeros(4, 6)
    values = {"a": t, "b": [t[0], {"c": t[:, 1]}], "n": 3}
    assert [name for name, _ in named_tensors(values)] == ["a", "b.0", "b.1.c"]
    start = t.data_ptr()
    assert span(t) == (start, start + 96) and span(t[:, 1]) == (start + 4, start + 4 + 76) and span(t[:0]) == (0, 0)
    memory = Memory([("t", span(t)), ("none", span(t[:0]))])
    assert memory.find(start + 95) == ("t", 95) and memory.find(start + 96) is None
    assert memory.outside(np.array([start - 1, start, start + 96])).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.float32, torch.float8_e4m3fn, torch.bool])
def test_junk_differs_and_is_drawn_again(dtype):
    fill = lambda seed: fill_with_junk([t := torch.zeros(200).to(dtype)], torch.Generator().manual_seed(seed)) or t
    assert not different(fill(1), fill(1)).any() and different(fill(1), fill(2)).any()


def test_a_report_merges_cases_and_lets_errors_replace_notes():
    report = Report("s", "cpu", ["a", "b"])
    report.add("hidden-sync", "f.py:1", "the text says so", note=True)
    report.add("fresh-output", "f.py:2", "made inside")
    assert report.clean and report.text().startswith("s on cpu: clean, 2 notes; 2 cases: a, b")
    report.add("hidden-sync", "f.py:1", "it happened", "a")
    report.add("hidden-sync", "f.py:1", "it happened again", "b")
    report.add("hidden-sync", "f.py:1", "the text says so", note=True)
    assert report.findings[0] == Finding("hidden-sync", "f.py:1", "it happened", ("a", "b")) and report.names == {"hidden-sync"} and not report.clean
    assert report.text().splitlines()[:2] == ["s on cpu: 1 error, 1 note; 2 cases: a, b", "error: hidden-sync at f.py:1 [a, b]"]
    assert json.loads(report.json())["findings"][1]["note"] is True
    with pytest.raises(ValueError, match="got the name 'odd'"):
        report.add("odd", "f.py:1", "")


def test_places_are_shown_from_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shown(f"{tmp_path}/a/b.py:3") == "a/b.py:3" and shown("/elsewhere/b.py:3") == "/elsewhere/b.py:3"
