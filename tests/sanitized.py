"""What test_sanitizer runs under compute-sanitizer, eagerly and in small:  python -m tests.sanitized attention | past_the_end

torch's allocator is off there (PYTORCH_NO_CUDA_MEMORY_CACHING), so that an access past a tensor's end is one past an allocation's."""

import sys
from unittest.mock import patch

import torch
import triton
import triton.language as tl

from tests.strategies import Batch, Features, randn


def attention():
    """Every path: tall tiles beside short requests and in a launch of their own, short ones alone, runs that share segments and spans, pads, unused
    requests, bad lengths; then with options."""
    from gkernels.kernels import attention
    mixed, short = (Batch(rows, [10, 9000, 600, 0], 16, pads=3, spare_requests=spare) for rows, spare in (([70, 1, 5, 1], 1), ([1, 1, 2, 1], 5)))
    everything = Features(window=(9, -1), tree=True, softcap=1.5, sinks=True, alibi=2, scales=2)
    for batch, dtype, drawn, apart_from in ((mixed, torch.bfloat16, Features(), 0), (mixed, torch.bfloat16, Features(), 2048),
                                            (mixed, torch.float16, everything, 2048), (short, torch.bfloat16, Features(scales=1), 2048)):
        caches = batch.caches(2, 64, dtype, "cuda")
        caches = [cache.to(torch.float8_e4m3fn) for cache in caches] if drawn.scales else caches
        starts, lens, table = batch.metadata("cuda")
        lens[3] = -1
        with patch.object(attention, "APART_FROM", apart_from):
            out, lse = attention.attention(randn(0, batch.T, 8, 64, dtype=dtype, device="cuda"), *caches, starts, lens, table,
                                           **drawn.options(batch, 8, 2, "cuda"))
        bad = batch.num_tokens - 1
        assert out[:bad].isfinite().all() and lse[:bad].isfinite().all() and out[bad].isnan().all() and not out[bad + 1:].any()


@triton.jit
def _past_the_end_kernel(out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, offs, offs <= n)


def past_the_end():
    """One element too many, at the end of an allocation."""
    out = torch.zeros(128, dtype=torch.int32, device="cuda")
    _past_the_end_kernel[(1,)](out, len(out), BLOCK=256)
    torch.cuda.synchronize()


if __name__ == "__main__":
    {"attention": attention, "past_the_end": past_the_end}[sys.argv[1]]()
    torch.cuda.synchronize()
