"""Linear:  out = x @ weight.T + bias,  alone, after an RMSNorm:  rmsnorm(x, norm) @ weight.T + bias,  or into a residual:  residual += it.

x [T, K] with any row stride, weight [N, K], bias [N] or None, norm [K] -> out [T, N] in x's dtype, or float32 (logits); residual [T, N].
float32 sums, one cast. The norm's dot sees x * norm rounded to x's dtype (in float16 it must stay below 65504) and is scaled by 1 / rms after.
Graph-safe: the path, the grid and the tiles depend on T, N and K only; rows at or past num_tokens[0] are written as zeros and change nothing.
Batch-invariant up to MOST_TOKENS rows: all sums over K are made in one order, fixed by (N, K, dtype) and whether there is a workspace, so a
row's bits are the same for any T, tile, place and neighbours. Above it torch multiplies for `linear`, whose bits may depend on T; the fused
ops take no more rows. With a workspace K is split where N gives few programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _check, _product
from ._product import MOST_TOKENS, Tile, Workspace

__all__ = ["MOST_TOKENS", "Workspace", "linear", "linear_out", "linear_residual", "norm_linear", "norm_linear_out"]


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _linear_kernel(
    x_ptr,             # [T, K]
    norm_ptr,          # [K]; None without a norm
    weight_ptr,        # [N, K]
    bias_ptr,          # [N]; None without a bias
    out_ptr,           # [T, N]; read too where IS_RESIDUAL
    partials_ptr,      # float32; None without a workspace
    counters_ptr,      # int32; None without a workspace
    num_tokens_ptr,    # [1] int32; None when every row is live
    T, stride_xt, stride_ot, eps,
    IS_RESIDUAL: tl.constexpr, C: tl.constexpr,
):
    pid_m, pid_n, split, tile = _product.place(T, C)
    offs_m, offs_n = pid_m * C.BLOCK_M + tl.arange(0, C.BLOCK_M), pid_n * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    _product.enter(weight_ptr, offs_n.to(tl.int64), split, C)
    # [BLOCK_N, BLOCK_M]
    out = out_ptr + offs_m.to(tl.int64)[None, :] * stride_ot + offs_n[:, None]
    mask_out = (offs_n < C.N)[:, None] & (offs_m < T)[None, :]
    live = T
    if num_tokens_ptr is not None:
        live = tl.minimum(tl.load(num_tokens_ptr), T)
        if pid_m * C.BLOCK_M >= live:
            tl.store(out, tl.full((C.BLOCK_N, C.BLOCK_M), 0, out_ptr.dtype.element_ty), mask_out & (split == 0))
            return
    mask_live = offs_m < live
    if IS_RESIDUAL:             # early, though only the tile's last program needs it: a load from L2 takes as long as the sums of a small product
        residual = tl.load(out, mask_out & mask_live[None, :], other=0.0).to(tl.float32)
    acc, gram = _product.sums(x_ptr, weight_ptr, norm_ptr, offs_n.to(tl.int64), offs_m, mask_live, stride_xt, split, (T >> 31).to(tl.float32), C)
    square = _product.squares(gram, C)
    if C.SPLITS > 1:
        if not _product.leave(acc, square, partials_ptr, counters_ptr, tile, split, norm_ptr is not None, C):
            return
        acc, square = _product.collect(acc, square, partials_ptr, tile, norm_ptr is not None, C)
    if norm_ptr is not None:
        acc = _product.normed(acc, square, bias_ptr, offs_n, eps, C)
    elif bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, offs_n < C.N, other=0.0).to(tl.float32)[:, None]
    if IS_RESIDUAL:
        acc += residual
    tl.store(out, tl.where(mask_live[None, :], acc, 0.0).to(out_ptr.dtype.element_ty), mask_out)


@triton.jit(do_not_specialize_on_alignment=["num_tokens_ptr"])
def _zero_pads_kernel(
    out_ptr,           # [T, N]
    num_tokens_ptr,    # [1] int32
    stride_ot,
    N: tl.constexpr, BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0)
    if token >= tl.load(num_tokens_ptr):
        for n in range(0, N, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            tl.store(out_ptr + token.to(tl.int64) * stride_ot + offs_n, tl.full((BLOCK_N,), 0, out_ptr.dtype.element_ty), offs_n < N)


def config(T: int, N: int, K: int, dtype: torch.dtype, splits: bool = False, normed: bool = False) -> Tile:
    """BLOCK_N, BLOCK_K, SPLITS and the warps ignore T, which is what keeps rows bitwise the same."""
    return _product.tile(T, N, K, dtype, splits, normed)


def _torch_linear(x, weight, bias, out, num_tokens):
    if not x.is_cuda:            # a CPU's 16-bit product may read past the end of a row into the next, and 0 * NaN is NaN
        wide = torch.mm(x.float(), weight.float().T)
        out.copy_(wide if bias is None else wide + bias)
    elif out.dtype != x.dtype:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
        if bias is not None:
            out.add_(bias)
    elif bias is not None:
        torch.addmm(bias, x, weight.T, out=out)
    else:
        torch.mm(x, weight.T, out=out)
    if num_tokens is not None:
        T, N = out.shape
        _zero_pads_kernel[(T,)](out, num_tokens, out.stride(0), N=N, BLOCK_N=min(triton.next_power_of_2(N), 4096), num_warps=4)


def _launch(op, x, norm, weight, eps, out, bias, num_tokens, workspace, is_residual=False):
    _check.tensor(op, "x", x, (None, None), _check.FLOATS)
    T, K = x.shape
    _check.tensor(op, "weight", weight, (None, K), (x.dtype,), x.device, dense=2)
    N = weight.shape[0]
    _check.require(K >= 1 and N >= 1, op, "weight", f"shape [{N}, {K}]", "at least one row and one column")
    _check.tensor(op, "residual" if is_residual else "out", out, (T, N), (x.dtype,) if is_residual or x.dtype == torch.float32 else
                  (x.dtype, torch.float32), x.device, writes=True)
    if norm is not None:
        _product.check_norm(op, norm, K, x)
    if bias is not None:
        _check.tensor(op, "bias", bias, (N,), (x.dtype,), x.device)
    _check.counter(op, "num_tokens", num_tokens, x.device)
    if T == 0:
        return
    if T > MOST_TOKENS:
        _check.require(op == "linear", op, "x", f"{T} rows", f"at most {MOST_TOKENS}; call the norm, linear and the add apart")
        _torch_linear(x, weight, bias, out, num_tokens)
        return
    c = config(T, N, K, x.dtype, workspace is not None, norm is not None)
    _linear_kernel[c.grid(T)](
        x, norm, weight, bias, out, *_product.check_workspace(op, workspace, c, T, x.device), num_tokens, T, x.stride(0), out.stride(0), eps,
        IS_RESIDUAL=is_residual, C=c, **c.options())


def linear_out(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None,
               num_tokens: torch.Tensor | None = None, workspace: Workspace | None = None) -> None:
    """Writes x @ weight.T + bias to `out`, which must not overlap `x`. Shapes: see the module. Raises ValueError or TypeError."""
    _launch("linear", x, None, weight, 0.0, out, bias, num_tokens, workspace)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, num_tokens: torch.Tensor | None = None,
           dtype: torch.dtype | None = None, workspace: Workspace | None = None) -> torch.Tensor:
    """Returns x @ weight.T + bias in x's dtype, or in `dtype`; rows at or past num_tokens[0] are zeros."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype, device=x.device)
    linear_out(x, weight, out, bias, num_tokens, workspace)
    return out


def norm_linear_out(x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, bias: torch.Tensor | None = None,
                    num_tokens: torch.Tensor | None = None, workspace: Workspace | None = None) -> None:
    """Writes rmsnorm(x, norm, eps) @ weight.T + bias to `out`, which must not overlap `x`, for at most MOST_TOKENS rows."""
    _launch("norm_linear", x, norm, weight, eps, out, bias, num_tokens, workspace)


def norm_linear(x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, bias: torch.Tensor | None = None,
                num_tokens: torch.Tensor | None = None, dtype: torch.dtype | None = None, workspace: Workspace | None = None) -> torch.Tensor:
    """Returns rmsnorm(x, norm, eps) @ weight.T + bias in x's dtype, or in `dtype`; rows at or past num_tokens[0] are zeros."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype, device=x.device)
    norm_linear_out(x, norm, weight, eps, out, bias, num_tokens, workspace)
    return out


def linear_residual(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None,
                    num_tokens: torch.Tensor | None = None, workspace: Workspace | None = None) -> None:
    """residual += x @ weight.T + bias in place, rounded once, for at most MOST_TOKENS rows; rows at or past num_tokens[0] become zeros."""
    _launch("linear_residual", x, None, weight, 0.0, residual, bias, num_tokens, workspace, is_residual=True)
