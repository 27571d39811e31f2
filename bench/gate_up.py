"""norm_gate_up, whose norm the node before has begun, against torch's operations, and against this library's own three nodes, at the widths of Llama
3.2 1B and Llama 3.1 8B."""

import torch
import torch.nn.functional as F

from bench.harness import bench
from gkernels.kernels import activation, gate_up, linear, rmsnorm

SHAPES = {"1B": (8192, 2048), "8B": (14336, 4096)}


def provider(name, T, width, K):
    def make(i):
        new = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, device="cuda")
        x, norm, weight, out = new(T, K), new(K), new(2 * width, K), new(T, width)
        normed, both = new(T, K), new(T, 2 * width)
        if name == "gkernels":
            scaled = linear.Scaled.empty(T, K, torch.bfloat16, "cuda", splits=True)
            rmsnorm.scale(x, norm, scaled)
            return lambda: gate_up.norm_gate_up_out(scaled, weight, 1e-5, out)

        def chain():
            if name == "torch":
                gate, up = F.linear(F.rms_norm(x, (K,), norm, 1e-5), weight).chunk(2, -1)
                return torch.mul(F.silu(gate), up, out=out)
            rmsnorm.rmsnorm_out(x, norm, 1e-5, normed)
            linear.linear_out(normed, weight, both)
            activation.silu_and_mul_out(both, out)
        return chain
    return make


def main():
    for model, (width, K) in SHAPES.items():
        for T in (1, 16, 64):
            moved = 2 * width * K * 2 + T * K * 2 + T * width * 2                     # weights and x in, out written once
            for name in ("gkernels", "unfused", "torch"):
                bench("gate_up", f"{model} {T} x 2 x {width} x {K}", name, provider(name, T, width, K), bytes=moved, flops=4 * T * width * K)
