"""rotary and rotary_kv_write against plain torch, at the heads of Llama 3.1 8B and of Qwen3 8B (which normalises q and k)."""

import torch

import reference.rotary as twin
from bench.harness import bench
from gkernels.kernels import rotary

D, P, L = 128, 16, 8192
HEADS = {"llama 32/8": (32, 8, False), "qwen3 32/8": (32, 8, True)}


def cases():
    """(case, bytes moved, {provider: make})"""
    for T in (1, 16, 64, 256, 2048, 8192):
        for heads, (H, K, is_normed) in HEADS.items():
            angles = T * (D * 4 + 4)                       # a row of cos and sin and a position a token
            sizes = {"rotary": 2 * T * (H + K) * D * 2 + angles, "rotary_kv_write": 2 * T * (H + 2 * K) * D * 2 + angles + 8 * T}
            for op in ["rotary_kv_write"] if is_normed else sizes:
                yield f"{op} {heads} {T}", sizes[op], {name: provider(name, op, T, heads) for name in ("gkernels", "torch")}


def provider(name, op, T, heads):
    H, K, is_normed = HEADS[heads]

    def make(i):
        new = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, device="cuda")
        q, k, v = new(T, (H + 2 * K) * D).view(T, H + 2 * K, D).split([H, K, K], 1)
        positions = torch.randint(L, (T,), dtype=torch.int32, device="cuda")
        cos_sin, q_out, k_out = rotary.cos_sin_table(D, L, 5e5, device="cuda"), new(T, H, D), new(T, K, D)
        if op == "rotary":
            if name == "torch":
                return lambda: twin.rotary(q, k, positions, cos_sin)
            return lambda: rotary.rotary_out(q, k, positions, cos_sin, False, q_out, k_out)
        k_cache, v_cache = new(2, T // P + 64, P, K, D)
        slots = torch.randperm(k_cache.shape[0] * P, device="cuda")[:T]
        norms = [new(D) if is_normed else None for _ in range(2)]
        if name == "gkernels":
            return lambda: rotary.rotary_kv_write(q, k, v, positions, cos_sin, slots, k_cache, v_cache, q_out, False, *norms)
        pages, offsets = slots // P, slots % P

        def torch_chain():
            turned = (x if w is None else torch.nn.functional.rms_norm(x, (D,), w, 1e-6) for x, w in zip((q, k), norms, strict=True))
            q_turned, k_turned = twin.rotary(*turned, positions, cos_sin)
            q_out.copy_(q_turned)
            k_cache[pages, offsets] = k_turned
            v_cache[pages, offsets] = v
        return torch_chain
    return make


def main():
    for case, moved, providers in cases():
        for name, make in providers.items():
            bench("rotary", case, name, make, bytes=moved)
