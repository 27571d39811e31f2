"""linear_fp8 and linear_int4 against torch's bfloat16 product at the products of Llama 3.2 1B and Llama 3.1 8B. Each row counts the bytes of its
own weights and scales, so torch's move twice and four times as much."""

import torch

from bench.harness import bench
from bench.linear import SHAPES
from gkernels.kernels import linear_quantized as room

FORMATS = {"fp8 row": 1.0, "fp8 block": 1 + 4 / 128**2, "int4 128": 0.5 + 4 / 128}      # bytes a weight, with its part of a block's or group's scale


def cases():
    """(case, floating-point operations, {provider: (bytes moved, make)}); int4 in groups of 128 columns."""
    for name, (N, K) in SHAPES.items():
        if "logits" in name:                                                          # checkpoints keep the head in 16 bits
            continue
        for T in (1, 16, 64, 256):
            rows = (T * K + T * N) * 2
            for kind, size in FORMATS.items():
                yield f"{name} {T} x {N} x {K} {kind}", 2 * T * N * K, {"gkernels": (int(N * K * size) + rows, ours(kind, T, N, K)),
                                                                        "torch": (N * K * 2 + rows, torchs(T, N, K))}


def ours(kind, T, N, K, device="cuda"):
    def make(i):
        x, out = (torch.randn(T, n, dtype=torch.bfloat16, device=device) for n in (K, N))
        if kind.startswith("fp8"):
            weight = torch.randn(N, K, dtype=torch.bfloat16, device=device).to(torch.float8_e4m3fn)
            scale = torch.ones(N if kind == "fp8 row" else (-(-N // 128), -(-K // 128)), device=device)
            return lambda: room.linear_fp8_out(x, weight, scale, out)
        weight = torch.randint(-2**31, 2**31, (N, -(-K // 256) * 32), dtype=torch.int32, device=device)
        scales = torch.ones(K // int(kind.split()[1]), N, device=device).view(torch.int32) | 8
        return lambda: room.linear_int4_out(x, weight, scales, out)
    return make


def torchs(T, N, K, device="cuda"):
    def make(i):
        x, weight, out = (torch.randn(n, m, dtype=torch.bfloat16, device=device) for n, m in ((T, K), (N, K), (T, N)))
        return lambda: torch.mm(x, weight.T, out=out)
    return make


def main():
    for case, flops, providers in cases():
        for name, (moved, make) in providers.items():
            bench("linear_quantized", case, name, make, bytes=moved, flops=flops)
