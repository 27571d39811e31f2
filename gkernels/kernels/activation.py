"""SwiGLU's activation:  out = silu(x[:, :F]) * x[:, F:],  silu(g) = g / (1 + exp(-g)).

x [T, 2F] with any row stride (the gate's columns first, then the up projection's) -> out [T, F]. float32 inside, one cast at the store.
Graph-safe: the grid depends on T and F only; rows at or past num_tokens[0] are written as zeros and never read.
Batch-invariant: each element is its own computation. Formula: Shazeer 2020, arXiv 2002.05202.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from ._overlap import overlap, wait_for_node_before


@triton.jit(do_not_specialize_on_alignment=["num_tokens_ptr"])
def _silu_and_mul_kernel(
    x_ptr,           # [T, 2F]
    out_ptr,         # [T, F]
    num_tokens_ptr,  # [1] int32; None when every row is live
    stride_xt, stride_ot,
    F: tl.constexpr, BLOCK_F: tl.constexpr, HAS_NUM_TOKENS: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs_f < F
    out_row = out_ptr + token * stride_ot + offs_f
    if HAS_NUM_TOKENS:
        if token >= tl.load(num_tokens_ptr):
            tl.store(out_row, tl.zeros((BLOCK_F,), out_ptr.dtype.element_ty), mask)
            return
    # [BLOCK_F]
    gate = tl.load(x_ptr + token * stride_xt + offs_f, mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * stride_xt + F + offs_f, mask, other=0.0).to(tl.float32)
    tl.store(out_row, (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask)


@dataclass(frozen=True)
class Config:
    BLOCK_F: int
    num_warps: int


def config(F: int) -> Config:
    """One 16-byte vector of halves a thread: 14 programs a row at F = 14336, so that a few decode rows already spread over the device."""
    block = min(triton.next_power_of_2(F), 1024)
    return Config(block, min(max(block // 256, 1), 4))


def silu_and_mul_out(x: torch.Tensor, out: torch.Tensor, num_tokens: torch.Tensor | None = None) -> None:
    """Writes silu(x[:, :F]) * x[:, F:] to `out`. Shapes: see the module. Raises ValueError or TypeError on a misfit."""
    _check.tensor("silu_and_mul", "x", x, (None, None), _check.FLOATS)
    _check.require(x.shape[1] % 2 == 0, "silu_and_mul", "x", f"{x.shape[1]} columns", "an even number, gate columns then up columns")
    T, F = x.shape[0], x.shape[1] // 2
    _check.tensor("silu_and_mul", "out", out, (T, F), (x.dtype,), x.device, writes=True)
    _check.counter("silu_and_mul", "num_tokens", num_tokens, x.device)
    if T * F == 0:
        return
    c = config(F)
    _silu_and_mul_kernel[(T, triton.cdiv(F, c.BLOCK_F))](
        x, out, num_tokens, x.stride(0), out.stride(0),
        F=F, BLOCK_F=c.BLOCK_F, HAS_NUM_TOKENS=num_tokens is not None, num_warps=c.num_warps, **overlap())


def silu_and_mul(x: torch.Tensor, num_tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Returns silu(x[:, :F]) * x[:, F:]; rows at or past num_tokens[0] are zeros."""
    out = x.new_empty(x.shape[0], x.shape[-1] // 2)
    silu_and_mul_out(x, out, num_tokens)
    return out
