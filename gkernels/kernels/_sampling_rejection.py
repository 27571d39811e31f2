"""How a row that top_p cuts is drawn without finding where its prefix ends.

Noise belongs to tokens, so the winner of all tokens, if it is kept, wins among those that are kept too. Whether top_p keeps it takes one sum and no
order: the tokens before it weigh less than top_p of all. If it is not kept, nothing behind it is, and the winner of those before it is next. The
winners turned down are records, whose number is Poisson with mean -log(kept mass): 0.1 at top_p 0.9, for any logits.
"""

import triton
import triton.language as tl

from ._noise import key_at
from ._sampling_contest import decide, enter, least_of, most_of, nobody
from ._sampling_cut import need_of
from ._sampling_tokens import better, clean, first_best, mass_of, scaled, scores, tile_at

LEAST_P = 0.75                                        # below it more than 3 rows of 100 would turn two winners down
_INF = tl.constexpr(float("inf"))


@triton.jit
def _is_before(x, ids, winner):
    """In the order of logits, then of ids."""
    return (x > winner[0]) | ((x == winner[0]) & (ids < winner[1]))


@triton.jit
def winner_of(row_ptr, token):
    """Logit and id."""
    return clean(tl.load(row_ptr + token)), token


@triton.jit
def masses_of(row_ptr, first, stop, winner, top, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """Of the tokens from `first` to `stop`: the mass of those before the winner, and of all."""
    before, total = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for at in tl.range(first, stop, BLOCK, num_stages=4):
        ids, x = tile_at(row_ptr, at, V, BLOCK)
        mass = mass_of(scaled(x, top, temperature))
        before, total = before + tl.where(_is_before(x, ids, winner), mass, 0), total + mass
    return tl.sum(before, 0), tl.sum(total, 0)


@triton.jit
def is_kept(before, total, winner, top, temperature, top_p, min_p):
    """Whether a winner is kept, before which tokens weigh this much."""
    return (before < need_of(0, total, top_p)) & (tl.exp(scaled(winner[0], top, temperature)) >= min_p)


@triton.jit
def _may_follow(x, ids, winner, top, temperature, min_p):
    """Which tokens may win once a winner is turned down."""
    return (x > -_INF) & _is_before(x, ids, winner) & (tl.exp(scaled(x, top, temperature)) >= min_p)


@triton.jit
def _winner_of_chunk(row_ptr, first, stop, winner, top, temperature, min_p, seed, position, V: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest score of the tokens from `first` to `stop` that may follow a winner, and its id; -inf and V where there is none."""
    key, standing = key_at(seed, position), nobody(V, BLOCK)
    for at in tl.range(first, stop, BLOCK, num_stages=4):
        ids, x = tile_at(row_ptr, at, V, BLOCK)
        standing = enter(standing, most_of(x, ids, _may_follow(x, ids, winner, top, temperature, min_p), top, temperature, key), ids)
    score, token, is_open = decide(standing, row_ptr, top, temperature, seed, position, V)
    for at in range(first, tl.where(is_open, stop, first), BLOCK):
        ids, x = tile_at(row_ptr, at, V, BLOCK)
        kept = _may_follow(x, ids, winner, top, temperature, min_p)
        if tl.max(most_of(x, ids, kept, top, temperature, key), 0) > least_of(score, top, temperature):
            score, token = better(score, token, *first_best(scores(x, ids, kept, temperature, seed, position), ids, V))
    return score, token


@triton.jit
def next_winner(winners, row_ptr, winner, top, temperature, min_p, seed, position, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The winner of the tokens that may follow a winner, and the chunks' winners, scores and ids [BLOCK_C], for the next. What won a chunk of more
    tokens bounds it: while the greatest of these scores is not that of a token that may follow, its chunk is read again, once or twice as a rule."""
    score, ids = winners
    offs_c = tl.arange(0, score.shape[0])
    best, token = first_best(score, ids, V)
    x = clean(tl.load(row_ptr + token, token < V, other=-_INF))
    while (best > -_INF) & (_may_follow(x, token, winner, top, temperature, min_p) == 0):
        chunk = tl.min(tl.where(ids == token, offs_c, offs_c + V), 0)              # not the token's: `first` also draws before the last chunk
        first, is_this = chunk * CHUNK, offs_c == chunk
        stop = tl.minimum(first + CHUNK, V)
        next_score, next_id = _winner_of_chunk(row_ptr, first, stop, winner, top, temperature, min_p, seed, position, V, BLOCK)
        score, ids = tl.where(is_this, next_score, score), tl.where(is_this, next_id, ids)
        best, token = first_best(score, ids, V)
        x = clean(tl.load(row_ptr + token, token < V, other=-_INF))
    return token, score, ids
