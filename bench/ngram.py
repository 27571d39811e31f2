"""ngram over histories of 1 K to 128 K tokens: 4 drafts after the longest of 3 tokens. Nothing in PyTorch does it in one go, so it stands alone."""

import torch

from bench.harness import bench
from gkernels.kernels import ngram


def make(R, L):
    history = torch.randint(0, 50, (R, L), dtype=torch.int32, device="cuda")
    lengths, most = (torch.full((R,), n, dtype=torch.int32, device="cuda") for n in (L, 4))
    workspace, draft = ngram.Workspace.allocate(R, "cuda"), torch.empty(R, 4, dtype=torch.int32, device="cuda")
    draft_len = torch.empty(R, dtype=torch.int32, device="cuda")
    return lambda: ngram.ngram_out(history, lengths, most, 1, 3, workspace, draft, draft_len)


def main():
    for R, L in ((1, 1024), (1, 131072), (64, 4096), (64, 131072)):
        bench("ngram", f"{R} x {L}", "gkernels", lambda i, R=R, L=L: make(R, L), bytes=R * L * 4)
