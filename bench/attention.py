"""Paged attention, first version: decode, prefill and mixed batches of 32 query heads on 8 KV heads, D 128, page 16, bf16.

torch is scaled_dot_product_attention, causal, over dense keys and values: for the prefills alone, whose one request needs no pages and no
other mask. Decode and mixed batches would have to be gathered and padded for it first, and the figure would be that of the copies.
"""

import torch

from bench.harness import bench
from gkernels.kernels import attention, schedule

H, K, D, PAGE = 32, 8, 128, 16


def cases():
    """(case, query lengths, KV lengths after the step)"""
    for R, n in ((1, 8192), (8, 4096), (64, 2048), (256, 1024)):
        yield f"decode {R}x{n}", [1] * R, [n] * R
    for R, n in ((1, 2048), (1, 8192)):
        yield f"prefill {R}x{n}", [n] * R, [n] * R
    yield "mixed 31x2048+2048", [1] * 31 + [2048], [2048] * 32
    yield "mixed 63x2048+512", [1] * 63 + [512], [2048] * 63 + [512]


def traffic(query_lens, lens):
    """Bytes: q, out, and the live keys and values once. Operations: two products over each query's visible keys."""
    moved = 2 * sum(query_lens) * H * D * 2 + sum(lens) * K * D * 2 * 2
    return moved, sum(4 * H * D * (q * n - q * (q - 1) // 2) for q, n in zip(query_lens, lens, strict=True))


def problem(query_lens, lens):
    """q, k_cache, v_cache, query_start_loc, seq_lens, block_table with pages in random order."""
    pages = [-(-n // PAGE) for n in lens]
    order, at = torch.randperm(sum(pages), device="cuda").int() + 1, 0
    table = torch.zeros(len(lens), max(pages), dtype=torch.int32, device="cuda")
    for r, n in enumerate(pages):
        table[r, :n], at = order[at:at + n], at + n
    caches = [torch.randn(sum(pages) + 1, PAGE, K, D, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    starts = torch.tensor([0, *query_lens]).cumsum(0).to("cuda", torch.int32)
    q = torch.randn(sum(query_lens), H, D, device="cuda", dtype=torch.bfloat16)
    return q, *caches, starts, torch.tensor(lens, dtype=torch.int32, device="cuda"), table


def ours(query_lens, lens):
    q, k_cache, v_cache, starts, seq_lens, table = problem(query_lens, lens)
    block_q = attention.config(H // K, D, q.dtype).BLOCK_Q
    plan = schedule.schedule(starts, seq_lens, table, PAGE, k_cache.shape[0], q.shape[0], block_q)
    out = torch.empty_like(q)
    return lambda: attention.attention_out(q, k_cache, v_cache, table, plan.items, plan.num_items, out)


def theirs(n):
    q, k, v = (torch.randn(1, heads, n, D, device="cuda", dtype=torch.bfloat16) for heads in (H, K, K))
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def main():
    for case, query_lens, lens in cases():
        moved, flops = traffic(query_lens, lens)
        if case.startswith("prefill"):
            bench("attention", case, "torch", lambda i, n=lens[0]: theirs(n), bytes=moved, flops=flops)
        bench("attention", case, "gkernels", lambda i, q=query_lens, n=lens: ours(q, n), bytes=moved, flops=flops)
