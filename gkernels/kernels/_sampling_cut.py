"""How sampling finds where a kept prefix ends in a source, which is a list of tokens in no order, or a whole row: by the ranks of a short list, or
by bisection."""

import triton
import triton.language as tl

from ._sampling_tokens import clean, key_of, mass_of, scaled

_INF = tl.constexpr(float("inf"))
_COMPARED = tl.constexpr(32)                          # tokens with which all of a short list are compared at a time
_LOWEST = tl.constexpr(-0x7F800001)                   # the key of -inf


@triton.jit
def tile_of(source, start, top, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """Ids, logits and z of one tile of a source: its list, the row, how many tokens it has, whether they are the row, and room for a list of few."""
    list_x_ptr, list_ids_ptr, row_ptr, count, is_row, _, _ = source
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
def _sums_from(source, bound, most, top, temperature, cut, V: tl.constexpr, BLOCK: tl.constexpr, IS_MASS: tl.constexpr, IS_TYPICAL: tl.constexpr):
    """The weight of all tokens whose key is at least `bound`, and how many of them have a key of at most `most`."""
    total, count = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, source[3], BLOCK):
        _, key, weight = _weights(source, start, top, temperature, cut, V, BLOCK, IS_MASS, IS_TYPICAL)
        weight = tl.where(key >= bound, weight, 0)
        total, count = total + weight, count + ((weight > 0) & (key <= most)).to(tl.int32)
    return tl.sum(total, 0), tl.sum(count, 0)


@triton.jit
def _cut_at(source, need, top, temperature, cut, V: tl.constexpr, BLOCK: tl.constexpr, RANKED: tl.constexpr, IS_MASS: tl.constexpr,
            IS_TYPICAL: tl.constexpr):
    """(key, id) of the last token of the shortest prefix whose weight reaches `need`; of the last of all when none does. By halves, until few enough
    tokens are left to rank, or all that are left are equal."""
    least, most, inside = tl.full((BLOCK,), 2**31 - 1, tl.int32), tl.full((BLOCK,), -2**31, tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, source[3], BLOCK):
        _, key, weight = _weights(source, start, top, temperature, cut, V, BLOCK, IS_MASS, IS_TYPICAL)
        least, most = tl.minimum(least, tl.where(weight > 0, key, 2**31 - 1)), tl.maximum(most, tl.where(weight > 0, key, -2**31))
        inside += (weight > 0).to(tl.int32)
    low, high, above, inside = tl.min(least, 0).to(tl.int64), tl.max(most, 0).to(tl.int64), tl.full((), 0, tl.int64), tl.sum(inside, 0)
    while (low < high) & (inside > RANKED):            # keys above `high` weigh `above` < need, keys from `low` on reach it; at most 32 rounds
        middle = low + (high - low + 1) // 2
        weight, count = _sums_from(source, middle.to(tl.int32), high.to(tl.int32), top, temperature, cut, V, BLOCK, IS_MASS, IS_TYPICAL)
        reached = weight >= need
        inside = tl.where(reached, count, inside - count)
        low, high, above = tl.where(reached, middle, low), tl.where(reached, high, middle - 1), tl.where(reached, above, weight)
    last_key, low_id, high_id = low.to(tl.int32), tl.full((), V, tl.int32), tl.full((), V, tl.int32)
    if inside <= RANKED:                               # the few are brought together behind the list
        near_x, near_ids, found = source[5], source[6], tl.full((), 0, tl.int32)
        tl.debug_barrier()                             # what an earlier cut left there has been read
        for start in range(0, source[3], BLOCK):
            ids, key, weight = _weights(source, start, top, temperature, cut, V, BLOCK, IS_MASS, IS_TYPICAL)
            is_near, x = (weight > 0) & (key >= low) & (key <= high), tile_of(source, start, top, temperature, V, BLOCK)[1]
            ranks = tl.cumsum(is_near.to(tl.int32), 0)
            tl.store(near_x + found + ranks - 1, x, is_near)
            tl.store(near_ids + found + ranks - 1, ids, is_near)
            found += tl.max(ranks, 0)
        tl.debug_barrier()
        near = (near_x, near_ids, source[2], found, source[4] & (found < 0), near_x, near_ids)      # no row
        ids, key, _ = _weights(near, 0, top, temperature, cut, V, RANKED, IS_MASS, IS_TYPICAL)
        number = _number(ids, key)
        _, before = _rank(near, number, top, temperature, cut, V, RANKED, IS_MASS, IS_TYPICAL)
        last = tl.min(tl.where((tl.arange(0, RANKED) < found) & (above + before < need), number, 0x7FFFFFFFFFFFFFFF), 0)
        last_key, low_id = _key_and_id(last)
    elif V > RANKED:                                   # of equal keys, the lowest ids; by halves again, as a list has no order: at most 18 rounds
        low_id, high_id = tl.full((), 0, tl.int32), tl.full((), V - 1, tl.int32)
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
def _number(ids, key):
    """Key and id in one, the id counting down: a greater number is an earlier token."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _key_and_id(number):
    return (number >> 32).to(tl.int32), 0x7FFFFFFF - (number & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _rank(source, number, top, temperature, cut, V: tl.constexpr, RANKED: tl.constexpr, IS_MASS: tl.constexpr, IS_TYPICAL: tl.constexpr):
    """How many tokens of a list of at most RANKED are before each token, and what they weigh: each is compared with each."""
    rank, before = tl.zeros((RANKED,), tl.int32), tl.zeros((RANKED,), tl.int64)
    for start in range(0, source[3], _COMPARED):
        ids, key, weight = _weights(source, start, top, temperature, cut, V, _COMPARED, IS_MASS, IS_TYPICAL)
        is_before = _number(ids, key)[None, :] > number[:, None]                   # [RANKED, _COMPARED]; a pad has no logit, and is before none
        rank += tl.sum(is_before.to(tl.int32), 1)
        before += tl.sum(tl.where(is_before, weight[None, :], 0), 1)
    return rank, before


@triton.jit
def _cut_by_rank(source, known, sure, beyond, k_left, has_k, top, temperature, top_p, V: tl.constexpr, RANKED: tl.constexpr):
    """(key, id) of the last token that top_k and top_p keep of a list of at most RANKED."""
    ids, x, z = tile_of(source, 0, top, temperature, V, RANKED)
    number, nothing = _number(ids, key_of(x)), (tl.full((), _LOWEST, tl.int32), V, 0.0, 0.0)                                 # [RANKED]
    rank, before = _rank(source, number, top, temperature, nothing, V, RANKED, True, False)    # all of them kept where this one is
    kept = (x > -_INF) & ((rank < k_left) | (has_k == 0))
    if top_p < 1.0:
        need = need_of(known, sure + beyond + tl.sum(tl.where(kept, mass_of(z), 0), 0), top_p)
        kept = kept & (before < need - sure)
    return _key_and_id(tl.min(tl.where(kept, number, 0x7FFFFFFFFFFFFFFF), 0))                  # where nothing is kept, before all tokens


@triton.jit
def need_of(known, total, p):
    """The mass that a prefix has to reach: p of the row's, where that is known, or else of the total."""
    return tl.ceil(p.to(tl.float64) * tl.maximum(known, total).to(tl.float64)).to(tl.int64)


@triton.jit
def select(source, known, sure, beyond, k_left, has_k, top, temperature, top_p, min_p, typical_p, V: tl.constexpr, BLOCK: tl.constexpr,
           RANKED: tl.constexpr, HAS_TYPICAL: tl.constexpr):
    """The cut of a row, from its source and what lies outside of it: the mass of the row, where it is known, the mass surely kept, and that which
    counts in the total only."""
    lowest, none = tl.full((), _LOWEST, tl.int32), tl.full((), -2**31, tl.int32)
    key, id = lowest, tl.full((), V, tl.int32)
    mean, typical_key, typical_id = tl.full((), 0.0, tl.float32), none, tl.full((), V, tl.int32)
    is_ranked = (source[3] <= RANKED) & (source[4] == 0)
    if is_ranked & (has_k | (top_p < 1.0)):
        key, id = _cut_by_rank(source, known, sure, beyond, k_left, has_k, top, temperature, top_p, V, RANKED)
    if has_k & (is_ranked == 0):
        key, id = _cut_at(source, k_left.to(tl.int64), top, temperature, (key, id, 0.0, mean), V, BLOCK, RANKED, False, False)
    if (top_p < 1.0) & (is_ranked == 0):
        cut = (key, id, 0.0, mean)
        listed, _ = _sums_from(source, none, none, top, temperature, cut, V, BLOCK, True, False)
        need = need_of(known, sure + beyond + listed, top_p) - sure
        key, id = _cut_at(source, need, top, temperature, cut, V, BLOCK, RANKED, True, False)
    if HAS_TYPICAL:
        if typical_p < 1.0:
            total, mean = _mean_of(source, top, temperature, (key, id, min_p), V, BLOCK)
            cut = (key, id, min_p, mean)
            typical_key, typical_id = _cut_at(source, need_of(0, total, typical_p), top, temperature, cut, V, BLOCK, RANKED, True, True)
    return key, id, min_p, mean, typical_key, typical_id
