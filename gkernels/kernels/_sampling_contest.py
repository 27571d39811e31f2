"""How a program finds the greatest score of the tokens that it reads, most of which it need not compute.

A token's first word of noise bounds its score from above, at a third of what the score costs. Each place of a tile keeps the token of its greatest
bound, and the greatest bound of its others: no tile waits for another thread. At the end the tokens of the greatest bounds are scored one by one,
until none is left that may win; rarely two of one place may, or too many, and the tiles are read again.
"""

import triton
import triton.language as tl

from ._noise import word_of
from ._sampling_tokens import better, clean, scores

_INF = tl.constexpr(float("inf"))
_TURNS = tl.constexpr(12)                             # tokens scored one by one, about 1 us each; 3 are usual
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def most_of(x, ids, kept, reference, temperature, key):
    """At least log2(e) (score - reference / temperature) of the kept tokens, -inf elsewhere. With noise -log(E), E = -log(1 - v) > v, a score is
    below x / temperature - log(v). v has 23 bits, rounded down. Read as an integer, a float is 2^23 (127 + log2) or less, by up to 0.09. The margins,
    2^-18 of the terms, cover their rounding."""
    v = ((word_of(ids, key[0], key[1]) >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    gap = tl.where(kept, x - reference, 0.0) * (_LOG2E / tl.maximum(temperature, 1e-30))
    most = gap + tl.abs(gap) * 3.814697265625e-06 + (127.001 - v.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920928955078125e-07)
    return tl.where(kept, tl.where(most == most, most, _INF), -_INF)


@triton.jit
def nobody(V: tl.constexpr, BLOCK: tl.constexpr):
    """A contest that no token has entered."""
    return tl.full((BLOCK,), -_INF, tl.float32), tl.full((BLOCK,), V, tl.int32), tl.full((BLOCK,), -_INF, tl.float32)


@triton.jit
def enter(standing, most, ids):
    """The places' greatest bounds, their tokens, and the greatest bounds of all others, with one more tile."""
    best, best_ids, others = standing
    return tl.maximum(best, most), tl.where(most > best, ids, best_ids), tl.maximum(others, tl.minimum(best, most))


@triton.jit
def least_of(score, reference, temperature):
    """What a bound has to pass for its token to win against a score."""
    inverse = 1.0 / tl.maximum(temperature, 1e-30).to(tl.float64)
    return ((score - reference.to(tl.float64) * inverse) * _LOG2E).to(tl.float32)


@triton.jit
def decide(standing, row_ptr, reference, temperature, seed, position, V: tl.constexpr):
    """The greatest score of the places' tokens, its id, and whether another token may still win."""
    best, best_ids, others = standing
    score, token, least, turn = tl.full((), -_INF, tl.float64), tl.full((), V, tl.int32), tl.full((), -_INF, tl.float32), tl.full((), 0, tl.int32)
    most = tl.max(best, 0)
    while (most > least) & (turn < _TURNS):
        id = tl.min(tl.where(best == most, best_ids, V), 0)
        score, token = better(score, token, scores(clean(tl.load(row_ptr + id)), id, True, temperature, seed, position), id)
        best = tl.where(best_ids == id, -_INF, best)
        most, least, turn = tl.max(best, 0), least_of(score, reference, temperature), turn + 1
    return score, token, tl.maximum(most, tl.max(others, 0)) > least
