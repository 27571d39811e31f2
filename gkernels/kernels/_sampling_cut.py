"""How sampling finds where a kept prefix ends: bisection over a source, which is a list of tokens in no order, or a whole row."""

import triton
import triton.language as tl

_INF = tl.constexpr(float("inf"))
_LOWEST = tl.constexpr(-0x7F800001)                   # the key of -inf


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
def scaled(x, top, temperature):
    """z = (x - top) / temperature: 0 at the greatest, -inf at -inf. The temperature is kept from 0, so that 0 stays 0."""
    return (x - top) * (1.0 / tl.maximum(temperature, 1e-30))


@triton.jit
def mass_of(z):
    """exp(z) in units of 2^-32 of the greatest token's: integers, so that no order of summation can move the end of a prefix."""
    return (tl.exp(z) * 4294967296.0 + 0.5).to(tl.int64)


@triton.jit
def tile_of(source, start, top, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """Ids, logits and z of one tile of the list, or of the row."""
    list_x_ptr, list_ids_ptr, row_ptr, count, is_row = source
    offs = start + tl.arange(0, BLOCK)                                             # [BLOCK]
    is_listed = (offs < count) & (is_row == 0)
    ids = tl.where(is_row, offs, tl.load(list_ids_ptr + offs, is_listed, other=V, cache_modifier=".cg"))
    x = tl.load(list_x_ptr + offs, is_listed, other=-_INF, cache_modifier=".cg")
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
def select(source, sure, beyond, k_left, has_k, top, temperature, top_p, min_p, typical_p, V: tl.constexpr, BLOCK: tl.constexpr,
            HAS_TYPICAL: tl.constexpr):
    """The cut of a row, from its source and what lies outside of it: the mass surely kept, and that which counts in the total only."""
    lowest, none = tl.full((), _LOWEST, tl.int32), tl.full((), -2**31, tl.int32)
    key, id = lowest, tl.full((), V, tl.int32)
    mean, typical_key, typical_id = tl.full((), 0.0, tl.float32), none, tl.full((), V, tl.int32)
    if has_k:
        key, id = _cut_at(source, k_left.to(tl.int64), top, temperature, (key, id, 0.0, mean), V, BLOCK, False, False)
    if top_p < 1.0:
        total = sure + beyond + _sum_from(source, none, top, temperature, (key, id, 0.0, mean), V, BLOCK, True, False)
        need = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64) - sure
        key, id = _cut_at(source, need, top, temperature, (key, id, 0.0, mean), V, BLOCK, True, False)
    if HAS_TYPICAL:
        if typical_p < 1.0:
            total, mean = _mean_of(source, top, temperature, (key, id, min_p), V, BLOCK)
            need = tl.ceil(typical_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
            typical_key, typical_id = _cut_at(source, need, top, temperature, (key, id, min_p, mean), V, BLOCK, True, True)
    return key, id, min_p, mean, typical_key, typical_id
