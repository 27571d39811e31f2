"""norm_qkv, whose norm the node before has begun, against torch's operations, and against this library's own three nodes, at the heads of Llama 3.2
1B, Llama 3.1 8B and Qwen3 8B (which normalises q and k)."""

import torch
import torch.nn.functional as F

import reference.rotary as twin
from bench.harness import bench
from gkernels.kernels import linear, qkv, rmsnorm, rotary

P, L, PAGES = 16, 8192, 64
SHAPES = {"1B": (32, 8, 64, 2048, False), "8B": (32, 8, 128, 4096, False), "qwen3 8B": (32, 8, 128, 4096, True)}       # H, KV, D, K, head norms


def provider(name, T, H, KV, D, K, is_normed):
    def make(i):
        new = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, device="cuda")
        N = (H + 2 * KV) * D
        x, norm, weight, q_out, workspace = new(T, K), new(K), new(N, K), new(T, H, D), linear.Workspace.allocate("cuda")
        positions, cos_sin = torch.randint(L, (T,), dtype=torch.int32, device="cuda"), rotary.cos_sin_table(D, L, 5e5, device="cuda")
        (k_cache, v_cache), slots = new(2, PAGES, P, KV, D), torch.randperm(PAGES * P, device="cuda")[:T]
        norms, normed, packed = [new(D) if is_normed else None for _ in range(2)], new(T, K), new(T, N)
        places = positions, cos_sin, slots, k_cache, v_cache, q_out
        if name == "gkernels":
            scaled = linear.Scaled.empty(T, K, torch.bfloat16, "cuda", splits=True)
            rmsnorm.scale(x, norm, scaled)
            return lambda: qkv.norm_qkv(scaled, weight, 1e-5, *places, None, *norms, workspace=workspace)
        q, k, v = packed.view(T, H + 2 * KV, D).split([H, KV, KV], 1)
        pages, offsets = slots // P, slots % P

        def chain():
            if name == "unfused":
                rmsnorm.rmsnorm_out(x, norm, 1e-5, normed)
                linear.linear_out(normed, weight, packed)
                return rotary.rotary_kv_write(q, k, v, *places, False, *norms, 1e-5)
            torch.mm(F.rms_norm(x, (K,), norm, 1e-5), weight.T, out=packed)
            heads = (t if w is None else F.rms_norm(t, (D,), w, 1e-5) for t, w in zip((q, k), norms, strict=True))
            turned, k_cache[pages, offsets] = twin.rotary(*heads, positions, cos_sin)
            q_out.copy_(turned)
            v_cache[pages, offsets] = v
        return chain
    return make


def main():
    for model, (H, KV, D, K, is_normed) in SHAPES.items():
        for T in (1, 16, 64):
            N = (H + 2 * KV) * D
            moved = N * K * 2 + T * K * 2 + T * N * 2 + T * (D * 4 + 12)              # weights, x, angles and places in; q, k and v written once
            for name in ("gkernels", "unfused", "torch"):
                bench("qkv", f"{model} {T} x {N} x {K}", name, provider(name, T, H, KV, D, K, is_normed), bytes=moved, flops=2 * T * N * K)
