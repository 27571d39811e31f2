"""The last product and the draw in plain PyTorch. Twin of gkernels/kernels/head.py."""

import torch

from .linear import norm_linear
from .sampling import sample


def draw(scaled, weight, eps, temperature, seed, position, seq_lens, status, bias=None, index=None):
    """One token a row, int32 [R]; ors flags into status in place, as the kernel does. scaled: (x, squares) as `scale` fills it."""
    wide = torch.promote_types(scaled[0].dtype, torch.float32)
    logits, off = norm_linear(scaled, weight, eps, bias, dtype=wide, index=index), torch.zeros_like(status)
    return sample(logits, temperature, off, off.float() + 1, off.float(), seed, position, seq_lens, status)
