"""Schedule: one small launch a step turns the host's three tensors into everything that the other kernels ask of a batch.

query_start_loc [R + 1], seq_lens [R], block_table [R, W] (all int32) -> `Schedule`: per token its position, cache slot and request; per
request the row of its last token and a status; the number of live tokens; and attention's work list.
It serves every layer of the step, and it is where the data of a batch is checked: a request whose lengths or pages make no sense is
flagged in `status`, gets no cache slots, and is marked in the work list so that attention answers NaN; other requests go on unharmed.
Graph-safe: R + 1 programs; all else is read from device memory. Pads are filled here: position 0, slot -1, request -1.

The work list, int32 [rows, RECORD], in sections whose places follow from the capacities (`sections`):
  header  number of tall items, of short requests, of fills; segments a run; whether spans are tall items of their own; number of runs, and of
          programs that begin with runs while others take tall items, or of those that leave tall items at once where these have a launch of their own
  fills   token ranges that attention only fills: pads and unused requests with zeros, bad lengths with NaN
  short   the requests of few rows. Their segments, counted through request, KV head, tile and segment, are the ordinals that runs cut
  runs    for each run a copy of the short request that it begins in, its index, and the ordinal; a program streams up to the next run's ordinal
  tall    query tiles of the requests of many rows, those with most keys first, whole or one item a span
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from ._overlap import overlap, wait_for_node_before

BAD_LENGTH, BAD_PAGE = 1, 2   # bits of status; sampling adds its own
MAX_R = 4096                  # every program holds one vector of all requests
RECORD = 16                   # int32 a record, 64 bytes
RUN_SPANS = 16                # states of whole spans that a run may leave


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b)


@triton.jit
def _pick(values, mine):
    return tl.sum(tl.where(mine, values, 0))


@triton.jit(do_not_specialize=["T", "R", "W", "N", "left", "programs", "tall_programs", "num_runs", "tall_slots", "fills_at", "short_at", "runs_at",
                                "tall_at", "stride_br"],
            do_not_specialize_on_alignment=["num_tokens_ptr"])
def _schedule_kernel(
    query_start_loc_ptr,    # [R + 1]
    seq_lens_ptr,           # [R]
    block_table_ptr,        # [R, W]
    positions_ptr,          # [T]
    slot_mapping_ptr,       # [T] int64
    token_to_request_ptr,   # [T]
    last_token_ptr,         # [R]
    num_tokens_ptr,         # [1]
    work_ptr,               # [rows, RECORD]
    status_ptr,             # [R]
    stride_br,
    T, R, W, N, left, programs, tall_programs, num_runs, tall_slots, fills_at, short_at, runs_at, tall_at,
    P: tl.constexpr, K: tl.constexpr, SHORT_ROWS: tl.constexpr, TALL_ROWS: tl.constexpr, SHORT_LIMIT: tl.constexpr, SEGMENT: tl.constexpr,
    SPAN: tl.constexpr, RECORD: tl.constexpr, RUN_SPANS: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_TALL: tl.constexpr,
    APART: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    r = tl.program_id(0)
    offs_r, offs_t = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T)
    is_request = offs_r < R
    # Starting at 0, the running maximum makes any junk in query_start_loc a set of ranges that tile [0, num_tokens) without overlap.
    raw_start = tl.load(query_start_loc_ptr + offs_r, is_request, other=0)                          # [BLOCK_R]
    raw_end = tl.load(query_start_loc_ptr + 1 + offs_r, is_request, other=0)
    start = tl.associative_scan(tl.where(offs_r == 0, 0, tl.minimum(tl.maximum(raw_start, 0), T)), 0, _greater)
    end = tl.maximum(start, tl.minimum(tl.maximum(raw_end, 0), T))
    lens = tl.load(seq_lens_ptr + offs_r, is_request, other=0)
    query_lens = tl.where(is_request, end - start, 0)
    num_tokens = tl.max(tl.where(is_request, end, 0))
    used = is_request & (lens != 0)
    straight = (raw_start == start) & (raw_end == end)
    fits = straight & (lens >= (query_lens if IS_CAUSAL else 0)) & (lens.to(tl.int64) <= W.to(tl.int64) * P)
    good = used & fits

    # attention's share of every request: which list, how many ordinals or items, and what comes before
    works = good & (query_lens > 0)
    # Of several tiles of short rows each reads all keys, a tall one reads them once; but short ones are cut finer. So where tall tiles are enough for
    # all programs, a request that would be several short tiles is tall.
    is_many = tl.sum((works & (query_lens > SHORT_ROWS)).to(tl.int32)) * K >= programs
    is_tall = works & (query_lens > tl.where(is_many, SHORT_ROWS, SHORT_LIMIT)) & HAS_TALL
    is_short = works & (is_tall == 0)
    first_key = tl.maximum(lens - query_lens - left, 0) if HAS_LEFT else tl.zeros((BLOCK_R,), tl.int32)
    first_segment = first_key // SEGMENT
    num_segments = tl.cdiv(lens, SEGMENT) - first_segment
    ordinals = tl.where(is_short, tl.cdiv(query_lens, SHORT_ROWS) * num_segments * K, 0)
    tiles = tl.where(is_tall, tl.cdiv(query_lens, TALL_ROWS), 0)
    spans = tl.cdiv(lens, SEGMENT * SPAN) - first_segment // SPAN
    is_split = tl.sum(tiles.to(tl.int64) * spans) * K <= tall_slots                # few tall tiles: one item a span, and a slot for each
    items = tiles * tl.where(is_split, spans, 1)
    is_fill = is_request & (query_lens > 0) & (works == 0)
    total, num_tall = tl.sum(ordinals), tl.sum(items)
    streams, shares = 0, programs
    if HAS_TALL:
        in_sight = tl.maximum(lens - query_lens // 2, 1)                           # keys, of a row in the middle
        tall_segments = tl.sum((tiles * (tl.cdiv(in_sight, SEGMENT) - first_segment)).to(tl.int64)) * K
        if APART:
            # On the H200 a tall tile takes a multiprocessor 7.3 us a segment and 4.8 besides, and a segment of a short request 5.5 where few programs
            # stream, 8.2 where all do and memory is what they wait for. So where tall items are most of it, they leave short requests their share of
            # the multiprocessors, and both end together; else they take them all for a short while, or runs that begin behind them would end last.
            tall_work, short_work = 12 * tall_segments + 8 * tl.sum(tiles) * K, 9 * total.to(tl.int64)
            takers = tl.cdiv(tall_programs * tall_work, tl.maximum(tall_work + short_work, 1)).to(tl.int32)
            streams = tl.where(3 * tall_work > 2 * short_work, tall_programs - takers, 0)
        else:
            # A segment of a short request takes a program about as long as one of a tall tile, 22 us where all stream, 8 where few do, against 11. So
            # short requests get that share of the programs, for memory and tensor cores to work side by side; the others end with what is left of the
            # runs. Where most is short, memory decides the end, and one run each leaves the fewest ends to fold; else runs come in whole rounds of
            # those programs.
            streams = (total.to(tl.int64) * programs // tl.maximum(total + tall_segments, 1)).to(tl.int32)
            rounds = tl.where(total > tall_segments, 1, num_runs // tl.maximum(streams, 1))
            shares = tl.where(num_tall > 0, rounds * tl.maximum(streams, 1), programs)
    run = tl.maximum(tl.cdiv(total, shares), 1)
    exact = run
    for align in tl.static_range(4):                                               # aligned runs cut fewer spans; at most a fifteenth longer
        rounded = tl.cdiv(exact, 2 << align) * (2 << align)
        run = tl.where(rounded * 15 <= exact * 16, rounded, run)
    is_whole = run > SPAN * (RUN_SPANS - 2)                                        # more spans than slots: runs of whole (head, tile) pairs

    if r == R:                                                                     # the program of the pads and of the totals
        num_pads, num_fills, num_short = T - num_tokens, tl.sum(is_fill.to(tl.int32)), tl.sum(is_short.to(tl.int32))
        tl.store(num_tokens_ptr, num_tokens)
        tl.store(work_ptr, num_tall)
        tl.store(work_ptr + 1, num_short)
        tl.store(work_ptr + 2, num_fills + (num_pads > 0).to(tl.int32))
        tl.store(work_ptr + 3, run)
        tl.store(work_ptr + 4, is_split.to(tl.int32))
        tl.store(work_ptr + 5, tl.cdiv(total, run))
        tl.store(work_ptr + 6, streams)
        fill = work_ptr + (fills_at + num_fills) * RECORD
        if num_pads > 0:
            tl.store(fill, num_tokens)
            tl.store(fill + 1, num_pads)
            tl.store(fill + 2, 0)
        for i in tl.range(0, num_pads, BLOCK_T):
            token, mask = num_tokens + i + offs_t, i + offs_t < num_pads
            tl.store(positions_ptr + token, tl.zeros((BLOCK_T,), tl.int32), mask)
            tl.store(slot_mapping_ptr + token, tl.full((BLOCK_T,), -1, tl.int64), mask)
            tl.store(token_to_request_ptr + token, tl.full((BLOCK_T,), -1, tl.int32), mask)
        for i in tl.range(0, num_runs + 1, BLOCK_T):
            at = work_ptr + (runs_at + i + offs_t) * RECORD
            mask = (i + offs_t <= num_runs) & ((i + offs_t) * run.to(tl.int64) >= total)
            tl.store(at + 9, total + tl.zeros((BLOCK_T,), tl.int32), mask)
        return

    mine = offs_r == r
    my_start, query_len, my_len = _pick(start, mine), _pick(query_lens, mine), _pick(lens, mine)
    is_used, is_good = _pick(used.to(tl.int32), mine) == 1, _pick(good.to(tl.int32), mine) == 1
    first_position = my_len - query_len

    bad_pages = tl.zeros((BLOCK_T,), tl.int32)
    table = block_table_ptr + r.to(tl.int64) * stride_br
    for i in tl.range(0, tl.where(is_good, tl.cdiv(my_len, P), 0), BLOCK_T):
        page = tl.load(table + i + offs_t, (i + offs_t) * P < my_len, other=0)
        bad_pages |= ((page < 0) | (page >= N)).to(tl.int32)
    is_poisoned = tl.max(bad_pages)
    tl.store(status_ptr + r, tl.where(is_used & (is_good == 0), 1, 0) | is_poisoned * 2)    # BAD_LENGTH, BAD_PAGE
    tl.store(last_token_ptr + r, tl.where(is_used & (query_len > 0), my_start + query_len - 1, -1))

    for i in tl.range(0, query_len, BLOCK_T):
        token, mask = my_start + i + offs_t, i + offs_t < query_len
        position = tl.where(is_good, first_position + i + offs_t, 0)
        page = tl.load(table + tl.maximum(position, 0) // P, mask & is_good & (position >= 0), other=-1)
        page_good = (page >= 0) & (page < N)
        slot = tl.where(page_good, page.to(tl.int64) * P + position % P, -1)
        tl.store(positions_ptr + token, tl.maximum(position, 0), mask)
        tl.store(slot_mapping_ptr + token, slot, mask)
        tl.store(token_to_request_ptr + token, tl.where(is_used, r, -1) + tl.zeros((BLOCK_T,), tl.int32), mask)

    before = is_request & (offs_r < r)
    if _pick(is_fill.to(tl.int32), mine) == 1:
        fill = work_ptr + (fills_at + tl.sum(tl.where(before & is_fill, 1, 0))) * RECORD
        tl.store(fill, my_start)
        tl.store(fill + 1, query_len)
        tl.store(fill + 2, is_used.to(tl.int32))                                   # used, so its length is bad: NaN
    my_segments, my_first_segment = _pick(num_segments, mine), _pick(first_segment, mine)
    if _pick(is_short.to(tl.int32), mine) == 1:
        index, ordinal = tl.sum(tl.where(before & is_short, 1, 0)), tl.sum(tl.where(before, ordinals, 0))
        short, field = work_ptr + (short_at + index) * RECORD, tl.arange(0, 8)
        record = tl.where(field == 0, r, tl.where(field == 1, my_start, tl.where(field == 2, query_len, my_len)))
        record = tl.where(field == 4, my_first_segment, tl.where(field == 5, my_segments, record))
        record = tl.where(field == 6, ordinal, tl.where(field == 7, is_poisoned, record))
        tl.store(short + field, record)
        first_run, end_run = tl.cdiv(ordinal, run), tl.cdiv(ordinal + _pick(ordinals, mine), run)
        for i in tl.range(first_run, end_run, BLOCK_T):
            at, mask = work_ptr + (runs_at + i + offs_t) * RECORD, i + offs_t < end_run
            begin = (i + offs_t) * run
            begin = tl.where(is_whole, ordinal + (begin - ordinal) // my_segments * my_segments, begin)
            tl.store(at[:, None] + field[None, :], tl.broadcast_to(record[None, :], (BLOCK_T, 8)), mask[:, None])
            tl.store(at + 8, index + tl.zeros((BLOCK_T,), tl.int32), mask)
            tl.store(at + 9, begin, mask)
    # Longer requests come first, equal ones in their order; within a request the last tile sees the most keys.
    if HAS_TALL:
        ahead = is_request & ((lens > my_len) | ((lens == my_len) & before))
        first_item, num_tiles = tl.sum(tl.where(ahead, items, 0)), _pick(tiles, mine)
        pieces = tl.where(is_split, _pick(spans, mine), 1)
        first_span, end_span = my_first_segment // SPAN, tl.cdiv(my_len, SEGMENT * SPAN)
        for i in tl.range(0, num_tiles * pieces, BLOCK_T):
            mask = i + offs_t < num_tiles * pieces
            piece = (i + offs_t) % pieces
            row = (num_tiles - 1 - (i + offs_t) // pieces) * TALL_ROWS
            tall = work_ptr + (tall_at + first_item + i + offs_t) * RECORD
            tl.store(tall, r + tl.zeros((BLOCK_T,), tl.int32), mask)
            tl.store(tall + 1, my_start + tl.zeros((BLOCK_T,), tl.int32), mask)
            tl.store(tall + 2, query_len + tl.zeros((BLOCK_T,), tl.int32), mask)
            tl.store(tall + 3, my_len + tl.zeros((BLOCK_T,), tl.int32), mask)
            tl.store(tall + 4, row, mask)
            tl.store(tall + 5, tl.where(is_split, first_span + piece, first_span), mask)
            tl.store(tall + 6, tl.where(is_split, first_span + piece + 1, end_span), mask)
            tl.store(tall + 7, is_poisoned + tl.zeros((BLOCK_T,), tl.int32), mask)
            tl.store(tall + 8, pieces + tl.zeros((BLOCK_T,), tl.int32), mask)
            tl.store(tall + 9, first_item + i + offs_t - piece, mask)                # the tile's first item: names its counter and its slots


@dataclass(frozen=True)
class Tiling:
    """How attention wants requests cut. Static: it follows from the model and the capacities; `attention.tiling` makes it."""

    kv_heads: int
    short_rows: int          # query rows of a short request's tile
    tall_rows: int           # and of a tall one's
    short_limit: int         # a request of more rows is tall, and one of more than short_rows where those are many
    has_tall: bool           # false where capacities leave no room for such requests
    segment: int             # tokens
    span: int                # segments
    programs: int            # of attention's launch
    runs: int                # capacity: as many as programs, twice as many where tall items go before in the same launch
    tall_slots: int          # states of tall tiles that the workspace holds for spans that are items of their own
    states: int              # float32 of the workspace
    counters: int            # int32 of the workspace
    causal: bool = True
    left: int = -1           # keys before a row's position that it sees at most; -1: all
    tall_programs: int = 0   # of the launch that tall items have of their own; 0: none, they go before runs

    def sections(self, T: int, R: int) -> tuple[int, int, int, int, int]:
        """Rows of the work list at which fills, short requests, runs and tall items begin, and their number in all."""
        short = 1 + R + 1
        runs = short + R
        tall = runs + self.runs + 1
        tiles = -(-T // self.tall_rows) + R if self.has_tall else 0
        return 1, short, runs, tall, tall + max(tiles, self.tall_slots // self.kv_heads)


@dataclass(frozen=True)
class Schedule:
    """What one step's kernels read about its batch; every field lives on the device and keeps its address."""

    positions: torch.Tensor          # int32 [T]
    slot_mapping: torch.Tensor       # int64 [T]
    token_to_request: torch.Tensor   # int32 [T]
    last_token: torch.Tensor         # int32 [R]: row of each request's last token, -1 for unused requests
    num_tokens: torch.Tensor         # int32 [1]
    status: torch.Tensor             # int32 [R]: 0, or bits that say what was wrong with the request's data
    work: torch.Tensor               # int32 [rows, RECORD]: attention's work list

    @classmethod
    def allocate(cls, T: int, R: int, tiling: Tiling, device: torch.device | str) -> Schedule:
        """For at most T tokens and R requests."""
        make = lambda *shape, dtype=torch.int32: torch.zeros(shape, dtype=dtype, device=device)
        return cls(make(T), make(T, dtype=torch.int64), make(T), make(R), make(1), make(R), make(tiling.sections(T, R)[-1], RECORD))


@dataclass(frozen=True)
class Config:
    BLOCK_R: int
    BLOCK_T: int
    num_warps: int


def config(R: int) -> Config:
    return Config(max(triton.next_power_of_2(R), 16), 512, 4)


def schedule_out(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, page_size: int, num_pages: int,
                 tiling: Tiling, out: Schedule) -> None:
    """Fills `out` for the batch; shapes as in the module. Raises ValueError or TypeError on shapes that do not fit each other."""
    device, (T,), R = query_start_loc.device, out.positions.shape, seq_lens.shape[0]
    _check.require(1 <= R <= MAX_R, "schedule", "seq_lens", f"R = {R}", f"1 to {MAX_R} requests")
    _check.require(1 <= page_size <= 256, "schedule", "page_size", page_size, "1 to 256")
    _check.require(num_pages >= 1, "schedule", "num_pages", num_pages, "at least 1")
    int32 = (torch.int32,)
    _check.tensor("schedule", "query_start_loc", query_start_loc, (R + 1,), int32)
    _check.tensor("schedule", "seq_lens", seq_lens, (R,), int32, device)
    _check.tensor("schedule", "block_table", block_table, (R, None), int32, device)
    _check.tensor("schedule", "out.slot_mapping", out.slot_mapping, (T,), (torch.int64,), device)
    for name in ("positions", "token_to_request"):
        _check.tensor("schedule", f"out.{name}", getattr(out, name), (T,), int32, device)
    for name in ("last_token", "status"):
        _check.tensor("schedule", f"out.{name}", getattr(out, name), (R,), int32, device)
    *sections, rows = tiling.sections(T, R)
    _check.tensor("schedule", "out.work", out.work, (rows, RECORD), int32, device, dense=2)
    _check.counter("schedule", "out.num_tokens", out.num_tokens, device)
    c = config(R)
    _schedule_kernel[(R + 1,)](
        query_start_loc, seq_lens, block_table, out.positions, out.slot_mapping, out.token_to_request, out.last_token, out.num_tokens,
        out.work, out.status, block_table.stride(0), T, R, block_table.shape[1], num_pages, tiling.left, tiling.programs, tiling.tall_programs,
        tiling.runs, tiling.tall_slots, *sections, P=page_size, K=tiling.kv_heads, SHORT_ROWS=tiling.short_rows, TALL_ROWS=tiling.tall_rows,
        SHORT_LIMIT=tiling.short_limit, SEGMENT=tiling.segment, SPAN=tiling.span, RECORD=RECORD, RUN_SPANS=RUN_SPANS, IS_CAUSAL=tiling.causal,
        HAS_LEFT=tiling.left >= 0, HAS_TALL=tiling.has_tall, APART=tiling.tall_programs > 0, BLOCK_R=c.BLOCK_R, BLOCK_T=c.BLOCK_T,
        num_warps=c.num_warps, **overlap())


def schedule(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, page_size: int, num_pages: int, T: int,
             tiling: Tiling) -> Schedule:
    """Returns the `Schedule` of the batch for a capacity of T tokens."""
    out = Schedule.allocate(T, seq_lens.shape[0], tiling, query_start_loc.device)
    schedule_out(query_start_loc, seq_lens, block_table, page_size, num_pages, tiling, out)
    return out
