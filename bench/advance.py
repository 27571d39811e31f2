"""advance for 1 to 256 requests with 16 stop ids each. Nothing in PyTorch does as much without the host, so it stands alone."""

import torch

from bench.harness import bench
from gkernels.kernels import advance


def make(R):
    row = lambda value: torch.full((R,), value, dtype=torch.int32, device="cuda")
    one, stop_ids = torch.zeros(1, dtype=torch.int32, device="cuda"), torch.full((R, 16), -1, dtype=torch.int32, device="cuda")
    ring = torch.zeros(8, R, dtype=torch.int32, device="cuda")
    state = advance.State(row(1), stop_ids, row(2**30), row(2**30), row(5), row(9), row(1), row(0), row(0), ring, one, one.clone())
    tokens, status = row(7), row(0)
    return lambda: advance.advance(tokens, status, state, 128256)


def main():
    for R in (1, 16, 256):
        bench("advance", f"{R}", "gkernels", lambda i, R=R: make(R), cold=False)
