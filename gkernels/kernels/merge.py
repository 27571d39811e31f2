"""Merge: attention over two disjoint sets of keys from attention over each,  out = (a exp(a_lse) + b exp(b_lse)) / (exp(a_lse) + exp(b_lse)).

a, b [T, H, D] with any row strides, a_lse, b_lse [T, H] float32 (natural log of the sum of exponentials) with any strides -> out like a, and
lse [T, H]. It makes a cascade: the pages that requests share are attended once, by all of their rows together and not causally, and each
request's own pages causally. float32 inside, one cast at the store. The exponentials are taken relative to the greater lse, so nothing overflows.
-inf means no keys: that side's row is not read and the other's bits are kept; without keys on both sides the row is 0 and -inf. NaN stays in its
row. Commutes bit for bit, since the side of the greater lse always takes the same place.
Graph-safe: the grid depends on T and H only; rows at or past num_tokens[0] are written as zeros and -inf and never read. Batch-invariant:
elementwise. Formulas: Milakov and Gimelshein 2018, arXiv 1805.02867; the cascade: Ye et al. 2024, flashinfer.ai/2024/02/02/cascade-inference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from ._overlap import overlap, wait_for_node_before

MAX_D = 1024


@triton.jit(do_not_specialize=["stride_alt", "stride_alh", "stride_blt", "stride_blh", "stride_lt", "stride_lh"],
            do_not_specialize_on_alignment=["a_lse_ptr", "b_lse_ptr", "lse_ptr", "num_tokens_ptr"])
def _merge_kernel(
    a_ptr,             # [T, H, D]
    a_lse_ptr,         # [T, H] float32
    b_ptr,             # [T, H, D]
    b_lse_ptr,         # [T, H] float32
    out_ptr,           # [T, H, D]
    lse_ptr,           # [T, H] float32; None when nobody asks
    num_tokens_ptr,    # [1] int32; None when every row is live
    stride_at, stride_ah, stride_alt, stride_alh, stride_bt, stride_bh, stride_blt, stride_blh, stride_ot, stride_oh, stride_lt, stride_lh,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, HAS_LSE: tl.constexpr, HAS_NUM_TOKENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    token, offs_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    offs_h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)                        # [BLOCK_H]
    mask_h = offs_h < H
    mask = mask_h[:, None] & (offs_d < D)                                                             # [BLOCK_H, BLOCK_D]
    out_tile = out_ptr + token * stride_ot + offs_h[:, None] * stride_oh + offs_d
    lse_tile = lse_ptr + token * stride_lt + offs_h * stride_lh if HAS_LSE else None
    if HAS_NUM_TOKENS:
        if token >= tl.load(num_tokens_ptr):
            tl.store(out_tile, tl.zeros((BLOCK_H, BLOCK_D), out_ptr.dtype.element_ty), mask)
            if HAS_LSE:
                tl.store(lse_tile, tl.full((BLOCK_H,), float("-inf"), tl.float32), mask_h)
            return
    a_lse = tl.load(a_lse_ptr + token * stride_alt + offs_h * stride_alh, mask_h, other=float("-inf"))
    b_lse = tl.load(b_lse_ptr + token * stride_blt + offs_h * stride_blh, mask_h, other=float("-inf"))
    has_a, has_b = a_lse != float("-inf"), b_lse != float("-inf")
    a = tl.load(a_ptr + token * stride_at + offs_h[:, None] * stride_ah + offs_d, mask & has_a[:, None], other=0.0).to(tl.float32)
    b = tl.load(b_ptr + token * stride_bt + offs_h[:, None] * stride_bh + offs_d, mask & has_b[:, None], other=0.0).to(tl.float32)
    is_b = (a_lse < b_lse) | (has_a == 0)
    high, low = tl.where(is_b[:, None], b, a), tl.where(is_b[:, None], a, b)
    high_lse, low_lse = tl.where(is_b, b_lse, a_lse), tl.where(is_b, a_lse, b_lse)
    both = has_a & has_b
    weight = tl.exp(low_lse - tl.where(both, high_lse, 0.0))                                          # of low; that of high is 1
    out = tl.where(both[:, None], tl.fma(low, tl.broadcast_to(weight[:, None], low.shape), high) / (1.0 + weight)[:, None], high)
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask)
    if HAS_LSE:
        tl.debug_barrier()                                         # lse may be a_lse: all warps have read it, each a copy, before one writes
        tl.store(lse_tile, tl.where(both, high_lse + tl.log(1.0 + weight), high_lse), mask_h)


@dataclass(frozen=True)
class Config:
    BLOCK_H: int
    BLOCK_D: int
    num_warps: int


def config(H: int, D: int) -> Config:
    """Tiles of at most 2048 elements, 16 a thread, as in rmsnorm: two loads of 16 bytes from each side in half precision."""
    block_d = triton.next_power_of_2(D)
    block_h = min(triton.next_power_of_2(H), 2048 // block_d)
    return Config(block_h, block_d, max(block_h * block_d // 512, 1))


def merge_out(a: torch.Tensor, a_lse: torch.Tensor, b: torch.Tensor, b_lse: torch.Tensor, out: torch.Tensor,
              lse: torch.Tensor | None = None, num_tokens: torch.Tensor | None = None) -> None:
    """Writes the merged rows to `out`, which may be `a` or `b`, and their log-sum-exp to `lse`, which may be `a_lse` or `b_lse`.

    Shapes: see the module. Raises ValueError or TypeError on a misfit.
    """
    _check.tensor("merge", "a", a, (None, None, None), _check.FLOATS)
    T, H, D = a.shape
    _check.require(1 <= D <= MAX_D, "merge", "a", f"D = {D}", f"1 to {MAX_D}")
    _check.tensor("merge", "b", b, (T, H, D), (a.dtype,), a.device)
    _check.tensor("merge", "out", out, (T, H, D), (a.dtype,), a.device, writes=True)
    for name, t in (("a_lse", a_lse), ("b_lse", b_lse)):
        _check.tensor("merge", name, t, (T, H), (torch.float32,), a.device, dense=0, aligned=False)
    if lse is not None:
        _check.tensor("merge", "lse", lse, (T, H), (torch.float32,), a.device, dense=0, aligned=False, writes=True)
    _check.counter("merge", "num_tokens", num_tokens, a.device)
    if T * H == 0:
        return
    c = config(H, D)
    _merge_kernel[(T, triton.cdiv(H, c.BLOCK_H))](
        a, a_lse, b, b_lse, out, lse, num_tokens,
        *a.stride()[:2], *a_lse.stride(), *b.stride()[:2], *b_lse.stride(), *out.stride()[:2], *((0, 0) if lse is None else lse.stride()),
        H=H, D=D, BLOCK_H=c.BLOCK_H, BLOCK_D=c.BLOCK_D, HAS_LSE=lse is not None, HAS_NUM_TOKENS=num_tokens is not None,
        num_warps=c.num_warps, **overlap())


def merge(a: torch.Tensor, a_lse: torch.Tensor, b: torch.Tensor, b_lse: torch.Tensor,
          num_tokens: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out [T, H, D], lse [T, H]) of the union of both key sets; rows at or past num_tokens[0] are zeros and -inf."""
    out, lse = a.new_empty(a.shape), a_lse.new_empty(a_lse.shape)
    merge_out(a, a_lse, b, b_lse, out, lse, num_tokens)
    return out, lse
