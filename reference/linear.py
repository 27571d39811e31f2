"""Linear in plain PyTorch. Twin of gkernels/kernels/linear.py."""

import torch

from .rmsnorm import zero_pads


def linear(x, weight, bias=None, num_tokens=None, dtype=None):
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    y = y.to(dtype or x.dtype)
    return y if num_tokens is None else zero_pads(y, num_tokens)
