"""ChoosingRunner: whatever the live number, a launch runs the one bucket that a GraphRunner would; and runners that share executables."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkernels.graph import Buckets, ChoosingRunner, GraphRunner, PiecewiseRunner, conditional, eager
from tests.close import assert_same
from tests.test_graph import eager_memory
from tests.test_loop import bindings, lost
from tests.test_piecewise import capture_with_a_fault

CUDA = torch.cuda.is_available()
on_a_stand_in = pytest.mark.skipif(CUDA, reason="a stand-in for CUDA, where the same runs on a GPU")
MOST = 12
sizes = st.lists(st.integers(1, MOST), min_size=1, max_size=5)


class Sums:
    """A step over live numbers: doubles them, and says which bucket did. Buckets that are `odd` take an operator more."""

    def __init__(self, device, event=lambda: None, odd=()):
        self.event, self.odd, self.device = event, odd, device
        self.x, self.live, self.bucket = (torch.zeros(n, dtype=torch.int32, device=device) for n in (MOST, 1, 1))
        self.calls = []

    def __call__(self, bucket):
        self.event()
        self.calls.append(bucket)
        y = self.x[:bucket] * 2
        self.bucket.fill_(bucket)
        if bucket in self.odd:
            y = y + 0
        self.event()
        return y

    def stage(self, n, seed):
        self.x.zero_()
        self.x[:n] = torch.arange(1, n + 1, dtype=torch.int32) * (seed + 1)
        self.live.fill_(n)
        self.bucket.fill_(-7)


def check_choice(runner, step, n, seed, told):
    """The bucket that the host would choose ran, it alone, and its outputs are those of a call."""
    step.stage(max(0, min(n, MOST)), seed)
    step.live.fill_(n)
    for captured in runner.graphs.values():
        captured.outputs.fill_(-7)
    outputs = runner.run(n) if told else runner.run()
    want = runner.buckets.pad(n) if runner.buckets.covers(n) else 0
    assert int(runner.taken) == want and int(step.bucket) == (want or -7), "another bucket"
    for bucket, captured in runner.graphs.items():
        assert_same(captured.outputs, step.x[:bucket] * 2 if bucket == want else torch.full_like(captured.outputs, -7))
    if want and (told or not runner.graphs):
        assert_same(outputs, step.x[:want] * 2)
    else:
        assert outputs is None


def live_numbers(buckets):
    """Each bucket's own size and what is next to it; none, fewer than none, too many."""
    return sorted({n for size in (0, -2**31, 2**31 - 2, *buckets) for n in (size, size + 1)})


def apart(step):
    """Every bucket's results stay, as they lie in memory that no other bucket has."""
    places = {n: torch.zeros(n, dtype=torch.int32, device=step.device) for n in range(1, MOST + 1)}
    return lambda bucket: places[bucket].copy_(step(bucket))


def choosing_of(chosen, device, kind=ChoosingRunner, **options):
    step = Sums(device)
    return step, kind(apart(step), step.live, Buckets(chosen), device, **options)


@given(sizes)
def test_the_device_takes_the_bucket_that_the_host_would(device, chosen):
    step, runner = choosing_of(chosen, device)
    step.stage(1, 0)
    runner.capture(progress=False)
    for seed, n in enumerate(live_numbers(runner.buckets)):
        for told in {False, runner.buckets.covers(n)}:
            check_choice(runner, step, n, seed, told)
    assert runner.path == (f"one graph that chooses on the device ({len(runner.buckets)} buckets)" if CUDA else "eager on the CPU interpreter")


@on_a_stand_in
@given(sizes)
def test_one_graph_takes_the_bucket_that_the_host_would(cuda, chosen):
    step = Sums("cpu")
    runner = ChoosingRunner(apart(step), step.live, Buckets(chosen), "cuda")
    step.stage(1, 0)
    runner.capture(progress=False)
    called = len(step.calls)
    for seed, n in enumerate(live_numbers(runner.buckets)):
        for told in {False, runner.buckets.covers(n)}:
            check_choice(runner, step, n, seed, told)
    assert len(step.calls) == called and runner.eager_steps == 0 and len(cuda.driver.executables) == 1
    runner.release()
    assert cuda.idle and cuda.reserved == 0 and not cuda.driver.executables
    check_choice(runner, step, 1, 0, told=False)
    with pytest.raises(RuntimeError, match=r"ChoosingRunner: replay: got no graphs, expected capture\(\) before it"):
        runner.replay()


def test_what_no_bucket_covers_runs_eagerly_where_the_host_knows_it(device):
    step = Sums(device)
    runner = ChoosingRunner(step, step.live, Buckets([1, 4]), device)
    runner.capture(progress=False)
    step.stage(7, 1)
    assert_same(runner.run(7), step.x[:7] * 2)
    assert int(step.bucket) == 7 and (runner.replays, runner.eager_steps) == (0, 1)


BROKEN = {b"sizes[threadIdx.x] < n": b"sizes[threadIdx.x] <= n", b"n > 0 && first < count": b"first < count"}


@pytest.mark.skipif(not CUDA, reason="the kernel that chooses is compiled for a GPU alone")
@pytest.mark.parametrize("source", BROKEN)
def test_a_kernel_that_chooses_otherwise_is_caught(monkeypatch, device, source):
    assert source in conditional.SOURCE
    monkeypatch.setattr(conditional, "SOURCE", conditional.SOURCE.replace(source, BROKEN[source]))
    conditional.module.cache_clear()
    try:
        step, runner = choosing_of([2, 5], device)
        runner.capture(progress=False)
        with pytest.raises(AssertionError):
            for n in live_numbers(runner.buckets):
                check_choice(runner, step, n, 0, told=False)
    finally:
        conditional.module.cache_clear()



def test_a_runner_that_chooses_otherwise_is_caught(device):
    """And so is one that runs what it is told, not what is live."""
    class Told(ChoosingRunner):
        def run(self, n=None):
            outputs = super().run(n)
            self.taken.fill_(self.buckets.sizes[-1])
            return outputs
    step, runner = choosing_of([2, 5], device, Told)
    runner.capture(progress=False)
    with pytest.raises(AssertionError, match="another bucket"):
        check_choice(runner, step, 1, 0, told=True)


@on_a_stand_in
@pytest.mark.parametrize("spoils", [False, True])
def test_a_fault_anywhere_leaves_all_usable(cuda, spoils):
    for at in itertools.count():
        step = Sums("cpu", cuda.event)
        runner = ChoosingRunner(apart(step), step.live, Buckets([2, 5]), "cuda")
        if not capture_with_a_fault(cuda, runner, at, spoils, collecting=at % 2 == 0):
            break
        assert cuda.idle and not runner.graphs and runner.switch is None and cuda.reserved == 0 and not cuda.driver.executables
        check_choice(runner, step, 3, at, told=True)
        runner.capture(progress=False)
        check_choice(runner, step, 3, at, told=True)
        runner.release()
    assert at > 30


@pytest.mark.parametrize("bad", [torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)])
def test_a_bad_live_number_is_named(bad):
    with pytest.raises(ValueError, match=r"ChoosingRunner: live: got torch.int\d\d \[.*\], expected torch.int32 \[1\]"):
        ChoosingRunner(Sums("cpu"), bad, Buckets([1]), "cpu")


@on_a_stand_in
def test_too_many_buckets_are_named(cuda):
    step = Sums("cpu")
    runner = ChoosingRunner(lambda bucket: step.bucket.fill_(bucket), step.live, Buckets(range(1, conditional.MOST_BODIES + 2)), "cuda")
    with pytest.raises(ValueError, match="ChoosingRunner: buckets: got 1025, expected at most 1024"):
        runner.capture(progress=False)
    assert not runner.graphs and cuda.idle


@pytest.mark.parametrize("there, why", [
    ((None,), r"SWITCH nodes are made through cuda.bindings, which is not installed; pip install 'gkernels\[loop\]'"),
    ((12060,), "the driver is of CUDA 12.6, SWITCH nodes came with 12.8; update it"),
    ((12080, lost), r"SWITCH nodes need NVRTC, .*; pip install nvidia-cuda-nvrtc"), ((12080,), ""), ((13000,), "")])
def test_why_nothing_chooses(monkeypatch, there, why):
    bindings(monkeypatch, *there)
    step = Sums("cpu")
    runner = ChoosingRunner(apart(step), step.live, Buckets([2, 5]), "cuda")
    if why:
        with pytest.raises(RuntimeError, match=f"ChoosingRunner: capture: {why}, or capture a GraphRunner"):
            runner.capture()
        assert not runner.graphs and choosing_of([2], "cpu")[1].why == ""
        check_choice(runner, step, 3, 0, told=False)
    else:
        assert runner.why == ""


@pytest.mark.gpu
def test_numbers_on_the_host_are_refused():
    step = Sums("cpu")
    runner = ChoosingRunner(lambda bucket: None, step.live, Buckets([1]), "cuda")
    with eager_memory(), pytest.raises(ValueError, match="ChoosingRunner: live, sizes, taken: got tensors on cpu, cpu, cpu, expected"):
        runner.capture(progress=False)


# Shared executables


@eager
def host_op(y):
    return y + 0


def in_pieces(step):
    return lambda bucket: host_op(step(bucket)) * 1


def check_shared(runner, step, order):
    for seed, n in enumerate(order):
        step.stage(n, seed)
        runner.graphs[runner.buckets.pad(n)].outputs.fill_(-7)
        assert_same(runner.replay(n)[:n], step.x[:n] * 2)
        assert int(step.bucket) == runner.buckets.pad(n), "another bucket's graph"


ORDER = (MOST, 1, 1, 5, 3, 5, MOST, 2)


def sharing(device, event=lambda: None, kind=GraphRunner, odd=(5,)):
    step = Sums(device, event, odd)
    call = step if kind is GraphRunner else in_pieces(step)
    return step, kind(call, Buckets([1, 3, 5, MOST]), "cuda", share=True)


@pytest.mark.parametrize("kind, executables", [(GraphRunner, 2), (PiecewiseRunner, 3)])
def test_buckets_alike_take_turns_in_one_executable(request, device, kind, executables):
    """That of 5 has a node more, so one of its own; in pieces, the part behind the eager op is the same for all."""
    cuda = None if CUDA else request.getfixturevalue("cuda")
    step, runner = sharing(device, kind=kind)
    with eager_memory():
        runner.capture(progress=False)
    assert len(runner.executables) == executables and f", which share {executables} executables" in runner.report()
    check_shared(runner, step, ORDER)
    if cuda:
        assert len(cuda.driver.executables) == executables
        before = cuda.driver.updates
        check_shared(runner, step, (2, 2, 3, 2))
        assert cuda.driver.updates == before, "updated for the bucket that it held"
        runner.release()
        assert not cuda.driver.executables and cuda.reserved == 0 and cuda.idle
    else:
        runner.release()
    assert not runner.executables and "share" not in runner.report()


def test_an_executable_that_is_not_updated_is_seen(request, device, monkeypatch):
    if not CUDA:
        request.getfixturevalue("cuda")
    step, runner = sharing(device)
    with eager_memory():
        runner.capture(progress=False)
    for turns in runner.executables:
        monkeypatch.setattr(turns, "take", lambda graph: True)
    with pytest.raises(AssertionError):
        check_shared(runner, step, ORDER)


def test_a_refused_update_is_an_error(request, device, monkeypatch):
    if not CUDA:
        request.getfixturevalue("cuda")
    _, runner = sharing(device)
    with eager_memory():
        runner.capture(progress=False)
    runner.replay(1)
    for turns in runner.executables:
        monkeypatch.setattr(turns.executable, "update", lambda graph: False)
    runner.replay(1)
    for _ in range(2):                                       # nor is it taken for what it held
        with pytest.raises(RuntimeError, match="GraphRunner: share: the driver refuses a graph that it took at capture"):
            runner.replay(3)


@on_a_stand_in
@pytest.mark.parametrize("spoils", [False, True])
def test_a_fault_while_executables_are_shared_leaves_all_usable(cuda, spoils):
    for at in itertools.count():
        step, runner = sharing("cpu", cuda.event)
        if not capture_with_a_fault(cuda, runner, at, spoils, collecting=at % 2 == 0):
            break
        assert cuda.idle and not runner.graphs and not runner.executables and cuda.reserved == 0 and not cuda.driver.executables
        runner.capture(progress=False)
        check_shared(runner, step, (1, 5))
        runner.release()
    assert at > 40
