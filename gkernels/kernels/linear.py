"""Linear:  out = x @ weight.T + bias,  alone, after an RMSNorm:  rmsnorm(row, norm) @ weight.T + bias,  or into a residual:  residual += it.

x [T, K] with any row stride, weight [N, K], which may be Quantized in the fused ops (see _quantized), bias [N] or None -> out [T, N] in x's
dtype, or float32 (logits); residual [T, N]. float32 sums, one cast. An RMSNorm is shared with the node before (see _product.Scaled): norm_linear
takes rows that are scaled by the norm already, and linear_residual leaves such rows for the next product. norm_linear may gather: row i of its
output is row index[i] of x.
Graph-safe: the path, the grid and the tiles depend on T, N and K only; rows at or past num_tokens[0] are written as zeros and change nothing.
Batch-invariant: all sums over K are made in one order, fixed by (N, K, dtype, kind of weight) and whether there is a workspace, so a row's bits
are the same for any T, tile, place and neighbours. `linear` alone is so up to MOST_TOKENS rows only, unless it is asked to stay `invariant`: above
them torch multiplies, faster, and its bits may depend on T. With a workspace K is split where N gives few programs.
On Hopper a product may read weight before the node ahead of it has ended, which must not write it; `linear` alone only where the weight is `ready`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _check, _product, _tile
from ._overlap import overlap, wait_for_node_before
from ._product import Scaled, Workspace
from ._quantized import PLAIN, Kind, Quantized, check_weight
from ._tile import MOST_TOKENS, Tile

if _check.HAS_GLUON:
    from ._nodes_hopper import _linear_streamed_kernel, operands

__all__ = ["MOST_TOKENS", "Quantized", "Scaled", "Workspace", "linear", "linear_out", "linear_residual", "norm_linear", "norm_linear_out"]


@triton.jit(do_not_specialize=["T", "X"], do_not_specialize_on_alignment=["num_tokens_ptr", "index_ptr"])
def _linear_kernel(
    x_ptr,             # [X, K]
    squares_ptr,       # [X, PARTS]; None without a norm
    index_ptr,         # [T] int32, rows of x; None where row i of out is that of x
    weight_ptr,        # [N, K], or as _quantized describes it
    scale_ptr,         # of a quantised weight; None for a plain one
    bias_ptr,          # [N]; None without a bias
    out_ptr,           # [T, N]; read too where IS_RESIDUAL
    norm_ptr,          # [N], of the norm after the residual; None without one
    scaled_ptr,        # [T, N] = residual * norm
    scaled_squares_ptr,    # [T, TILES]
    partials_ptr,      # float32; None without a workspace
    counters_ptr,      # int32; None without a workspace
    num_tokens_ptr,    # [1] int32; None when every row is live
    T, X, stride_xt, stride_ot, stride_st, eps,
    IS_RESIDUAL: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr,
):
    pid_m, pid_n, split, tile = _product.place(T, C)
    offs_m = pid_m * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    offs_n, mask_n, rows = _product.columns_of(pid_n, C)
    _product.enter(weight_ptr, scale_ptr, rows, split, C)
    # [BLOCK_N, BLOCK_M]
    out = out_ptr + offs_m.to(tl.int64)[None, :] * stride_ot + offs_n[:, None]
    mask_out = mask_n[:, None] & (offs_m < T)[None, :]
    if norm_ptr is not None:
        scaled = scaled_ptr + offs_m.to(tl.int64)[None, :] * stride_st + offs_n[:, None]
    live, mask_x, rows_x = T, offs_m < T, offs_m
    if num_tokens_ptr is not None:
        live = tl.minimum(tl.load(num_tokens_ptr), T)
        if not C.ONE:
            if pid_m * C.BLOCK_M >= live:
                zeros = tl.full((C.BLOCK_N, C.BLOCK_M), 0, out_ptr.dtype.element_ty)
                tl.store(out, zeros, mask_out & (split == 0))
                if norm_ptr is not None:
                    tl.store(scaled, zeros, mask_out & (split == 0))
                return
            mask_x = offs_m < live
    if index_ptr is not None:
        rows_x = tl.load(index_ptr + offs_m, mask_x, other=-1)
        mask_x &= (rows_x >= 0) & (rows_x < X)
    if IS_RESIDUAL:             # early, though only the tile's last program needs it: a load from L2 takes as long as the sums of a small product
        residual = tl.load(out, mask_out & mask_x[None, :], other=0.0).to(tl.float32)
    if squares_ptr is not None:
        squares = _product.load_squares(squares_ptr, rows_x, mask_x, PARTS)
    if norm_ptr is not None:    # early too: nobody has read it since the step before, so it comes from memory
        norm = tl.load(norm_ptr + offs_n, mask_n, other=0.0)
    zero = (T >> 31).to(tl.float32)
    if C.SERIAL:
        acc = _product.serial_sums(x_ptr, weight_ptr, scale_ptr, rows, rows_x, mask_x, stride_xt, zero, C)
    else:
        acc = _product.sums(x_ptr, weight_ptr, scale_ptr, rows, rows_x, mask_x, stride_xt, split, zero, C)
        if C.SPLITS > 1:
            n, m = tl.arange(0, C.BLOCK_N), tl.arange(0, C.BLOCK_M)
            if not _product.leave(acc, partials_ptr, counters_ptr, tile, split, n, m, C):
                return
            acc = _product.collect(partials_ptr, tile, n, m, C)
    if squares_ptr is not None:
        acc = _product.normed(acc, _product.inverse_rms(squares, eps, C), bias_ptr, rows, C)
    elif bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask_n, other=0.0).to(tl.float32)[:, None]
    if IS_RESIDUAL:
        acc += residual
    mask_live = mask_x & (offs_m < live)
    acc = tl.where(mask_live[None, :], acc, 0.0)
    if index_ptr is not None:
        acc = tl.where(((rows_x >= X) & (offs_m < live))[None, :], float("nan"), acc)
    if norm_ptr is not None:
        rounded = _product.write_rows(acc, norm, out, scaled, mask_out, mask_live)
        tl.store(scaled_squares_ptr + offs_m.to(tl.int64) * C.TILES + pid_n, _product.column_sums(rounded * rounded), mask_live)
    else:
        _product.write_rows(acc, None, out, None, mask_out, mask_live)


@triton.jit(do_not_specialize_on_alignment=["num_tokens_ptr"])
def _zero_pads_kernel(
    out_ptr,           # [T, N]
    num_tokens_ptr,    # [1] int32
    stride_ot,
    N: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    token = tl.program_id(0)
    if token >= tl.load(num_tokens_ptr):
        for n in range(0, N, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            tl.store(out_ptr + token.to(tl.int64) * stride_ot + offs_n, tl.full((BLOCK_N,), 0, out_ptr.dtype.element_ty), offs_n < N)


def config(T: int, N: int, K: int, dtype: torch.dtype, splits: bool = False, kind: Kind = PLAIN, leaves_squares: bool = False,
           stride: int = 8, streams: bool = True) -> Tile:
    """Splits and the order of K ignore T, which is what keeps rows bitwise the same. leaves_squares: of which every kind of weight has as many.
    streams: whether weight and x may come by the hardware's copies, the weight before the node ahead has ended."""
    c = _tile.streamed(T, N, K, dtype, splits, kind, stride) if streams else None
    if c is not None and (not leaves_squares or c.parts == _tile.parts(N, dtype, splits)):
        return c
    c = _tile.tile(T, N, K, dtype, splits, kind=kind, shares=not leaves_squares)
    return _tile.plain_streamed(c, T, dtype, stride) if streams else c


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
        _zero_pads_kernel[(T,)](out, num_tokens, out.stride(0), N=N, BLOCK_N=min(triton.next_power_of_2(N), 4096), num_warps=4, **overlap())


def _launch(op, x, checked, out, bias, num_tokens, workspace, squares=None, parts=0, eps=0.0, index=None, is_residual=False, norm=None, scaled=None,
            invariant=True, ready=True):
    """checked: what `check_weight` returns."""
    weight, scale, kind = checked
    (X, K), N, T = x.shape, weight.shape[0], x.shape[0] if index is None else index.shape[0]
    _check.require(K >= 1 and N >= 1, op, "weight", f"shape [{N}, {K}]", "at least one row and one column")
    _check.tensor(op, "residual" if is_residual else "out", out, (T, N), (x.dtype,) if is_residual or x.dtype == torch.float32 else
                  (x.dtype, torch.float32), x.device, writes=True)
    if bias is not None:
        _check.tensor(op, "bias", bias, (N,), (x.dtype,), x.device)
    _check.counter(op, "num_tokens", num_tokens, x.device)
    if T > MOST_TOKENS and kind == PLAIN and not invariant:
        _torch_linear(x, weight, bias, out, num_tokens)
        return
    c = config(T, N, K, x.dtype, workspace is not None, kind, norm is not None, x.stride(0), ready and index is None)
    if norm is not None:
        _check.tensor(op, "norm", norm, (N,), (x.dtype,), x.device)
        left = _product.check_scaled(op, "scaled", scaled, T, N, (x.dtype,), x.device, writes=True)
        _check.require(left == c.parts, op, "scaled.squares", f"{left} parts", f"{c.parts}; Scaled.empty makes that many")
    if T == 0:
        return
    tensors = bias, out, norm, *(scaled or (None, None)), *_product.check_workspace(op, workspace, c, T, x.device), num_tokens
    numbers = out.stride(0), scaled.x.stride(0) if scaled else 0, eps
    constants = dict(IS_RESIDUAL=is_residual, PARTS=parts, C=c) | c.options()
    if c.IS_STREAMED:
        _linear_streamed_kernel[c.grid(T)](*operands(weight, x, c), squares, scale, *tensors, T, *numbers, **constants)
    else:
        _linear_kernel[c.grid(T)](x, squares, index, weight, scale, *tensors, T, X, x.stride(0), *numbers, **constants)


def linear_out(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None,
               num_tokens: torch.Tensor | None = None, workspace: Workspace | None = None, invariant: bool = False, ready: bool = False) -> None:
    """Writes x @ weight.T + bias to `out`, which must not overlap `x`. Shapes: see the module. invariant: a row's bits do not depend on T, also
    above MOST_TOKENS rows. ready: the node ahead does not write `weight`, so it may be fetched before that has ended. Raises ValueError or
    TypeError."""
    _check.tensor("linear", "x", x, (None, None), _check.FLOATS)
    checked = check_weight("linear", weight, None, x.shape[1], x)
    _launch("linear", x, checked, out, bias, num_tokens, workspace, invariant=invariant, ready=ready)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, num_tokens: torch.Tensor | None = None,
           dtype: torch.dtype | None = None, workspace: Workspace | None = None, invariant: bool = False, ready: bool = False) -> torch.Tensor:
    """Returns x @ weight.T + bias in x's dtype, or in `dtype`; rows at or past num_tokens[0] are zeros."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype, device=x.device)
    linear_out(x, weight, out, bias, num_tokens, workspace, invariant, ready)
    return out


def norm_linear_out(scaled: Scaled, weight: torch.Tensor | Quantized, eps: float, out: torch.Tensor, bias: torch.Tensor | None = None,
                    num_tokens: torch.Tensor | None = None, workspace: Workspace | None = None, index: torch.Tensor | None = None) -> None:
    """Writes rmsnorm(row, norm, eps) @ weight.T + bias to `out`, which must not overlap `scaled`. With `index`, int32 [T'],
    they are those rows: zeros for a negative one, NaN for one that does not exist."""
    op, x = "norm_linear", scaled.x
    parts = _product.check_scaled(op, "scaled", scaled, None, None, _check.FLOATS, None)
    if index is not None:
        _check.tensor(op, "index", index, (None,), (torch.int32,), x.device, aligned=False)
    _launch(op, x, check_weight(op, weight, None, x.shape[1], x), out, bias, num_tokens, workspace, scaled.squares, parts, eps, index)


def norm_linear(scaled: Scaled, weight: torch.Tensor | Quantized, eps: float = 1e-6, bias: torch.Tensor | None = None,
                num_tokens: torch.Tensor | None = None, dtype: torch.dtype | None = None, workspace: Workspace | None = None,
                index: torch.Tensor | None = None) -> torch.Tensor:
    """Returns rmsnorm(row, norm, eps) @ weight.T + bias in x's dtype, or in `dtype`; rows at or past num_tokens[0] are zeros."""
    x, rows = scaled.x, scaled.x if index is None else index
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=dtype or x.dtype, device=x.device)
    norm_linear_out(scaled, weight, eps, out, bias, num_tokens, workspace, index)
    return out


def linear_residual(x: torch.Tensor, weight: torch.Tensor | Quantized, residual: torch.Tensor, bias: torch.Tensor | None = None,
                    num_tokens: torch.Tensor | None = None, workspace: Workspace | None = None, norm: torch.Tensor | None = None,
                    scaled: Scaled | None = None) -> None:
    """residual += x @ weight.T + bias in place, rounded once; rows at or past num_tokens[0] become zeros. With `norm` [N] of the RMSNorm that
    follows, it fills `scaled`, which `Scaled.empty` makes."""
    op = "linear_residual"
    _check.tensor(op, "x", x, (None, None), _check.FLOATS)
    _check.require((norm is None) == (scaled is None), op, "norm", "one of norm and scaled", "both or none")
    checked = check_weight(op, weight, None, x.shape[1], x)
    _launch(op, x, checked, residual, bias, num_tokens, workspace, is_residual=True, norm=norm, scaled=scaled)
