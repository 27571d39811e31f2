"""RMSNorm in plain PyTorch. Twin of gkernels/kernels/rmsnorm.py."""

import torch


def rmsnorm(x, weight, eps=1e-6, num_tokens=None):
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(wide)).to(x.dtype)
    return y if num_tokens is None else zero_pads(y, num_tokens)


def add_rmsnorm(x, residual, weight, eps=1e-6, num_tokens=None):
    """Adds x to residual in place, as the kernel does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = (residual.to(wide) + x.to(wide)).to(residual.dtype)
    residual.copy_(total if num_tokens is None else zero_pads(total, num_tokens))
    return rmsnorm(residual.to(wide), weight, eps, num_tokens).to(x.dtype)


def scale(x, weight, scaled, num_tokens=None):
    """Fills scaled = (x * weight, sums of x^2), the latter in the first of its parts."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = (x.to(wide) * weight.to(wide)).to(x.dtype)
    scaled[0].copy_(y if num_tokens is None else zero_pads(y, num_tokens))
    scaled[1].zero_()[:, 0] = x.to(scaled[1].dtype).square().sum(-1)


def finish(scaled, eps=1e-6):
    """rmsnorm of the rows that `scale` was given, up to one rounding."""
    x, squares = scaled
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * torch.rsqrt(squares.to(wide).sum(-1, keepdim=True) / x.shape[-1] + eps)).to(x.dtype)


def zero_pads(y, num_tokens):
    """Rows at or past num_tokens[0] as exact zeros, whatever they held."""
    live = torch.arange(y.shape[0], device=y.device) < num_tokens
    return torch.where(live.view(-1, *[1] * (y.dim() - 1)), y, torch.zeros_like(y))
