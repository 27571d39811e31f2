"""Expand: the rows of a speculative step, each request's token and its drafts back to back.

token_ids, seq_lens [R] as a plain decode step has them, draft [R, K] and draft_len [R], limits [R], all int32 -> `Rows`. A request of length n with d
drafts has d + 1 rows at positions n - 1 to n - 1 + d, and length n + d; d is at most draft_len, K, the row's limit, and never less than 0. Unused
requests (seq_lens 0) have no row. Row j of a request draws the token at place n + j, which its draft j foretells; the last row has no draft.
Pads: token 0, draft -1, request 0, position 0, which `sample` takes for an unused row.
Graph-safe: one program. All is read from device memory; `verify` reads what comes of the rows, and `advance` rolls back by length alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from ._overlap import overlap, wait_for_node_before

MAX_R = 4096


@triton.jit(do_not_specialize=["R", "T", "stride_dr"], do_not_specialize_on_alignment=[
    "token_ids_ptr", "seq_lens_ptr", "draft_ptr", "draft_len_ptr", "limits_ptr", "rows_token_ids_ptr", "rows_draft_ptr", "request_ptr",
    "position_ptr", "query_start_loc_ptr", "rows_seq_lens_ptr"])
def _expand_kernel(
    token_ids_ptr,          # [R]
    seq_lens_ptr,           # [R]
    draft_ptr,              # [R, K]
    draft_len_ptr,          # [R]
    limits_ptr,             # [R]
    rows_token_ids_ptr,     # [T], T = R * (K + 1)
    rows_draft_ptr,         # [T]
    request_ptr,            # [T]
    position_ptr,           # [T]
    query_start_loc_ptr,    # [R + 1]
    rows_seq_lens_ptr,      # [R]
    R, T, stride_dr,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    offs_r, offs_t = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T)                 # [BLOCK_R], [BLOCK_T]
    mask = offs_r < R
    length = tl.maximum(tl.load(seq_lens_ptr + offs_r, mask, other=0), 0)
    limit = tl.minimum(tl.load(draft_len_ptr + offs_r, mask, other=0), tl.load(limits_ptr + offs_r, mask, other=0))
    drafts = tl.where(length > 0, tl.minimum(tl.maximum(limit, 0), K), 0)
    rows = tl.where(length > 0, drafts + 1, 0)
    end = tl.cumsum(rows, 0)
    start = end - rows
    tl.store(query_start_loc_ptr + offs_r + 1, end, mask)
    tl.store(query_start_loc_ptr + offs_r, start, mask & (offs_r == 0))
    tl.store(rows_seq_lens_ptr + offs_r, length + drafts, mask)
    for j in range(0, K + 1):
        row, has_row = start + j, mask & (j < rows)
        token = tl.load(draft_ptr + offs_r * stride_dr + j - 1, has_row & (j > 0), other=0)
        token = tl.where(j == 0, tl.load(token_ids_ptr + offs_r, has_row, other=0), token)
        tl.store(rows_token_ids_ptr + row, token, has_row)
        tl.store(rows_draft_ptr + row, tl.load(draft_ptr + offs_r * stride_dr + j, has_row & (j < drafts), other=-1), has_row)
        tl.store(request_ptr + row, offs_r, has_row)
        tl.store(position_ptr + row, length + j, has_row)
    total = tl.sum(rows, 0)
    for i in range(0, T - total, BLOCK_T):
        row = total + i + offs_t
        tl.store(rows_token_ids_ptr + row, tl.zeros((BLOCK_T,), tl.int32), row < T)
        tl.store(rows_draft_ptr + row, tl.full((BLOCK_T,), -1, tl.int32), row < T)
        tl.store(request_ptr + row, tl.zeros((BLOCK_T,), tl.int32), row < T)
        tl.store(position_ptr + row, tl.zeros((BLOCK_T,), tl.int32), row < T)


@dataclass(frozen=True)
class Rows:
    """int32, T = R * (K + 1) rows."""

    token_ids: torch.Tensor          # [T]
    draft: torch.Tensor              # [T]: what each row's token should be
    request: torch.Tensor            # [T]
    position: torch.Tensor           # [T]: place in the sequence of the token that the row draws
    query_start_loc: torch.Tensor    # [R + 1]
    seq_lens: torch.Tensor           # [R]

    @classmethod
    def allocate(cls, R: int, K: int, device: torch.device | str) -> Rows:
        return cls(*(torch.zeros(n, dtype=torch.int32, device=device) for n in (*[R * (K + 1)] * 4, R + 1, R)))


def expand_out(token_ids: torch.Tensor, seq_lens: torch.Tensor, draft: torch.Tensor, draft_len: torch.Tensor, limits: torch.Tensor,
               out: Rows) -> None:
    """Writes `out`. Shapes: see the module. Raises ValueError or TypeError on a misfit."""
    op, int32, (R,), device = "expand", (torch.int32,), seq_lens.shape, seq_lens.device
    _check.require(1 <= R <= MAX_R, op, "seq_lens", f"R = {R}", f"1 to {MAX_R} requests")
    _check.tensor(op, "draft", draft, (R, None), int32, device, aligned=False)
    K = draft.shape[1]
    for name, t in (("token_ids", token_ids), ("seq_lens", seq_lens), ("draft_len", draft_len), ("limits", limits)):
        _check.tensor(op, name, t, (R,), int32, device, aligned=False)
    T = R * (K + 1)
    sizes = dict(query_start_loc=R + 1, seq_lens=R)
    for name, t in vars(out).items():
        _check.tensor(op, f"out.{name}", t, (sizes.get(name, T),), int32, device, aligned=False)
    _expand_kernel[(1,)](token_ids, seq_lens, draft, draft_len, limits, *vars(out).values(), R, T, draft.stride(0),
                         K=K, BLOCK_R=triton.next_power_of_2(R), BLOCK_T=512, num_warps=4, **overlap())


def expand(token_ids: torch.Tensor, seq_lens: torch.Tensor, draft: torch.Tensor, draft_len: torch.Tensor, limits: torch.Tensor) -> Rows:
    """Returns the rows of the step."""
    R, K = draft.shape
    out = Rows.allocate(R, K, draft.device)
    expand_out(token_ids, seq_lens, draft, draft_len, limits, out)
    return out
