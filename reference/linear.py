"""Linear in plain PyTorch, alone, after an RMSNorm and into a residual. Twin of gkernels/kernels/linear.py."""

import torch

from .rmsnorm import rmsnorm, zero_pads


def linear(x, weight, bias=None, num_tokens=None, dtype=None):
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    y = y.to(dtype or x.dtype)
    return y if num_tokens is None else zero_pads(y, num_tokens)


def norm_linear(x, norm, weight, eps=1e-6, bias=None, num_tokens=None, dtype=None):
    return linear(rmsnorm(x, norm, eps), weight, bias, num_tokens, dtype)


def linear_residual(x, weight, residual, bias=None, num_tokens=None):
    """Adds to residual in place, as the kernel does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = (residual.to(wide) + linear(x, weight, bias).to(wide)).to(residual.dtype)
    residual.copy_(total if num_tokens is None else zero_pads(total, num_tokens))
