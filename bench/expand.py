"""expand for 1 to 256 requests with 4 drafts each. Nothing in PyTorch does as much without the host, so it stands alone."""

import torch

from bench.harness import bench
from gkernels.kernels import expand


def make(R, K=4):
    row = lambda value: torch.full((R,), value, dtype=torch.int32, device="cuda")
    arguments, out = (row(5), row(99), row(7)[:, None].expand(R, K).contiguous(), row(K), row(K)), expand.Rows.allocate(R, K, "cuda")
    return lambda: expand.expand_out(*arguments, out)


def main():
    for R in (1, 16, 256):
        bench("expand", f"{R}", "gkernels", lambda i, R=R: make(R), cold=False)
