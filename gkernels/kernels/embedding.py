"""Embedding: a gather of rows,  out[t] = weight[ids[t]],  bit for bit.

ids int32 or int64 [T], weight [V, D] with any row stride -> out [T, D]. It embeds tokens, and picks each request's last row of the hidden
states with padding_index = -1. An id equal to padding_index gives zeros; any other id outside [0, V) gives a row of NaN.
Graph-safe: the grid depends on T and D only; at or past num_tokens[0] ids are not read and rows are zeros. V * D may pass 2^31.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from ._overlap import overlap, wait_for_node_before


@triton.jit(do_not_specialize=["V"], do_not_specialize_on_alignment=["ids_ptr", "num_tokens_ptr"])
def _embedding_kernel(
    ids_ptr,         # [T] int32 or int64
    weight_ptr,      # [V, D]
    out_ptr,         # [T, D]
    num_tokens_ptr,  # [1] int32; None when every row is live
    V,
    stride_wv, stride_ot,
    D: tl.constexpr, PADDING_INDEX: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NUM_TOKENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    out_row = out_ptr + token * stride_ot + offs_d
    zeros = tl.zeros((BLOCK_D,), out_ptr.dtype.element_ty)
    if HAS_NUM_TOKENS:
        if token >= tl.load(num_tokens_ptr):
            tl.store(out_row, zeros, mask)
            return
    index = tl.load(ids_ptr + token).to(tl.int64)
    if PADDING_INDEX is not None:
        if index == PADDING_INDEX:
            tl.store(out_row, zeros, mask)
            return
    is_row = (index >= 0) & (index < V)
    # [BLOCK_D]
    row = tl.load(weight_ptr + tl.where(is_row, index, 0) * stride_wv + offs_d, mask & is_row, other=0.0)
    nan = tl.full((BLOCK_D,), float("nan"), tl.float32).to(out_ptr.dtype.element_ty)
    tl.store(out_row, tl.where(is_row, row, nan), mask)


@dataclass(frozen=True)
class Config:
    BLOCK_D: int
    num_warps: int


def config(D: int) -> Config:
    """One 16-byte vector of halves a thread, and 1024 columns a program, so that a few decode rows already spread over the device."""
    block = min(triton.next_power_of_2(D), 1024)
    return Config(block, min(max(block // 256, 1), 4))


def embedding_out(ids: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, num_tokens: torch.Tensor | None = None,
                  padding_index: int | None = None) -> None:
    """Writes weight[ids] to `out`. Shapes: see the module. Raises ValueError or TypeError on a misfit."""
    _check.tensor("embedding", "ids", ids, (None,), (torch.int32, torch.int64), aligned=False)
    _check.tensor("embedding", "weight", weight, (None, None), _check.FLOATS, ids.device)
    (T,), (V, D) = ids.shape, weight.shape
    _check.tensor("embedding", "out", out, (T, D), (weight.dtype,), ids.device, writes=True)
    _check.counter("embedding", "num_tokens", num_tokens, ids.device)
    _check.require(padding_index is None or type(padding_index) is int, "embedding", "padding_index", type(padding_index).__name__,
                   "an int or None", TypeError)
    if T * D == 0:
        return
    c = config(D)
    _embedding_kernel[(T, triton.cdiv(D, c.BLOCK_D))](
        ids, weight, out, num_tokens, V, weight.stride(0), out.stride(0),
        D=D, PADDING_INDEX=padding_index, BLOCK_D=c.BLOCK_D, HAS_NUM_TOKENS=num_tokens is not None, num_warps=c.num_warps,
        **overlap())


def embedding(ids: torch.Tensor, weight: torch.Tensor, num_tokens: torch.Tensor | None = None,
              padding_index: int | None = None) -> torch.Tensor:
    """Returns weight[ids]; rows of padding_index and rows at or past num_tokens[0] are zeros, rows of ids that do not exist are NaN."""
    out = weight.new_empty(ids.shape[0], weight.shape[-1])
    embedding_out(ids, weight, out, num_tokens, padding_index)
    return out
