"""Linear over quantised weights:  out = x @ W.T + bias, where W stays in fp8 or int4 and every product is with its exact value.

x [T, K] with any row stride, bias [N] or None -> out [T, N] in x's dtype, or float32 (logits). float32 sums, one cast.
  fp8   weight float8_e4m3fn [N, K]; scale float32 [N], one a row, or [ceil(N / 128), ceil(K / 128)], one a block: W = weight * scale
  int4  weight int32 [N, ceil(K / 256) * 32], scales int32 [K / G, N], both from `pack_gptq` or `pack_awq`: W = (q - zero) * scale of the group.
        G is 32, 64, 128, a multiple of 256, or K
The kernel is that of `linear`, for any T; how it meets weights and scales, see _quantized. fp8 needs a GPU that converts it, capability 8.9 or later.
On Hopper it may read the weight before the node ahead of it has ended, which must not write it; a node before that one may.
Graph-safe: the grid and the tiles depend on T, N and K only; rows at or past num_tokens[0] are written as zeros and change nothing.
Batch-invariant for any T: one program sums over K in one order, fixed by (N, K, dtype, kind), so a row's bits are the same for any T, tile, place
and neighbours.
"""

from __future__ import annotations

import torch

from . import _check, linear
from ._int4 import pack_awq, pack_gptq
from ._quantized import FLOAT8, Quantized, check_scale, check_weight

__all__ = ["Quantized", "check_fp8", "linear_fp8", "linear_fp8_out", "linear_int4", "linear_int4_out", "pack_awq", "pack_gptq"]


def linear_fp8_out(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None,
                   num_tokens: torch.Tensor | None = None) -> None:
    """Writes x @ W.T + bias to `out`, which must not overlap `x`. Shapes: see the module. Raises ValueError or TypeError."""
    _run("linear_fp8", x, Quantized(weight, scale), ("weight", "scale"), FLOAT8, out, bias, num_tokens)


def linear_fp8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None,
               num_tokens: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns x @ W.T + bias in x's dtype, or in `dtype`; rows at or past num_tokens[0] are zeros."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype, device=x.device)
    linear_fp8_out(x, weight, scale, out, bias, num_tokens)
    return out


def linear_int4_out(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None,
                    num_tokens: torch.Tensor | None = None) -> None:
    """Writes x @ W.T + bias to `out`, which must not overlap `x`. Shapes: see the module. Raises ValueError or TypeError."""
    _run("linear_int4", x, Quantized(weight, scales), ("weight", "scales"), torch.int32, out, bias, num_tokens)


def linear_int4(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None,
                num_tokens: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns x @ W.T + bias in x's dtype, or in `dtype`; rows at or past num_tokens[0] are zeros."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype, device=x.device)
    linear_int4_out(x, weight, scales, out, bias, num_tokens)
    return out


def _run(op, x, weight, names, dtype, out, bias, num_tokens):
    _check.tensor(op, "x", x, (None, None), _check.FLOATS)
    linear._launch(op, x, check_weight(op, weight, None, x.shape[1], x, names, (dtype,)), out, bias, num_tokens, None)


def check_fp8(weight: torch.Tensor, scale: torch.Tensor) -> None:
    """What a loader asks of an fp8 weight and its scale, once: shapes as in the module, finite contents, and a GPU that converts fp8. It waits for
    the device. Raises ValueError or TypeError."""
    op = "linear_fp8"
    _check.tensor(op, "weight", weight, (None, None), (FLOAT8,), dense=2)
    N, K = weight.shape
    check_scale(op, scale, N, K, weight.device)
    _check.require(bool(scale.isfinite().all()), op, "scale", "NaN or infinity", "finite numbers; convert the checkpoint again")
    _check.require(bool((weight.view(torch.uint8) & 127 != 127).all()), op, "weight", "NaN", "finite numbers; convert the checkpoint again")
    if weight.is_cuda and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(weight.device)
        _check.require((major, minor) >= (8, 9), op, "weight", f"a GPU of capability {major}.{minor}", "8.9 or later, which converts float8_e4m3fn; "
                       "load the checkpoint in bfloat16")
