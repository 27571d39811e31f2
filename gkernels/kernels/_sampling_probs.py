"""What `sample` drew from: the kept tokens' probabilities, by two passes over what `select` or `first` left of a row."""

import triton
import triton.language as tl

from ._overlap import wait_for_node_before
from ._sampling import STATE, options_of, sum_of
from ._sampling_cut import kept_of
from ._sampling_tokens import mass_of, scaled, tile_at

_INF, _STATE = tl.constexpr(float("inf")), tl.constexpr(STATE)


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "typical_p_ptr", "seq_lens_ptr", "out_ptr"])
def probs_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr, seq_lens_ptr, out_ptr,               # as in first_kernel
    partials_ptr,      # [R, CHUNKS, 3]: the first is the chunk's kept mass, stored by the first launch for the second
    state_ptr,
    probs_ptr,         # [R, V]
    stride_lr, stride_pr,
    V: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, HAS_TYPICAL: tl.constexpr,
    IS_SECOND: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    chunk, row = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    state = state_ptr + row * _STATE
    options = (temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr)
    temperature, _, _, min_p, _, _ = options_of(row, options, V, HAS_TYPICAL)
    is_live, top, token = tl.load(seq_lens_ptr + row) > 0, tl.load(state + 1).to(tl.float32, bitcast=True), tl.load(out_ptr + row)
    is_drawn, mean = is_live & (temperature > 0.0) & (tl.abs(top) < _INF), tl.load(state + 9).to(tl.float32, bitcast=True)
    cut = (tl.load(state + 7), tl.load(state + 8), min_p, mean, tl.load(state + 10), tl.load(state + 11))
    total, sums = tl.full((), 1, tl.int64), tl.zeros((BLOCK,), tl.int64)
    if IS_SECOND:
        total = tl.maximum(sum_of(partials_ptr, row, 0, CHUNKS, BLOCK_C), 1)
    for at in tl.range(chunk * CHUNK, chunk * CHUNK + CHUNK, BLOCK):
        if is_drawn:
            ids, x = tile_at(logits_ptr + row.to(tl.int64) * stride_lr, at, V, BLOCK)
            z = scaled(x, top, temperature)
            mass = tl.where(kept_of(ids, x, z, cut, HAS_TYPICAL), mass_of(z), 0)
        else:                                                                      # all on the token; nothing where there is none
            ids = at + tl.arange(0, BLOCK)
            mass = ((ids == token) & is_live).to(tl.int64)
        if IS_SECOND:
            tl.store(probs_ptr + row.to(tl.int64) * stride_pr + ids, (mass.to(tl.float64) / total.to(tl.float64)).to(tl.float32), ids < V)
        sums += mass
    if not IS_SECOND:
        tl.store(partials_ptr + (row * CHUNKS + chunk) * 3, tl.sum(sums, 0))
