"""The rest of an RMSNorm, gate and up projections and SwiGLU in one node:  out = silu(g) * u,  [g, u] = rmsnorm(row, norm) @ weight.T + bias.

scaled: x = row * norm [T, K] with any row stride, and the rows' squares (see _product.Scaled); weight [2F, K] (the gate's rows first, then the up
projection's), which may be Quantized (see _quantized), bias [2F] or None -> out [T, F]. float32 sums; g and u are never rounded, out once.
Graph-safe: the grid and the tiles depend on T, F and K only; rows at or past num_tokens[0] are written as zeros and change nothing.
Batch-invariant: see _product. Beyond MOST_TOKENS rows rmsnorm, linear and silu_and_mul apart are faster.
On Hopper weight may be read before the node ahead has ended, which must not write it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _check, _product, _tile
from ._product import Scaled
from ._quantized import PLAIN, Kind, Quantized, check_weight
from ._tile import Tile

if _check.HAS_GLUON:
    from ._nodes_hopper import _norm_gate_up_streamed_kernel, operands


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _norm_gate_up_kernel(
    x_ptr,             # [T, K]
    squares_ptr,       # [T, PARTS]
    weight_ptr,        # [2F, K], or as _quantized describes it
    scale_ptr,         # of a quantised weight; None for a plain one
    bias_ptr,          # [2F]; None without a bias
    out_ptr,           # [T, F]
    num_tokens_ptr,    # [1] int32; None when every row is live
    T, stride_xt, stride_ot, eps,
    F: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr,
):
    BLOCK_M: tl.constexpr = C.BLOCK_M
    HALF: tl.constexpr = C.BLOCK_N // 2
    pid_m, pid_n, split, _ = _product.place(T, C)
    offs_m, offs_n, offs_f = pid_m * C.BLOCK_M + tl.arange(0, C.BLOCK_M), tl.arange(0, C.BLOCK_N), pid_n * HALF + tl.arange(0, HALF)
    # [BLOCK_N]: HALF rows of the gate, then their rows of up; past F as good as past 2F
    column = pid_n * HALF + offs_n % HALF
    rows = tl.where(column < F, offs_n // HALF * F + column, 2 * F).to(tl.int64)
    _product.enter(weight_ptr, scale_ptr, rows, split, C)
    # [HALF, BLOCK_M]
    out = out_ptr + offs_m.to(tl.int64)[None, :] * stride_ot + offs_f[:, None]
    mask_out = (offs_f < F)[:, None] & (offs_m < T)[None, :]
    live, mask_x = T, offs_m < T
    if num_tokens_ptr is not None:
        live = tl.minimum(tl.load(num_tokens_ptr), T)
        if not C.ONE:
            if pid_m * C.BLOCK_M >= live:
                tl.store(out, tl.full((HALF, BLOCK_M), 0, out_ptr.dtype.element_ty), mask_out)
                return
            mask_x = offs_m < live
    squares = _product.load_squares(squares_ptr, offs_m, mask_x, PARTS)
    acc = _product.sums(x_ptr, weight_ptr, scale_ptr, rows, offs_m, mask_x, stride_xt, split, (T >> 31).to(tl.float32), C)
    gate, up = _product.halves(_product.normed(acc, _product.inverse_rms(squares, eps, C), bias_ptr, rows, C), C)
    out_tile = tl.where((offs_m < live)[None, :], gate / (1.0 + tl.exp(-gate)) * up, 0.0)
    tl.store(out, out_tile.to(out_ptr.dtype.element_ty), mask_out)


def config(T: int, F: int, K: int, dtype: torch.dtype, kind: Kind = PLAIN, stride: int = 8) -> Tile:
    """Tiles of as many rows of gate as of up; F = 8192 makes 256 programs, so K is never split."""
    if (c := _tile.streamed(T, 2 * F, K, dtype, False, kind, stride)) is not None:
        return c
    half = 128 if _check.INTERPRETED else 32 if dtype != torch.float32 and F >= 32 * _tile.MULTIPROCESSORS else 16
    return _tile.plain_streamed(_tile.tile(T, 2 * F, K, dtype, False, (2 * half, triton.cdiv(F, half)), kind), T, dtype, stride)


def norm_gate_up_out(scaled: Scaled, weight: torch.Tensor | Quantized, eps: float, out: torch.Tensor, bias: torch.Tensor | None = None,
                     num_tokens: torch.Tensor | None = None) -> None:
    """Writes silu(g) * u to `out`, which must not overlap `scaled`. Shapes: see the module. Raises ValueError or TypeError."""
    op, x = "norm_gate_up", scaled.x
    parts = _product.check_scaled(op, "scaled", scaled, None, None, _check.FLOATS, None)
    T, K = x.shape
    weight, scale, kind = check_weight(op, weight, None, K, x)
    N = weight.shape[0]
    _check.require(K >= 1 and N >= 2 and N % 2 == 0, op, "weight", f"shape [{N}, {K}]", "an even number of rows, gate rows then up rows")
    _check.tensor(op, "out", out, (T, N // 2), (x.dtype,), x.device, writes=True)
    if bias is not None:
        _check.tensor(op, "bias", bias, (N,), (x.dtype,), x.device)
    _check.counter(op, "num_tokens", num_tokens, x.device)
    if T == 0:
        return
    c = config(T, N // 2, K, x.dtype, kind, x.stride(0))
    if c.IS_STREAMED:
        _norm_gate_up_streamed_kernel[c.grid(T)](*operands(weight, x, c), scaled.squares, scale, bias, out, num_tokens, T, out.stride(0), eps,
                                                 F=N // 2, PARTS=parts, C=c, **c.options())
        return
    _norm_gate_up_kernel[c.grid(T)](x, scaled.squares, weight, scale, bias, out, num_tokens, T, x.stride(0), out.stride(0), eps, F=N // 2,
                                    PARTS=parts, C=c, **c.options())


def norm_gate_up(scaled: Scaled, weight: torch.Tensor | Quantized, eps: float = 1e-6, bias: torch.Tensor | None = None,
                 num_tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Returns silu(g) * u, [g, u] = rmsnorm(row, norm, eps) @ weight.T + bias; rows at or past num_tokens[0] are zeros."""
    out = scaled.x.new_empty(scaled.x.shape[0], weight.shape[0] // 2)
    norm_gate_up_out(scaled, weight, eps, out, bias, num_tokens)
    return out
