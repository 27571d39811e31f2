"""Both runners on a fake CUDA: cuts, eager ops between graphs, one pool, and faults at every event of a capture."""

import gc
import itertools
import sys
import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkernels import ops
from gkernels.graph import Buckets, GraphRunner, PiecewiseRunner, eager, segments
from gkernels.graph.piecewise import attention_ops
from gkernels.model.cache import PagedCache
from gkernels.model.config import LlamaConfig
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights
from gkernels.model.sampling import Sampling
from gkernels.model.step import Row, Step
from tests.close import assert_same
from tests.fake_cuda import Planted

pytestmark = pytest.mark.usefixtures("cuda")


@eager
def scale_by_host(y, out):
    out.copy_(y * (1 + int(y.sum()) % 5))


@eager
def shift_by_host(y):
    return y - int(y.max())


@eager
def several(y, more):
    return [y.flip(0)], {"sum": y + more["one"], "none": None}, len(y)


def graph_op(y):
    return y * 3 + 1


def write_op(y):
    out = torch.empty_like(y)
    out.copy_(y)
    out[:1].add_(5)
    return out


def write_eagerly(y):
    out = torch.empty_like(y)
    scale_by_host(y, out=out)
    return out


def return_several(y):
    (flipped,), named, n = several(y, {"one": torch.ones_like(y)})
    return flipped * n + named["sum"]


KINDS = {"graph": graph_op, "write": write_op, "eager write": write_eagerly, "eager return": shift_by_host, "eager several": return_several}
kinds = st.lists(st.sampled_from(list(KINDS)), max_size=6)
SIZE = 8


class Program:
    """A step that applies ops one after the other to a static tensor of integers, and reports an event before each."""

    def __init__(self, chosen, event=lambda: None):
        self.chosen, self.event, self.x = chosen, event, torch.zeros(SIZE, dtype=torch.int64)

    def __call__(self, bucket):
        y = self.x[:bucket]
        for kind in self.chosen:
            self.event()
            y = KINDS[kind](y)
        self.event()
        return y, {"twice": y * 2}

    def draw(self, seed):
        self.x.copy_(torch.randint(-9, 9, (SIZE,), generator=torch.Generator().manual_seed(seed)))


def check_replays(runner, program):
    """Replays of changed inputs over junk equal eager steps, in an order that comes back to the first bucket."""
    for seed, n in enumerate((SIZE, 3, SIZE, 1)):
        program.draw(seed)
        y, named = runner.graphs[runner.buckets.pad(n)].outputs
        for t in (y, named["twice"]):
            if t.data_ptr() != program.x.data_ptr():
                t.fill_(-777)
        want, got = program(runner.buckets.pad(n)), runner.run(n)
        assert_same(got[0], want[0])
        assert_same(got[1]["twice"], want[1]["twice"])
    assert (runner.replays, runner.eager_steps) == (4, 0)


def captured(program, kind=PiecewiseRunner, sizes=(1, 4, SIZE), **options):
    runner = kind(program, Buckets(sizes), "cuda", **options)
    runner.capture(progress=False)
    return runner


@given(kinds)
def test_replays_equal_eager_steps(cuda, chosen):
    program = Program(chosen)
    runner = captured(program)
    check_replays(runner, program)
    assert cuda.idle and len(cuda.pools) == 1
    cut = any("eager" in kind for kind in chosen)
    for bucket, c in runner.graphs.items():
        assert c.bucket == bucket and len(c.graphs) == 1 + sum("eager" in kind for kind in chosen) and c.nodes > 0 and (len(c.parts) > 1) == cut
    runner.release()
    assert cuda.reserved == 0


@pytest.mark.parametrize("method, broken", [
    ("EagerCall.__call__", lambda self: None),
    ("refresh", lambda want, got, name: None),
])
def test_control_an_eager_op_that_is_not_run_again_is_seen(monkeypatch, method, broken):
    program = Program(["graph", "eager return", "graph"])
    check_replays(captured(program), program)
    owner, _, name = method.rpartition(".")
    monkeypatch.setattr(segments.EagerCall if owner else segments, name, broken)
    with pytest.raises(AssertionError, match="elements differ"):
        check_replays(captured(program), program)


def test_control_a_graph_that_computed_at_capture_only_is_seen():
    program = Program(["graph"])
    runner = captured(program)
    for c in runner.graphs.values():
        for graph in c.graphs:
            graph.tape.clear()
    with pytest.raises(AssertionError, match="elements differ"):
        check_replays(runner, program)


def test_an_eager_op_sees_real_values_while_capturing():
    """The graph before it has run by then: no op meets memory that nothing has written."""
    program, seen = Program(["graph", "eager write"]), []
    look = eager(lambda y: seen.append(y.tolist()))
    program.draw(1)

    def step(bucket):
        y = graph_op(program.x[:bucket])
        look(y)
        return y

    runner = captured(step, sizes=(SIZE,))
    assert len(seen) == GraphRunner.WARM_UPS + 1 and all(values == graph_op(program.x).tolist() for values in seen)
    runner.run(SIZE)
    assert len(seen) == GraphRunner.WARM_UPS + 2


def test_one_interface(cuda):
    program = Program(["graph", "write"])
    runners = [captured(program, kind) for kind in (GraphRunner, PiecewiseRunner)]
    for runner in runners:
        check_replays(runner, program)
        assert runner.covers(3) and not runner.covers(SIZE + 1) and not runner.covers(0)
        header, *rows, total = runner.report().splitlines()
        assert header.split() == ["tokens", "seconds", "MiB", "nodes", "graphs"] and [row.split()[0] for row in rows] == ["8", "4", "1"]
        assert total.split()[0] == "all" and all(row.split()[-1] == "1" for row in rows)
    assert [runner.path for runner in runners] == ["captured graphs (3 buckets)", "piecewise graphs (3 buckets, 3 graphs)"]
    assert len(cuda.pools) == 2 and cuda.reserved > 0
    for runner in runners:
        runner.release()
        assert not runner.covers(3) and runner.path == "eager on CUDA"
        assert_same(runner.run(2)[0], program(4)[0])
    assert cuda.reserved == 0


def test_on_a_cpu_a_step_runs_straight_through():
    program = Program(["graph", "eager several", "eager write"])
    runner = PiecewiseRunner(program, Buckets([4]), "cpu", unsafe=[(program, "event")])
    runner.capture()
    program.draw(3)
    assert not runner.graphs and runner.path == "eager on the CPU interpreter"
    assert_same(runner.run(4)[0], program(4)[0])


def test_monolithic_refuses_an_eager_op(cuda):
    program = Program(["graph", "eager write"])
    with pytest.raises(RuntimeError, match=r"GraphRunner: step: got a call of scale_by_host, which is marked eager, .*PiecewiseRunner"):
        captured(program, GraphRunner)
    assert cuda.idle and cuda.reserved == 0


def test_control_a_host_decision_without_a_mark_spoils_the_capture(cuda):
    step = lambda bucket: torch.ones(bucket) * int(torch.arange(bucket).sum())
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        captured(step)
    assert cuda.idle and cuda.reserved == 0


def test_ops_are_named_from_outside(cuda):
    engine = SimpleNamespace(attend=scale_by_host.__wrapped__, norm=graph_op)
    program = Program([])

    def step(bucket):
        out = torch.empty_like(program.x[:bucket])
        engine.attend(engine.norm(program.x[:bucket]), out)
        return engine.norm(out), {"twice": out}

    runner = captured(step, unsafe=[(engine, "attend")])
    assert engine.attend is scale_by_host.__wrapped__
    assert all(len(c.graphs) == 2 for c in runner.graphs.values())
    program.draw(5)
    assert_same(runner.run(4)[0], step(4)[0])


@pytest.mark.parametrize("name", ["attention", "attention_out"])
@pytest.mark.parametrize("told, graphs", [({}, 2), ({"unsafe": ()}, 1)])
def test_attention_is_cut_at_unless_others_are_named(cuda, monkeypatch, name, told, graphs):
    def attend(x, out):
        out.copy_(x + 1)

    monkeypatch.setattr(ops, name, attend)
    program = Program([])

    def step(bucket):
        out = torch.empty_like(program.x[:bucket])
        getattr(ops, name)(graph_op(program.x[:bucket]), out)
        return graph_op(out), {}

    runner = captured(step, **told)
    assert all(len(c.graphs) == graphs for c in runner.graphs.values()) and getattr(ops, name) is attend
    program.draw(5)
    assert_same(runner.run(4)[0], step(4)[0])


def test_a_step_without_attention_is_one_graph(cuda, monkeypatch):
    assert all(len(c.graphs) == 1 for c in captured(Program(["graph"])).graphs.values())
    monkeypatch.delitem(sys.modules, "gkernels.ops")
    assert attention_ops() == () and all(len(c.graphs) == 1 for c in captured(Program(["graph"])).graphs.values())


def test_an_op_that_was_named_and_not_called_is_an_error(cuda):
    engine = SimpleNamespace(attend=graph_op)
    attend = engine.attend
    with pytest.raises(RuntimeError, match=r"unsafe: attend was not called through .*name the module through which the step calls it"):
        captured(lambda bucket: attend(torch.ones(bucket)), unsafe=[(engine, "attend")])
    assert cuda.idle and cuda.reserved == 0 and engine.attend is graph_op
    with pytest.raises(ValueError, match=r"unsafe: got 'atend' of .*, expected a callable there"):
        PiecewiseRunner(attend, Buckets([1]), "cuda", unsafe=[(engine, "atend")])


@pytest.mark.parametrize("later, words", [
    (lambda y: (y.repeat(2), 1), r"returned torch.int64 \[16\], expected torch.int64 \[8\] as at capture"),
    (lambda y: (y.float(), 1), r"returned torch.float32 \[8\], expected torch.int64 \[8\]"),
    (lambda y: (y, 2), r"returned 2, expected 1 as at capture, which the next graph holds; return it in a tensor"),
    (lambda y: y, r"expected \(tensor"),
    (lambda y: {"y": y}, r"expected \(tensor"),
])
def test_an_eager_op_that_returns_something_else_is_an_error(later, words):
    program, now = Program([]), [lambda y: (y + 1, 1)]
    op = eager(lambda y: now[0](y))
    runner = captured(lambda bucket: op(program.x[:bucket])[0] * 2, sizes=(SIZE,))
    assert runner.run(SIZE).tolist() == [2] * SIZE
    now[0] = later
    with pytest.raises(RuntimeError, match=words):
        runner.run(SIZE)


def test_an_eager_op_inside_another_is_part_of_it():
    program = Program([])
    outer = eager(lambda y: shift_by_host(y) + 1)
    runner = captured(lambda bucket: outer(graph_op(program.x[:bucket])))
    program.draw(2)
    assert all(len(c.parts) == 2 for c in runner.graphs.values())
    assert_same(runner.run(SIZE), outer(graph_op(program.x)))


def test_other_threads_are_not_captured(cuda):
    """An eager op that another thread calls during a capture is its own affair."""
    done = []

    def elsewhere():
        done.append(segments._capturing.get())

    def step(bucket):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert (segments._capturing.get() is not None) == (cuda.capturing is not None)
        return torch.ones(bucket)

    captured(step, sizes=(1,))
    assert done == [None] * (GraphRunner.WARM_UPS + 1)


def test_an_eager_op_on_a_side_stream_is_refused(cuda):
    def step(bucket):
        with torch.cuda.stream(torch.cuda.Stream("cuda")):
            return shift_by_host(torch.ones(bucket))

    with pytest.raises(RuntimeError, match=r"eager: shift_by_host: got a call on a side stream, expected the capturing stream"):
        captured(step)
    assert cuda.idle and cuda.reserved == 0


def test_a_step_that_goes_on_after_a_failed_eager_op_is_refused(cuda):
    """Nothing of it would be captured from there on."""
    failing = eager(lambda y: y.no_such_method())

    def step(bucket):
        with suppress(AttributeError):
            failing(torch.ones(bucket))
        return torch.ones(bucket)

    with pytest.raises(RuntimeError, match="the step went on after an eager op had failed"):
        captured(step)
    assert cuda.idle and cuda.reserved == 0


def capture_with_a_fault(cuda, runner, at, spoils, collecting):
    """Whether the fault came before the capture was done; collection must then be as it was."""
    gc.enable() if collecting else gc.disable()
    cuda.plant(at, spoils)
    try:
        runner.capture(progress=False)
    except Planted:
        return True
    finally:
        was_enabled = gc.isenabled()
        gc.enable()
        cuda.plant(None, False)
        assert was_enabled == collecting
    return False


def check_faults(cuda, kind, chosen, spoils):
    """Plants a fault at every event of a capture: afterwards none goes on, no memory is held, and eager steps and another capture work."""
    program = Program(chosen, cuda.event)
    for at in itertools.count():
        runner = kind(program, Buckets([4, SIZE]), "cuda")
        if not capture_with_a_fault(cuda, runner, at, spoils, collecting=at % 2 == 0):
            return at
        assert cuda.idle and not runner.graphs and cuda.reserved == 0 and segments._capturing.get() is None
        program.draw(at)
        assert_same(runner.run(4)[0], program(4)[0])
        runner.capture(progress=False)
        runner.eager_steps = 0
        check_replays(runner, program)
        runner.release()


@pytest.mark.parametrize("spoils", [False, True])
@pytest.mark.parametrize("kind, chosen, places", [(GraphRunner, ["graph", "write"], 30),
                                                  (PiecewiseRunner, ["graph", "eager write", "eager return", "write"], 50)])
def test_a_fault_anywhere_leaves_all_usable(cuda, kind, chosen, places, spoils):
    assert check_faults(cuda, kind, chosen, spoils) >= places


@pytest.mark.parametrize("owner, name, broken", [
    (segments, "release_failed", lambda pool: None),
    (segments.Segments, "_discard", lambda self: None),
    (GraphRunner, "release", lambda self: self.graphs.clear()),
    (gc, "enable", lambda: None),
])
def test_control_a_fault_that_is_not_cleaned_up_is_seen(cuda, monkeypatch, owner, name, broken):
    """What a failed capture leaves in the allocator, an open capture, the cached memory, and collection that stays off."""
    enable = gc.enable
    monkeypatch.setattr(owner, name, broken)
    try:
        with pytest.raises(AssertionError):
            check_faults(cuda, PiecewiseRunner, ["graph", "eager return"], spoils=True)
    finally:
        enable()
        if cuda.capturing:
            cuda.capturing.mode.__exit__(None, None, None)


SHAPES = dict(architectures=["LlamaForCausalLM"], vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=64,
              tie_word_embeddings=False, eos_token_id=0, bos_token_id=0, hidden_act="silu", torch_dtype="float32")
BATCHES = [[Row([5, 6, 7, 8], 4, [1]), Row([9], 3, [2])],
           [Row([1], 5, [1]), Row([2], 4, [2]), Row([3, 4], 2, [3], Sampling(temperature=0.9, seed=4))], [Row([7], 6, [1])]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here; tests/test_graph.py runs the model's step on the GPU")
def test_the_models_step_is_cut_at_attention():
    """Whole steps of interpreted kernels, one graph and cut ones: logits, tokens and cache as of eager steps, bit for bit."""
    config = LlamaConfig.from_dict(SHAPES)
    model, seen = Llama.build(config, random_weights(config, "cpu"), 64), {}
    for kind, options in ((None, {}), (GraphRunner, {}), (PiecewiseRunner, {"unsafe": [(ops, "attention_out")]})):
        step = Step(model, PagedCache.allocate(2, 6, 16, 1, 16, torch.float32, "cpu"), 8, 4, 32)
        if kind:
            runner = captured(step, kind, (8,), checks=(step.buffers.check_addresses,), **options)
        else:
            runner = GraphRunner(step, Buckets([8]), "cpu")
        for t in (step.cache.keys, step.cache.values):
            t.zero_()                                   # of what the warm-up wrote
        seen[kind] = []
        for rows in BATCHES:
            logits = runner.run(step.stage(rows))
            seen[kind] += [logits.clone(), step.results.clone(), step.cache.keys.clone()]
            logits.fill_(float("nan"))
            step.results.fill_(-7)
        if kind:
            assert runner.replays == 3 and all(len(c.graphs) == (3 if options else 1) for c in runner.graphs.values())
    for kind in (GraphRunner, PiecewiseRunner):
        for got, want in zip(seen[kind], seen[None], strict=True):
            assert_same(got, want)
    assert not torch.equal(seen[None][0], seen[None][3])
