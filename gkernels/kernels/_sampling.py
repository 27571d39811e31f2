"""The kernels of sampling: passes over the vocabulary, each shared by all programs of a row. `sampling` has the rules and the launches.

A row's last program to arrive in `first` or `reach` settles it for the next pass, and in `draw` ends it: no pass waits for a host or a barrier. All
merges are exact (maxima, integer sums, float64 scores), so neither arrival nor chunking moves a bit.

  first   the greatest logit, and that of every GROUP tokens; rows that drop nothing are drawn here and are done, as are greedy ones. Where only top_p
          drops, and not much, the winner of all tokens is found here
  reach   such rows end here if they keep that winner; where rows are many, it is launched twice, and they end if they keep the next. Of others, where
          few tokens may be kept, these are listed; else the tokens in each of BINS bins are counted, which bounds where the prefix ends
  draw    tokens above the bins where the prefix may end compete where they are read, and those in them are listed; nothing where `reach` listed.
          One program a row finds the end in the list, or in the whole row where the list cannot hold it, and draws. Rows that turned their winners
          down end here if they keep the next, or one program goes on until they keep one
"""

import triton
import triton.language as tl

from ._arrive import arrive
from ._noise import key_at
from ._overlap import wait_for_node_before
from ._sampling_bins import BINS, LINEAR, bin_of, bounds_of
from ._sampling_contest import decide, draw_of, enter, greatest_of, least_of, most_of, nobody, tile_ahead
from ._sampling_cut import kept_of, select, tile_of
from ._sampling_rejection import LEAST_P, is_kept, masses_of, next_winner, winner_of
from ._sampling_short import FAMILY, GROUP, SHORT_K, families, group_words, list_reached, put_groups, settle_families, settle_groups
from ._sampling_tokens import better, first_best, mass_of, scaled, scores, tile_at

NO_TOKEN, BAD_OPTION = 4, 8
STATE = 16                                            # int32 a row: what one pass leaves for the next
DONE, COUNT, LIST, ROW, SHORT, WINNER = range(6)      # modes: drawn; to be counted; to be drawn with a list; from the row; from a list alone;
                                                      # drawn as if all were kept
_INF = tl.constexpr(float("inf"))
_LOWEST = tl.constexpr(-0x7F800001)                   # the key of -inf
_NO_TOKEN, _BAD_OPTION, _BINS, _STATE = tl.constexpr(NO_TOKEN), tl.constexpr(BAD_OPTION), tl.constexpr(BINS), tl.constexpr(STATE)
_DONE, _COUNT, _LIST, _ROW, _SHORT, _WINNER = (tl.constexpr(mode) for mode in range(6))
_GROUP, _FAMILY, _SHORT_K, _LINEAR = tl.constexpr(GROUP), tl.constexpr(FAMILY), tl.constexpr(SHORT_K), tl.constexpr(LINEAR)
_LEAST_P = tl.constexpr(LEAST_P)


@triton.jit
def options_of(row, options, V: tl.constexpr, HAS_TYPICAL: tl.constexpr):
    """temperature, top_k (V where off), top_p, min_p, typical_p of a row, those out of range switched off, and whether none was."""
    temperature, top_k, top_p = tl.load(options[0] + row), tl.load(options[1] + row), tl.load(options[2] + row)
    min_p, typical_p = tl.load(options[3] + row), tl.load(options[4] + row) if HAS_TYPICAL else 1.0
    good_temperature, good_k = (temperature >= 0.0) & (temperature < _INF), top_k >= 0               # NaN compares as bad
    good_p, good_min, good_typical = (top_p > 0.0) & (top_p <= 1.0), (min_p >= 0.0) & (min_p <= 1.0), (typical_p > 0.0) & (typical_p <= 1.0)
    return (tl.where(good_temperature, temperature, 0.0), tl.where((top_k > 0) & (top_k < V), top_k, V), tl.where(good_p, top_p, 1.0),
            tl.where(good_min, min_p, 0.0), tl.where(good_typical, typical_p, 1.0),
            good_temperature & good_k & good_p & good_min & good_typical)


@triton.jit
def _settle(scores_ptr, partials_ptr, row, V: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The greatest of the chunks' logits, and the id of the greatest of their scores. All is loaded before a reduction waits for any."""
    offs_c = tl.arange(0, BLOCK_C)
    at, mask = row * CHUNKS + offs_c, offs_c < CHUNKS
    tops = tl.load(scores_ptr + at * 2, mask, other=-_INF, cache_modifier=".cg")
    best = tl.load(scores_ptr + at * 2 + 1, mask, other=-_INF, cache_modifier=".cg")
    ids = tl.load(partials_ptr + at * 3 + 1, mask, other=V, cache_modifier=".cg").to(tl.int32)
    return tl.max(tops, 0), first_best(best, ids, V)[1]


@triton.jit
def _winners(scores_ptr, partials_ptr, row, V: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The greatest score of each chunk, and its id."""
    offs_c = tl.arange(0, BLOCK_C)
    at, mask = row * CHUNKS + offs_c, offs_c < CHUNKS
    score = tl.load(scores_ptr + at * 2 + 1, mask, other=-_INF, cache_modifier=".cg")
    return score, tl.load(partials_ptr + at * 3 + 1, mask, other=V, cache_modifier=".cg").to(tl.int32)


@triton.jit
def sum_of(partials_ptr, row, which: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):
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


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "typical_p_ptr", "seed_ptr", "position_ptr",
                                            "seq_lens_ptr", "keeps_ptr", "status_ptr", "out_ptr"])
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
    keeps_ptr,         # [R] int32: 0 for rows to be left alone; None for none
    status_ptr,        # [R] int32, read and written
    out_ptr,           # [R] int32
    scores_ptr,        # [R, CHUNKS, 2] float64: a chunk's greatest logit and greatest score, which is that logit where the row is greedy
    partials_ptr,      # [R, CHUNKS, 3] int64: the second is the id of the greatest score
    counts_ptr,        # [R, BINS + 4] int32, zeros between launches: tokens a bin; programs that arrived in `first`, and in the others;
                       # tokens listed by `reach`, by `draw`
    state_ptr,         # [R, STATE] int32: mode, greatest logit, then what `reach` finds, the cut, and what it needs
    groups_ptr,        # [R, group_words] int32: of each GROUP tokens the key of the greatest logit, all masses in units of 2^-24 of its, and families
    stride_lr,
    V: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr, BLOCK_C: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, CAPACITY: tl.constexpr, HAS_TYPICAL: tl.constexpr, NEEDS_CUT: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    chunk, row = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    state = state_ptr + row * _STATE
    # All that a row says of itself at once, before a branch depends on any
    options, row_ptr = (temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr), logits_ptr + row.to(tl.int64) * stride_lr
    temperature, top_k, top_p, min_p, typical_p, good = options_of(row, options, V, HAS_TYPICAL)
    seq_len, seed, position = tl.load(seq_lens_ptr + row), tl.load(seed_ptr + row), tl.load(position_ptr + row)
    first = chunk * CHUNK
    stop = tl.minimum(first + CHUNK, V)
    tile = tile_ahead(row_ptr, first, stop, V, STREAM)
    if keeps_ptr is not None:
        if tl.load(keeps_ptr + row) == 0:
            if chunk == 0:
                tl.store(state, _DONE)
            return
    if seq_len <= 0:
        if chunk == 0:
            tl.store(out_ptr + row, -1)
            tl.store(state, _DONE)
        return
    cuts, keeps_few = (top_k < V) | (top_p < 1.0) | (typical_p < 1.0), (top_k <= _SHORT_K) & (top_k <= GROUPS // 4)
    may_be_short = (keeps_few | (top_k == V)) & (typical_p == 1.0)
    is_nucleus = (top_k == V) & (top_p < 1.0) & (typical_p == 1.0)
    turns_down = is_nucleus & (top_p >= _LEAST_P) & (NEEDS_CUT == 0)
    has_masses = is_nucleus & (turns_down == 0)
    draws_here = (temperature > 0.0) & (((cuts == 0) & (min_p == 0.0)) | turns_down)
    has_groups = (temperature > 0.0) & (draws_here == 0)
    # The more families a top_k needs, the lower is the bound that they give, and the more tokens reach it
    needs_families = may_be_short & (top_k <= families(GROUPS) // 3)
    needs_groups = may_be_short & (top_k < V) & (needs_families == 0)
    row_groups = groups_ptr + row * group_words(GROUPS)
    score, token = tl.full((), -_INF, tl.float64), tl.full((), V, tl.int32)
    # A loop of its own for each kind of row: what others need costs it nothing
    if has_groups:
        top = put_groups(row_groups, row_ptr, first, temperature, needs_families, has_masses, V, CHUNK, BLOCK, GROUPS)
    elif draws_here:
        top, score, token = draw_of(row_ptr, tile, first, stop, temperature, seed, position, V, CHUNK, STREAM)
    else:
        top, token = greatest_of(row_ptr, tile, first, stop, V, CHUNK, STREAM)
        score = top.to(tl.float64)
    partial = row * CHUNKS + chunk
    tl.store(scores_ptr + partial * 2, top.to(tl.float64))
    tl.store(scores_ptr + partial * 2 + 1, score)
    tl.store(partials_ptr + partial * 3 + 1, token.to(tl.int64))
    if arrive(counts_ptr + row * (_BINS + 4) + _BINS, CHUNKS):
        status = tl.load(status_ptr + row)                                         # with all that is loaded here, not after it
        greatest, token = _settle(scores_ptr, partials_ptr, row, V, CHUNKS, BLOCK_C)
        top, none, mode = greatest.to(tl.float32), greatest == -_INF, tl.full((), _DONE, tl.int32)
        is_drawn = (temperature > 0.0) & (tl.abs(greatest) < _INF)
        if is_drawn & (draws_here == 0):
            if has_masses | needs_groups:
                serves, bound, least, total, scale, offset = settle_groups(
                    row_groups, top, temperature, top_k, top_p, min_p, may_be_short, has_masses, V, GROUPS, BLOCK_G, CAPACITY)
            else:
                serves, bound, least, total, scale, offset = settle_families(row_groups, top, temperature, top_k, min_p, may_be_short, V, GROUPS,
                                                                             BLOCK, CAPACITY)
            mode = tl.where(serves, _SHORT, tl.where(cuts, _COUNT, _LIST))
            tl.store(state + 12, tl.where(serves, bound, scale.to(tl.int32, bitcast=True)))
            tl.store(state + 13, tl.where(serves, least.to(tl.int32, bitcast=True), offset))
            tl.store(state + 14, (total & 0xFFFFFFFF).to(tl.int32))
            tl.store(state + 15, (total >> 32).to(tl.int32))
            offs = tl.arange(0, 8)                                                 # every bin surely kept
            tl.store(state + offs, _BINS, (offs >= 2) & (offs < 5))
        else:
            for at in range(0, tl.where((temperature > 0.0) & (greatest == _INF), V, 0), BLOCK):       # +inf wins over any noise, the first of them
                ids, x = tile_at(row_ptr, at, V, BLOCK)
                first_infinite = tl.min(tl.where(x == _INF, ids, V), 0)
                token = tl.minimum(tl.where(at == 0, V, token), first_infinite)
            tl.store(out_ptr + row, tl.where(none, -1, token))
            mode = tl.where(is_drawn & turns_down, _WINNER, _DONE)
            tl.store(state + 12, token)
        tl.store(state, mode)
        tl.store(state + 1, top.to(tl.int32, bitcast=True))
        _put_cut(state, (tl.full((), _LOWEST, tl.int32), V, 0.0, tl.full((), 0.0, tl.float32), tl.full((), -2**31, tl.int32), V))
        flags = tl.where(none, _NO_TOKEN, 0) | tl.where(good, 0, _BAD_OPTION)
        tl.store(status_ptr + row, status | flags)


@triton.jit
def _judge(row, chunk, winner, row_ptr, top, temperature, partials_ptr, counter_ptr, V: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
           BLOCK: tl.constexpr):
    """Leaves a chunk's mass and that before the winner, and says whether this program is the row's last."""
    first, partial = chunk * CHUNK, partials_ptr + (row * CHUNKS + chunk) * 3
    before, total = masses_of(row_ptr, first, tl.minimum(first + CHUNK, V), winner, top, temperature, V, BLOCK)
    tl.store(partial, total)
    tl.store(partial + 2, before)
    return arrive(counter_ptr, CHUNKS)


@triton.jit
def _verdict(row, winner, top, temperature, top_p, min_p, partials_ptr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):
    total, before = sum_of(partials_ptr, row, 0, CHUNKS, BLOCK_C), sum_of(partials_ptr, row, 2, CHUNKS, BLOCK_C)
    return is_kept(before, total, winner, top, temperature, top_p, min_p)


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "typical_p_ptr", "seed_ptr", "position_ptr",
                                            "out_ptr"])
def reach_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr, seed_ptr, position_ptr, out_ptr,    # as in first_kernel
    scores_ptr,        # [R, CHUNKS, 2], as `first` left it
    partials_ptr,      # [R, CHUNKS, 3]: the chunk's mass, that below the linear bins, and that above all bins; or the chunk's mass, the id that
                       # `first` left, and the mass before the winner
    counts_ptr, state_ptr, groups_ptr,                                                                               # as in first_kernel
    list_x_ptr,        # [R, ROOM] float32: CAPACITY tokens, and room for `select`
    list_ids_ptr,      # [R, ROOM] int32
    stride_lr,
    V: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr, ROOM: tl.constexpr, HAS_TYPICAL: tl.constexpr, IS_SECOND: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    chunk, row = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    state, counts_ptr, row_ptr = state_ptr + row * _STATE, counts_ptr + row * (_BINS + 4), logits_ptr + row.to(tl.int64) * stride_lr
    mode, top, one, two = tl.load(state), tl.load(state + 1).to(tl.float32, bitcast=True), tl.load(state + 12), tl.load(state + 13)
    options = (temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr)
    temperature, top_k, top_p, min_p, typical_p, _ = options_of(row, options, V, HAS_TYPICAL)
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    if (mode == _DONE) | (mode == _LIST):
        return
    if IS_SECOND:
        if mode != _WINNER:
            return
    if mode == _WINNER:
        winner = winner_of(row_ptr, one)
        if _judge(row, chunk, winner, row_ptr, top, temperature, partials_ptr, counts_ptr + _BINS + 1, V, CHUNK, CHUNKS, BLOCK):
            if _verdict(row, winner, top, temperature, top_p, min_p, partials_ptr, CHUNKS, BLOCK_C):
                tl.store(state, _DONE)
            else:
                token = next_winner(_winners(scores_ptr, partials_ptr, row, V, CHUNKS, BLOCK_C), row_ptr, winner, top, temperature, min_p, seed,
                                    position, V, CHUNK, BLOCK)[0]
                tl.store(state + 12, token)
                tl.store(out_ptr + row, token)
    elif IS_SECOND:
        pass
    elif mode == _SHORT:
        lists = row.to(tl.int64) * ROOM
        list_reached(row_ptr, groups_ptr + row * group_words(GROUPS), list_x_ptr + lists, list_ids_ptr + lists, counts_ptr + _BINS + 2, top,
                     temperature, one, two.to(tl.float32, bitcast=True), chunk * (CHUNK // _GROUP), V, BLOCK, GROUPS, CHUNK // _GROUP, CAPACITY)
    else:
        scale, offset, bins = one.to(tl.float32, bitcast=True), two, tl.arange(0, _BINS)
        zeros = tl.zeros((BLOCK,), tl.float32)
        counts, mass, above, below = tl.zeros((_BINS,), tl.int32), zeros, zeros, zeros
        for at in tl.range(chunk * CHUNK, chunk * CHUNK + CHUNK, BLOCK):
            x = tile_at(row_ptr, at, V, BLOCK)[1]
            z = scaled(x, top, temperature)
            place, weight = bin_of(z, scale, offset), tl.exp(z)
            counts += tl.histogram(tl.maximum(place, 0), _BINS, (x > -_INF) & (place >= 0))        # z of far tokens may be -inf: they count
            mass, above, below = mass + weight, above + tl.where(place < 0, weight, 0.0), below + tl.where(place >= _LINEAR, weight, 0.0)
        tl.atomic_add(counts_ptr + bins, counts, counts > 0, sem="relaxed")
        partial = partials_ptr + (row * CHUNKS + chunk) * 3
        tl.store(partial, (tl.sum(mass, 0).to(tl.float64) * 4294967296.0).to(tl.int64))
        tl.store(partial + 1, (tl.sum(below, 0).to(tl.float64) * 4294967296.0).to(tl.int64))
        tl.store(partial + 2, (tl.sum(above, 0).to(tl.float64) * 4294967296.0).to(tl.int64))
        if arrive(counts_ptr + _BINS + 1, CHUNKS):
            counts = tl.load(counts_ptr + bins, cache_modifier=".cg")
            tl.debug_barrier()                                                     # the threads that clear bins are not those that read them
            tl.store(counts_ptr + bins, tl.zeros((_BINS,), tl.int32))
            total = sum_of(partials_ptr, row, 0, CHUNKS, BLOCK_C).to(tl.float32) * 2.3283064365386963e-10
            far = sum_of(partials_ptr, row, 1, CHUNKS, BLOCK_C).to(tl.float32) * 2.3283064365386963e-10
            near = sum_of(partials_ptr, row, 2, CHUNKS, BLOCK_C).to(tl.float32) * 2.3283064365386963e-10
            # Where top_k is off, more than there are, so that no bin is its end
            first_bin, last_bin, k_bin, k_left, listed = bounds_of(counts, near, far, total, scale, offset,
                                                                   tl.where(top_k < V, top_k, V + 1), top_p, typical_p < 1.0)
            fits = listed <= CAPACITY
            tl.store(state, tl.where(fits, _LIST, _ROW))
            tl.store(state + 2, first_bin)
            tl.store(state + 3, last_bin)
            tl.store(state + 4, k_bin)
            tl.store(state + 5, tl.where(fits, k_left, top_k))


@triton.jit
def _draw(row_ptr, options, draws, state, counter, list_x_ptr, list_ids_ptr, scores_ptr, partials_ptr, chunk, V: tl.constexpr, CHUNK: tl.constexpr,
          BLOCK: tl.constexpr):
    """Draws from the tokens of a chunk that are surely kept, lists those that may be, and leaves the masses of both kinds of others."""
    temperature, min_p, top = options
    seed, position = draws
    key, standing = key_at(seed, position), nobody(V, BLOCK)
    first, last, k_bin = tl.load(state + 2), tl.load(state + 3), tl.load(state + 4)
    scale, offset = tl.load(state + 12).to(tl.float32, bitcast=True), tl.load(state + 13)
    sure, beyond = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for at in tl.range(chunk * CHUNK, chunk * CHUNK + CHUNK, BLOCK):
        ids, x = tile_at(row_ptr, at, V, BLOCK)
        z = scaled(x, top, temperature)
        live, bins, mass = x > -_INF, bin_of(z, scale, offset), mass_of(z)
        is_sure, is_beyond = live & (bins < first), live & (bins > last) & (bins < k_bin)
        listed = live & (bins >= first) & ((bins <= last) | (bins == k_bin))
        sure, beyond = sure + tl.where(is_sure, mass, 0), beyond + tl.where(is_beyond, mass, 0)
        standing = enter(standing, most_of(x, ids, is_sure & (tl.exp(z) >= min_p), top, temperature, key), ids)
        count = tl.sum(listed.to(tl.int32), 0)
        if count > 0:
            place = tl.atomic_add(counter, count, sem="relaxed") + tl.cumsum(listed.to(tl.int32), 0) - 1
            tl.store(list_x_ptr + place, x, listed)
            tl.store(list_ids_ptr + place, ids, listed)
    score, token, is_open = decide(standing, row_ptr, top, temperature, seed, position, V)
    for at in range(chunk * CHUNK, tl.where(is_open, chunk * CHUNK + CHUNK, 0), BLOCK):
        ids, x = tile_at(row_ptr, at, V, BLOCK)
        z = scaled(x, top, temperature)
        kept = (x > -_INF) & (bin_of(z, scale, offset) < first) & (tl.exp(z) >= min_p)
        if tl.max(most_of(x, ids, kept, top, temperature, key), 0) > least_of(score, top, temperature):
            score, token = better(score, token, *first_best(scores(x, ids, kept, temperature, seed, position), ids, V))
    tl.store(scores_ptr + 1, score)
    tl.store(partials_ptr, tl.sum(sure, 0))
    tl.store(partials_ptr + 1, token.to(tl.int64))
    tl.store(partials_ptr + 2, tl.sum(beyond, 0))


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "typical_p_ptr", "seed_ptr", "position_ptr",
                                            "out_ptr"])
def draw_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr, seed_ptr, position_ptr, out_ptr,    # as in first_kernel
    scores_ptr,        # [R, CHUNKS, 2]: the second is written, or read as `first` left it
    partials_ptr,      # [R, CHUNKS, 3]: mass surely kept, id of the greatest score, mass that counts in the total only; or as in reach_kernel
    counts_ptr, state_ptr, list_x_ptr, list_ids_ptr, stride_lr,                                                      # as in reach_kernel
    V: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    CAPACITY: tl.constexpr, ROOM: tl.constexpr, RANKED: tl.constexpr, HAS_TYPICAL: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    chunk, row = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    state, arrivals = state_ptr + row * _STATE, counts_ptr + row * (_BINS + 4) + _BINS + 1
    # All of it at once, before a branch depends on any
    mode, top, k_left, k_bin, next_token = tl.load(state), tl.load(state + 1), tl.load(state + 5), tl.load(state + 4), tl.load(state + 12)
    count = tl.load(arrivals + 1, chunk == 0, other=0)
    known = (tl.load(state + 15).to(tl.int64) << 32) | (tl.load(state + 14).to(tl.int64) & 0xFFFFFFFF)
    options = (temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr)
    temperature, top_k, top_p, min_p, typical_p, _ = options_of(row, options, V, HAS_TYPICAL)
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    if (mode == _DONE) | ((mode != _LIST) & (mode != _WINNER) & (chunk > 0)):
        return
    lists, row_ptr, top = row.to(tl.int64) * ROOM, logits_ptr + row.to(tl.int64) * stride_lr, top.to(tl.float32, bitcast=True)
    if mode == _WINNER:
        winner = winner_of(row_ptr, next_token)
        if _judge(row, chunk, winner, row_ptr, top, temperature, partials_ptr, arrivals, V, CHUNK, CHUNKS, BLOCK):
            keeps = _verdict(row, winner, top, temperature, top_p, min_p, partials_ptr, CHUNKS, BLOCK_C)
            score, ids = _winners(scores_ptr, partials_ptr, row, V, CHUNKS, BLOCK_C)
            while keeps == 0:                          # fewer tokens are before it each time, and the greatest is kept
                next_token, score, ids = next_winner((score, ids), row_ptr, winner, top, temperature, min_p, seed, position, V, CHUNK, BLOCK_S)
                winner = winner_of(row_ptr, next_token)
                before, total = masses_of(row_ptr, 0, V, winner, top, temperature, V, BLOCK)
                keeps = is_kept(before, total, winner, top, temperature, top_p, min_p)
            tl.store(out_ptr + row, next_token)
        return
    list_x_ptr, list_ids_ptr = list_x_ptr + lists, list_ids_ptr + lists
    sure, beyond, score, token = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), -_INF, tl.float64), tl.full((), V, tl.int32)
    selects = chunk == 0
    if mode == _LIST:
        partial = row * CHUNKS + chunk
        _draw(row_ptr, (temperature, min_p, top), (seed, position), state, arrivals + 2, list_x_ptr, list_ids_ptr, scores_ptr + partial * 2,
              partials_ptr + partial * 3, chunk, V, CHUNK, BLOCK)
        selects = arrive(arrivals, CHUNKS)
        if selects:
            count = tl.load(arrivals + 2, cache_modifier=".cg")
            sure, beyond = sum_of(partials_ptr, row, 0, CHUNKS, BLOCK_C), sum_of(partials_ptr, row, 2, CHUNKS, BLOCK_C)
            score, token = first_best(*_winners(scores_ptr, partials_ptr, row, V, CHUNKS, BLOCK_C), V)
    if selects == 0:
        return
    tl.debug_barrier()                                                             # every thread has the count before it is cleared
    tl.store(arrivals + tl.where(mode == _LIST, 2, 1), 0)
    is_row, is_short = mode == _ROW, mode == _SHORT
    count, k_left, known = tl.where(is_row, V, tl.minimum(count, CAPACITY)), tl.where(is_short, top_k, k_left), tl.where(is_short, known, 0)
    has_k = (top_k < V) & (is_row | tl.where(is_short, count > top_k, k_bin < _BINS))          # else fewer tokens than top_k have a logit
    source = (list_x_ptr, list_ids_ptr, row_ptr, count, is_row, list_x_ptr + CAPACITY, list_ids_ptr + CAPACITY)
    cut = select(source, known, sure, beyond, k_left, has_k, top, temperature, top_p, min_p, typical_p, V, BLOCK_S, RANKED, HAS_TYPICAL)
    if count <= RANKED:
        ids, x, z = tile_of(source, 0, top, temperature, V, RANKED)
        kept = kept_of(ids, x, z, cut, HAS_TYPICAL)
        score, token = better(score, token, *first_best(scores(x, ids, kept, temperature, seed, position), ids, V))
    else:
        key, standing = key_at(seed, position), nobody(V, BLOCK_S)
        for start in range(0, count, BLOCK_S):
            ids, x, z = tile_of(source, start, top, temperature, V, BLOCK_S)
            standing = enter(standing, most_of(x, ids, kept_of(ids, x, z, cut, HAS_TYPICAL), top, temperature, key), ids)
        next_score, next_token, is_open = decide(standing, source[2], top, temperature, seed, position, V)
        score, token = better(score, token, next_score, next_token)
        for start in range(0, tl.where(is_open, count, 0), RANKED):
            ids, x, z = tile_of(source, start, top, temperature, V, RANKED)
            kept = kept_of(ids, x, z, cut, HAS_TYPICAL)
            score, token = better(score, token, *first_best(scores(x, ids, kept, temperature, seed, position), ids, V))
    tl.store(out_ptr + row, token)
    _put_cut(state, cut)
