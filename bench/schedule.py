"""The schedule of a step, which runs once for all layers: one launch, against the floor of a graph node.

torch is no provider here: its way to positions, slots and a sorted work list is some twenty operations, half of them with shapes that follow
the batch, and no engine computes them on the device like that.
"""

import torch

from bench.harness import bench
from gkernels.kernels import attention, schedule

PAGE, H, K, D = 16, 32, 8, 128


def cases():
    """(case, query lengths, contexts)"""
    yield "1 decode at 8192", [1], [8191]
    yield "256 decodes at 1024", [1] * 256, [1023] * 256
    yield "63 decodes at 2048 + 512 prefill", [1] * 63 + [512], [2047] * 63 + [0]
    yield "8192 prefill", [8192], [0]


def make(query_lens, contexts):
    lens = [q + c for q, c in zip(query_lens, contexts, strict=True)]
    width = -(-max(lens) // PAGE)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to("cuda", torch.int32)
    table = torch.randint(1, 1000, (len(lens), width), dtype=torch.int32, device="cuda")
    tiling = attention.tiling(sum(query_lens), len(lens), H, K, D, D, torch.bfloat16, "cuda")
    out = schedule.Schedule.allocate(sum(query_lens), len(lens), tiling, "cuda")
    seq_lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
    return lambda: schedule.schedule_out(starts, seq_lens, table, PAGE, 1000, tiling, out)


def main():
    for case, query_lens, contexts in cases():
        bench("schedule", case, "gkernels", lambda i, q=query_lens, c=contexts: make(q, c), cold=False)
