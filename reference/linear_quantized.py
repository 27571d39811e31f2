"""Linear over quantised weights in plain PyTorch. Twin of gkernels/kernels/linear_quantized.py."""

import torch

from .linear import linear


def linear_fp8(x, weight, scale, bias=None, num_tokens=None, dtype=None):
    return _exactly(x, fp8_values(weight, scale), bias, num_tokens, dtype)


def linear_int4(x, weight, scales, bias=None, num_tokens=None, dtype=None):
    return _exactly(x, int4_values(weight, scales, x.shape[1]), bias, num_tokens, dtype)


def _exactly(x, weight, bias, num_tokens, dtype):
    """Products in float32, or in float64 for float64 inputs; one rounding to x's dtype, or to `dtype`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide), num_tokens).to(dtype or x.dtype)


def fp8_values(weight, scale):
    """float64 [N, K] of a float8 weight with a scale a row, [N], or one for each 128 x 128 elements."""
    weight, scale = weight.double(), scale.double()
    if scale.dim() == 1:
        return weight * scale[:, None]
    return weight * scale.repeat_interleave(128, 0)[:weight.shape[0]].repeat_interleave(128, 1)[:, :weight.shape[1]]


def int4_values(weight, scales, K):
    """float64 [N, K] of words in blocks of 32: nibble i of word j in block b is q of column 256 b + 32 i + j. A group's constant is its float32
    scale, the low five bits replaced by its zero point."""
    q = torch.stack([weight.view(len(weight), -1, 32) >> 4 * i & 15 for i in range(8)], 2).flatten(1)[:, :K]
    zero, scale = ((t.T.repeat_interleave(K // len(scales), 1)) for t in (scales & 31, (scales & ~31).view(torch.float32)))
    return (q - zero).double() * scale.double()
