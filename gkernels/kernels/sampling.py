"""Sampling:  token = argmax over the kept set of  logit / temperature + Gumbel noise,  or the plain argmax at temperature 0.

logits [R, V] with any row stride; temperature, top_p, min_p float32 [R]; top_k, position, seq_lens, status int32 [R]; seed int64 [R] -> out
int32 [R]. `position` is the place in the sequence of the token to be drawn. In the order (logit down, id up) of a stable sort, the kept set is
the prefix of top_k tokens, of it the shortest prefix whose mass reaches top_p, of it the tokens of at least min_p times the greatest
probability; 0, 1 and 0 switch them off. Nothing is sorted: bisection over the logits' ordered bit patterns finds where the prefix ends. Masses
are sums of integers, in units of 2^-32 of the greatest, so that no order of summation can move its end.
The noise of a token depends on (seed, position, token id) only: a request draws the same tokens in any row, batch and graph. Its 64-bit
uniforms cut off no tail (fp32 ones stop at 2^-24, which a vocabulary of 128 K feels).
Graph-safe: one program a row. A row with seq_lens 0 is unused: token -1, status untouched. NaN logits count as -inf, +inf ones win. A row
without a choice gets token -1 and status |= NO_TOKEN; options out of range are switched off, status |= BAD_OPTION. Other rows never change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check

NO_TOKEN, BAD_OPTION = 4, 8
MAX_V = 262144                                        # masses of 2^32 each then sum below 2^53, exact in float64
_INF = tl.constexpr(float("inf"))
_LOWEST = tl.constexpr(-0x7F800001)                   # the key of -inf
_NO_TOKEN, _BAD_OPTION = tl.constexpr(NO_TOKEN), tl.constexpr(BAD_OPTION)


@triton.jit
def _load(row_ptr, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """Ids, logits and keys of one tile: int32 keys order as the logits do, and 0.0 equals -0.0."""
    # [BLOCK]
    ids = start + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + ids, ids < V, other=-_INF).to(tl.float32)
    x = tl.where(x == x, tl.where(x == 0.0, 0.0, x), -_INF)
    bits = x.to(tl.int32, bitcast=True)
    return ids, x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _first_max(best, best_id, V: tl.constexpr):
    """The greatest value and the lowest id that has it."""
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, best_id, V), 0)


@triton.jit
def _weights(ids, x, key, top, scale, cut_key, cut_id, IS_MASS: tl.constexpr):
    """What each token adds to a prefix: 1, or its mass; nothing past the cut and at -inf."""
    kept = (x > -_INF) & ((key > cut_key) | ((key == cut_key) & (ids <= cut_id)))
    if IS_MASS:
        weight = (tl.exp((x - top) * scale) * 4294967296.0 + 0.5).to(tl.int64)
    else:
        weight = tl.full(key.shape, 1, tl.int64)
    return tl.where(kept, weight, 0)


@triton.jit
def _weight_from(row_ptr, bound, top, scale, cut_key, cut_id, V: tl.constexpr, BLOCK: tl.constexpr, IS_MASS: tl.constexpr):
    """The weight of all tokens whose key is at least `bound`."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, V, BLOCK):
        ids, x, key = _load(row_ptr, start, V, BLOCK)
        total += tl.where(key >= bound, _weights(ids, x, key, top, scale, cut_key, cut_id, IS_MASS), 0)
    return tl.sum(total, 0)


@triton.jit
def _cut_at(row_ptr, need, top, top_key, scale, cut_key, cut_id, V: tl.constexpr, BLOCK: tl.constexpr, IS_MASS: tl.constexpr):
    """The last (key, id) of the shortest prefix whose weight reaches `need`; the whole order when none does."""
    low, high, above = tl.full((), _LOWEST, tl.int64), top_key.to(tl.int64), tl.full((), 0, tl.int64)
    while low < high:                                 # keys above `high` weigh `above` < need, keys from `low` on reach it; 32 rounds
        middle = low + (high - low + 1) // 2
        weight = _weight_from(row_ptr, middle.to(tl.int32), top, scale, cut_key, cut_id, V, BLOCK, IS_MASS)
        reached = weight >= need
        low, high, above = tl.where(reached, middle, low), tl.where(reached, high, middle - 1), tl.where(reached, above, weight)
    last_key, last_id, start = low.to(tl.int32), tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    while (start < V) & (above < need):               # of equal logits, the lowest ids
        ids, x, key = _load(row_ptr, start, V, BLOCK)
        weight = tl.where(key == last_key, _weights(ids, x, key, top, scale, cut_key, cut_id, IS_MASS), 0)
        before = above + tl.cumsum(weight, 0) - weight
        last_id = tl.maximum(last_id, tl.max(tl.where((weight > 0) & (before < need), ids, -1), 0))
        above += tl.sum(weight, 0)
        start += BLOCK
    return last_key, last_id


@triton.jit
def _cut(row_ptr, top, top_key, scale, top_k, top_p, V: tl.constexpr, BLOCK: tl.constexpr):
    """The last (key, id) that top_k and top_p keep."""
    key, id = tl.full((), _LOWEST, tl.int32), tl.full((), V, tl.int32)
    if (top_k > 0) & (top_k < V):
        key, id = _cut_at(row_ptr, top_k.to(tl.int64), top, top_key, scale, key, id, V, BLOCK, False)
    if top_p < 1.0:
        total = _weight_from(row_ptr, _LOWEST, top, scale, key, id, V, BLOCK, True)
        need = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        key, id = _cut_at(row_ptr, need, top, top_key, scale, key, id, V, BLOCK, True)
    return key, id


@triton.jit
def _gumbel(seed, position, ids):
    """-log(E), E = -log(1 - v), v = (64 random bits + 1/2) / 2^64. Small v: the series of -log1p(-v); else 1 - v from the inverted bits."""
    zero = tl.zeros_like(ids)
    high, low, _, _ = tl.philox(seed, ids, zero + position, zero, zero)
    v = (high.to(tl.float32) + (low.to(tl.float32) + 0.5) * 2.3283064365386963e-10) * 2.3283064365386963e-10
    w = ((high ^ 0xFFFFFFFF).to(tl.float32) + ((low ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10) * 2.3283064365386963e-10
    series = v * (1.0 + v * (0.5 + v * (0.33333333 + v * (0.25 + v * 0.2))))                     # 2^-27 off at v = 2^-5
    return -tl.log(tl.where(v < 0.03125, series, -tl.log(w)))


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr", "position_ptr",
                                            "seq_lens_ptr", "status_ptr", "out_ptr"])
def _sample_kernel(
    logits_ptr,        # [R, V]
    temperature_ptr,   # [R]
    top_k_ptr,         # [R] int32
    top_p_ptr,         # [R]
    min_p_ptr,         # [R]
    seed_ptr,          # [R] int64
    position_ptr,      # [R] int32
    seq_lens_ptr,      # [R] int32
    status_ptr,        # [R] int32, read and written
    out_ptr,           # [R] int32
    stride_lr,
    V: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(seq_lens_ptr + row) <= 0:
        tl.store(out_ptr + row, -1)
        return
    temperature, top_k = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row)
    top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    good_temperature, good_top_k = (temperature >= 0.0) & (temperature < _INF), top_k >= 0         # NaN compares as bad
    good_top_p, good_min_p = (top_p > 0.0) & (top_p <= 1.0), (min_p >= 0.0) & (min_p <= 1.0)
    temperature, top_k = tl.where(good_temperature, temperature, 0.0), tl.where(good_top_k, top_k, 0)
    top_p, min_p = tl.where(good_top_p, top_p, 1.0), tl.where(good_min_p, min_p, 0.0)

    row_ptr = logits_ptr + row.to(tl.int64) * stride_lr
    # [BLOCK]
    best, best_id = tl.full((BLOCK,), -_INF, tl.float32), tl.full((BLOCK,), V, tl.int32)
    for start in range(0, V, BLOCK):
        ids, x, _ = _load(row_ptr, start, V, BLOCK)
        best, best_id = tl.where(x > best, x, best), tl.where(x > best, ids, best_id)
    top, token = _first_max(best, best_id, V)

    if (temperature > 0.0) & (tl.abs(top) < _INF):
        scale = 1.0 / tl.maximum(temperature, 1e-30)                                                # finite, so that 0 * scale is 0
        bits = top.to(tl.int32, bitcast=True)
        cut_key, cut_id = _cut(row_ptr, top, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), scale, top_k, top_p, V, BLOCK)
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
        best, best_id = tl.full((BLOCK,), -_INF, tl.float32), tl.full((BLOCK,), V, tl.int32)
        for start in range(0, V, BLOCK):
            ids, x, key = _load(row_ptr, start, V, BLOCK)
            z = (x - top) * scale
            kept = (x > -_INF) & ((key > cut_key) | ((key == cut_key) & (ids <= cut_id))) & (tl.exp(z) >= min_p)
            score = tl.where(kept, z + _gumbel(seed, position, ids), -_INF)
            best, best_id = tl.where(score > best, score, best), tl.where(score > best, ids, best_id)
        _, token = _first_max(best, best_id, V)

    none = top == -_INF
    good = good_temperature & good_top_k & good_top_p & good_min_p
    flags = tl.where(none, _NO_TOKEN, 0) | tl.where(good, 0, _BAD_OPTION)
    tl.store(status_ptr + row, tl.load(status_ptr + row) | flags)
    tl.store(out_ptr + row, tl.where(none, -1, token))


@dataclass(frozen=True)
class Config:
    BLOCK: int
    num_warps: int


def config(V: int) -> Config:
    """8 elements a thread: 16 spill in the draw, where 64-bit random numbers take half of the registers."""
    block = min(max(triton.next_power_of_2(V), 128), 4096)
    return Config(block, max(block // 256, 1))


def check_options(temperature: float, top_k: int, top_p: float, min_p: float, vocab_size: int) -> None:
    """Raises ValueError on the options of one request, on the host, where the kernel would switch them off and flag the row."""
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for name, value, kinds, low, high, expected in (
            ("temperature", temperature, (int, float), 0, most, "a finite number, at least 0; 0 takes the likeliest token"),
            ("top_k", top_k, (int,), 0, vocab_size, f"an integer from 0 to the vocabulary's {vocab_size}; 0 keeps every token"),
            ("top_p", top_p, (int, float), least, 1, "a number above 0 and at most 1; 1 keeps every token"),
            ("min_p", min_p, (int, float), 0, 1, "a number from 0 to 1; 0 keeps every token")):
        _check.require(isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high, "sample", name, value, expected)


def sample_out(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
               seed: torch.Tensor, position: torch.Tensor, seq_lens: torch.Tensor, status: torch.Tensor, out: torch.Tensor) -> None:
    """Writes one token a row to `out` and ors flags into `status`. Shapes: see the module. Raises ValueError or TypeError on a misfit."""
    op = "sample"
    _check.tensor(op, "logits", logits, (None, None), _check.FLOATS)
    R, V = logits.shape
    _check.require(1 <= V <= MAX_V, op, "logits", f"V = {V}", f"1 to {MAX_V}")
    for name, t, dtype in (("temperature", temperature, torch.float32), ("top_k", top_k, torch.int32), ("top_p", top_p, torch.float32),
                           ("min_p", min_p, torch.float32), ("seed", seed, torch.int64), ("position", position, torch.int32),
                           ("seq_lens", seq_lens, torch.int32), ("status", status, torch.int32), ("out", out, torch.int32)):
        _check.tensor(op, name, t, (R,), (dtype,), logits.device, aligned=False)
    if R == 0:
        return
    c = config(V)
    _sample_kernel[(R,)](
        logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status, out, logits.stride(0),
        V=V, BLOCK=c.BLOCK, num_warps=c.num_warps)


def sample(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
           seed: torch.Tensor, position: torch.Tensor, seq_lens: torch.Tensor, status: torch.Tensor) -> torch.Tensor:
    """Returns one token a row, int32 [R], -1 where there is none, and ors flags into `status`."""
    out = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
    sample_out(logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status, out)
    return out
