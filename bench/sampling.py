"""sample against torch (softmax, sort, cumsum and an exponential race) over a vocabulary of 128 K float32 logits."""

import torch

from bench.harness import bench
from gkernels.kernels import sampling

V = 128256
OPTIONS = {"greedy": (0.0, 0, 1.0), "plain": (0.8, 0, 1.0), "top-k 40": (0.8, 40, 1.0), "top-p 0.9": (0.8, 0, 0.9), "both": (0.8, 40, 0.9)}


def cases():
    """(case, bytes moved, {provider: make})"""
    for name, options in OPTIONS.items():
        for R in (1, 16, 64):
            moved = R * V * 4                                  # one pass over the logits: the floor, not what bisection reads
            yield f"{name} {R} x {V}", moved, {which: provider(which, R, *options) for which in ("gkernels", "torch")}


def provider(name, R, temperature, top_k, top_p):
    def make(i):
        logits = torch.randn(R, V, device="cuda") * 3
        if name == "torch":
            return lambda: torch_sample(logits, temperature, top_k, top_p)
        temperatures, top_ps, min_ps = (torch.full((R,), value, device="cuda") for value in (temperature, top_p, 0.0))
        ints, seeds = torch.ones(5, R, dtype=torch.int32, device="cuda"), torch.arange(R, device="cuda")
        ints[0] = top_k
        return lambda: sampling.sample_out(logits, temperatures, ints[0], top_ps, min_ps, seeds, *ints[1:])
    return make


def torch_sample(logits, temperature, top_k, top_p):
    """What a decode loop writes without a kernel; its options are baked into the graph."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_k or top_p < 1:
        probabilities, ids = probabilities.topk(top_k) if top_k else probabilities.sort(dim=-1, descending=True)
        probabilities = torch.where(probabilities.cumsum(-1) - probabilities < top_p * probabilities.sum(-1, keepdim=True), probabilities, 0.0)
        return ids.gather(-1, (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True))
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def main():
    for case, moved, makes in cases():
        for name, make in makes.items():
            bench("sampling", case, name, make, bytes=moved)
