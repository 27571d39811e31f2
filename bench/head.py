"""The head and the draw in one, beside the nodes that it stands for, at the vocabularies of Llama 3.2 1B and Llama 3.1 8B."""

import torch

from bench.harness import bench
from gkernels.kernels import head, linear, sampling

V = 128256
WIDTHS = {"1B": 2048, "8B": 4096}


def cases():
    """(case, bytes moved, {provider: make})"""
    for name, K in WIDTHS.items():
        for kind, temperature in (("greedy", 0.0), ("plain", 0.8)):
            for R in (1, 16, 64):
                moved = V * K * 2 + R * K * 2                                   # weights and x in: the floor, without the logits
                yield f"{name} {kind} B{R}", moved, {which: provider(which, R, K, temperature) for which in ("gkernels", "unfused")}


def provider(which, R, K, temperature):
    def make(i):
        row = lambda value, dtype=torch.int32: torch.full((R,), value, dtype=dtype, device="cuda")
        weight, scaled = torch.randn(V, K, dtype=torch.bfloat16, device="cuda"), linear.Scaled.empty(R, K, torch.bfloat16, "cuda", splits=True)
        scaled.x.normal_()
        scaled.squares.fill_(K / scaled.squares.shape[1])
        heat, seed, (lens, status, out) = row(temperature, torch.float32), torch.arange(R, device="cuda"), (row(9), row(0), row(0))
        if which == "gkernels":
            workspace = head.Workspace.allocate(R, V, torch.bfloat16, "cuda")
            return lambda: head.draw_out(scaled, weight, 1e-5, heat, seed, lens, lens, status, workspace, out)
        logits, workspace = torch.empty(R, V, device="cuda"), sampling.Workspace.allocate(R, V, "cuda")
        off = row(0), row(1, torch.float32), row(0, torch.float32)              # top-k, top-p, min-p

        def launch():
            linear.norm_linear_out(scaled, weight, 1e-5, logits)
            sampling.sample_out(logits, heat, *off, seed, lens, lens, status, workspace, out)
        return launch
    return make


def main():
    for case, moved, makes in cases():
        for name, make in makes.items():
            bench("head", case, name, make, bytes=moved)
