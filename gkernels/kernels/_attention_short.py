"""Short requests, those of few rows, in the kernel of attention: a program streams one run of their (head, rows, segment) ordinals through one
loop, and folds what several runs share where it is the last to arrive. The arguments are those of `_attention`.
"""

import triton
import triton.language as tl

from ._attention_tile import (
    count_in,
    empty_state,
    empty_tile,
    finish,
    fold,
    get_state,
    lanes_of,
    load_pages,
    load_queries,
    load_tile,
    pages_of,
    products,
    put_state,
    row_sums,
    rows_of,
    sight_of,
    step,
    visibility,
)


@triton.jit
def _span_slot(run, run_length, ordinal, first_segment, span, C: tl.constexpr):
    """Where a run keeps a span's state. A run may end one group of rows and begin another: the first counts its slots up, the second down."""
    skipped = run * run_length - ordinal                                          # of the group's ordinals, in earlier runs
    rank = span - tl.cdiv(first_segment + skipped, C.SPAN)
    return run * C.RUN_SPANS + tl.where(skipped > 0, rank, C.RUN_SPANS - 1 - (span - first_segment // C.SPAN))


@triton.jit
def _segment_slot(x, span_begin, run_length, C: tl.constexpr):
    """Where a run keeps a segment's state, by ordinals: after the span that it begins in, or in the one that it ends in."""
    run, owner = x // run_length, span_begin // run_length
    return run * C.RUN_SEGMENTS + tl.where(run == owner, C.SPAN + x - span_begin, x - run * run_length)


@triton.jit
def tile_after(tile, group_tiles):
    """The next of a group's tiles of keys; after the last one the first, of the next group."""
    return tl.where(tile + 1 == group_tiles, 0, tile + 1)


@triton.jit
def next_tile(tile, row, kv_head, group_tiles, num_rows):
    """The tile of keys after this one, through tiles, then tiles of rows, then KV heads."""
    wraps = tile + 1 == group_tiles
    row += wraps.to(tl.int32)
    turns = row == num_rows
    return tile_after(tile, group_tiles), tl.where(turns, 0, row), kv_head + turns.to(tl.int32)


@triton.jit
def tiles_of(begin, end, item, C: tl.constexpr):
    """The ordinals [begin, end) of a request as tiles of keys: the request's first key; tiles of rows a head; tiles of keys a tile of rows; the
    first of these tiles and the end of them, counted through heads and tiles of rows."""
    _, _, query_len, kv_len, first_segment, num_segments, _, _ = item
    TILES: tl.constexpr = C.SEGMENT // C.BLOCK_N
    first_key = first_segment * C.SEGMENT
    group_tiles = tl.cdiv(kv_len - first_key, C.BLOCK_N)                          # of the last segment only those with a live key
    first_tile = begin // num_segments * group_tiles + begin % num_segments * TILES
    end_tile = end // num_segments * group_tiles + end % num_segments * TILES
    return first_key, tl.cdiv(query_len, C.SHORT_M // C.GROUP), group_tiles, first_tile, end_tile


@triton.jit
def leave_segment(span, row_state, empty, x, row, kv_head, num_rows, run, item, offs_m, offs_d, inputs, strides, in_memory: tl.constexpr,
                  C: tl.constexpr):
    """After the segment x of a tile of rows, given the states of its span and of the row's spans before: writes the rows if it was their last, or
    stores what other runs share, and returns the states to go on with. in_memory: a row's spans meet there, not in row_state."""
    number, run_length, run_begin, run_end = run
    _, first_token, query_len, _, first_segment, num_segments, ordinal, poisoned = item
    states_ptr = inputs[5]
    group, segment = kv_head * num_rows + row, first_segment + x
    number_of_span = segment // C.SPAN
    x += group * num_segments                                                     # ordinals, within the request
    span_begin = tl.maximum(number_of_span * C.SPAN, first_segment) - segment + x
    span_end = tl.minimum(number_of_span * C.SPAN + C.SPAN, first_segment + num_segments) - segment + x
    row_end = (group + 1) * num_segments
    span_whole = (ordinal + span_begin >= run_begin) & (ordinal + span_end <= run_end)
    row_whole = (ordinal + group * num_segments >= run_begin) & (ordinal + row_end <= run_end)
    token, head, live = rows_of(row * (C.SHORT_M // C.GROUP), offs_m, query_len, first_token, kv_head, C)
    if in_memory:                                                                 # where a tile has more rows than a state
        live = live & (offs_m < C.SHORT_M)
    if row_whole:
        if in_memory:
            if x + 1 == span_end:
                # In the run's last slot: a run that holds whole rows leaves fewer spans than it has slots. Each element stays with the thread that
                # adds to it.
                row_ptr = states_ptr + (C.RUNS * C.RUN_SEGMENTS + (number + 1) * C.RUN_SPANS - 1).to(tl.int64) * C.SHORT_STATE
                m, l, acc = span
                if number_of_span > first_segment // C.SPAN:
                    m_before, l_before, acc_before = get_state(row_ptr, offs_m, offs_d, live, C.SHORT_M, C)
                    m, l, acc = fold(m_before, l_before, acc_before, m, l, acc)
                if x + 1 == row_end:
                    finish(m, l, acc, poisoned, token, head, live, offs_d, kv_head, inputs, strides, C)
                else:
                    put_state(row_ptr, offs_m, offs_d, m, l, acc, live, C.SHORT_M, C)
                span = empty
        else:
            if x + 1 == span_end:
                row_state = fold(row_state[0], row_state[1], row_state[2], span[0], span[1], span[2])
                span = empty
            if x + 1 == row_end:
                finish(row_state[0], row_state[1], row_state[2], poisoned, token, head, live, offs_d, kv_head, inputs, strides, C)
                row_state = empty
    elif (x + 1 == span_end) | (span_whole == 0):
        slot = _segment_slot(ordinal + x, ordinal + span_begin, run_length, C)
        span_slot = _span_slot(number, run_length, ordinal + group * num_segments, first_segment, number_of_span, C)
        slot = tl.where(span_whole, C.RUNS * C.RUN_SEGMENTS + span_slot, slot)
        put_state(states_ptr + slot.to(tl.int64) * C.SHORT_STATE, offs_m, offs_d, span[0], span[1], span[2], live, C.SHORT_M, C)
        span = empty
    return span, row_state


@triton.jit
def _stream(begin, end, run, item, inputs, strides, extents, C: tl.constexpr):
    """Attends to the ordinals [begin, end) of one short request in one pipelined loop: out for groups of rows that lie whole in the run,
    states of spans and of segments for the others."""
    request, first_token, query_len, kv_len, _, _, _, _ = item
    q_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr = inputs[0], inputs[1], inputs[2], inputs[3]
    k_scale_ptr, scale, cap, N = inputs[12], inputs[14], inputs[15], extents[3]
    M: tl.constexpr = C.SHORT_M
    ROWS: tl.constexpr = M // C.GROUP
    TILES: tl.constexpr = C.SEGMENT // C.BLOCK_N
    table = block_table_ptr + request.to(tl.int64) * strides[8]
    offs_m, offs_d = tl.arange(0, M), tl.arange(0, C.BLOCK_DV)
    first_key, num_rows, group_tiles, first_tile, end_tile = tiles_of(begin, end, item, C)
    # Two places in the list of tiles: that of the loads, which the pipeline lets run ahead, and that of the products.
    to_tile, to_row, to_head = first_tile % group_tiles, first_tile // group_tiles % num_rows, first_tile // group_tiles // num_rows
    tile, row, kv_head = to_tile, to_row, to_head
    q = load_queries(row * ROWS, query_len, first_token, kv_head, q_ptr, strides, M, C)
    pages = pages_of(load_pages(table, first_key + to_tile * C.BLOCK_N, kv_len, C), N)
    entries = load_pages(table, first_key + tile_after(to_tile, group_tiles) * C.BLOCK_N, kv_len, C)
    m, l, acc = empty_tile(M, C)
    span, row_state = empty_state(M, C), empty_state(M, C)
    k_lanes, v_lanes = lanes_of(k_cache_ptr, strides[3], C.BLOCK_D, C), lanes_of(v_cache_ptr, strides[6], C.BLOCK_DV, C)
    for _ in range(first_tile, end_tile):
        n = first_key + to_tile * C.BLOCK_N
        k, v = load_tile(k_lanes, v_lanes, pages, to_head, n, kv_len, strides, C)
        to_tile, to_row, to_head = next_tile(to_tile, to_row, to_head, group_tiles, num_rows)
        pages, entries = pages_of(entries, N), load_pages(table, first_key + tile_after(to_tile, group_tiles) * C.BLOCK_N, kv_len, C)

        n = first_key + tile * C.BLOCK_N
        key = n + tl.arange(0, C.BLOCK_N)
        position, first, stop, tree, slope = sight_of(
            row * ROWS, offs_m, query_len, kv_len, request, first_token, kv_head, inputs, strides, extents, C)
        seen = visibility(key, first, stop, tree, kv_len - query_len, C)
        k_scale = tl.load(k_scale_ptr + kv_head * strides[13]) if C.HAS_SCALE else 1.0
        m, l, acc = step(products(q, k, C), v, seen, True, key, position, slope, scale * k_scale, cap, m, l, acc, q.dtype, M, C)
        if (tile % TILES == TILES - 1) | (tile == group_tiles - 1):
            span = fold(span[0], span[1], span[2], m, row_sums(l, M, C.BLOCK_N // 4), acc)
            m, l, acc = empty_tile(M, C)
            span, row_state = leave_segment(span, row_state, empty_state(M, C), tile // TILES, row, kv_head, num_rows, run, item, offs_m, offs_d,
                                            inputs, strides, False, C)
            if tile == group_tiles - 1:
                _, row, kv_head = next_tile(tile, row, kv_head, group_tiles, num_rows)
                more = tl.where(kv_head < C.K, query_len, 0)                      # rows of the next group, if there is one
                q = load_queries(row * ROWS, more, first_token, kv_head, q_ptr, strides, M, C)
        tile = tile_after(tile, group_tiles)


@triton.jit
def _fold_spans(row, first, count, group_begin, first_segment, run_length, empty, offs_m, offs_d, states_ptr, BATCH: tl.constexpr,
                C: tl.constexpr):
    """The state of one query row over `count` spans from `first` on."""
    rows = row * C.GROUP + offs_m
    m, l, acc = empty
    for base in range(0, count, BATCH):
        for j in tl.static_range(BATCH):                                           # loads in batches: a round trip costs 0.7 us
            span = first + base + j
            owner = tl.maximum(span * C.SPAN - first_segment + group_begin, group_begin) // run_length
            slot = C.RUNS * C.RUN_SEGMENTS + _span_slot(owner, run_length, group_begin, first_segment, span, C)
            state_ptr = states_ptr + slot.to(tl.int64) * C.SHORT_STATE
            m_next, l_next, acc_next = get_state(state_ptr, rows, offs_d, base + j < count, C.SHORT_M, C)
            m, l, acc = fold(m, l, acc, m_next, l_next, acc_next)
    return m, l, acc


@triton.jit
def _fold_segments(row, span_begin, span_end, run_length, empty, offs_m, offs_d, states_ptr, BATCH: tl.constexpr, C: tl.constexpr):
    """The state of one query row over the segments of a span, given by ordinals."""
    m, l, acc = empty
    for base in range(span_begin, span_end, BATCH):
        for x in tl.static_range(BATCH):                                           # loads in batches, as many as there are states
            slot = _segment_slot(base + x, span_begin, run_length, C)
            m_next, l_next, acc_next = get_state(states_ptr + slot.to(tl.int64) * C.SHORT_STATE, row * C.GROUP + offs_m, offs_d,
                                                 base + x < span_end, C.SHORT_M, C)
            m, l, acc = fold(m, l, acc, m_next, l_next, acc_next)
    return m, l, acc


@triton.jit
def _settle(group, begin, end, run_length, item, empty, offs_m, offs_d, inputs, strides, BATCH: tl.constexpr, C: tl.constexpr):
    """Reports the ordinals [begin, end) of a group of rows that other runs share, and folds spans, or the rows, whose states are now complete."""
    states_ptr, counters_ptr = inputs[5], inputs[6]
    _, first_token, query_len, _, first_segment, num_segments, ordinal, poisoned = item
    GROUP: tl.constexpr = C.GROUP
    ROWS: tl.constexpr = C.SHORT_M // GROUP
    num_rows = tl.cdiv(query_len, ROWS)
    kv_head, row0 = group // num_rows, group % num_rows * ROWS
    rows = tl.minimum(ROWS, query_len - row0)
    group_begin = ordinal + group * num_segments                                  # ordinals of the whole step from here on
    begin, end = begin + ordinal, end + ordinal
    to_segment = first_segment - group_begin
    first_span, last_span = (begin + to_segment) // C.SPAN, (end - 1 + to_segment) // C.SPAN
    done = end - begin                                                            # of the group's segments, in spans that are complete
    for span in range(first_span, last_span + 1, tl.maximum(last_span - first_span, 1)):
        span_begin = tl.maximum(span * C.SPAN - to_segment, group_begin)
        span_end = tl.minimum(span * C.SPAN + C.SPAN - to_segment, group_begin + num_segments)
        mine = tl.minimum(end, span_end) - tl.maximum(begin, span_begin)
        if mine < span_end - span_begin:
            done -= mine
            owner = span_begin // run_length
            if count_in(counters_ptr + 4 + owner, mine, span_end - span_begin):
                for row in range(0, rows):
                    if BATCH > 8:                                                  # where a fold of nothing costs more than a batch's round trip
                        if span_end - span_begin <= 4:
                            m, l, acc = _fold_segments(row, span_begin, span_end, run_length, empty, offs_m, offs_d, states_ptr, 4, C)
                        else:
                            m, l, acc = _fold_segments(row, span_begin, span_end, run_length, empty, offs_m, offs_d, states_ptr, BATCH, C)
                    else:
                        m, l, acc = _fold_segments(row, span_begin, span_end, run_length, empty, offs_m, offs_d, states_ptr, BATCH, C)
                    if span_end - span_begin == num_segments:
                        token, head, live = rows_of(row0 + row, offs_m, query_len, first_token, kv_head, C)
                        finish(m, l, acc, poisoned, token, head, live, offs_d, kv_head, inputs, strides, C)
                    else:
                        slot = C.RUNS * C.RUN_SEGMENTS + _span_slot(owner, run_length, group_begin, first_segment, span, C)
                        put_state(states_ptr + slot.to(tl.int64) * C.SHORT_STATE, row * GROUP + offs_m, offs_d, m, l, acc, offs_m < GROUP,
                                  C.SHORT_M, C)
                done += tl.where(span_end - span_begin == num_segments, 0, span_end - span_begin)
    spans = (first_segment + num_segments - 1) // C.SPAN - first_segment // C.SPAN + 1
    if (spans > 1) & (done > 0):
        if count_in(counters_ptr + 4 + C.RUNS + group_begin // run_length, done, num_segments):
            for row in range(0, rows):
                m, l, acc = _fold_spans(row, first_segment // C.SPAN, spans, group_begin, first_segment, run_length, empty, offs_m, offs_d,
                                        states_ptr, BATCH, C)
                token, head, live = rows_of(row0 + row, offs_m, query_len, first_token, kv_head, C)
                finish(m, l, acc, poisoned, token, head, live, offs_d, kv_head, inputs, strides, C)


@triton.jit
def settle_ends(first, last, run_length, item, empty, offs_m, offs_d, inputs, strides, BATCH: tl.constexpr, C: tl.constexpr):
    """Settles the groups of rows that the ordinals [first, last) of a request begin and end in, where other runs have a share of them. offs_m
    [GROUP], offs_d [BLOCK_DV] and `empty`, a state of them: indices come from the caller, since each of Triton's languages makes its own. BATCH:
    states that are asked for at once."""
    num_segments = item[5]
    first_group, last_group = first // num_segments, (last - 1) // num_segments
    for group in range(first_group, last_group + 1, tl.maximum(last_group - first_group, 1)):
        begin, end = tl.maximum(first, group * num_segments), tl.minimum(last, (group + 1) * num_segments)
        if end - begin < num_segments:
            _settle(group, begin, end, run_length, item, empty, offs_m, offs_d, inputs, strides, BATCH, C)


@triton.jit
def open_run(number, runs_at, work_ptr, C: tl.constexpr):
    """A run: (number, ordinals a run, begin, end); the record of the request that it begins in; and that request's index."""
    record = work_ptr + (runs_at + number) * C.RECORD                             # which holds a copy of its first request's
    run = number, tl.load(work_ptr + 3), tl.load(record + 9), tl.load(record + C.RECORD + 9)
    return run, record, tl.load(record + 8)


@triton.jit
def open_item(record, begin, run_end, C: tl.constexpr):
    """A short request (request, first token, query rows, keys, first segment, segments, ordinal, poisoned); and its ordinals from `begin` to the
    run's end, counted from its own first."""
    query_len, num_segments, ordinal = tl.load(record + 2), tl.load(record + 5), tl.load(record + 6)
    item = (tl.load(record), tl.load(record + 1), query_len, tl.load(record + 3), tl.load(record + 4), num_segments, ordinal, tl.load(record + 7))
    groups = tl.cdiv(query_len, C.SHORT_M // C.GROUP) * C.K
    return item, begin - ordinal, tl.minimum(run_end - ordinal, groups * num_segments)


@triton.jit
def take_run(number, short_at, runs_at, inputs, strides, extents, C: tl.constexpr):
    """All of a run: the ordinals up to the next one's, request by request."""
    run, record, index = open_run(number, runs_at, inputs[4], C)
    _, run_length, begin, run_end = run
    while begin < run_end:
        item, first, last = open_item(record, begin, run_end, C)
        _stream(first, last, run, item, inputs, strides, extents, C)
        settle_ends(first, last, run_length, item, empty_state(C.GROUP, C), tl.arange(0, C.GROUP), tl.arange(0, C.BLOCK_DV), inputs, strides,
                    8, C)
        begin = item[6] + last
        index += 1
        record = inputs[4] + (short_at + index) * C.RECORD
