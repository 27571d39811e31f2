"""embedding against torch.index_select: tokens of Llama 3.1 8B's vocabulary, and the last row of each request."""

import functools

import torch

from bench.harness import bench
from gkernels.kernels import embedding

D = 4096


def cases():
    """(case, bytes moved, {provider: make})"""
    for what, V, sizes in (("tokens", 128256, (1, 16, 64, 256, 2048, 8192)), ("last rows", 8192, (1, 16, 64, 256))):
        for T in sizes:
            moved = 2 * T * D * 2 + 4 * T                  # rows in and out, ids in
            yield f"{what} {T} x {D}", moved, {name: provider(name, T, V) for name in ("gkernels", "torch")}


@functools.cache
def table(V):
    return torch.randn(V, D, dtype=torch.bfloat16, device="cuda")


def provider(name, T, V):
    def make(i):
        weight = table(V)                                  # shared: each closure reads other rows of it
        ids = torch.randint(V, (T,), dtype=torch.int32, device="cuda")
        out = torch.empty(T, D, dtype=torch.bfloat16, device="cuda")
        if name == "torch":
            return lambda: torch.index_select(weight, 0, ids, out=out)
        return lambda: embedding.embedding_out(ids, weight, out, padding_index=-1)
    return make


def main():
    for case, moved, providers in cases():
        for name, make in providers.items():
            bench("embedding", case, name, make, bytes=moved)
