"""The rest of an RMSNorm, gate and up projections and SwiGLU in plain PyTorch. Twin of gkernels/kernels/gate_up.py."""

from .activation import silu_and_mul
from .linear import norm_linear


def norm_gate_up(scaled, weight, eps=1e-6, bias=None, num_tokens=None):
    return silu_and_mul(norm_linear(scaled, weight, eps, bias), num_tokens)
