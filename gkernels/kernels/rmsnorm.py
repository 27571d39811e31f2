"""RMSNorm:  out = x / sqrt(mean(x^2) + eps) * weight,  alone or after a residual add:  residual += x, out = rmsnorm(residual).

x [T, D] (or [T, H, D] for qk-norm) with any row strides, weight [D] -> out like x. float32 inside, one cast at the store.
`scale` does the half of it that the products of _product leave to the node before:  scaled.x = x * weight,  scaled.squares = sum(x^2).
Graph-safe: the grid depends on T and H only; rows at or past num_tokens[0] are written as zeros and never read.
Batch-invariant: one program a row, and its configuration ignores T. Formula: Zhang and Sennrich 2019, arXiv 1910.07467.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from ._overlap import overlap, wait_for_node_before
from ._product import Scaled, check_scaled

MAX_D = 16384


@triton.jit(do_not_specialize_on_alignment=["num_tokens_ptr"])
def _rmsnorm_kernel(
    x_ptr,             # [T, H, D]
    residual_ptr,      # [T, D], read and written; None without a residual
    weight_ptr,        # [D]
    out_ptr,           # [T, H, D]
    num_tokens_ptr,    # [1] int32; None when every row is live
    stride_xt, stride_xh, stride_rt, stride_ot, stride_oh,
    eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NUM_TOKENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    row = tl.program_id(0)
    token, head = (row // H).to(tl.int64), (row % H).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask = offs_d < D
    out_row = out_ptr + token * stride_ot + head * stride_oh + offs_d
    if HAS_NUM_TOKENS:
        if token >= tl.load(num_tokens_ptr):
            tl.store(out_row, tl.zeros((BLOCK_D,), out_ptr.dtype.element_ty), mask)
            if HAS_RESIDUAL:
                tl.store(residual_ptr + token * stride_rt + offs_d, tl.zeros((BLOCK_D,), residual_ptr.dtype.element_ty), mask)
            return
    # [BLOCK_D]
    x = tl.load(x_ptr + token * stride_xt + head * stride_xh + offs_d, mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_row = residual_ptr + token * stride_rt + offs_d
        x = (x + tl.load(residual_row, mask, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(residual_row, x, mask)
        x = x.to(tl.float32)
    weight = tl.load(weight_ptr + offs_d, mask, other=0.0).to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x) / D + eps) * weight
    tl.store(out_row, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize_on_alignment=["num_tokens_ptr"])
def _scale_kernel(
    x_ptr,             # [T, D]
    weight_ptr,        # [D]
    out_ptr,           # [T, D]
    squares_ptr,       # [T, PARTS]
    num_tokens_ptr,    # [1] int32; None when every row is live
    stride_xt, stride_ot,
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    offs_d, offs_p = tl.arange(0, BLOCK_D), tl.arange(0, triton.next_power_of_2(PARTS))
    is_live = True
    if num_tokens_ptr is not None:
        is_live = token < tl.load(num_tokens_ptr)
    # [BLOCK_D]
    x = tl.load(x_ptr + token * stride_xt + offs_d, (offs_d < D) & is_live, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs_d, (offs_d < D) & is_live, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * stride_ot + offs_d, tl.where(is_live, x * weight, 0.0).to(out_ptr.dtype.element_ty), offs_d < D)
    tl.store(squares_ptr + token * PARTS + offs_p, tl.where(offs_p == 0, tl.sum(x * x), 0.0), offs_p < PARTS)


@dataclass(frozen=True)
class Config:
    BLOCK_D: int
    num_warps: int


def config(D: int) -> Config:
    """Tile of one row: 16 elements a thread is where the H200's loads stay 16 bytes wide without spilling at D = 16384."""
    block = triton.next_power_of_2(D)
    return Config(block, min(max(block // 512, 1), 16))


def _launch(op, x, residual, weight, eps, out, num_tokens):
    _check.require(x.dim() in (2, 3), op, "x", f"{x.dim()} dimensions", "[T, D] or [T, H, D]")
    rank3 = x.dim() == 3
    T, H, D = x.shape if rank3 else (x.shape[0], 1, x.shape[-1])
    shape = (T, H, D) if rank3 else (T, D)
    _check.require(1 <= D <= MAX_D, op, "x", f"D = {D}", f"1 to {MAX_D}")
    _check.tensor(op, "x", x, shape, _check.FLOATS)
    _check.tensor(op, "weight", weight, (D,), _check.FLOATS, x.device)
    _check.tensor(op, "out", out, shape, (x.dtype,), x.device, writes=True)
    _check.counter(op, "num_tokens", num_tokens, x.device)
    if residual is not None:
        _check.tensor(op, "residual", residual, (T, D), _check.FLOATS, x.device, writes=True)
    if T * H == 0:
        return
    c = config(D)
    _rmsnorm_kernel[(T * H,)](
        x, residual, weight, out, num_tokens,
        x.stride(0), x.stride(1) if rank3 else 0, 0 if residual is None else residual.stride(0), out.stride(0), out.stride(1) if rank3 else 0,
        eps, H=H, D=D, BLOCK_D=c.BLOCK_D, HAS_RESIDUAL=residual is not None, HAS_NUM_TOKENS=num_tokens is not None, num_warps=c.num_warps,
        **overlap())


def rmsnorm_out(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, num_tokens: torch.Tensor | None = None) -> None:
    """Writes rmsnorm(x) to `out`, which may be `x`. Shapes: see the module. Raises ValueError or TypeError on a misfit."""
    _launch("rmsnorm", x, None, weight, eps, out, num_tokens)


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, num_tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * weight over the last dimension; rows at or past num_tokens[0] are zeros."""
    out = torch.empty_like(x)
    rmsnorm_out(x, weight, eps, out, num_tokens)
    return out


def add_rmsnorm_out(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor,
                    num_tokens: torch.Tensor | None = None) -> None:
    """residual += x in place (rounded to residual's dtype), then writes rmsnorm(residual) to `out`; x [T, D]."""
    _check.require(x.dim() == 2, "add_rmsnorm", "x", f"{x.dim()} dimensions", "[T, D]")
    _launch("add_rmsnorm", x, residual, weight, eps, out, num_tokens)


def add_rmsnorm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6,
                num_tokens: torch.Tensor | None = None) -> torch.Tensor:
    """residual += x in place, then returns rmsnorm(residual)."""
    out = torch.empty_like(x)
    add_rmsnorm_out(x, residual, weight, eps, out, num_tokens)
    return out


def scale(x: torch.Tensor, weight: torch.Tensor, scaled: Scaled, num_tokens: torch.Tensor | None = None) -> None:
    """Fills `scaled` with x * weight and the sums of x^2, all in the first part, for a product that follows; x [T, D]. Rows at or past num_tokens[0]
    become zeros."""
    _check.tensor("scale", "x", x, (None, None), _check.FLOATS)
    T, D = x.shape
    _check.require(1 <= D <= MAX_D, "scale", "x", f"D = {D}", f"1 to {MAX_D}")
    _check.tensor("scale", "weight", weight, (D,), _check.FLOATS, x.device)
    parts = check_scaled("scale", "scaled", scaled, T, D, (x.dtype,), x.device, writes=True)
    _check.counter("scale", "num_tokens", num_tokens, x.device)
    if T == 0:
        return
    c = config(D)
    _scale_kernel[(T,)](x, weight, *scaled, num_tokens, x.stride(0), scaled.x.stride(0), D=D, PARTS=parts, BLOCK_D=c.BLOCK_D, num_warps=c.num_warps,
                        **overlap())
