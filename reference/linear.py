"""Linear in plain PyTorch, alone, after an RMSNorm and into a residual. Twin of gkernels/kernels/linear.py."""

import torch

from .rmsnorm import finish, scale, zero_pads


def linear(x, weight, bias=None, num_tokens=None, dtype=None):
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    y = y.to(dtype or x.dtype)
    return y if num_tokens is None else zero_pads(y, num_tokens)


def norm_linear(scaled, weight, eps=1e-6, bias=None, num_tokens=None, dtype=None, index=None):
    """scaled: (x, squares) as `scale` fills it."""
    y = linear(finish(scaled, eps), weight, bias, None, dtype)
    y = y if index is None else gather(y, index)
    return y if num_tokens is None else zero_pads(y, num_tokens)


def gather(y, index):
    """Rows of y: zeros for a negative index, NaN for one that does not exist."""
    zeros, nan = (torch.full_like(y[:1], value) for value in (0.0, float("nan")))
    return torch.cat([y, zeros, nan])[torch.where(index < 0, len(y), torch.where(index < len(y), index, len(y) + 1)).long()]


def linear_residual(x, weight, residual, bias=None, num_tokens=None, norm=None, scaled=None):
    """Adds to residual in place, as the kernel does, and fills `scaled`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = (residual.to(wide) + linear(x, weight, bias).to(wide)).to(residual.dtype)
    residual.copy_(total if num_tokens is None else zero_pads(total, num_tokens))
    if norm is not None:
        scale(residual, norm, scaled, num_tokens)
