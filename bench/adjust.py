"""adjust over a vocabulary of 128 K float32 logits, beside its twin in plain PyTorch: every option on, and every option off."""

import torch

import reference.adjust as twin
from bench.harness import bench
from bench.sampling import V, adjustments
from gkernels.kernels import adjust


def cases():
    """(case, bytes moved, {provider: make})"""
    for name in ("all on", "all off"):
        for R in (1, 16, 64):
            moved = R * V * (4 + 4 + 4) if name == "all on" else 0         # logits in and out, counts in
            yield f"{name} V{V} B{R}", moved, {which: provider(which, R, name == "all on") for which in ("gkernels", "torch")}


def provider(which, R, all_on):
    def make(i):
        logits, row = torch.randn(R, V, device="cuda") * 3, lambda value, dtype=torch.int32: torch.full((R,), value, dtype=dtype, device="cuda")
        every, lens, status = adjustments(R, row), row(9), row(0)
        if not all_on:
            for name, off in (("bias_ids", -1), ("repetition", 1), ("presence", 0), ("frequency", 0), ("banned_ids", -1), ("stop_ids", -1)):
                getattr(every, name).fill_(off)
        if which == "torch":
            return lambda: twin.adjust(logits, every, lens, status)
        return lambda: adjust.adjust_out(logits, every, lens, status, logits)
    return make


def main():
    for case, moved, makes in cases():
        for name, make in makes.items():
            bench("adjust", case, name, make, bytes=moved, cold=moved > 0)
