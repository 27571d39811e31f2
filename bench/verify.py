"""verify for 4 drafts a request: alike, and drawn over a vocabulary of 128 K. Nothing in PyTorch does it without the host, so it stands alone."""

import torch

from bench.harness import bench
from gkernels.kernels import verify

V, K = 128256, 4


def make(R, is_drawn):
    T = R * (K + 1)
    ints = lambda *shape: torch.zeros(shape, dtype=torch.int32, device="cuda")
    starts = torch.arange(0, T + 1, K + 1, dtype=torch.int32, device="cuda")
    outputs = ints(T), ints(T) + (not is_drawn), starts, ints(R), ints(R, K + 1), ints(R)
    if not is_drawn:
        return lambda: verify.verify_out(*outputs)
    target, proposal = (torch.randn(T, V, device="cuda").softmax(-1) for _ in range(2))
    probs = verify.Probabilities(target, proposal, ints(R) + 1, torch.arange(R, device="cuda"), ints(T) + 9)
    workspace = verify.Workspace.allocate(R, V, "cuda")
    return lambda: verify.verify_out(*outputs, probs, workspace)


def main():
    for R in (1, 16, 64):
        for name, is_drawn in (("alike", False), ("drawn", True)):
            moved = R * V * 8 if is_drawn else 0                # the rows of the first draft that falls
            bench("verify", f"{name} B{R} K{K}", "gkernels", lambda i, R=R, d=is_drawn: make(R, d), bytes=moved, cold=is_drawn)
