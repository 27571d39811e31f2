"""Tall requests, those of many rows, in the kernel of attention: a program takes one tile of query rows over all of its keys, or over one span
of them where such tiles are few. The arguments are those of `_attention`.
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
def keys_of(query_len, kv_len, row0, span, M: tl.constexpr, extents, C: tl.constexpr):
    """Which keys of a span M rows from row0 on of a tall request see: the first row's position; begin, end of those that any row sees; begin, end
    of those that all of them do."""
    left, right = extents[4], extents[5]
    context, last_row = kv_len - query_len, tl.minimum(row0 + M // C.GROUP, query_len) - 1
    begin, end = span * C.SPAN * C.SEGMENT, tl.minimum((span + 1) * C.SPAN * C.SEGMENT, kv_len)
    all_begin, all_end = begin, end
    if C.HAS_RIGHT:
        end, all_end = tl.minimum(end, context + last_row + right + 1), tl.minimum(end, context + row0 + right + 1)
    if C.HAS_LEFT:
        begin, all_begin = tl.maximum(begin, (context + row0 - left) // C.BLOCK_N * C.BLOCK_N), context + last_row - left
    if C.HAS_TREE:
        all_end = tl.minimum(all_end, context)
    return context, begin, end, all_begin, all_end


@triton.jit
def _attend(record, part, span, kv_head, inputs, strides, extents, C: tl.constexpr):
    """The state of a tall tile's rows from `part` on over one span."""
    q_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, k_scale_ptr = inputs[0], inputs[1], inputs[2], inputs[3], inputs[12]
    scale, cap, N = inputs[14], inputs[15], extents[3]
    M: tl.constexpr = C.TALL_PART
    request, first_token, query_len, kv_len = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    row0 = tl.load(record + 4) + part // C.GROUP
    offs_m = tl.arange(0, M)
    context, begin, end, all_begin, all_end = keys_of(query_len, kv_len, row0, span, M, extents, C)
    table = block_table_ptr + request.to(tl.int64) * strides[8]
    k_scale = tl.load(k_scale_ptr + kv_head * strides[13]) if C.HAS_SCALE else 1.0
    q = load_queries(row0, query_len, first_token, kv_head, q_ptr, strides, M, C)
    k_lanes, v_lanes = lanes_of(k_cache_ptr, strides[3], C.BLOCK_D, C), lanes_of(v_cache_ptr, strides[6], C.BLOCK_DV, C)
    pages, entries = pages_of(load_pages(table, begin, kv_len, C), N), load_pages(table, begin + C.BLOCK_N, kv_len, C)
    span_m, span_l, span_acc = empty_state(M, C)
    m, l, acc = empty_tile(M, C)
    for n in range(begin, end, C.BLOCK_N):
        k, v = load_tile(k_lanes, v_lanes, pages, kv_head, n, kv_len, strides, C)
        pages, entries = pages_of(entries, N), load_pages(table, n + 2 * C.BLOCK_N, kv_len, C)
        key = n + tl.arange(0, C.BLOCK_N)
        position, first, stop, tree, slope = sight_of(row0, offs_m, query_len, kv_len, request, first_token, kv_head, inputs, strides, extents, C)
        seen = visibility(key, first, stop, tree, context, C)
        logits = products(q, k, C)
        is_first, masked = (n % C.SEGMENT == 0) & (n > begin), (n + C.BLOCK_N > all_end) | (n < all_begin)
        # To empty m makes alpha 0, and so empties l and acc. On Hopper one branch takes the products, so that it follows the wait for them. One that
        # did not would be moved before them, where it reads acc: then p v would be waited for where it is issued (381 TFLOP/s instead of 406).
        if M >= 64:
            if is_first | masked:
                logits = tl.where(seen, logits, float("-inf"))
                if is_first:
                    span_m, span_l, span_acc = fold(span_m, span_l, span_acc, m, row_sums(l, M, C.BLOCK_N // 4), acc)
                    m = tl.full((M,), float("-inf"), tl.float32)
        else:
            if is_first:
                span_m, span_l, span_acc = fold(span_m, span_l, span_acc, m, row_sums(l, M, C.BLOCK_N // 4), acc)
                m = tl.full((M,), float("-inf"), tl.float32)
            if masked:
                logits = tl.where(seen, logits, float("-inf"))
        m, l, acc = step(logits, v, seen, False, key, position, slope, scale * k_scale, cap, m, l, acc, q.dtype, M, C)
    return fold(span_m, span_l, span_acc, m, row_sums(l, M, C.BLOCK_N // 4), acc)


@triton.jit
def tall_rows(record, rows, kv_head, C: tl.constexpr):
    """Of rows of a tall tile: token, head, live. Volatile: read again, so that no loop over keys keeps it in registers."""
    first_token, query_len = tl.load(record + 1, volatile=True), tl.load(record + 2, volatile=True)
    return rows_of(tl.load(record + 4, volatile=True), rows, query_len, first_token, kv_head, C)


@triton.jit
def _add_span(sum_ptr, record, part, kv_head, C: tl.constexpr):
    """Folds the state in the slot after into the one at sum_ptr, FEW rows at a time, which takes few registers."""
    offs_m, offs_d = tl.arange(0, C.FEW), tl.arange(0, C.BLOCK_DV)
    for row in range(part, part + C.TALL_PART, C.FEW):
        _, _, live = tall_rows(record, row + offs_m, kv_head, C)
        m, l, acc = get_state(sum_ptr, row + offs_m, offs_d, live, C.TALL_M, C)
        m_next, l_next, acc_next = get_state(sum_ptr + C.TALL_STATE, row + offs_m, offs_d, live, C.TALL_M, C)
        m, l, acc = fold(m, l, acc, m_next, l_next, acc_next)
        put_state(sum_ptr, row + offs_m, offs_d, m, l, acc, live, C.TALL_M, C)


@triton.jit
def _finish_tall(slots, pieces, record, part, kv_head, inputs, strides, C: tl.constexpr):
    """Folds the states of a tall tile's spans, a slot for each, and writes its rows from `part` on."""
    offs_m, offs_d = tl.arange(0, C.FEW), tl.arange(0, C.BLOCK_DV)
    stride = tl.full((), C.K * C.TALL_STATE, tl.int64)
    for row in range(part, part + C.TALL_PART, C.FEW):
        token, head, live = tall_rows(record, row + offs_m, kv_head, C)
        m, l, acc = empty_state(C.FEW, C)
        for piece in range(0, pieces):
            m_next, l_next, acc_next = get_state(slots + piece * stride, row + offs_m, offs_d, live, C.TALL_M, C)
            m, l, acc = fold(m, l, acc, m_next, l_next, acc_next)
        finish(m, l, acc, tl.load(record + 7), token, head, live, offs_d, kv_head, inputs, strides, C)


@triton.jit
def take_tall(item, part, kv_head, tall_at, inputs, strides, extents, C: tl.constexpr):
    """TALL_PART rows from `part` on of a query tile of a tall request. Several spans meet in this program's two slots, the sum and the span to add;
    or, where each span is an item of its own, in the items' slots, and the last program to arrive folds them."""
    work_ptr, states_ptr, counters_ptr = inputs[4], inputs[5], inputs[6]
    PARTS: tl.constexpr = C.TALL_M // C.TALL_PART
    record = work_ptr + (tall_at + item) * C.RECORD
    end_span = tl.load(record + 6)
    if PARTS > 1:
        end_span = tl.where(tl.load(record + 4) + part // C.GROUP < tl.load(record + 2), end_span, 0)
    for span in range(tl.load(record + 5), end_span):
        m, l, acc = _attend(record, part, span, kv_head, inputs, strides, extents, C)
        offs_m, offs_d = tl.arange(0, C.TALL_PART), tl.arange(0, C.BLOCK_DV)
        token, head, live = tall_rows(record, part + offs_m, kv_head, C)
        pieces, first_item = tl.load(record + 8, volatile=True), tl.load(record + 9, volatile=True)
        first, end = tl.load(record + 5, volatile=True), tl.load(record + 6, volatile=True)
        if (pieces == 1) & (end - first == 1):
            finish(m, l, acc, tl.load(record + 7), token, head, live, offs_d, kv_head, inputs, strides, C)
        else:
            slots = states_ptr + C.RUNS * (C.RUN_SEGMENTS + C.RUN_SPANS) * C.SHORT_STATE
            first_slot = tl.where(pieces > 1, first_item * C.K + kv_head, C.TALL_SLOTS + 2 * tl.program_id(0))
            slots += first_slot.to(tl.int64) * C.TALL_STATE
            step_to = tl.where(pieces > 1, (item - first_item) * C.K, (span > first).to(tl.int32))
            put_state(slots + step_to.to(tl.int64) * C.TALL_STATE, part + offs_m, offs_d, m, l, acc, live, C.TALL_M, C)
            is_last = span + 1 == end
            if pieces > 1:
                is_last = count_in(counters_ptr + 4 + 2 * C.RUNS + first_slot * PARTS + part // C.TALL_PART, 1, pieces)
            else:
                tl.debug_barrier()                                                # between stores and loads of different threads
                if span > first:
                    _add_span(slots, record, part, kv_head, C)
                    tl.debug_barrier()
            if is_last:
                _finish_tall(slots, pieces, record, part, kv_head, inputs, strides, C)
