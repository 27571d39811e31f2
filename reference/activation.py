"""SwiGLU's activation in plain PyTorch. Twin of gkernels/kernels/activation.py."""

import torch

from .rmsnorm import zero_pads


def silu_and_mul(x, num_tokens=None):
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    y = (torch.nn.functional.silu(gate) * up).to(x.dtype)
    return y if num_tokens is None else zero_pads(y, num_tokens)
