"""sample over a vocabulary of 128 K float32 logits, beside what a decode loop writes in plain PyTorch ("sort": softmax, sort, cumsum and an
exponential race; argmax where greedy) and, where it is installed, FlashInfer, whose options are tensors and whose draw is by rejection.

"all on" has every option of a request: penalties, 32 biases, a bitmask, bans, then temperature, top-k, top-p and min-p. It is timed with `adjust`.
"""

import importlib.util

import torch

from bench.harness import bench
from gkernels.kernels import adjust, sampling

V = 128256
OPTIONS = {"top-k 50 top-p 0.9": dict(top_k=50, top_p=0.9), "plain": {}, "greedy": dict(temperature=0.0), "min-p 0.05": dict(min_p=0.05),
           "top-p 0.9": dict(top_p=0.9), "all on": dict(top_k=50, top_p=0.9, min_p=0.05)}


def cases():
    """(case, bytes moved, {provider: make})"""
    for name, options in OPTIONS.items():
        for R in (1, 16, 64, 256):
            moved = R * V * 4                                  # one pass over the logits: the floor, not what the passes read
            providers = ["gkernels"] if name == "all on" else ["gkernels", "sort"]
            if name in ("top-k 50 top-p 0.9", "top-p 0.9", "plain", "min-p 0.05") and importlib.util.find_spec("flashinfer"):
                providers.append("flashinfer")
            yield f"{name} V{V} B{R}", moved, {which: provider(which, R, name == "all on", **options) for which in providers}


def provider(which, R, all_on, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0):
    def make(i):
        logits = torch.randn(R, V, device="cuda") * 3
        return {"gkernels": ours, "sort": plain, "flashinfer": flashinfer}[which](logits, all_on, temperature, top_k, top_p, min_p)
    return make


def ours(logits, all_on, temperature, top_k, top_p, min_p):
    R = logits.shape[0]
    row = lambda value, dtype=torch.int32: torch.full((R,), value, dtype=dtype, device="cuda")
    real = torch.float32
    options = row(temperature, real), row(top_k), row(top_p, real), row(min_p, real), torch.arange(R, device="cuda"), row(9), row(9), row(0)
    workspace, out, adjusted = sampling.Workspace.allocate(R, V, "cuda"), row(0), torch.empty_like(logits) if all_on else logits
    every = adjustments(R, row) if all_on else None

    def launch():
        if all_on:
            adjust.adjust_out(logits, every, options[-2], options[-1], adjusted)
        sampling.sample_out(adjusted, *options, workspace, out)
    return launch


def adjustments(R, row):
    ids = lambda n: torch.randint(0, V, (R, n), dtype=torch.int32, device="cuda")
    words = -(-V // 32)
    counts = (torch.rand(R, V, device="cuda") < 1e-3).int()
    prompt, allowed = torch.zeros(R, words, dtype=torch.int32, device="cuda"), torch.full((R, words), -1, dtype=torch.int32, device="cuda")
    real = torch.float32
    return adjust.Adjustments(ids(32), torch.randn(R, 32, device="cuda"), row(1.1, real), row(0.5, real), row(0.5, real), counts, prompt, allowed,
                              ids(8), ids(8), row(4), row(9), torch.arange(R, dtype=torch.int32, device="cuda"))


def plain(logits, all_on, temperature, top_k, top_p, min_p):
    """What a decode loop writes without a kernel; its options are baked into the graph."""
    def launch():
        if temperature == 0:
            return logits.argmax(-1)
        probabilities, ids = (logits / temperature).softmax(-1), None
        if top_k or top_p < 1:
            probabilities, ids = probabilities.topk(top_k) if top_k else probabilities.sort(dim=-1, descending=True)
            probabilities = torch.where(probabilities.cumsum(-1) - probabilities < top_p * probabilities.sum(-1, keepdim=True), probabilities, 0.0)
        if min_p:
            probabilities = torch.where(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0.0, probabilities)
        winner = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True)
        return winner if ids is None else ids.gather(-1, winner)
    return launch


def flashinfer(logits, all_on, temperature, top_k, top_p, min_p):
    peer = importlib.import_module("flashinfer.sampling")
    R = logits.shape[0]
    row = lambda value, dtype: torch.full((R,), value, dtype=dtype, device="cuda")
    temperatures, ks, ps, mins = row(temperature, torch.float32), row(top_k, torch.int32), row(top_p, torch.float32), row(min_p, torch.float32)

    def launch():
        probabilities = peer.softmax(logits, temperatures)
        if top_k:
            return peer.top_k_top_p_sampling_from_probs(probabilities, ks, ps)
        if top_p < 1:
            return peer.top_p_sampling_from_probs(probabilities, ps)
        return peer.min_p_sampling_from_probs(probabilities, mins) if min_p else peer.sampling_from_probs(probabilities)
    return launch


def main():
    for case, moved, makes in cases():
        for name, make in makes.items():
            bench("sampling", case, name, make, bytes=moved)
