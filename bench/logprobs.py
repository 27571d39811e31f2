"""logprobs of the chosen token and of the 20 likeliest over a vocabulary of 128 K float32 logits, beside log_softmax and topk."""

import torch

from bench.harness import bench
from gkernels.kernels import logprobs

V, N = 128256, 20


def cases():
    """(case, bytes moved, {provider: make})"""
    for R in (1, 16, 64):
        yield f"top {N} V{V} B{R}", R * V * 4, {which: provider(which, R) for which in ("gkernels", "torch")}


def provider(which, R):
    def make(i):
        logits, row = torch.randn(R, V, device="cuda") * 3, torch.full((R,), 7, dtype=torch.int32, device="cuda")
        workspace, out = logprobs.Workspace.allocate(R, V, N, "cuda"), logprobs.Logprobs.allocate(R, N, "cuda")
        return (lambda: plain(logits, row.long())) if which == "torch" else lambda: logprobs.logprobs_out(logits, row, row, workspace, out)
    return make


def plain(logits, token):
    every = logits.log_softmax(-1)
    chosen = every.gather(-1, token[:, None])
    return chosen, (every > chosen).sum(-1), every.topk(N)


def main():
    for case, moved, makes in cases():
        for name, make in makes.items():
            bench("logprobs", case, name, make, bytes=moved)
