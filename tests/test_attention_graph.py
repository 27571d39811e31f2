"""Attention as a captured launch: one record for any lengths, every item taken once, and the same bits from every replay and in any order.

On a GPU a graph is captured and replayed; on a CPU the recorded launches, which are what a graph holds, run again on the same memory."""


import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import reference.attention as twin
from gkernels.graph import interpreter
from gkernels.graph.launches import record
from gkernels.kernels import _attention_short, schedule
from gkernels.kernels import attention as room
from tests.close import RELATIVE_RMS, assert_close, assert_same, bits
from tests.strategies import randn

CUDA = torch.cuda.is_available()
H, K, PAGE = 4, 2, 16
REPLAYS = 10_000 if CUDA else 5
no_gpu = pytest.mark.skipif(CUDA, reason="looks at the CPU interpreter")


class Step:
    """Static tensors for T tokens and R requests of at most `longest` keys, pages of their own for each request, and one step over them."""

    def __init__(self, device, T, R, longest, programs=None, dtype=torch.float16, D=16):
        W = -(-longest // PAGE)
        N = 1 + R * W
        self.q, *self.caches = (randn(i, *shape, dtype=dtype, device=device) for i, shape in enumerate([(T, H, D), (N, PAGE, K, D), (N, PAGE, K, D)]))
        self.table = 1 + torch.randperm(R * W, generator=torch.Generator().manual_seed(0)).view(R, W).to(device, torch.int32)
        self.starts, self.lens = (torch.zeros(n, dtype=torch.int32, device=device) for n in (R + 1, R))
        self.tiling = room.tiling(T, R, H, K, D, D, dtype, device, programs=programs)
        self.plan, self.workspace = schedule.Schedule.allocate(T, R, self.tiling, device), room.Workspace.allocate(self.tiling, device)
        self.out, self.lse = torch.empty_like(self.q), torch.empty(T, H, device=device)

    def stage(self, query_lens, lens):
        """The next batch, and poison wherever it is to write."""
        self.starts.copy_(torch.tensor([0, *query_lens]).cumsum(0))
        self.lens.copy_(torch.tensor(lens))
        for t in (self.out, self.lse, self.workspace.states):
            t.fill_(float("nan"))
        self.plan.work.fill_(-123)

    def __call__(self):
        self.schedule()
        self.attend()

    def schedule(self):
        schedule.schedule_out(self.starts, self.lens, self.table, PAGE, self.caches[0].shape[0], self.tiling, self.plan)

    def attend(self):
        room.attention_out(self.q, *self.caches, self.table, self.plan.work, self.workspace, self.out, self.lse, tiling=self.tiling)

    @property
    def arguments(self):
        return self.q, *self.caches, self.starts, self.lens, self.table


def captured(step):
    """The step as a graph: what replays it, whatever stands in its tensors by then."""
    if not CUDA:
        with record() as launches:
            step()
        return lambda: [launch.again() for launch in launches]
    with torch.cuda.stream(torch.cuda.Stream()):
        step()                                                                      # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def check_other_lengths(capture, step, first, other):
    """A graph captured with one batch, replayed with another and with the first again."""
    step.stage(*first)
    replay = capture(step)
    for batch in (other, first):
        step.stage(*batch)
        replay()
        got = step.out.clone(), step.lse.clone()
        want = twin.attention(step.q.double(), *(cache.double() for cache in step.caches), step.starts, step.lens, step.table)
        for result, wide, plain in zip(got, want, twin.attention(*step.arguments), strict=True):
            assert_close(result, wide, plain)
        step.stage(*batch)
        step()
        for result, eager in zip(got, (step.out, step.lse), strict=True):
            assert_same(result, eager)


def extremes(T, R, longest):
    """All lengths 1, and all lengths as great as the capacities allow; with room for them, the tokens shared out to the requests too."""
    return ([1] * R, [1] * R), ([T // R] * R, [longest] * R)


CAPACITIES = [(2, 2, 1040, 16), (80, 2, 592, 16), pytest.param(64, 64, 9216, 16, marks=pytest.mark.gpu),
              pytest.param(4096, 8, 9216, 16, marks=pytest.mark.gpu), pytest.param(4096, 8, 9216, 64, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("grows", [True, False], ids=["shortest captured", "longest captured"])
@pytest.mark.parametrize("T, R, longest, D", CAPACITIES)
def test_a_graph_of_the_shortest_serves_the_longest(device, T, R, longest, D, grows):
    short, long = extremes(T, R, longest)
    check_other_lengths(captured, Step(device, T, R, longest, D=D), *((short, long) if grows else (long, short)))


def captured_with_its_pages(step):
    """Captures the table as wide as the batch of the moment needs it."""
    table, step.table = step.table, step.table[:, :-(-int(step.lens.max()) // PAGE)].contiguous()
    replay, kept, step.table = captured(step), step.table, table
    return lambda kept=kept: replay()


def captured_and_lost(step):
    captured(step)
    return lambda: None


@pytest.mark.parametrize("broken", [captured_with_its_pages, captured_and_lost])
def test_control_a_graph_that_kept_its_lengths_is_caught(device, broken):
    with pytest.raises(AssertionError, match="NaN in"):
        check_other_lengths(broken, Step(device, 80, 2, 592), *extremes(80, 2, 592))


def reads_of_keys(step):
    """How often the kernel loads each key: [requests, KV heads, keys]. Its first column tells, since an item loads whole rows."""
    with interpreter.accesses() as launches:
        step()
    cache, counts = step.caches[0], np.zeros(step.caches[0].numel(), np.int64)
    argument = launches[-1].arguments["k_cache_ptr"]
    for kind, *_, addresses, size in launches[-1].records:
        inside, elements = argument.holds(addresses, size)
        assert kind == "load" or not inside.any()
        np.add.at(counts, elements[inside], 1)
    pages = torch.from_numpy(counts).view(cache.shape)[..., 0]                       # [N, P, K]
    return pages[step.table.long()].flatten(1, 2).transpose(1, 2)


def demanded_reads(step, query_lens, lens):
    """The same from the definition: a short request's tile of rows takes each of its keys once, a tall one's those in sight, to whole blocks."""
    block, cut = room.config(step.q.shape[2], step.q.shape[2], step.q.dtype).BLOCK_N, step.tiling
    counts = torch.zeros(len(lens), K, step.table.shape[1] * PAGE, dtype=torch.int64)
    for r, (rows, keys) in enumerate(zip(query_lens, lens, strict=True)):
        is_tall = cut.has_tall and rows > cut.short_limit
        tile = cut.tall_rows if is_tall else cut.short_rows
        for row in range(0, rows, tile):
            end = -(-(keys - rows + min(row + tile, rows)) // block) * block if is_tall else keys
            counts[r, :, :min(end, keys)] += 1
    return counts


def check_items(step):
    """A tall request, runs of three segments and of two, an unused request, and one that is tall by a row."""
    query_lens, lens = [40, 1, 7, 3, 33], [50, 1100, 530, 0, 1033]
    step.stage(query_lens, lens)
    got, want = reads_of_keys(step), demanded_reads(step, [rows if keys else 0 for rows, keys in zip(query_lens, lens, strict=True)], lens)
    assert torch.equal(got, want), f"{int((got != want).sum())} keys are loaded more or less often than there are items that need them"


@no_gpu
@pytest.mark.parametrize("programs", [1, 7, 132])
def test_every_item_is_taken_once(device, programs):
    check_items(Step(device, 90, 5, 1104, programs))


class TakesAnItemTwice(Step):
    def schedule(self):
        super().schedule()
        tall = self.plan.work[self.tiling.sections(len(self.q), len(self.lens))[3]:]
        tall[1:] = tall[:-1].clone()
        self.plan.work[0, 0] += 1


class LosesTheLastSegment(Step):
    def schedule(self):
        super().schedule()
        runs_at, tall_at = self.tiling.sections(len(self.q), len(self.lens))[2:4]
        runs = self.plan.work[runs_at:tall_at, 9]
        runs.clamp_(max=int(runs[-1]) - 1)


@no_gpu
@pytest.mark.parametrize("broken", [TakesAnItemTwice, LosesTheLastSegment])
def test_control_an_item_taken_twice_or_never_is_caught(device, broken):
    with pytest.raises(AssertionError, match="keys are loaded more or less often"):
        check_items(broken(device, 90, 5, 1104, 7))


PREFILL = ([700, 1, 500, 300], [9000, 1100, 5000, 300]) if CUDA else ([40, 1], [50, 300])              # on Hopper in a launch of its own
RAGGED = (torch.linspace(0, 1, 64).mul(12).exp2().int().tolist() if CUDA else [1, 1100, 530])        # one row each: 1 to 4096 keys on a GPU


def check_one_pattern(run, step, batch=([1] * len(RAGGED), RAGGED)):
    """Every one of REPLAYS runs gives the bits of the first. On a CPU each takes the programs in another order, so that others arrive last."""
    step.stage(*batch)
    step()
    first, moved = (step.out.clone(), step.lse.clone()), torch.zeros((), dtype=torch.int64, device=step.out.device)
    assert not first[0].isnan().any()
    for i in range(REPLAYS):
        for t in (step.out, step.lse, step.workspace.states):
            t.fill_(float("nan"))
        run(i)
        for got, want in zip((step.out, step.lse), first, strict=True):
            moved += (bits(got) != bits(want)).any()
    assert moved == 0, f"{int(moved)} results differ from the first"


def ragged(device):
    return Step(device, len(RAGGED), len(RAGGED), -(-max(RAGGED) // PAGE) * PAGE, programs=None if CUDA else 7)


def runs_of(step, batch=([1] * len(RAGGED), RAGGED)):
    """What runs the step once more: a replay of its graph, or on a CPU the step in another order of programs."""
    if CUDA:
        step.stage(*batch)
        replay = captured(step)
        return lambda i: replay()

    def run(i):
        with interpreter.shuffled(i):
            step()
    return run


def test_every_replay_gives_one_pattern(device):
    step = ragged(device)
    check_one_pattern(runs_of(step), step)


def test_every_replay_of_prefill_gives_one_pattern(device):
    step = Step(device, *((2048, 4, 9008, None) if CUDA else (44, 2, 304, 7)), D=64 if CUDA else 16)
    check_one_pattern(runs_of(step, PREFILL), step, PREFILL)


def test_control_a_result_that_moves_once_is_caught(device):
    step = ragged(device)
    run = runs_of(step)

    def moves(i):
        run(i)
        if i == REPLAYS - 2:
            step.out[0, 0, 0] += 2**-6

    with pytest.raises(AssertionError, match="1 results differ from the first"):
        check_one_pattern(moves, step)
    with pytest.raises(AssertionError, match="results differ from the first"):
        check_one_pattern(lambda i: None, step)


@no_gpu
def test_shared_states_are_handed_over_in_order(device):
    """No program reads a state that another may still be writing."""
    step = ragged(device)
    step.stage([1] * len(RAGGED), RAGGED)
    with interpreter.accesses():
        step()


@triton.jit
def _count_in_relaxed(counter_ptr, count, total):
    is_last = tl.atomic_add(counter_ptr, count, sem="relaxed") + count == total
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@no_gpu
def test_control_a_count_that_orders_nothing_is_caught(device, monkeypatch):
    monkeypatch.setattr(_attention_short, "count_in", _count_in_relaxed)
    with pytest.raises(interpreter.Race, match="race on element"):
        test_shared_states_are_handed_over_in_order(device)


def check_error(step, out):
    """Relative RMS against float64: at most a rounding and a little, and at most twice that of plain PyTorch."""
    want = twin.attention(step.q.double(), *(cache.double() for cache in step.caches), step.starts, step.lens, step.table)[0]
    rms = lambda t: ((t.double() - want).norm() / want.norm()).item()
    assert rms(out) <= RELATIVE_RMS[out.dtype] and rms(out) <= 2 * rms(twin.attention(*step.arguments)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_error_is_within_its_bounds(device, dtype):
    step = Step(device, 21, 2, 304, dtype=dtype)
    step.stage([20, 1], [150, 300])
    step()
    check_error(step, step.out)
    with pytest.raises(AssertionError):                                              # control: one rounding more than it may take
        check_error(step, step.out.to(torch.float8_e4m3fn).to(dtype))
    step.stage([20, 1], [151, 301])
    step()
    step.lens -= 1
    with pytest.raises(AssertionError):                                              # control: a key too many
        check_error(step, step.out)
