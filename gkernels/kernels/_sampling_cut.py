"""How sampling finds where a kept prefix ends in a source, which is a list of tokens in no order, or a whole row: by the ranks of a short list, or
by bisection."""

import triton
import triton.language as tl

from ._sampling_tokens import clean, key_of, mass_of, scaled

_INF = tl.constexpr(float("inf"))
_COMPARED = tl.constexpr(16)                          # tokens with which all of a short list are compared at a time
_LOWEST = tl.constexpr(-0x7F800001)                   # the key of -inf


@triton.jit
def tile_of(source, start, top, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """Ids, logits and z of one tile of the list, or of the row."""
    list_x_ptr, list_ids_ptr, row_ptr, count, is_row = source
    offs = start + tl.arange(0, BLOCK)                                             # [BLOCK]
    is_listed = (offs < count) & (is_row == 0)
    ids = tl.where(is_row, offs, tl.load(list_ids_ptr + offs, is_listed, other=V))
    x = tl.load(list_x_ptr + offs, is_listed, other=-_INF)
    x = tl.where(is_row, clean(tl.load(row_ptr + offs, (offs < count) & is_row, other=-_INF)), x)
    return ids, x, scaled(x, top, temperature)


@triton.jit
def _key(x, z, mean, IS_TYPICAL: tl.constexpr):
    """The order of a cut, greatest first: by logit, or by nearness of z to its mean."""
    if IS_TYPICAL:
        key = -tl.abs(z - mean).to(tl.int32, bitcast=True)
    else:
        key = key_of(x)
    return key


@triton.jit
def kept_of(ids, x, z, cut, HAS_TYPICAL: tl.constexpr):
    """Which tokens a cut keeps: (key, id) of the last in the order of logits, min_p, mean of z, and (key, id) of the last in the typical order."""
    key = key_of(x)
    kept = (x > -_INF) & ((key > cut[0]) | ((key == cut[0]) & (ids <= cut[1]))) & (tl.exp(z) >= cut[2])
    if HAS_TYPICAL:
        key = _key(x, z, cut[3], True)
        kept = kept & ((key > cut[4]) | ((key == cut[4]) & (ids <= cut[5])))
    return kept


@triton.jit
def _weights(source, start, top, temperature, cut, V: tl.constexpr, BLOCK: tl.constexpr, IS_MASS: tl.constexpr, IS_TYPICAL: tl.constexpr):
    """Ids, keys, and what each token adds to a prefix: 1, or its mass; nothing where the cut so far drops it."""
    ids, x, z = tile_of(source, start, top, temperature, V, BLOCK)
    weight = mass_of(z) if IS_MASS else tl.full((BLOCK,), 1, tl.int64)
    return ids, _key(x, z, cut[3], IS_TYPICAL), tl.where(kept_of(ids, x, z, cut, False), weight, 0)


@triton.jit
def _sum_from(source, bound, top, temperature, cut, V: tl.constexpr, BLOCK: tl.constexpr, IS_MASS: tl.constexpr, IS_TYPICAL: tl.constexpr):
    """The weight of all tokens whose key is at least `bound`."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, source[3], BLOCK):
        _, key, weight = _weights(source, start, top, temperature, cut, V, BLOCK, IS_MASS, IS_TYPICAL)
        total += tl.where(key >= bound, weight, 0)
    return tl.sum(total, 0)


@triton.jit
def _cut_at(source, need, top, temperature, cut, V: tl.constexpr, BLOCK: tl.constexpr, IS_MASS: tl.constexpr, IS_TYPICAL: tl.constexpr):
    """(key, id) of the last token of the shortest prefix whose weight reaches `need`; of the last of all when none does."""
    least, most = tl.full((BLOCK,), 2**31 - 1, tl.int32), tl.full((BLOCK,), -2**31, tl.int32)
    for start in range(0, source[3], BLOCK):
        _, key, weight = _weights(source, start, top, temperature, cut, V, BLOCK, IS_MASS, IS_TYPICAL)
        least, most = tl.minimum(least, tl.where(weight > 0, key, 2**31 - 1)), tl.maximum(most, tl.where(weight > 0, key, -2**31))
    low, high, above = tl.min(least, 0).to(tl.int64), tl.max(most, 0).to(tl.int64), tl.full((), 0, tl.int64)
    while low < high:                                  # keys above `high` weigh `above` < need, keys from `low` on reach it; at most 32 rounds
        middle = low + (high - low + 1) // 2
        weight = _sum_from(source, middle.to(tl.int32), top, temperature, cut, V, BLOCK, IS_MASS, IS_TYPICAL)
        reached = weight >= need
        low, high, above = tl.where(reached, middle, low), tl.where(reached, high, middle - 1), tl.where(reached, above, weight)
    # Of equal keys, the lowest ids. A list has no order, so the id too is found by bisection: no round where one token has the key, at most 18
    last_key, least, most = low.to(tl.int32), tl.full((BLOCK,), V, tl.int32), tl.full((BLOCK,), -1, tl.int32)
    for start in range(0, source[3], BLOCK):
        ids, key, weight = _weights(source, start, top, temperature, cut, V, BLOCK, IS_MASS, IS_TYPICAL)
        least = tl.minimum(least, tl.where((key == last_key) & (weight > 0), ids, V))
        most = tl.maximum(most, tl.where((key == last_key) & (weight > 0), ids, -1))
    low_id, high_id = tl.min(least, 0), tl.max(most, 0)
    while low_id < high_id:
        middle_id = (low_id + high_id) // 2
        total = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, source[3], BLOCK):
            ids, key, weight = _weights(source, start, top, temperature, cut, V, BLOCK, IS_MASS, IS_TYPICAL)
            total += tl.where((key == last_key) & (ids <= middle_id), weight, 0)
        reached = above + tl.sum(total, 0) >= need
        low_id, high_id = tl.where(reached, low_id, middle_id + 1), tl.where(reached, middle_id, high_id)
    return last_key, low_id


@triton.jit
def _mean_of(source, top, temperature, cut, V: tl.constexpr, BLOCK: tl.constexpr):
    """Mass of the kept tokens, and the mean of z over it (minus what the entropy is off it), from integer sums."""
    total, moment = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for start in range(0, source[3], BLOCK):
        ids, x, z = tile_of(source, start, top, temperature, V, BLOCK)
        kept = kept_of(ids, x, z, cut, False) & (z > -64.0)                        # below it masses are 0
        total += tl.where(kept, mass_of(z), 0)
        moment += tl.where(kept, (tl.exp(z) * tl.maximum(z, -64.0) * 4294967296.0).to(tl.int64), 0)
    total = tl.sum(total, 0)
    return total, (tl.sum(moment, 0).to(tl.float64) / total.to(tl.float64)).to(tl.float32)


@triton.jit
def _number(ids, x):
    """Key and id in one, the id counting down: a greater number is an earlier token. Pads have no logit, and are the last."""
    return (key_of(x).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _cut_by_rank(source, sure, beyond, k_left, has_k, top, temperature, top_p, V: tl.constexpr, RANKED: tl.constexpr):
    """(key, id) of the last token that top_k and top_p keep of a list of at most RANKED, each compared with each."""
    ids, x, z = tile_of(source, 0, top, temperature, V, RANKED)
    number, rank, before = _number(ids, x), tl.zeros((RANKED,), tl.int32), tl.zeros((RANKED,), tl.int64)                     # [RANKED]
    for start in range(0, source[3], _COMPARED):
        other_ids, other_x, other_z = tile_of(source, start, top, temperature, V, _COMPARED)
        is_before = _number(other_ids, other_x)[None, :] > number[:, None]                                                   # [RANKED, _COMPARED]
        rank += tl.sum(is_before.to(tl.int32), 1)
        before += tl.sum(tl.where(is_before, mass_of(other_z)[None, :], 0), 1)     # all of them kept where this one is
    kept = (x > -_INF) & ((rank < k_left) | (has_k == 0))
    if top_p < 1.0:
        total = sure + beyond + tl.sum(tl.where(kept, mass_of(z), 0), 0)
        kept = kept & (before < tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64) - sure)
    last = tl.min(tl.where(kept, number, 0x7FFFFFFFFFFFFFFF), 0)                   # where nothing is kept, before all tokens
    return (last >> 32).to(tl.int32), 0x7FFFFFFF - (last & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def select(source, sure, beyond, k_left, has_k, top, temperature, top_p, min_p, typical_p, V: tl.constexpr, BLOCK: tl.constexpr,
           RANKED: tl.constexpr, HAS_TYPICAL: tl.constexpr):
    """The cut of a row, from its source and what lies outside of it: the mass surely kept, and that which counts in the total only."""
    lowest, none = tl.full((), _LOWEST, tl.int32), tl.full((), -2**31, tl.int32)
    key, id = lowest, tl.full((), V, tl.int32)
    mean, typical_key, typical_id = tl.full((), 0.0, tl.float32), none, tl.full((), V, tl.int32)
    is_ranked = source[3] <= RANKED
    if is_ranked & (has_k | (top_p < 1.0)):
        key, id = _cut_by_rank(source, sure, beyond, k_left, has_k, top, temperature, top_p, V, RANKED)
    if has_k & (is_ranked == 0):
        key, id = _cut_at(source, k_left.to(tl.int64), top, temperature, (key, id, 0.0, mean), V, BLOCK, False, False)
    if (top_p < 1.0) & (is_ranked == 0):
        total = sure + beyond + _sum_from(source, none, top, temperature, (key, id, 0.0, mean), V, BLOCK, True, False)
        need = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64) - sure
        key, id = _cut_at(source, need, top, temperature, (key, id, 0.0, mean), V, BLOCK, True, False)
    if HAS_TYPICAL:
        if typical_p < 1.0:
            total, mean = _mean_of(source, top, temperature, (key, id, min_p), V, BLOCK)
            need = tl.ceil(typical_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
            typical_key, typical_id = _cut_at(source, need, top, temperature, (key, id, min_p, mean), V, BLOCK, True, True)
    return key, id, min_p, mean, typical_key, typical_id
