"""The kernels of sampling: passes over the vocabulary, each shared by all programs of a row. `sampling` has the rules and the launches.

A row's last program to arrive in `first` or `count` settles it for the next pass: no pass waits for a host or a barrier. All merges are exact
(maxima, integer sums, float64 scores), so neither arrival nor chunking moves a bit.

  first   the greatest logit, and that of every GROUP tokens; rows that drop nothing are drawn here and are done, as are greedy ones
  count   how many tokens lie in each of BINS bins of distance from the greatest, which bounds where the kept prefix ends
  draw    tokens of bins that are surely kept compete where they are read; those of bins where the prefix may end are listed
  select  one program a row finds the end in the list, or in the whole row where the list cannot hold it, and draws
  probs   where asked for, the kept tokens' probabilities

A row that keeps few tokens needs neither `count` nor `draw`: the groups' greatest bound its prefix, and the last program in `first` lists it.
"""

import triton
import triton.language as tl

from ._arrive import arrive
from ._sampling_cut import kept_of, select, tile_of
from ._sampling_short import GROUP, SHORT_K, list_kept
from ._sampling_tokens import better, clean, first_best, key_of, mass_of, may_beat, scaled, scores

NO_TOKEN, BAD_OPTION = 4, 8
BINS = 1024
STATE = 16                                            # int32 a row: what one pass leaves for the next
DONE, COUNT, LIST, ROW, SHORT = 0, 1, 2, 3, 4         # modes: drawn; to be counted; to be drawn with a list; from the row; from a list alone
_INF = tl.constexpr(float("inf"))
_LOWEST = tl.constexpr(-0x7F800001)                   # the key of -inf
_LINEAR = tl.constexpr(768)                           # bins up to z = -16, 48 a unit; the others 16 an octave, up to z = -2^20
_NO_TOKEN, _BAD_OPTION, _BINS, _STATE = tl.constexpr(NO_TOKEN), tl.constexpr(BAD_OPTION), tl.constexpr(BINS), tl.constexpr(STATE)
_DONE, _COUNT, _LIST, _ROW, _SHORT = (tl.constexpr(mode) for mode in (DONE, COUNT, LIST, ROW, SHORT))
_GROUP, _SHORT_K = tl.constexpr(GROUP), tl.constexpr(SHORT_K)


@triton.jit
def _bin_of(z):
    """The bin of z = (x - top) / temperature, which never falls as x falls: fine where masses are, and wide enough for any temperature."""
    far = ((z * -0.0625).to(tl.int32, bitcast=True) - 0x3F800000 >> 19) + _LINEAR
    return tl.where(z > -16.0, (tl.maximum(z, -16.0) * -48.0).to(tl.int32), tl.minimum(far, _BINS - 1))


@triton.jit
def _options(row, options, V: tl.constexpr, HAS_TYPICAL: tl.constexpr):
    """temperature, top_k (V where off), top_p, min_p, typical_p of a row, those out of range switched off, and whether none was."""
    temperature, top_k, top_p = tl.load(options[0] + row), tl.load(options[1] + row), tl.load(options[2] + row)
    min_p, typical_p = tl.load(options[3] + row), tl.load(options[4] + row) if HAS_TYPICAL else 1.0
    good_temperature, good_k = (temperature >= 0.0) & (temperature < _INF), top_k >= 0               # NaN compares as bad
    good_p, good_min, good_typical = (top_p > 0.0) & (top_p <= 1.0), (min_p >= 0.0) & (min_p <= 1.0), (typical_p > 0.0) & (typical_p <= 1.0)
    return (tl.where(good_temperature, temperature, 0.0), tl.where((top_k > 0) & (top_k < V), top_k, V), tl.where(good_p, top_p, 1.0),
            tl.where(good_min, min_p, 0.0), tl.where(good_typical, typical_p, 1.0),
            good_temperature & good_k & good_p & good_min & good_typical)


@triton.jit
def _merge(scores_ptr, partials_ptr, row, which: tl.constexpr, V: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The greatest of the chunks' logits (which = 0) or scores (1), and its id."""
    offs_c = tl.arange(0, BLOCK_C)
    at, mask = row * CHUNKS + offs_c, offs_c < CHUNKS
    score = tl.load(scores_ptr + at * 2 + which, mask, other=-_INF, cache_modifier=".cg")
    return first_best(score, tl.load(partials_ptr + at * 3 + which, mask, other=V, cache_modifier=".cg").to(tl.int32), V)


@triton.jit
def _sum_of(partials_ptr, row, which: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):
    offs_c = tl.arange(0, BLOCK_C)
    return tl.sum(tl.load(partials_ptr + (row * CHUNKS + offs_c) * 3 + which, offs_c < CHUNKS, other=0, cache_modifier=".cg"), 0)


@triton.jit
def _put_cut(state, cut):
    """Leaves a cut to `probs_kernel`; its min_p is the row's."""
    tl.store(state + 7, cut[0])
    tl.store(state + 8, cut[1])
    tl.store(state + 9, cut[3].to(tl.int32, bitcast=True))
    tl.store(state + 10, cut[4])
    tl.store(state + 11, cut[5])


@triton.jit
def _tile(logits_ptr, row, at, stride_lr, V: tl.constexpr, BLOCK: tl.constexpr):
    """Ids and clean logits of BLOCK tokens from `at`."""
    ids = at + tl.arange(0, BLOCK)                                                 # [BLOCK]
    return ids, clean(tl.load(logits_ptr + row.to(tl.int64) * stride_lr + ids, ids < V, other=-_INF))


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "typical_p_ptr", "seed_ptr", "position_ptr",
                                            "seq_lens_ptr", "status_ptr", "out_ptr"])
def first_kernel(
    logits_ptr,        # [R, V]
    temperature_ptr,   # [R]
    top_k_ptr,         # [R] int32
    top_p_ptr,         # [R]
    min_p_ptr,         # [R]
    typical_p_ptr,     # [R], or None
    seed_ptr,          # [R] int64
    position_ptr,      # [R] int32
    seq_lens_ptr,      # [R] int32
    status_ptr,        # [R] int32, read and written
    out_ptr,           # [R] int32
    scores_ptr,        # [R, CHUNKS, 2] float64: a chunk's greatest logit and greatest score
    partials_ptr,      # [R, CHUNKS, 3] int64: their ids, the second of which `draw` overwrites; see there for the third
    counts_ptr,        # [R, BINS + 3] int32, zeros between launches: tokens a bin; programs that arrived in `first` and `count`; tokens listed
    state_ptr,         # [R, STATE] int32: mode, greatest logit, then what `count` finds
    groups_ptr,        # [R, 2, GROUPS] int32: of each GROUP tokens the key of the greatest logit, and all masses in units of 2^-24 of its
    list_x_ptr,        # [R, CAPACITY] float32
    list_ids_ptr,      # [R, CAPACITY] int32
    stride_lr,
    V: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr, CAPACITY: tl.constexpr, HAS_TYPICAL: tl.constexpr,
):
    chunk, row = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    state = state_ptr + row * _STATE
    if tl.load(seq_lens_ptr + row) <= 0:
        if chunk == 0:
            tl.store(out_ptr + row, -1)
            tl.store(state, _DONE)
        return
    options = (temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr)
    temperature, top_k, top_p, min_p, typical_p, good = _options(row, options, V, HAS_TYPICAL)
    cuts, keeps_few = (top_k < V) | (top_p < 1.0) | (typical_p < 1.0), (top_k <= _SHORT_K) & (top_k <= GROUPS // 4)
    is_short = (keeps_few | ((top_k == V) & (top_p < 1.0))) & (typical_p == 1.0)
    draws_here = (temperature > 0.0) & (cuts == 0) & (min_p == 0.0)
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    tops, at_group = tl.full((BLOCK // _GROUP,), -_INF, tl.float32), tl.full((BLOCK // _GROUP,), 0, tl.int32)
    score, token = tl.full((), -_INF, tl.float64), tl.full((), V, tl.int32)
    for at in tl.range(chunk * CHUNK, chunk * CHUNK + CHUNK, BLOCK, num_stages=4):
        ids, x = _tile(logits_ptr, row, at, stride_lr, V, BLOCK)
        tile = tl.reshape(x, (BLOCK // _GROUP, _GROUP))
        groups, group_tops = at // _GROUP + tl.arange(0, BLOCK // _GROUP), tl.max(tile, 1)
        at_group, tops = tl.where(group_tops > tops, groups, at_group), tl.maximum(tops, group_tops)
        if is_short:
            tl.store(groups_ptr + row * 2 * GROUPS + groups, key_of(group_tops), groups < GROUPS)
            if top_k == V:
                z = scaled(tile, tl.where(group_tops > -_INF, group_tops, 0.0)[:, None], temperature)
                masses = tl.sum((tl.exp(z) * 16777216.0 + 0.5).to(tl.int32), 1)
                tl.store(groups_ptr + (row * 2 + 1) * GROUPS + groups, masses, groups < GROUPS)
        if draws_here:
            if tl.max(may_beat(score, x, ids, temperature, seed, position).to(tl.int32), 0) == 1:
                score, token = better(score, token, *first_best(scores(x, ids, x > -_INF, temperature, seed, position), ids, V))
    top, group = first_best(tops, at_group, V)
    members, x = _tile(logits_ptr, row, group * _GROUP, stride_lr, V, _GROUP)
    top_id = tl.min(tl.where(x == top, members, V - 1), 0)
    partial = row * CHUNKS + chunk
    tl.store(scores_ptr + partial * 2, top.to(tl.float64))
    tl.store(scores_ptr + partial * 2 + 1, score)
    tl.store(partials_ptr + partial * 3, top_id.to(tl.int64))
    tl.store(partials_ptr + partial * 3 + 1, token.to(tl.int64))
    if arrive(counts_ptr + row * (_BINS + 3) + _BINS, CHUNKS):
        greatest, likeliest = _merge(scores_ptr, partials_ptr, row, 0, V, CHUNKS, BLOCK_C)
        _, drawn = _merge(scores_ptr, partials_ptr, row, 1, V, CHUNKS, BLOCK_C)
        is_drawn, none = (temperature > 0.0) & (tl.abs(greatest) < _INF), greatest == -_INF
        tl.store(out_ptr + row, tl.where(none, -1, tl.where(is_drawn & draws_here, drawn, likeliest)))
        top, mode, listed = greatest.to(tl.float32), tl.where(cuts, _COUNT, _LIST), tl.full((), 0, tl.int32)
        if is_short & is_drawn:
            lists = row.to(tl.int64) * CAPACITY
            listed, beyond = list_kept(logits_ptr + row.to(tl.int64) * stride_lr, groups_ptr + row * 2 * GROUPS, list_x_ptr + lists,
                                       list_ids_ptr + lists, top, temperature, top_k, top_p, V, BLOCK, GROUPS, BLOCK_G, CAPACITY)
            mode, listed = tl.where(listed < 0, _COUNT, _SHORT), tl.maximum(listed, 0)
            tl.store(partials_ptr + row * CHUNKS * 3, beyond)
        tl.store(state, tl.where(is_drawn & (draws_here == 0), mode, _DONE))
        tl.store(state + 1, top.to(tl.int32, bitcast=True))
        _put_cut(state, (tl.full((), _LOWEST, tl.int32), V, 0.0, tl.full((), 0.0, tl.float32), tl.full((), -2**31, tl.int32), V))
        offs = tl.arange(0, 8)                                                     # every bin surely kept
        tl.store(state + offs, tl.where(offs < 5, _BINS, listed), (offs >= 2) & (offs < 7))
        flags = tl.where(none, _NO_TOKEN, 0) | tl.where(good, 0, _BAD_OPTION)
        tl.store(status_ptr + row, tl.load(status_ptr + row) | flags)


@triton.jit
def _edge(bins):
    """How far from 0 z begins in a bin."""
    far = (((bins - _LINEAR) << 19) + 0x3F800000).to(tl.float32, bitcast=True) * 16.0
    return tl.where(bins >= _BINS, _INF, tl.where(bins < _LINEAR, bins.to(tl.float32) / 48.0, far))


@triton.jit
def _bounds(counts, total, top_k, top_p, is_typical):
    """Where the kept prefix may end: first and last bin of the mass's end, bin of the count's end, how many listed tokens the count leaves, and how
    many are listed, those of all these bins. A bin's edges bound its mass, so the prefix up to a bin is known from its head and, with the total,
    from its tail: to 2 % of the smaller of the two. 2e-5 covers the rounding of masses and sums."""
    bins = tl.arange(0, _BINS)                                                     # [BINS]
    through = tl.cumsum(counts, 0)
    k_bin = tl.min(tl.where(through >= top_k, bins, _BINS), 0)
    head_most = tl.cumsum(counts.to(tl.float32) * tl.exp(-_edge(bins)), 0)
    head_least = tl.cumsum(counts.to(tl.float32) * tl.exp(-_edge(bins + 1)), 0)
    most = tl.minimum(head_most, total - (tl.max(head_least, 0) - head_least))
    least = tl.maximum(head_least, total - (tl.max(head_most, 0) - head_most))
    slack = 2e-5 * total + 1e-4
    need_least = top_p * tl.maximum(tl.max(tl.where(bins < k_bin, least, 0.0), 0), 1.0) - slack    # the greatest token alone has mass 1
    need_most = top_p * tl.max(tl.where(bins <= k_bin, most, 0.0), 0) + slack
    has_p = top_p < 1.0
    first = tl.where(is_typical, 0, tl.where(has_p, tl.min(tl.where(most >= need_least, bins, k_bin), 0), k_bin))
    last = tl.where(has_p, tl.min(tl.where(least >= need_most, bins, k_bin), 0), k_bin)
    first, last = tl.minimum(first, k_bin), tl.minimum(last, k_bin)
    listed = ((bins >= first) & (bins <= last)) | (bins == k_bin)
    before = tl.sum(tl.where((bins < k_bin) & (listed == 0), counts, 0), 0)
    return first, last, k_bin, top_k - before, tl.sum(tl.where(listed, counts, 0), 0)


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "typical_p_ptr"])
def count_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr,                                     # as in first_kernel
    partials_ptr,      # [R, CHUNKS, 3]: the first is the chunk's mass
    counts_ptr, state_ptr, stride_lr,
    V: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, CAPACITY: tl.constexpr,
    HAS_TYPICAL: tl.constexpr,
):
    chunk, row = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    state, counts_ptr = state_ptr + row * _STATE, counts_ptr + row * (_BINS + 3)
    if tl.load(state) != _COUNT:
        return
    options = (temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr)
    temperature, top_k, top_p, _, typical_p, _ = _options(row, options, V, HAS_TYPICAL)
    top, bins = tl.load(state + 1).to(tl.float32, bitcast=True), tl.arange(0, _BINS)
    counts, mass = tl.zeros((_BINS,), tl.int32), tl.zeros((BLOCK,), tl.int64)
    for at in tl.range(chunk * CHUNK, chunk * CHUNK + CHUNK, BLOCK):
        x = _tile(logits_ptr, row, at, stride_lr, V, BLOCK)[1]
        z = scaled(x, top, temperature)
        counts += tl.histogram(_bin_of(z), _BINS, x > -_INF)                       # z of a far token may be -inf, and the token counts
        mass += mass_of(z)
    tl.atomic_add(counts_ptr + bins, counts, counts > 0, sem="relaxed")
    tl.store(partials_ptr + (row * CHUNKS + chunk) * 3, tl.sum(mass, 0))
    if arrive(counts_ptr + _BINS + 1, CHUNKS):
        counts = tl.load(counts_ptr + bins, cache_modifier=".cg")
        tl.debug_barrier()                                                         # the threads that clear bins are not those that read them
        tl.store(counts_ptr + bins, tl.zeros((_BINS,), tl.int32))
        total = _sum_of(partials_ptr, row, 0, CHUNKS, BLOCK_C).to(tl.float32) * 2.3283064365386963e-10
        # Where top_k is off, more than there are, so that no bin is its end
        first, last, k_bin, k_left, listed = _bounds(counts, total, tl.where(top_k < V, top_k, V + 1), top_p, typical_p < 1.0)
        fits = listed <= CAPACITY
        tl.store(state, tl.where(fits, _LIST, _ROW))
        tl.store(state + 2, first)
        tl.store(state + 3, last)
        tl.store(state + 4, k_bin)
        tl.store(state + 5, tl.where(fits, k_left, top_k))
        tl.store(state + 6, tl.where(fits, listed, V))


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "typical_p_ptr", "seed_ptr", "position_ptr"])
def draw_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr, seed_ptr, position_ptr,             # as in first_kernel
    scores_ptr,        # [R, CHUNKS, 2]: the second is written
    partials_ptr,      # [R, CHUNKS, 3]: mass surely kept, id of the greatest score, mass that counts in the total only
    counts_ptr, state_ptr, list_x_ptr, list_ids_ptr, stride_lr,                                                      # as in first_kernel
    V: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr, HAS_TYPICAL: tl.constexpr,
):
    chunk, row = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    state = state_ptr + row * _STATE
    if tl.load(state) != _LIST:
        return
    options = (temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr)
    temperature, _, _, min_p, _, _ = _options(row, options, V, HAS_TYPICAL)
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    top = tl.load(state + 1).to(tl.float32, bitcast=True)
    first, last, k_bin = tl.load(state + 2), tl.load(state + 3), tl.load(state + 4)
    score, token = tl.full((), -_INF, tl.float64), tl.full((), V, tl.int32)
    sure, beyond = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for at in tl.range(chunk * CHUNK, chunk * CHUNK + CHUNK, BLOCK):
        ids, x = _tile(logits_ptr, row, at, stride_lr, V, BLOCK)
        z = scaled(x, top, temperature)
        live, bins, mass = x > -_INF, _bin_of(z), mass_of(z)
        is_sure, is_beyond = live & (bins < first), live & (bins > last) & (bins < k_bin)
        listed = live & (bins >= first) & ((bins <= last) | (bins == k_bin))
        sure, beyond = sure + tl.sum(tl.where(is_sure, mass, 0), 0), beyond + tl.sum(tl.where(is_beyond, mass, 0), 0)
        kept = is_sure & (tl.exp(z) >= min_p)
        if tl.max((kept & may_beat(score, x, ids, temperature, seed, position)).to(tl.int32), 0) == 1:
            score, token = better(score, token, *first_best(scores(x, ids, kept, temperature, seed, position), ids, V))
        count = tl.sum(listed.to(tl.int32), 0)
        if count > 0:
            place = tl.atomic_add(counts_ptr + row * (_BINS + 3) + _BINS + 2, count, sem="relaxed") + tl.cumsum(listed.to(tl.int32), 0) - 1
            place = row.to(tl.int64) * CAPACITY + place
            tl.store(list_x_ptr + place, x, listed)
            tl.store(list_ids_ptr + place, ids, listed)
    partial = row * CHUNKS + chunk
    tl.store(scores_ptr + partial * 2 + 1, score)
    tl.store(partials_ptr + partial * 3, sure)
    tl.store(partials_ptr + partial * 3 + 1, token.to(tl.int64))
    tl.store(partials_ptr + partial * 3 + 2, beyond)


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "typical_p_ptr", "seed_ptr", "position_ptr",
                                            "out_ptr"])
def select_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr, seed_ptr, position_ptr, out_ptr,    # as in first_kernel
    scores_ptr, partials_ptr, counts_ptr, state_ptr, list_x_ptr, list_ids_ptr, stride_lr,                            # as in draw_kernel
    V: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, CAPACITY: tl.constexpr, RANKED: tl.constexpr,
    HAS_TYPICAL: tl.constexpr,
):
    row = tl.program_id(0)
    state = state_ptr + row * _STATE
    mode = tl.load(state)
    if mode == _DONE:
        return
    tl.store(counts_ptr + row * (_BINS + 3) + _BINS + 2, 0)
    options = (temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr)
    temperature, top_k, top_p, min_p, typical_p, _ = _options(row, options, V, HAS_TYPICAL)
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    top, count = tl.load(state + 1).to(tl.float32, bitcast=True), tl.load(state + 6)
    k_left = tl.where(mode == _SHORT, top_k, tl.load(state + 5))
    # Else fewer tokens than top_k have a logit
    has_k = (top_k < V) & ((mode == _ROW) | tl.where(mode == _SHORT, count > top_k, tl.load(state + 4) < _BINS))
    sure, beyond, score, token = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), -_INF, tl.float64), tl.full((), V, tl.int32)
    if mode == _LIST:
        sure, beyond = _sum_of(partials_ptr, row, 0, CHUNKS, BLOCK_C), _sum_of(partials_ptr, row, 2, CHUNKS, BLOCK_C)
        score, token = _merge(scores_ptr, partials_ptr, row, 1, V, CHUNKS, BLOCK_C)
    if mode == _SHORT:
        beyond = tl.load(partials_ptr + row * CHUNKS * 3)
    lists = row.to(tl.int64) * CAPACITY
    source = (list_x_ptr + lists, list_ids_ptr + lists, logits_ptr + row.to(tl.int64) * stride_lr, count, mode == _ROW)
    cut = select(source, sure, beyond, k_left, has_k, top, temperature, top_p, min_p, typical_p, V, BLOCK, RANKED, HAS_TYPICAL)
    for start in range(0, count, RANKED):                                          # a short list in one turn
        ids, x, z = tile_of(source, start, top, temperature, V, RANKED)
        kept = kept_of(ids, x, z, cut, HAS_TYPICAL)
        score, token = better(score, token, *first_best(scores(x, ids, kept, temperature, seed, position), ids, V))
    tl.store(out_ptr + row, token)
    _put_cut(state, cut)


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "typical_p_ptr", "seq_lens_ptr", "out_ptr"])
def probs_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr, seq_lens_ptr, out_ptr,               # as in first_kernel
    partials_ptr,      # [R, CHUNKS, 3]: the first is the chunk's kept mass, stored by the first launch for the second
    state_ptr,
    probs_ptr,         # [R, V]
    stride_lr, stride_pr,
    V: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, HAS_TYPICAL: tl.constexpr,
    IS_SECOND: tl.constexpr,
):
    chunk, row = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    state = state_ptr + row * _STATE
    options = (temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr)
    temperature, _, _, min_p, _, _ = _options(row, options, V, HAS_TYPICAL)
    is_live, top, token = tl.load(seq_lens_ptr + row) > 0, tl.load(state + 1).to(tl.float32, bitcast=True), tl.load(out_ptr + row)
    is_drawn, mean = is_live & (temperature > 0.0) & (tl.abs(top) < _INF), tl.load(state + 9).to(tl.float32, bitcast=True)
    cut = (tl.load(state + 7), tl.load(state + 8), min_p, mean, tl.load(state + 10), tl.load(state + 11))
    total, sums = tl.full((), 1, tl.int64), tl.zeros((BLOCK,), tl.int64)
    if IS_SECOND:
        total = tl.maximum(_sum_of(partials_ptr, row, 0, CHUNKS, BLOCK_C), 1)
    for at in tl.range(chunk * CHUNK, chunk * CHUNK + CHUNK, BLOCK):
        if is_drawn:
            ids, x = _tile(logits_ptr, row, at, stride_lr, V, BLOCK)
            z = scaled(x, top, temperature)
            mass = tl.where(kept_of(ids, x, z, cut, HAS_TYPICAL), mass_of(z), 0)
        else:                                                                      # all on the token; nothing where there is none
            ids = at + tl.arange(0, BLOCK)
            mass = ((ids == token) & is_live).to(tl.int64)
        if IS_SECOND:
            tl.store(probs_ptr + row.to(tl.int64) * stride_pr + ids, (mass.to(tl.float64) / total.to(tl.float64)).to(tl.float32), ids < V)
        sums += mass
    if not IS_SECOND:
        tl.store(partials_ptr + (row * CHUNKS + chunk) * 3, tl.sum(sums, 0))
