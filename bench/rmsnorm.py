"""add_rmsnorm on rows of 4096 bf16 values, from one decode row to a prefill of 16384."""

import torch

import reference.rmsnorm as twin
from bench.harness import bench
from gkernels.kernels import rmsnorm

D = 4096


def cases():
    """(case, bytes moved, {provider: make})"""
    for T in (1, 64, 1024, 16384):
        moved = (4 * T + 1) * D * 2      # in: x, residual, weight; out: residual, out
        yield f"add {T} x {D}", moved, {"gkernels": lambda i, T=T: ours(T), "torch": lambda i, T=T: plain(T)}


def inputs(T):
    x, residual = (torch.randn(T, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return x, residual, torch.ones(D, device="cuda", dtype=torch.bfloat16)


def ours(T):
    x, residual, weight = inputs(T)
    out = torch.empty_like(x)
    return lambda: rmsnorm.add_rmsnorm_out(x, residual, weight, 1e-6, out)


def plain(T):
    x, residual, weight = inputs(T)
    return lambda: twin.add_rmsnorm(x, residual, weight, 1e-6)


def main():
    for case, moved, providers in cases():
        for provider, make in providers.items():
            bench("rmsnorm", case, provider, make, bytes=moved)
