"""The kernel of attention: programs that take tall tiles and runs of short requests from the work list. `attention` has its launch.

Arguments travel as three tuples: `inputs` and `strides` in the order of the kernel's parameters, `extents` (T, R, W, N, left, right).
"""

import triton
import triton.language as tl

from ._attention_ahead import ask_ahead
from ._attention_short import take_run
from ._attention_tall import take_tall
from ._attention_tile import count_in
from ._overlap import wait_for_node_before


@triton.jit
def fill(num_fills, fills_at, offs_h, offs_d, inputs, strides, C: tl.constexpr):
    """Zeros, with lse -inf, for pads and unused requests; NaN for bad lengths. Programs share the rows; offs_h [FILL_H], offs_d [BLOCK_DV].
    num_fills is the work list's."""
    work_ptr, out_ptr, lse_ptr = inputs[4], inputs[7], inputs[8]
    for i in range(0, num_fills):
        record = work_ptr + (fills_at + i) * C.RECORD
        token, rows, is_bad = tl.load(record).to(tl.int64), tl.load(record + 1), tl.load(record + 2) != 0
        value, no_lse = tl.where(is_bad, float("nan"), 0.0), tl.where(is_bad, float("nan"), float("-inf"))
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            for h in range(0, C.K * C.G, C.FILL_H):
                head = (h + offs_h).to(tl.int64)
                out = out_ptr + (token + row) * strides[9] + head[:, None] * strides[10] + offs_d[None, :]
                tl.store(out, value.to(out_ptr.dtype.element_ty), (head < C.K * C.G)[:, None] & (offs_d < C.DV)[None, :])
                if C.HAS_LSE:
                    tl.store(lse_ptr + (token + row) * strides[11] + head, no_lse, head < C.K * C.G)


@triton.jit(do_not_specialize=["T", "R", "W", "N", "left", "right", "fills_at", "short_at", "runs_at", "tall_at", "stride_br", "stride_ar",
                               "stride_ks", "stride_vs"])
def _attention_kernel(
    q_ptr,             # [T, H, D]
    k_cache_ptr,       # [N, P, K, D]
    v_cache_ptr,       # [N, P, K, DV]
    block_table_ptr,   # [R, W]
    work_ptr,          # [rows, RECORD]: see schedule
    states_ptr,        # states of short tiles [RUNS, RUN_SEGMENTS], [RUNS, RUN_SPANS]; of tall ones [TALL_SLOTS], [programs]
    counters_ptr,      # int32 [4 + 2 * RUNS + TALL_SLOTS], zeros between launches: two tickets, programs that are done, spans, rows, tall tiles
    out_ptr,           # [T, H, DV]
    lse_ptr,           # [T, H] float32, or None
    sinks_ptr,         # [H] float32, or None
    alibi_ptr,         # [H] or [R, H] float32, or None
    tree_ptr,          # [T] int64, or None
    k_scale_ptr,       # [1] or [K] float32, or None; and so is v_scale_ptr
    v_scale_ptr,
    scale, cap,        # of `step`
    stride_qt, stride_qh, stride_kn, stride_kp, stride_kh, stride_vn, stride_vp, stride_vh, stride_br, stride_ot, stride_oh, stride_lt, stride_ar,
    stride_ks, stride_vs,
    T, R, W, N, left, right, fills_at, short_at, runs_at, tall_at,
    C: tl.constexpr,
):
    inputs = (q_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, work_ptr, states_ptr, counters_ptr, out_ptr, lse_ptr, sinks_ptr, alibi_ptr, tree_ptr,
              k_scale_ptr, v_scale_ptr, scale, cap)
    strides = (stride_qt, stride_qh, stride_kn, stride_kp, stride_kh, stride_vn, stride_vp, stride_vh, stride_br, stride_ot, stride_oh, stride_lt,
               stride_ar, stride_ks, stride_vs)
    extents = (T, R, W, N, left, right)
    if C.AHEAD:
        if not C.HAS_TALL:                                                        # beside tall tiles it gains nothing, and 16 bytes more spill
            ask_ahead(tl.program_id(0), runs_at, tl.arange(0, C.AHEAD), inputs, strides, extents, C)
    wait_for_node_before(C.AHEAD > 0)
    if C.HAS_TALL:
        PARTS: tl.constexpr = C.TALL_M // C.TALL_PART
        num_items = tl.load(work_ptr) * C.K * PARTS
        ticket = num_items
        if tl.program_id(0) >= tl.load(work_ptr + 6):                             # the programs before it begin with runs
            ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
        while ticket < num_items:
            unit = ticket // PARTS
            take_tall(unit // C.K, ticket % PARTS * C.TALL_PART, unit % C.K, tall_at, inputs, strides, extents, C)
            ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
        num_runs = tl.minimum(tl.load(work_ptr + 5), C.RUNS)
        ticket = tl.atomic_add(counters_ptr + 1, 1, sem="relaxed")
        while ticket < num_runs:
            take_run(ticket, short_at, runs_at, inputs, strides, extents, C)
            ticket = tl.atomic_add(counters_ptr + 1, 1, sem="relaxed")
        if count_in(counters_ptr + 2, 1, tl.num_programs(0)):
            tl.store(counters_ptr, 0)
            tl.store(counters_ptr + 1, 0)
    else:
        take_run(tl.program_id(0), short_at, runs_at, inputs, strides, extents, C)
    fill(tl.load(work_ptr + 2), fills_at, tl.arange(0, C.FILL_H), tl.arange(0, C.BLOCK_DV), inputs, strides, C)
