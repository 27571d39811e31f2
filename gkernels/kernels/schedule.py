"""Schedule: one small launch a step turns the host's three tensors into everything that the other kernels ask of a batch.

query_start_loc [R + 1], seq_lens [R], block_table [R, W] (all int32) -> `Schedule`: per token its position, cache slot and request; per
request the row of its last token and a status; the number of live tokens; and attention's work list, heaviest item first.
It serves every layer of the step, and it is where the data of a batch is checked: a request whose lengths or pages make no sense is
flagged in `status`, gets no cache slots, and is marked in the work list so that attention answers NaN; other requests go on unharmed.
Graph-safe: R + 1 programs; all else is read from device memory. Pads are filled here: position 0, slot -1, request -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check

BAD_LENGTH, BAD_PAGE = 1, 2   # bits of status; sampling adds its own
MAX_R = 4096                  # every program holds one vector of all requests


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["T", "R", "W", "N", "BLOCK_Q", "stride_br"], do_not_specialize_on_alignment=["num_tokens_ptr", "num_items_ptr"])
def _schedule_kernel(
    query_start_loc_ptr,    # [R + 1]
    seq_lens_ptr,           # [R]
    block_table_ptr,        # [R, W]
    positions_ptr,          # [T]
    slot_mapping_ptr,       # [T] int64
    token_to_request_ptr,   # [T]
    last_token_ptr,         # [R]
    num_tokens_ptr,         # [1]
    items_ptr,              # [I, 4]: request or -1, first token, rows, position of the first row or -1
    num_items_ptr,          # [1]
    status_ptr,             # [R]
    stride_br,
    T, R, W, N, BLOCK_Q,
    P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):
    r = tl.program_id(0)
    offs_r, offs_t = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T)
    is_request = offs_r < R
    # Starting at 0, the running maximum makes any junk in query_start_loc a set of ranges that tile [0, num_tokens) without overlap.
    raw_start = tl.load(query_start_loc_ptr + offs_r, is_request, other=0)                          # [BLOCK_R]
    raw_end = tl.load(query_start_loc_ptr + 1 + offs_r, is_request, other=0)
    start = tl.associative_scan(tl.where(offs_r == 0, 0, tl.minimum(tl.maximum(raw_start, 0), T)), 0, _greater)
    end = tl.maximum(start, tl.minimum(tl.maximum(raw_end, 0), T))
    lens = tl.load(seq_lens_ptr + offs_r, is_request, other=0)
    tiles = tl.where(is_request, tl.cdiv(end - start, BLOCK_Q), 0)
    num_tokens = tl.max(tl.where(is_request, end, 0))

    if r == R:                                                          # the program of the pads, which come last in the work list
        num_pads = T - num_tokens
        first_item = tl.sum(tiles)
        pad_items = tl.cdiv(num_pads, BLOCK_Q)
        tl.store(num_tokens_ptr, num_tokens)
        tl.store(num_items_ptr, first_item + pad_items)
        for i in tl.range(0, num_pads, BLOCK_T):
            token, mask = num_tokens + i + offs_t, i + offs_t < num_pads
            tl.store(positions_ptr + token, tl.zeros((BLOCK_T,), tl.int32), mask)
            tl.store(slot_mapping_ptr + token, tl.full((BLOCK_T,), -1, tl.int64), mask)
            tl.store(token_to_request_ptr + token, tl.full((BLOCK_T,), -1, tl.int32), mask)
        for i in tl.range(0, pad_items, BLOCK_T):
            mask = i + offs_t < pad_items
            item = items_ptr + (first_item + i + offs_t) * 4
            token = (i + offs_t) * BLOCK_Q
            tl.store(item, tl.full((BLOCK_T,), -1, tl.int32), mask)
            tl.store(item + 1, num_tokens + token, mask)
            tl.store(item + 2, tl.minimum(num_pads - token, BLOCK_Q), mask)
            tl.store(item + 3, tl.zeros((BLOCK_T,), tl.int32), mask)
        return

    mine = offs_r == r
    my_start, my_end, my_len = tl.sum(tl.where(mine, start, 0)), tl.sum(tl.where(mine, end, 0)), tl.sum(tl.where(mine, lens, 0))
    straight = tl.sum(tl.where(mine & (raw_start == start) & (raw_end == end), 1, 0)) == 1
    query_len = my_end - my_start
    used = my_len != 0
    fits = straight & (my_len >= query_len) & (my_len.to(tl.int64) <= W.to(tl.int64) * P)
    good = used & fits
    first_position = my_len - query_len

    bad_pages = tl.zeros((BLOCK_T,), tl.int32)
    table = block_table_ptr + r.to(tl.int64) * stride_br
    for i in tl.range(0, tl.where(good, tl.cdiv(my_len, P), 0), BLOCK_T):
        page = tl.load(table + i + offs_t, (i + offs_t) * P < my_len, other=0)
        bad_pages |= ((page < 0) | (page >= N)).to(tl.int32)
    tl.store(status_ptr + r, tl.where(used & (fits == 0), 1, 0) | tl.max(bad_pages) * 2)    # BAD_LENGTH, BAD_PAGE
    tl.store(last_token_ptr + r, tl.where(used & (query_len > 0), my_end - 1, -1))

    for i in tl.range(0, query_len, BLOCK_T):
        token, mask = my_start + i + offs_t, i + offs_t < query_len
        position = tl.where(good, first_position + i + offs_t, 0)
        page = tl.load(table + position // P, mask & good, other=-1)
        page_good = (page >= 0) & (page < N)
        slot = tl.where(page_good, page.to(tl.int64) * P + position % P, -1)
        tl.store(positions_ptr + token, position, mask)
        tl.store(slot_mapping_ptr + token, slot, mask)
        tl.store(token_to_request_ptr + token, tl.where(used, r, -1) + tl.zeros((BLOCK_T,), tl.int32), mask)

    # Longer requests come first, equal ones in their order; within a request the last tile sees the most keys.
    ahead = is_request & ((lens > my_len) | ((lens == my_len) & (offs_r < r)))
    first_item = tl.sum(tl.where(ahead, tiles, 0))
    num_tiles = tl.cdiv(query_len, BLOCK_Q)
    for i in tl.range(0, num_tiles, BLOCK_T):
        mask = i + offs_t < num_tiles
        item = items_ptr + (first_item + i + offs_t) * 4
        row = (num_tiles - 1 - i - offs_t) * BLOCK_Q
        tl.store(item, tl.where(used, r, -1) + tl.zeros((BLOCK_T,), tl.int32), mask)
        tl.store(item + 1, my_start + row, mask)
        tl.store(item + 2, tl.minimum(query_len - row, BLOCK_Q), mask)
        tl.store(item + 3, tl.where(good, first_position + row, -1), mask)


@dataclass(frozen=True)
class Schedule:
    """What one step's kernels read about its batch; every field lives on the device and keeps its address."""

    positions: torch.Tensor          # int32 [T]
    slot_mapping: torch.Tensor       # int64 [T]
    token_to_request: torch.Tensor   # int32 [T]
    last_token: torch.Tensor         # int32 [R]: row of each request's last token, -1 for unused requests
    num_tokens: torch.Tensor         # int32 [1]
    items: torch.Tensor              # int32 [I, 4]: attention's work list
    num_items: torch.Tensor          # int32 [1]
    status: torch.Tensor             # int32 [R]: 0, or bits that say what was wrong with the request's data

    @classmethod
    def allocate(cls, T: int, R: int, block_q: int, device: torch.device | str) -> Schedule:
        """For at most T tokens and R requests; block_q is the query tile of `attention.config`."""
        make = lambda *shape, dtype=torch.int32: torch.zeros(shape, dtype=dtype, device=device)
        return cls(make(T), make(T, dtype=torch.int64), make(T), make(R), make(1), make(max_items(T, R, block_q), 4), make(1), make(R))


def max_items(T: int, R: int, block_q: int) -> int:
    """Capacity of the work list: every request, and the pads, may end in one unfilled tile."""
    _check.require(block_q >= 1, "schedule", "block_q", block_q, "the BLOCK_Q of attention.config")
    return -(-T // block_q) + R + 1


@dataclass(frozen=True)
class Config:
    BLOCK_R: int
    BLOCK_T: int
    num_warps: int


def config(R: int) -> Config:
    return Config(max(triton.next_power_of_2(R), 16), 512, 4)


def schedule_out(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, page_size: int, num_pages: int,
                 block_q: int, out: Schedule) -> None:
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
    _check.tensor("schedule", "out.items", out.items, (max_items(T, R, block_q), 4), int32, device, dense=2)
    _check.counter("schedule", "out.num_tokens", out.num_tokens, device)
    _check.counter("schedule", "out.num_items", out.num_items, device)
    c = config(R)
    _schedule_kernel[(R + 1,)](
        query_start_loc, seq_lens, block_table, out.positions, out.slot_mapping, out.token_to_request, out.last_token, out.num_tokens,
        out.items, out.num_items, out.status, block_table.stride(0), T, R, block_table.shape[1], num_pages, block_q,
        P=page_size, BLOCK_R=c.BLOCK_R, BLOCK_T=c.BLOCK_T, num_warps=c.num_warps)


def schedule(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, page_size: int, num_pages: int, T: int,
             block_q: int) -> Schedule:
    """Returns the `Schedule` of the batch for a capacity of T tokens."""
    out = Schedule.allocate(T, seq_lens.shape[0], block_q, query_start_loc.device)
    schedule_out(query_start_loc, seq_lens, block_table, page_size, num_pages, block_q, out)
    return out
