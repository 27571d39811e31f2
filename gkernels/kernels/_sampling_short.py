"""What a row's groups tell of the end of its kept prefix, and how all programs of a row list the tokens that it may keep, where these are few.

Each group's greatest logit is a token of its own. So none below the top_k-th of these can be among the top_k tokens, and none below the least of
those that together have top_p of all mass can be in that prefix. What min_p keeps is bounded by the greatest logit alone. Only groups that reach the
bound are read again, some top_k of the thousands. Where top_k is small the bound comes from families of groups, which are fewer: the 50th greatest of
251 leaves 57 tokens to list on normal logits, that of 4008 groups 50.
"""

import triton
import triton.language as tl

from ._sampling_bins import LINEAR
from ._sampling_tokens import clean, key_of, logit_of, scaled

GROUP = 32                                            # tokens: 128 bytes of float32, what a read of single groups moves anyway
FAMILY = 16                                           # groups: a 128 K vocabulary has 251 families, which one program halves at two a thread
_GROUP, _FAMILY, _LINEAR = tl.constexpr(GROUP), tl.constexpr(FAMILY), tl.constexpr(LINEAR)
SHORT_K = 224                                         # greatest top_k that is served
_INF = tl.constexpr(float("inf"))
_LOWEST = tl.constexpr(-0x7F800001)                   # the key of -inf
_FIELD = tl.constexpr(2097151)                        # 21 bits: three sums in one int64
_UNITS = tl.constexpr(1048576.0)                      # of all mass; 8192 groups, each rounded up, stay below 2^21


@triton.constexpr_function
def families(GROUPS):
    return (GROUPS + FAMILY - 1) // FAMILY


@triton.constexpr_function
def group_words(GROUPS):
    """int32 of a row: of each group the key of the greatest logit, then the groups' masses, then of each family the key of the greatest."""
    return 2 * GROUPS + families(GROUPS)


@triton.jit
def put_families(groups_ptr, group_tops, at, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Leaves the keys of the families that begin in a tile of BLOCK tokens at `at`, whose groups have these greatest logits."""
    COUNT: tl.constexpr = BLOCK // (_GROUP * _FAMILY)
    place = at // (_GROUP * _FAMILY) + tl.arange(0, COUNT)
    tops = tl.max(tl.reshape(group_tops, (COUNT, _FAMILY)), 1)
    tl.store(groups_ptr + 2 * GROUPS + place, key_of(tops), place < families(GROUPS))


@triton.jit
def put_groups(groups_ptr, row_ptr, first, temperature, needs_families, has_masses, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
               GROUPS: tl.constexpr):
    """Leaves what a chunk's groups are asked for, and returns its greatest logit."""
    tops = tl.full((BLOCK // _GROUP,), -_INF, tl.float32)
    for at in tl.range(first, tl.minimum(first + CHUNK, V), BLOCK, num_stages=4):
        ids, groups = at + tl.arange(0, BLOCK), at // _GROUP + tl.arange(0, BLOCK // _GROUP)
        tile = tl.reshape(tl.load(row_ptr + ids, ids < V, other=-_INF).to(tl.float32), (BLOCK // _GROUP, _GROUP))
        group_tops = clean(tl.max(tile, 1))                                        # a maximum passes over NaN
        tops = tl.maximum(tops, group_tops)
        tl.store(groups_ptr + groups, key_of(group_tops), groups < GROUPS)
        if BLOCK >= _GROUP * _FAMILY:                                              # else there are too few
            if needs_families:
                put_families(groups_ptr, group_tops, at, GROUPS, BLOCK)
        if has_masses:
            z = scaled(clean(tile), tl.where(group_tops > -_INF, group_tops, 0.0)[:, None], temperature)
            masses = tl.sum((tl.exp(z) * 16777216.0 + 0.5).to(tl.int32), 1)
            tl.store(groups_ptr + GROUPS + groups, masses, groups < GROUPS)
    return tl.max(tops, 0)


@triton.jit
def _bound(keys, weights, need, slack):
    """Two keys and a weight: that at or above the first, which reaches `need`, and if it can not much more than `slack` above; that from the
    second on does not. The weight of all where they cannot. A round halves the keys between twice; weights sum below 2^21."""
    low, high = tl.min(tl.where(keys > _LOWEST, keys, 0x7FFFFFFF), 0), tl.max(keys, 0).to(tl.int64) + 1
    reached = tl.sum(tl.where(keys >= low, weights, 0), 0)
    if reached < need:                                 # groups without a logit count too
        low, reached = tl.full((), _LOWEST, tl.int32), tl.sum(weights, 0)
    low, weights = low.to(tl.int64), weights.to(tl.int64)
    while (high - low > 1) & (reached - need > slack):
        step = tl.maximum((high - low) >> 2, 1)
        first, second, third = low + step, tl.minimum(low + 2 * step, high - 1), tl.minimum(low + 3 * step, high - 1)
        packed = tl.where(keys >= first, weights, 0) + tl.where(keys >= second, weights << 21, 0) + tl.where(keys >= third, weights << 42, 0)
        packed = tl.sum(packed, 0)
        a, b, c = (packed & _FIELD).to(tl.int32), ((packed >> 21) & _FIELD).to(tl.int32), (packed >> 42).to(tl.int32)
        high = tl.where(c >= need, high, tl.where(b >= need, third, tl.where(a >= need, second, first)))
        low = tl.where(c >= need, third, tl.where(b >= need, second, tl.where(a >= need, first, low)))
        reached = tl.where(c >= need, c, tl.where(b >= need, b, tl.where(a >= need, a, reached)))
    return low, high, reached


@triton.jit
def _least(min_p, has_k):
    """The z that min_p keeps: tl.exp is off by a few 2^-22. With top_k all of its tokens have to be known, for their mass."""
    return tl.where((min_p >= 1e-37) & (has_k == 0), tl.log(tl.maximum(min_p, 1e-37)) - 1e-3, -_INF)


@triton.jit
def _width(width):
    """Of the bins of z, over the distances of the groups' greatest, which hold the end of a top_k."""
    return tl.minimum(tl.maximum(width, 1e-6), 16.0)


@triton.jit
def settle_groups(groups_ptr, top, temperature, top_k, top_p, min_p, may_be_short, has_masses, V: tl.constexpr, GROUPS: tl.constexpr,
                  BLOCK_G: tl.constexpr, CAPACITY: tl.constexpr):
    """From the greatest logit of each group, and where there are masses from these:
    whether all tokens that the row may keep are few enough for its list; the key and the z that they reach; the mass of the row, 0 where it is not
    known; and, for rows where they are not few, the scale and the offset of their bins."""
    offs, has_k = tl.arange(0, BLOCK_G), top_k < V                                 # [BLOCK_G]
    keys = tl.load(groups_ptr + offs, offs < GROUPS, other=_LOWEST, cache_modifier=".cg")       # pads without mass, as a NaN's is not
    z = scaled(logit_of(keys), top, temperature)
    greatest, masses = tl.exp(z), tl.full((BLOCK_G,), 33554432.0, tl.float32)      # 32 tokens as great as a group's greatest, where nothing is known
    weights, need, slack, total = (offs < GROUPS).to(tl.int32), top_k, tl.full((), 8, tl.int32), tl.full((), 0, tl.int64)
    low, reached, units = tl.full((), _LOWEST, tl.int64), tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float32)
    if has_masses:
        # Whole numbers, of a group in units of 2^-24 of its greatest: the total depends on no chunk and no order
        masses = tl.load(groups_ptr + GROUPS + offs, offs < GROUPS, other=0, cache_modifier=".cg").to(tl.float32)
        total = tl.sum((greatest * masses * 256.0 + 0.5).to(tl.int64), 0)
        masses = masses * 5.9604644775390625e-08
        units = _UNITS / (total.to(tl.float32) * 2.3283064365386963e-10)
        weights = tl.where(offs < GROUPS, greatest * units * 0.99999, 0.0).to(tl.int32)                # rounded down, and the need up
        need = (top_p * _UNITS * 1.00001).to(tl.int32) + 2
        slack = need // 128
    if (has_k & may_be_short) | has_masses:
        low, _, reached = _bound(keys, weights, need, slack)
        reached -= need
    least = _least(min_p, has_k)
    bound = tl.where(reached >= 0, low, _LOWEST).to(tl.int32)
    edge = tl.maximum(scaled(logit_of(bound), top, temperature), least)
    # A group's tokens above the edge have at least exp(edge) each, its greatest aside
    above = tl.minimum(tl.maximum(z, -3e38) - tl.maximum(edge, -3e38), 80.0)
    most = 1.0 + tl.minimum(31.0, (masses - 1.0 + 4e-6) * tl.exp(above) * 1.0001)
    most = tl.where(has_masses, most, 32.0)
    reaches = (keys >= bound) & (z >= least) & (offs < GROUPS)
    serves = may_be_short & ((reached >= 0) | (least > -_INF)) & (tl.sum(tl.where(reaches, most, 0.0), 0) <= CAPACITY)
    width, start = _width(-tl.min(tl.where(keys > _LOWEST, z, 0.0), 0)), tl.full((), 0.0, tl.float32)
    if has_masses & (serves == 0):                     # bins over where the end of top_p may be
        # All tokens of a group count from its greatest on
        weights = tl.where(offs < GROUPS, greatest * masses * units * 1.00001 + 1.0, 0.0).to(tl.int32)
        _, high, _ = _bound(keys, weights, (top_p * _UNITS * 0.9999).to(tl.int32), slack)
        start = tl.minimum(-scaled(logit_of(tl.minimum(high, 0x7F7FFFFF).to(tl.int32)), top, temperature), 64.0)
        # Below `stop`, V tokens have less than 1 - top_p
        stop = -tl.log((1.0 - top_p) * total.to(tl.float32) * 2.3283064365386963e-10 / V)
        start = tl.maximum(start, 0.0)
        width = tl.maximum(stop - start, 1e-5 * start + 1e-6)
    scale = _LINEAR / width
    return serves, bound, least, total, scale, tl.maximum((start * scale).to(tl.int32) - 1, 0)


@triton.jit
def settle_families(groups_ptr, top, temperature, top_k, min_p, may_be_short, V: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
                    CAPACITY: tl.constexpr):
    """What `settle_groups` tells, of rows whose bound needs no masses and few families. A loop over the groups, not all 4096 at once: a row takes 21
    us, not 24."""
    has_k = top_k < V
    low, reached = tl.full((), _LOWEST, tl.int64), tl.full((), 0, tl.int32)
    if has_k & may_be_short:
        FAMILIES: tl.constexpr = families(GROUPS)
        offs_f = tl.arange(0, triton.next_power_of_2(FAMILIES))
        tops = tl.load(groups_ptr + 2 * GROUPS + offs_f, offs_f < FAMILIES, other=_LOWEST, cache_modifier=".cg")
        low, _, reached = _bound(tops, (offs_f < FAMILIES).to(tl.int32), top_k, 2)
        reached -= top_k
    bound, least = tl.where(reached >= 0, low, _LOWEST).to(tl.int32), _least(min_p, has_k)
    num_reaching, width = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, GROUPS, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        keys = tl.load(groups_ptr + offs, offs < GROUPS, other=_LOWEST, cache_modifier=".cg")
        z = scaled(logit_of(keys), top, temperature)
        num_reaching += ((keys >= bound) & (z >= least) & (offs < GROUPS)).to(tl.int32)
        width = tl.maximum(width, tl.where(keys > _LOWEST, -z, 0.0))
    serves = may_be_short & ((reached >= 0) | (least > -_INF)) & (tl.sum(num_reaching, 0) * _GROUP <= CAPACITY)
    scale = _LINEAR / _width(tl.max(width, 0))
    return serves, bound, least, tl.full((), 0, tl.int64), scale, tl.full((), 0, tl.int32)


@triton.jit
def list_reached(row_ptr, groups_ptr, list_x_ptr, list_ids_ptr, counter_ptr, top, temperature, bound, least, first_group, V: tl.constexpr,
                 BLOCK: tl.constexpr, GROUPS: tl.constexpr, COUNT: tl.constexpr, CAPACITY: tl.constexpr):
    """Lists the tokens of COUNT groups that reach the bound, in no order. Where the groups' keys were it leaves the ids of those that it read."""
    groups = first_group + tl.arange(0, COUNT)                                     # [COUNT]
    keys = tl.load(groups_ptr + groups, groups < GROUPS, other=_LOWEST)
    reaches = (keys >= bound) & (scaled(logit_of(keys), top, temperature) >= least) & (groups < GROUPS)
    num_groups = tl.sum(reaches.to(tl.int32), 0)
    tl.debug_barrier()                                                             # every thread has its keys before ids take their place
    tl.store(groups_ptr + first_group + tl.cumsum(reaches.to(tl.int32), 0) - 1, groups, reaches)
    tl.debug_barrier()
    for start in range(0, num_groups, BLOCK // _GROUP):
        place = start + tl.arange(0, BLOCK) // _GROUP                              # [BLOCK]
        ids = tl.load(groups_ptr + first_group + place, place < num_groups, other=V) * _GROUP + tl.arange(0, BLOCK) % _GROUP
        x = clean(tl.load(row_ptr + ids, (place < num_groups) & (ids < V), other=-_INF))
        listed = (key_of(x) >= bound) & (scaled(x, top, temperature) >= least) & (x > -_INF)
        ranks = tl.cumsum(listed.to(tl.int32), 0)
        at = tl.atomic_add(counter_ptr, tl.max(ranks, 0), sem="relaxed") + ranks - 1
        tl.store(list_x_ptr + at, x, listed & (at < CAPACITY))
        tl.store(list_ids_ptr + at, ids, listed & (at < CAPACITY))
