"""kv_write against torch's indexed assignment, at Llama 3.1 8B's KV heads with pages of 16 in token-major and head-major order."""

import torch

from bench.harness import bench
from gkernels.kernels import kv_cache

K, D, P = 8, 128, 16


def cases():
    """(case, bytes moved, {provider: make})"""
    for T in (1, 16, 64, 256, 2048, 8192):
        for layout in ("NHD", "HND"):
            moved = 4 * T * K * D * 2 + 8 * T              # keys and values in and out, slots in
            yield f"{layout} {T} x {K} x {D}", moved, {name: provider(name, T, layout) for name in ("gkernels", "torch")}


def provider(name, T, layout):
    def make(i):
        N = T // P + 64
        caches = torch.zeros(2, N, P, K, D, dtype=torch.bfloat16, device="cuda")
        if layout == "HND":
            caches = caches.view(2, N, K, P, D).transpose(2, 3)
        k_cache, v_cache = caches
        k, v = torch.randn(2, T, K, D, dtype=torch.bfloat16, device="cuda")
        slots = torch.randperm(N * P, device="cuda")[:T]
        pages, offsets = slots // P, slots % P

        def torch_write():
            k_cache[pages, offsets] = k
            v_cache[pages, offsets] = v
        return torch_write if name == "torch" else lambda: kv_cache.kv_write(k, v, k_cache, v_cache, slots)
    return make


def main():
    for case, moved, providers in cases():
        for name, make in providers.items():
            bench("kv_cache", case, name, make, bytes=moved)
