"""How a program finds the greatest score of the tokens that it reads, most of which it need not compute.

A token's first word of noise bounds its score from above, at a third of what the score costs. Each place of a tile keeps the token of its greatest
bound, and the greatest bound of its others: no tile waits for another thread. At the end the tokens of the greatest bounds are scored, one of each
warp's in a turn, until none is left that may win; rarely two of one place may, or too many, and the tiles are read again. Where every token of a
chunk competes (`draw_of`), a place keeps no token, but the greatest bound of all of its own, which are scored together.
"""

import triton
import triton.language as tl

from ._noise import key_at, word_of
from ._sampling_tokens import better, clean, first_best, scores, tile_at

_INF = tl.constexpr(float("inf"))
_TURNS = tl.constexpr(12)                             # about 1 us each; the first is enough unless the best two are of one warp
_LANES, _WARPS = tl.constexpr(32), tl.constexpr(8)
_LOG2E = tl.constexpr(1.4426950408889634)
_UNIT = tl.constexpr(4)                               # tokens that a thread loads at once, whose greatest no other thread is asked for
_RESCORED = tl.constexpr(1024)                        # tokens of a tile where all are scored


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
def _by_warps(places, PLACES: tl.constexpr):
    """Places as [times, WARPS, LANES], whose middle is the warp that has them."""
    LANES: tl.constexpr = min(PLACES, _LANES)
    WARPS: tl.constexpr = min(PLACES // LANES, _WARPS)
    return tl.reshape(places, (PLACES // (WARPS * LANES), WARPS, LANES))


@triton.jit
def _first_best_of_warps(score, ids, V: tl.constexpr):
    """[WARPS]: the greatest value that each warp has, and the lowest id that has it. No warp waits for another."""
    best = tl.max(tl.max(score, 2), 0)
    return best, tl.min(tl.min(tl.where(score == best[None, :, None], ids, V), 2), 0)


@triton.jit
def decide(standing, row_ptr, reference, temperature, seed, position, V: tl.constexpr):
    """The greatest score of the places' tokens, its id, and whether another token may still win."""
    PLACES: tl.constexpr = standing[0].shape[0]
    best, best_ids, others = _by_warps(standing[0], PLACES), _by_warps(standing[1], PLACES), tl.max(standing[2], 0)
    score, token, least, turn = tl.full((), -_INF, tl.float64), tl.full((), V, tl.int32), tl.full((), -_INF, tl.float32), tl.full((), 0, tl.int32)
    most = tl.max(standing[0], 0)
    while (most > least) & (turn < _TURNS):
        tops, ids = _first_best_of_warps(best, best_ids, V)
        x = clean(tl.load(row_ptr + ids, tops > -_INF, other=-_INF))
        score, token = better(score, token, *first_best(scores(x, ids, tops > -_INF, temperature, seed, position), ids, V))
        best = tl.where(best_ids == ids[None, :, None], -_INF, best)
        most, least, turn = tl.max(tl.max(tl.max(best, 2), 0), 0), least_of(score, reference, temperature), turn + 1
    return score, token, tl.maximum(most, others) > least


@triton.jit
def _start_of(at, V: tl.constexpr, BLOCK: tl.constexpr):
    """Where the tile at `at` begins: the row's last BLOCK tokens stand for a tile that passes its end, so that no token needs a mask. A token that is
    seen twice wins no more than once."""
    at = tl.minimum(at, max(V - BLOCK, 0))
    return tl.multiple_of(at, 16) if (V - BLOCK) % 16 == 0 else at


@triton.jit
def tile_ahead(row_ptr, at, stop, V: tl.constexpr, BLOCK: tl.constexpr):
    """Logits of the tile at `at`, NaN and -0.0 among them; nothing is read from `stop` on."""
    offs = tl.arange(0, BLOCK)                                                     # [BLOCK]
    return tl.load(row_ptr + _start_of(at, V, BLOCK) + offs, (offs < V) & (at < stop), other=-_INF)


@triton.jit
def greatest_of(row_ptr, tile, first, stop, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest logit of a chunk, whose first tile is given, and its id; -inf and V where there is none."""
    tops, starts = tl.full((BLOCK,), -_INF, tl.float32), tl.full((BLOCK,), V, tl.int32)
    for at in tl.range(first, stop, BLOCK, num_stages=1):
        start, x, tile = _start_of(at, V, BLOCK), tile.to(tl.float32), tile_ahead(row_ptr, at + BLOCK, stop, V, BLOCK)
        is_greater = x > tops                                                      # NaN is not
        tops, starts = tl.where(is_greater, x, tops), tl.where(is_greater, start, starts)
    top, token = first_best(tops, tl.minimum(starts + tl.arange(0, BLOCK), V), V)
    return clean(top), token


@triton.jit
def _greatest_of_units(tops, x, BLOCK: tl.constexpr):
    greatest = tl.max(tl.reshape(x, (BLOCK // _UNIT, _UNIT)), 1)                   # NaN only where all are
    return tl.where(greatest > tops, greatest, tops)


@triton.jit
def draw_of(row_ptr, tile, first, stop, temperature, seed, position, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest logit of a chunk, whose first tile is given, its greatest score and the id of that; -inf, -inf and V where there is none.

    A token's first word of noise, h, bounds its score. With noise -log(E), E = -log(1 - v) > v >= h / 2^32, log2(e) times the score is below
    log2(e) x / temperature + 32 - log2(h). Read as an integer, h as a float is 2^23 (127 + log2(h)) or less, by up to 0.09. A place, a unit of each
    tile, keeps the greatest bound of all its tokens; those of the places that may hold the winner, one or two as a rule, are scored at the end."""
    PLACES: tl.constexpr = BLOCK // _UNIT
    key, scale = key_at(seed, position), _LOG2E * 8388608.0 / tl.maximum(temperature, 1e-30)
    tops = tl.full((PLACES,), -_INF, tl.float32)
    most = tl.full((PLACES,), -3.4e38, tl.float32)                                 # not less: x / temperature may pass what a float holds
    for at in tl.range(first, stop, BLOCK, num_stages=1):
        start, x, tile = _start_of(at, V, BLOCK), tile.to(tl.float32), tile_ahead(row_ptr, at + BLOCK, stop, V, BLOCK)
        h = word_of(start + tl.arange(0, BLOCK), key[0], key[1]).to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)
        tops, most = _greatest_of_units(tops, x, BLOCK), _greatest_of_units(most, x * scale - h, BLOCK)
    top = clean(tl.max(tops, 0))
    most = most * 1.1920928955078125e-07                                           # to units of 1
    most += tl.abs(most) * 3.814697265625e-06 + 159.001                            # covers the rounding: at most 2^-20 of the terms
    score, token, least, turn = tl.full((), -_INF, tl.float64), tl.full((), V, tl.int32), tl.full((), -_INF, tl.float32), tl.full((), 0, tl.int32)
    greatest, members = tl.where(top > -_INF, tl.max(most, 0), -_INF), tl.arange(0, CHUNK // PLACES)
    most, places = _by_warps(most, PLACES), _by_warps(tl.arange(0, PLACES), PLACES)
    while (greatest > least) & (turn < _TURNS):
        _, place = _first_best_of_warps(most, places, PLACES)
        ids = (_start_of(first + members // _UNIT * BLOCK, V, BLOCK) + members % _UNIT)[None, :] + place[:, None] * _UNIT      # [WARPS, members]
        x = clean(tl.load(row_ptr + ids, ids < V, other=-_INF))
        next_scores = scores(x, ids, x > -_INF, temperature, seed, position)
        next_score = tl.max(tl.max(next_scores, 1), 0)
        score, token = better(score, token, next_score, tl.min(tl.min(tl.where(next_scores == next_score, ids, V), 1), 0))
        most = tl.where(places == place[None, :, None], -_INF, most)
        greatest, least, turn = tl.max(tl.max(tl.max(most, 2), 0), 0), (score * _LOG2E).to(tl.float32), turn + 1
    RESCORED: tl.constexpr = min(BLOCK, _RESCORED)
    for at in range(first, tl.where(greatest > least, stop, first), RESCORED):       # too many may win: all are scored
        ids, x = tile_at(row_ptr, at, V, RESCORED)
        score, token = better(score, token, *first_best(scores(x, ids, x > -_INF, temperature, seed, position), ids, V))
    return top, score, token
