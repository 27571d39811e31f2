"""How sampling lists all tokens that a row may keep, where they are few, without another pass over the row.

Each group's greatest logit is a token of its own. So none below the top_k-th of these can be among the top_k tokens, and none below the least of
those that together have top_p of all mass can be in that prefix: only groups that reach the bound are read, some top_k of the thousands.
"""

import triton
import triton.language as tl

from ._sampling_tokens import clean, key_of, logit_of, mass_of, scaled

GROUP = 32                                            # tokens: 128 bytes of float32, what a read of single groups moves anyway
_GROUP = tl.constexpr(GROUP)
SHORT_K = 224                                         # greatest top_k that is served
_MOST_GROUPS = tl.constexpr(256)                      # that one program reads: 1500 of them take it 40 us, and two passes by all programs 15
_INF = tl.constexpr(float("inf"))
_LOWEST = tl.constexpr(-0x7F800001)                   # the key of -inf


@triton.jit
def _bound(keys, weights, need, slack):
    """A key that weights of at least `need` reach, and not much more than `slack` above; the least of all keys where they cannot."""
    low, high, reached = tl.min(keys, 0).to(tl.int64), tl.max(keys, 0).to(tl.int64) + 1, tl.full((), 0x7FFFFFFF, tl.int32)
    while (high - low > 1) & (reached - need > slack):
        middle = (low + high) >> 1
        weight = tl.sum(tl.where(keys >= middle, weights, 0), 0)
        low, high, reached = tl.where(weight >= need, middle, low), tl.where(weight >= need, high, middle), tl.where(weight >= need, weight, reached)
    return low


@triton.jit
def list_kept(row_ptr, groups_ptr, list_x_ptr, list_ids_ptr, top, temperature, top_k, top_p, V: tl.constexpr, BLOCK: tl.constexpr,
              GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, CAPACITY: tl.constexpr):
    """Lists all tokens that top_k, or else top_p, may keep, in the order of their ids. Returns how many they are, -1 where this way does not serve,
    and without top_k the mass of all others. Where the groups' keys were it leaves the ids of the groups that it read."""
    offs, has_k = tl.arange(0, BLOCK_G), top_k < V                                 # [BLOCK_G]
    keys = tl.load(groups_ptr + offs, offs < GROUPS, other=_LOWEST, cache_modifier=".cg")       # pads without mass, as a NaN's is not
    weights, need, slack, total = (offs < GROUPS).to(tl.int32), top_k, tl.full((), 14, tl.int32), tl.full((), 0, tl.int64)
    if has_k == 0:
        z = scaled(logit_of(keys), top, temperature)
        masses = tl.load(groups_ptr + GROUPS + offs, offs < GROUPS, other=0, cache_modifier=".cg")
        # Whole numbers, of a group in units of 2^-24 of its greatest: the total depends on no chunk and no order
        total = tl.sum((tl.exp(z) * masses.to(tl.float32) * 256.0 + 0.5).to(tl.int64), 0)
        weights = tl.where(offs < GROUPS, mass_of(z) >> 15, 0).to(tl.int32)        # of 8192 groups below 2^30; rounded down, the need up
        need = (tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)) * 3.0517578125e-05).to(tl.int32) + 1
        slack = need // 128
    bound = _bound(keys, weights, need, slack)
    reaches = (keys >= bound) & (offs < GROUPS)
    num_groups = tl.sum(reaches.to(tl.int32), 0)
    serves = (tl.sum(tl.where(reaches, weights, 0), 0) >= need) & (num_groups <= _MOST_GROUPS)
    tl.debug_barrier()                                                             # every thread has its keys before ids take their place
    tl.store(groups_ptr + tl.cumsum(reaches.to(tl.int32), 0) - 1, offs, reaches & serves)
    tl.debug_barrier()
    count, mass = tl.full((), 0, tl.int32), tl.full((), 0, tl.int64)
    for start in range(0, tl.where(serves, num_groups, 0), BLOCK // _GROUP):
        place = start + tl.arange(0, BLOCK) // _GROUP                              # [BLOCK]
        ids = tl.load(groups_ptr + place, place < num_groups, other=V) * _GROUP + tl.arange(0, BLOCK) % _GROUP
        x = clean(tl.load(row_ptr + ids, (place < num_groups) & (ids < V), other=-_INF))
        listed = (key_of(x) >= bound) & (x > -_INF)
        at = count + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(list_x_ptr + at, x, listed & (at < CAPACITY))
        tl.store(list_ids_ptr + at, ids, listed & (at < CAPACITY))
        count, mass = count + tl.sum(listed.to(tl.int32), 0), mass + tl.sum(tl.where(listed, mass_of(scaled(x, top, temperature)), 0), 0)
    return tl.where(serves & (count <= CAPACITY), count, -1), tl.where(has_k, 0, tl.maximum(total - mass, 0))
