"""Loop: the turns of a launch are eager steps, tokens and cache slots alike; it ends when all rows have, or at the limit of the launch."""

import itertools
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkernels.graph import Buckets, Loop, conditional
from gkernels.model.cache import PagedCache
from gkernels.model.sampling import Sampling
from gkernels.model.step import Row, Step
from tests.close import assert_same
from tests.strategies import seeds
from tests.test_engine import MAX_LEN, UNLUCKY, VOCAB, build
from tests.test_graph import eager_memory, reserved, traps
from tests.test_piecewise import capture_with_a_fault

CUDA = torch.cuda.is_available()
on_a_stand_in = pytest.mark.skipif(CUDA, reason="a stand-in for CUDA, where the same runs on a GPU")


# Any callable


class Rows:
    """A step over rows that have some turns to go: a turn adds to the live ones, and counts those that go on."""

    def __init__(self, device, event=lambda: None, places=4):
        self.event, new = event, lambda n: torch.zeros(n, dtype=torch.int32, device=device)
        self.todo, self.sums, self.turns, self.left, self.running = new(places), new(places), new(1), new(1), new(1)

    def __call__(self, bucket):
        self.event()
        todo, sums = self.todo[:bucket], self.sums[:bucket]
        live = (todo > 0).to(torch.int32)
        sums += live * todo * todo
        todo -= live
        self.turns += 1
        self.event()
        self.running.copy_((todo > 0).sum(0, keepdim=True))
        return sums * 2

    def stage(self, todo, limit):
        for t in (self.todo, self.sums, self.turns):
            t.zero_()
        self.todo[:len(todo)] = torch.tensor(todo, dtype=torch.int32)
        self.left.fill_(limit)
        self.running.fill_(sum(n > 0 for n in todo))


def loop_of(rows, device, kind=Loop, steps=1):
    return kind(rows, rows.left, rows.running, Buckets([1, 4]), device, steps=steps)


def check_turns(loop, rows, todo, limit):
    """As many calls as the longest row needs, or as the limit allows, and up to steps - 1 more within the limit; every row as far as it is to go, and
    no further, however many calls a turn makes."""
    rows.stage(todo, limit)
    loop.run(len(todo))
    needed = min(limit, max(todo))
    calls = min(limit, -(-needed // loop.steps) * loop.steps) if needed <= limit // loop.steps * loop.steps else needed
    assert (int(rows.turns), int(rows.left), int(rows.running)) == (calls, limit - calls, sum(n > needed for n in todo)), "another number of turns"
    squares = lambda n: sum((n - i) ** 2 for i in range(min(n, needed)))
    assert rows.sums.tolist() == [*map(squares, todo), *[0] * (4 - len(todo))], "another row"


todos, limits, turn_steps = st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 12), st.integers(1, 4)


@given(todos, todos, limits, turn_steps)
def test_turns_end_with_the_rows_or_at_the_limit(device, first, todo, limit, steps):
    """On a GPU, of a graph that was captured while other rows were staged."""
    rows = Rows(device)
    loop = loop_of(rows, device, steps=steps)
    rows.stage(first, 3)
    loop.capture(progress=False)
    check_turns(loop, rows, todo, limit)
    check_turns(loop, rows, todo[::-1], limit)
    assert (loop.eager_steps, loop.replays) == ((0, 2) if CUDA else (2, 0)) and loop.why == ""
    assert loop.path == ("WHILE loops on the device (2 buckets)" if CUDA else "eager on the CPU interpreter")


class Restless(Rows):
    """Never says that its rows have ended."""

    def __call__(self, bucket):
        outputs = super().__call__(bucket)
        self.running.fill_(1)
        return outputs


class Stuck(Rows):
    """Forgets to advance."""

    def __call__(self, bucket):
        todo = self.todo.clone()
        outputs = super().__call__(bucket)
        self.todo.copy_(todo)
        return outputs


@pytest.mark.parametrize("kind, words", [(Restless, "another number of turns"), (Stuck, "another number of turns|another row")])
@pytest.mark.parametrize("todo, limit", [([3, 1], 7), ([3, 2], 2)])
def test_a_step_that_does_not_advance_is_caught_and_ends_at_the_limit(device, kind, words, todo, limit):
    rows = kind(device)
    loop = loop_of(rows, device)
    loop.capture(progress=False)
    if kind is Stuck or limit > max(todo):
        with pytest.raises(AssertionError, match=words):
            check_turns(loop, rows, todo, limit)
    else:
        rows.stage(todo, limit)
        loop.run(2)
    assert int(rows.turns) == limit and int(rows.left) == 0


@pytest.mark.parametrize("source, holds, todo, limit, steps", [
    (b"*left >= steps", lambda loop: loop.left > 0, [2], 5, 1), (b"*running > 0 && *left > -9", lambda loop: loop.running > 0, [5], 2, 1),
    (b"*left > 0 && *running > 0", lambda loop: loop.left > 0 and loop.running > 0, [9], 3, 2)], ids=["left", "running", "past the limit"])
def test_a_condition_that_forgets_a_part_is_caught(device, monkeypatch, source, holds, todo, limit, steps):
    class Broken(Loop):
        def call(self, bucket):
            while holds(self):
                for _ in range(steps):
                    self.step(bucket)
                self.left -= steps

    whole = b"*left >= steps && *running > 0"
    assert whole in conditional.SOURCE
    monkeypatch.setattr(conditional, "SOURCE", conditional.SOURCE.replace(whole, source))
    conditional.module.cache_clear()
    try:
        rows = Rows(device)
        loop = loop_of(rows, device, Broken, steps)
        loop.capture(progress=False)
        with pytest.raises(AssertionError, match="another number of turns"):
            check_turns(loop, rows, todo, limit)
    finally:
        conditional.module.cache_clear()


class Restarting(Rows):
    """Makes something of a call that comes after the last row has ended."""

    def __call__(self, bucket):
        self.sums[:bucket] += (self.todo.sum() == 0).to(torch.int32)
        return super().__call__(bucket)


@pytest.mark.parametrize("steps, seen", [(1, False), (2, True)])
def test_a_call_past_the_end_that_does_harm_is_caught(device, steps, seen):
    rows = Restarting(device)
    loop = loop_of(rows, device, steps=steps)
    loop.capture(progress=False)
    if not seen:
        return check_turns(loop, rows, [3, 1], 6)
    with pytest.raises(AssertionError, match="another row"):
        check_turns(loop, rows, [3, 1], 6)


@on_a_stand_in
@given(todos, todos, limits, turn_steps)
def test_turns_of_a_graph(cuda, first, todo, limit, steps):
    rows = Rows("cpu")
    loop = loop_of(rows, "cuda", steps=steps)
    rows.stage(first, 3)
    loop.capture(progress=False)
    check_turns(loop, rows, todo, limit)
    rows.stage([2, 5], 3)
    loop.graphs[4].outputs.fill_(-7)
    assert loop.run(4)[:2].tolist() == [2 * (4 + 1), 2 * (25 + 16 + 9)] and (loop.eager_steps, loop.replays) == (0, 2)
    assert loop.path == "WHILE loops on the device (2 buckets)" and cuda.idle
    loop.release()
    assert cuda.reserved == 0 and not cuda.driver.executables
    check_turns(loop, rows, todo, limit)


@on_a_stand_in
@pytest.mark.parametrize("spoils", [False, True])
def test_a_fault_anywhere_leaves_all_usable(cuda, spoils):
    """At every event of a capture, the making of the WHILE node among them."""
    for at in itertools.count():
        rows = Rows("cpu", cuda.event)
        loop = loop_of(rows, "cuda", steps=2)
        if not capture_with_a_fault(cuda, loop, at, spoils, collecting=at % 2 == 0):
            break
        assert cuda.idle and not loop.graphs and cuda.reserved == 0 and not cuda.driver.executables
        check_turns(loop, rows, [4, 1], 3)
        loop.capture(progress=False)
        check_turns(loop, rows, [4, 1], 3)
        loop.release()
    assert at > 45


@pytest.mark.parametrize("bad", [torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), torch.zeros((), dtype=torch.int32)])
def test_bad_counters_are_named(bad):
    rows = Rows("cpu")
    with pytest.raises(ValueError, match=r"Loop: left: got torch.int\d\d \[.*\], expected torch.int32 \[1\]"):
        Loop(rows, bad, rows.running, Buckets([1]), "cpu")
    with pytest.raises(ValueError, match="Loop: running: got"):
        Loop(rows, rows.left, bad, Buckets([1]), "cpu")
    with pytest.raises(ValueError, match="Loop: steps: got 0, expected at least 1"):
        loop_of(rows, "cpu", steps=0)


def bindings(monkeypatch, version, nvrtc=lambda: (0, 12, 4)):
    """Puts a driver of that version, and NVRTC, in the place of cuda.bindings; None: nothing."""
    package = None if version is None else ModuleType("cuda.bindings")
    if package:
        package.driver, package.nvrtc = SimpleNamespace(cuDriverGetVersion=lambda: (0, version)), SimpleNamespace(nvrtcVersion=nvrtc)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)


def lost():
    raise RuntimeError("no libnvrtc.so")


@pytest.mark.parametrize("there, why", [((None,), r"cuda.bindings, which is not installed; pip install 'gkernels\[loop\]'"),
                                        ((12030,), "the driver is of CUDA 12.3, WHILE nodes came with 12.4; update it"),
                                        ((12040, lost), r"which cuda.bindings does not find \(no libnvrtc.so\); pip install nvidia-cuda-nvrtc"),
                                        ((12040,), ""), ((13000,), "")])
def test_why_there_is_no_loop(monkeypatch, there, why):
    bindings(monkeypatch, *there)
    rows = Rows("cpu")
    loop = loop_of(rows, "cuda")
    if why:
        with pytest.raises(RuntimeError, match=f"Loop: capture: .*{why}, or capture a Burst"):
            loop.capture()
        assert not loop.graphs and loop_of(rows, "cpu").why == ""
        check_turns(loop, rows, [3, 1], 5)
    else:
        assert loop.why == ""


# The model's step


PLACES, PAGE, PAGES, DEPTH = 3, 4, 40, 4
STATE = ("token_ids", "seq_lens", "generated", "ended", "running")


def build_step():
    """A Step of a tiny model over a cache that is full of numbers."""
    device = torch.device("cuda" if CUDA else "cpu")
    m = build(device)
    c = m.config
    cache = PagedCache.allocate(c.num_layers, PAGES, PAGE, c.num_kv_heads, c.head_dim, torch.float32, device)
    for seed, t in enumerate((cache.keys, cache.values)):
        t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)))
    return Step(m, cache, PLACES, PLACES, MAX_LEN, DEPTH)


@pytest.fixture(scope="module")
def step():
    return build_step()


def model_loop(step, call=None, steps=1):
    b = step.buffers
    loop = Loop(call or step, b["turns"], b["running"], Buckets([1, PLACES]), step.device, (b.check_addresses,), steps)
    with eager_memory():
        loop.capture(progress=False)
    return loop


@pytest.fixture(scope="module", params=[1, 2, 3])
def loop(step, request):
    return model_loop(step, steps=request.param)


def random_rows(seed):
    """Decoding rows anywhere, greedy and drawn. They end by one of many stop tokens, by their number, by length, at once by an error, or not yet."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=random))
    pages, rows = (torch.randperm(PAGES - 1, generator=random) + 1).tolist(), []
    for slot in range(draw(1, PLACES)):
        length, generated = draw(1, 30), draw(0, 3)
        options = Sampling(generated + draw(1, 8), [0.0, 0.9][draw(0, 1)], draw(0, 30), seed=draw(0, 99), min_tokens=draw(0, 5))
        ends = tuple({draw(0, VOCAB - 1) for _ in range(draw(0, 16))})
        own = [pages.pop() for _ in range(-(-(length + DEPTH) // PAGE))]
        rows.append(Row([draw(14, 96) if draw(0, 9) else UNLUCKY], length, own, options, True, generated, length + draw(1, 8), ends, slot))
    return rows


def run(step, rows, limit, launch):
    """What a launch of many turns leaves behind, from one and the same start; the cache is put back."""
    keys, values = step.cache.keys.clone(), step.cache.values.clone()
    for row in rows:
        step.enter(row.slot, [5], [])
    launch(step.stage(rows, limit))
    lines, flags = step.read_ring(PLACES if len(rows) > 1 else 1, len(rows))
    left = dict(keys=step.cache.keys.clone(), values=step.cache.values.clone(), counts=step.counts.clone(),
                **{name: step.buffers[name].clone() for name in STATE})
    moved = [(left[name] != t).any(-1).any(-1).any(0) for name, t in (("keys", keys), ("values", values))]       # [PAGES, PAGE]
    step.cache.keys.copy_(keys)
    step.cache.values.copy_(values)
    return lines, flags, left, moved[0] | moved[1]


def one_by_one(step, loop, limit):
    """Launches what a Loop turns, step by step from the host, and none past the end of the last row."""
    def launch(n):
        for _ in range(limit):
            if step.buffers["seq_lens"].any():
                step(loop.capacity(n))
    return launch


def check_model(step, loop, seed, limit):
    rows = random_rows(seed)
    want_lines, want_flags, want, _ = run(step, rows, limit, one_by_one(step, loop, limit))
    lines, flags, got, moved = run(step, rows, limit, loop.run)
    assert lines == want_lines and len(lines) <= limit and flags == want_flags
    for name in want:
        assert_same(got[name], want[name])
    may_move = torch.zeros_like(moved)
    for i, row in enumerate(rows):
        turns = sum(line[i] >= 0 for line in lines) + bool(flags[i])
        for at in range(row.seq_len - 1, row.seq_len - 1 + turns):
            may_move[row.pages[at // PAGE], at % PAGE] = True
    assert not (moved & ~may_move).any(), "a slot of no turn's"


@settings(max_examples=60 if CUDA else 5)
@given(seeds, st.integers(1, DEPTH))
def test_turns_equal_eager_steps(step, loop, seed, limit):
    check_model(step, loop, seed, limit)


def test_the_batches_end_in_many_ways(step, loop):
    """So the property above meets rows that end at once, amid the turns and not at all, and some with an error."""
    numbers, errors = set(), 0
    for seed in range(4):
        rows = random_rows(seed)
        lines, flags, _, _ = run(step, rows, DEPTH, one_by_one(step, loop, DEPTH))
        numbers |= {sum(line[i] >= 0 for line in lines) for i in range(len(rows))}
        errors += sum(map(bool, flags))
    assert {1, DEPTH} < numbers and errors, (numbers, errors)


def twice(step):
    return lambda bucket: (step(bucket), step(bucket))


def forgetting(step):
    def call(bucket):
        token_ids = step.buffers["token_ids"].clone()
        step(bucket)
        step.buffers["token_ids"].copy_(token_ids)
    return call


def reviving(step):
    def call(bucket):
        step(bucket)
        step.buffers["seq_lens"][:1].clamp_(min=1)
    return call


@pytest.mark.parametrize("broken", [twice, forgetting, reviving])
def test_a_broken_turn_is_caught(step, broken):
    loop = model_loop(step, broken(step))
    with pytest.raises(AssertionError):
        for seed in range(3):
            check_model(step, loop, seed, DEPTH)


LONG = MAX_LEN - 8     # turns of a launch that no row ends


def long_rows():
    return [Row([20 + i], 4, list(range(1 + 12 * i, 13 + 12 * i)), Sampling(10**6, i / 2, seed=i), True, 0, MAX_LEN + 1, (), i)
            for i in range(PLACES)]


@pytest.fixture(scope="module")
def long_step(step):
    return Step(step.model, step.cache, PLACES, PLACES, MAX_LEN, LONG)


@pytest.mark.gpu
def test_a_hundred_thousand_turns_leave_memory_as_it_was(long_step):
    """To the byte: torch's, and the device's where no other test runs on it at the same time."""
    loop, turns, alone = model_loop(long_step), 0, "PYTEST_XDIST_WORKER" not in os.environ
    figures = lambda: (torch.cuda.mem_get_info() if alone else None, torch.cuda.memory_stats())
    seen = set()
    while turns < 100_000 + LONG:
        if turns == LONG:
            torch.cuda.synchronize()
            before = figures()
        loop.run(long_step.stage(long_rows(), LONG))
        lines, flags = long_step.read_ring(PLACES, PLACES)
        assert len(lines) == LONG and flags == [0] * PLACES and all(token >= 0 for line in lines for token in line)
        seen.add(str(lines))
        turns += len(lines)
    torch.cuda.synchronize()
    assert figures() == before and len(seen) == 1


@pytest.mark.gpu
def test_a_launch_waits_once_for_its_tokens(long_step):
    """And for nothing else; it compiles and allocates nothing."""
    loop = model_loop(long_step)
    loop.run(long_step.stage(long_rows(), LONG))
    long_step.read_ring(PLACES, PLACES)
    with traps() as waits:
        for _ in range(5):
            loop.run(long_step.stage(long_rows(), LONG))
            long_step.read_ring(PLACES, PLACES)
    assert waits == {"event": 5}


@pytest.mark.gpu
@pytest.mark.parametrize("at", range(5))
def test_a_failed_capture_leaves_all_usable(step, monkeypatch, at):
    """In the step of the first bucket and of the second, and while either's WHILE node is made."""
    made, add, calls = 0, conditional.Nodes.kernel, 0

    def failing_add(*arguments):
        nonlocal made
        made += 1
        if made == at:
            raise RuntimeError("planted")
        return add(*arguments)

    def failing(bucket):
        nonlocal calls
        calls += 1
        out = step(bucket)
        if at == 0 and calls == 6:
            raise RuntimeError("planted")
        return out

    step.plan(PLACES), step.plan(1)
    before = reserved()
    monkeypatch.setattr(conditional.Nodes, "kernel", failing_add)
    with pytest.raises(RuntimeError, match="planted"):
        model_loop(step, failing)
    monkeypatch.undo()
    assert reserved() <= before, "a failed capture keeps its pool"
    check_model(step, model_loop(step), 1, DEPTH)


@pytest.mark.gpu
def test_counters_on_the_host_are_refused():
    rows = Rows("cuda")
    loop = Loop(rows, torch.zeros(1, dtype=torch.int32), rows.running, Buckets([1]), "cuda")
    with pytest.raises(ValueError, match="Loop: left, running: got tensors on cpu, cuda:0, expected them on the device"):
        loop.capture(progress=False)
    assert not loop.graphs
