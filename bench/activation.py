"""silu_and_mul against torch at the widths of Llama 3.2 1B, Llama 3.1 8B and 70B."""

import torch

from bench.harness import bench
from gkernels.kernels import activation


def cases():
    """(case, bytes moved, {provider: make})"""
    for F in (8192, 14336, 28672):
        for T in (1, 16, 64, 256, 2048):
            moved = 3 * T * F * 2                          # two halves in, one out
            yield f"silu_and_mul {T} x {F}", moved, {name: provider(name, T, F) for name in ("gkernels", "torch")}


def provider(name, T, F):
    def make(i):
        x, out = (torch.randn(T, width, dtype=torch.bfloat16, device="cuda") for width in (2 * F, F))
        if name == "torch":
            return lambda: torch.mul(torch.nn.functional.silu(x[:, :F]), x[:, F:], out=out)
        return lambda: activation.silu_and_mul_out(x, out)
    return make


def main():
    for case, moved, providers in cases():
        for name, make in providers.items():
            bench("activation", case, name, make, bytes=moved)
