"""What sampling, and in part log-probabilities, know of a token: its logit, as a key that orders, its mass, and its score, the logit with noise."""

import triton
import triton.language as tl

from ._noise import gumbel

_INF = tl.constexpr(float("inf"))


@triton.jit
def clean(x):
    """float32 without NaN, which counts as -inf, and without -0.0."""
    x = x.to(tl.float32)
    return tl.where(x == x, tl.where(x == 0.0, 0.0, x), -_INF)


@triton.jit
def key_of(x):
    """int32 that orders as x does."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def logit_of(key):
    """The logit that has a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def scaled(x, top, temperature):
    """z = (x - top) / temperature: 0 at the greatest, -inf at -inf. The temperature is kept from 0, so that 0 stays 0."""
    return (x - top) * (1.0 / tl.maximum(temperature, 1e-30))


@triton.jit
def mass_of(z):
    """exp(z) in units of 2^-32 of the greatest token's: integers, so that no order of summation can move the end of a prefix."""
    return (tl.exp(z) * 4294967296.0 + 0.5).to(tl.int64)


@triton.jit
def first_best(score, ids, V: tl.constexpr):
    """The greatest value and the lowest id that has it."""
    top = tl.max(score, 0)
    return top, tl.min(tl.where(score == top, ids, V), 0)


@triton.jit
def better(score, token, next_score, next_token):
    wins = (next_score > score) | ((next_score == score) & (next_token < token))
    return tl.where(wins, next_score, score), tl.where(wins, next_token, token)


@triton.jit
def scores(x, ids, kept, temperature, seed, position):
    """float64: exact for logits of any size, so that no row needs its greatest to draw."""
    noise = gumbel(seed, position, ids).to(tl.float64)
    return tl.where(kept, x.to(tl.float64) * (1.0 / temperature.to(tl.float64)) + noise, -_INF)


@triton.jit
def tile_at(row_ptr, at, V: tl.constexpr, BLOCK: tl.constexpr):
    """Ids and clean logits of BLOCK tokens from `at`."""
    ids = at + tl.arange(0, BLOCK)                                                 # [BLOCK]
    return ids, clean(tl.load(row_ptr + ids, ids < V, other=-_INF))
