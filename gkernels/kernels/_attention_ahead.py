"""What attention does before it waits for the node ahead of it: it asks the L2 for the first keys and values of a run.

Nodes before may still be at work, so whatever is read here is a hint. It is read past the L1, which would keep it, and is clamped, so that no
address leaves the caches, whatever it is; and it decides nothing but what the L2 is asked for. What counts is read again after the wait.
"""

import triton
import triton.language as tl

from ._attention_tile import pages_of

AHEAD_BYTES = tl.constexpr(4 << 20)              # that all programs ask for: with 16 MiB a request of 8192 keys takes 2 us more than with 4 or none


@triton.jit
def _hint(ptr):
    return tl.load(ptr, cache_modifier=".cg")


@triton.jit
def _ask(cache_ptr, pages, slots, kv_head, mask, stride_n, stride_p, stride_h, D: tl.constexpr):
    """Asks the L2 for the rows [KEYS] of one head at these pages and slots."""
    PER_LINE: tl.constexpr = 1024 // cache_ptr.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.cdiv(D, PER_LINE)
    rows = cache_ptr + pages.to(tl.int64) * stride_n + slots.to(tl.int64) * stride_p + kv_head.to(tl.int64) * stride_h
    for line in tl.static_range(LINES):
        tl.inline_asm_elementwise("{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l,r",
                                  [(rows + min(line * PER_LINE, D - 1)).to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def ask_ahead(run, runs_at, offs_n, inputs, strides, extents, C: tl.constexpr):
    """Asks for the first AHEAD keys of a run, fewer where runs are many; offs_n [AHEAD]. The other arguments are those of `_attention`."""
    work_ptr, R, W, N = inputs[4], extents[1], extents[2], extents[3]
    KEY_BYTES: tl.constexpr = (C.D + C.DV) * inputs[1].dtype.element_ty.primitive_bitwidth // 8
    record = work_ptr + (runs_at + run) * C.RECORD
    num_runs, request, query_len, kv_len = _hint(work_ptr + 5), _hint(record), _hint(record + 2), _hint(record + 3)
    first_segment, num_segments, ordinal, begin = _hint(record + 4), _hint(record + 5), _hint(record + 6), _hint(record + 9)
    group = (begin - ordinal) // num_segments                                     # a division by 0 is no fault, but any number
    kv_head = tl.minimum(tl.maximum(group // tl.cdiv(query_len, C.SHORT_M // C.GROUP), 0), C.K - 1)
    first_key = (first_segment + (begin - ordinal) % num_segments) * C.SEGMENT
    end = tl.minimum(first_key + AHEAD_BYTES // KEY_BYTES // num_runs, tl.minimum(kv_len, W * C.P))
    key = first_key + offs_n
    mask = (run < num_runs) & (key >= 0) & (key < end)
    table = inputs[3] + tl.minimum(tl.maximum(request, 0), R - 1).to(tl.int64) * strides[8]
    pages = pages_of(tl.load(table + key // C.P, mask, other=0, cache_modifier=".cg"), N)
    _ask(inputs[1], pages, key % C.P, kv_head, mask, strides[2], strides[3], strides[4], C.D)
    _ask(inputs[2], pages, key % C.P, kv_head, mask, strides[5], strides[6], strides[7], C.DV)
