"""merge on 32 heads of 128 bf16 values, from one decode row to a prefill of 4096."""

import torch

import reference.merge as twin
from bench.harness import bench
from gkernels.kernels import merge

H, D = 32, 128


def cases():
    """(case, bytes moved, {provider: make})"""
    for T in (1, 64, 4096):
        moved = 3 * T * H * (D * 2 + 4)      # in: two sides and their lse; out: one
        yield f"merge {T} x {H} x {D}", moved, {"gkernels": lambda i, T=T: ours(T), "torch": lambda i, T=T: plain(T)}


def inputs(T):
    sides = [(torch.randn(T, H, D, device="cuda", dtype=torch.bfloat16), torch.randn(T, H, device="cuda")) for _ in range(2)]
    return [t for side in sides for t in side]


def ours(T):
    a, a_lse, b, b_lse = inputs(T)
    out, lse = torch.empty_like(a), torch.empty_like(a_lse)
    return lambda: merge.merge_out(a, a_lse, b, b_lse, out, lse)


def plain(T):
    arguments = inputs(T)
    return lambda: twin.merge(*arguments)


def main():
    for case, moved, providers in cases():
        for provider, make in providers.items():
            bench("merge", case, provider, make, bytes=moved)
