"""Tall requests on Hopper, in a launch of their own: one warp of a program fetches, and twice 4 attend, each to half of a tile's rows.

In one loop for everything, copying takes as many instructions as attending, and each 64 rows read keys and values from the L2 for themselves:
`_attention_tall` stays below 400 TFLOP/s on the H200. Here the hardware copies pages by itself, for 128 rows at once. Triton's own language has warps
of two kinds only where one descriptor covers a tile, which pages of 16 keys do not allow, so this is Gluon. What a row is made of, and in what order,
is that of the other paths: the device functions of `_attention_tile` serve both languages.

The fetching warp takes tickets and runs ahead, also from one item to the next. Its barriers, and who waits there for what:
  given   attending warps, for the record of their next item; taken: the fetching warp, until both halves have read it
  asked   attending warps, for the item's queries;            used:  the fetching warp, until both halves have attended with them
  full    attending warps, for a tile of keys and values;     empty: the fetching warp, until both halves have multiplied with it
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra import cuda

from ._attention_tall import keys_of, tall_rows
from ._attention_tile import count_in, finish, fold, get_state, pages_of, put_state, quad_sums, rows_of
from ._attention_tile_hopper import chunks_of, copies, fetch_boxes, fetch_last, fold_segment, weights

TICKETS = gl.constexpr(2)             # that fetching warps may be ahead
PLACES = gl.constexpr(2)              # for queries: of an item and of the next
ITEM = gl.constexpr(10)               # of a ticket, a record of the work list: the number of the item and head, -1 after the last


@gluon.jit
def _fetch_queries(tile, row0, query_len, first_token, kv_head, q_ptr, stride_t, stride_h, C: gl.constexpr):
    """[TALL_M, D] of q, zeros in rows that are not live."""
    LAYOUT: gl.constexpr = copies(C.D, tile.dtype, 1)
    M: gl.constexpr = C.TALL_M
    D: gl.constexpr = C.D
    TOKENS: gl.constexpr = 16 // C.GROUP                                          # of a chunk; addresses anew for each take 1500 cycles more
    chunks, row, column = chunks_of(tile), gl.arange(0, 16, gl.SliceLayout(1, LAYOUT)), gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    token, head, live = rows_of(row0, row, query_len, first_token, kv_head, C)
    q = q_ptr + tl.multiple_of(token * stride_t + head * stride_h, 8)[:, None] + column[None, :]      # of 16 bytes, as `attention` has seen to
    for i in range(M // 16):
        live = (row0 + i * TOKENS + row // C.GROUP < query_len) & (row % C.GROUP < C.G)
        for j in gl.static_range(D // 64):
            async_copy.async_copy_global_to_shared(chunks.index(j * (M // 16) + i), q + j * 64, live[:, None])
        q += TOKENS * stride_t.to(tl.int64)


@gluon.jit
def _give(ticket, num_items, serial, tickets, given, taken, work_ptr, tall_at, C: gl.constexpr):
    """Hands the attending warps the record of their next item."""
    slot, field = serial % TICKETS, gl.arange(0, C.RECORD, gl.BlockedLayout([1], [32], [1], [0]))
    is_item = ticket < num_items
    record = tl.load(work_ptr + (tall_at + ticket // C.K) * C.RECORD + field, (field >= 0) & is_item, other=0)
    mbarrier.wait(taken.index(slot), (serial // TICKETS + 1) & 1)
    tickets.index(slot).store(tl.where(field == ITEM, tl.where(is_item, ticket, -1), record))
    gl.thread_barrier()
    mbarrier.arrive(given.index(slot), count=1)


@gluon.jit
def _fetch(boxes, buffers, barriers, tall_at, inputs, strides, extents, C: gl.constexpr):
    """Queries, keys and values of this program's items."""
    if C.AHEAD:
        cuda.gdc_wait()
    k_boxes, v_boxes = boxes
    q_tiles, k_ring, v_ring, tickets = buffers
    given, taken, asked, used, full, empty = barriers
    q_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, work_ptr, counters_ptr = inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[6]
    N = extents[3]
    BOX: gl.constexpr = k_boxes.block_shape[0]
    BOXES: gl.constexpr = C.BLOCK_N // BOX
    # Places in boxes take 32 bits, which `attention` has seen to, also where strides take more. A head takes no rows where heads lie side by side.
    k_rows_a_page, v_rows_a_page = (strides[2] // strides[3]).to(tl.int32), (strides[5] // strides[6]).to(tl.int32)
    k_rows_a_head, v_rows_a_head = (strides[4] // strides[3]).to(tl.int32), (strides[7] // strides[6]).to(tl.int32)
    k_columns_a_head, v_columns_a_head = (strides[4] % strides[3]).to(tl.int32), (strides[7] % strides[6]).to(tl.int32)
    num_items = tl.load(work_ptr) * C.K
    turn, serial = 0, 0
    takers = tl.num_programs(0) - tl.load(work_ptr + 6)                            # the others leave, for programs of the next launch
    ticket = tl.where(tl.program_id(0) < takers, tl.program_id(0), num_items)
    _give(ticket, num_items, serial, tickets, given, taken, work_ptr, tall_at, C)
    while ticket < num_items:
        record, kv_head = work_ptr + (tall_at + ticket // C.K) * C.RECORD, ticket % C.K
        request, first_token, query_len = tl.load(record), tl.load(record + 1), tl.load(record + 2)
        kv_len, row0 = tl.load(record + 3), tl.load(record + 4)
        place = serial % PLACES
        mbarrier.wait(used.index(place), (serial // PLACES + 1) & 1)
        _fetch_queries(q_tiles.index(place), row0, query_len, first_token, kv_head, q_ptr, strides[0], strides[1], C)
        async_copy.mbarrier_arrive(asked.index(place), increment_count=False)
        table = block_table_ptr + request.to(tl.int64) * strides[8]
        for span in range(tl.load(record + 5), tl.load(record + 6)):
            _, begin, end, _, _ = keys_of(query_len, kv_len, row0, span, C.TALL_M, extents, C)
            for n in range(begin, end, C.BLOCK_N):
                stage = turn % C.STAGES
                k_tile, v_tile, is_full = k_ring.index(stage), v_ring.index(stage), full.index(stage)
                mbarrier.wait(empty.index(stage), (turn // C.STAGES + 1) & 1)
                if n + C.BLOCK_N <= kv_len:
                    mbarrier.expect(is_full, C.BLOCK_N * (C.D + C.DV) * 2)
                    k_rows, v_rows = (), ()
                    for i in gl.static_range(BOXES):                              # all entries first: to wait for one takes as long as for all
                        page, slot = pages_of(tl.load(table + (n + i * BOX) // C.P), N), (n + i * BOX) % C.P
                        k_rows += (page * k_rows_a_page + kv_head * k_rows_a_head + slot,)           # type: ignore[assignment]
                        v_rows += (page * v_rows_a_page + kv_head * v_rows_a_head + slot,)           # type: ignore[assignment]
                    fetch_boxes(k_tile, k_boxes, is_full, k_rows, kv_head * k_columns_a_head)
                    fetch_boxes(v_tile, v_boxes, is_full, v_rows, kv_head * v_columns_a_head)
                else:
                    fetch_last(k_tile, k_cache_ptr, table, n, kv_len, kv_head, N, strides[2], strides[3], strides[4], C)
                    fetch_last(v_tile, v_cache_ptr, table, n, kv_len, kv_head, N, strides[5], strides[6], strides[7], C)
                    async_copy.commit_group()
                    async_copy.wait_group(0)
                    fence_async_shared()                                          # products do not read as threads write
                    gl.thread_barrier()
                    mbarrier.arrive(is_full, count=1)
                turn += 1
        ticket = takers + tl.atomic_add(counters_ptr, 1, sem="relaxed")
        serial += 1
        _give(ticket, num_items, serial, tickets, given, taken, work_ptr, tall_at, C)
    async_copy.wait_group(0)
    if count_in(counters_ptr + 2, 1, tl.num_programs(0)):
        tl.store(counters_ptr, 0)


@gluon.jit
def _logits(q, k_ring, full, turn, C: gl.constexpr):
    """q k^T of the tile at `turn`, begun once it is there."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C.BLOCK_N, 16])
    stage = turn % C.STAGES
    mbarrier.wait(full.index(stage), turn // C.STAGES & 1)
    zeros = gl.full([C.TALL_M // 2, C.BLOCK_N], 0.0, gl.float32, S)
    return warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _attend_span(q, span, turn, tile_row0, row0, item, k_ring, v_ring, full, empty, inputs, strides, extents, C: gl.constexpr):
    """The state of this half's rows over one span, and the next turn. Each tile's first product runs beside the second one of the tile before, also
    where a segment ends. Other orders lost on the H200: weights beside the second product, and halves that multiply by turns, each 1 to 5 %."""
    M: gl.constexpr = C.TALL_M // 2
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C.BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C.DV, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, O)
    dtype: gl.constexpr = inputs[0].dtype.element_ty
    context, begin, end, all_begin, all_end = keys_of(item[2], item[3], tile_row0, span, C.TALL_M, extents, C)
    nothing = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    m, l = nothing, quad_sums(gl.full([M, C.BLOCK_N], 0.0, gl.float32, S), M, C.BLOCK_N)
    acc = gl.full([M, C.DV], 0.0, gl.float32, O)
    span_m, span_l, span_acc = gl.full([M], float("-inf"), gl.float32, ROWS), gl.full([M], 0.0, gl.float32, ROWS), acc
    if begin < end:
        s = warpgroup_mma_wait(0, [_logits(q, k_ring, full, turn, C)])
        m, l, alpha, p = weights(s, (begin + C.BLOCK_N > all_end) | (begin < all_begin), begin, row0, context, item, inputs[14], m, l, inputs,
                                 strides, extents, dtype, C)
        for n in range(begin + C.BLOCK_N, end, C.BLOCK_N):
            logits = _logits(q, k_ring, full, turn + 1, C)
            sums = warpgroup_mma(p, v_ring.index(turn % C.STAGES), acc, is_async=True)
            s, acc, p = warpgroup_mma_wait(0, [logits, sums, p])
            mbarrier.arrive(empty.index(turn % C.STAGES), count=1)
            turn += 1
            if n % C.SEGMENT == 0:
                span_m, span_l, span_acc = fold_segment(span_m, span_l, span_acc, m, l, acc, C)
                m = nothing                                                       # makes alpha 0, and so empties l and acc
            m, l, alpha, p = weights(s, (n + C.BLOCK_N > all_end) | (n < all_begin), n, row0, context, item, inputs[14], m, l, inputs, strides,
                                     extents, dtype, C)
            acc = acc * alpha[:, None]
        sums = warpgroup_mma(p, v_ring.index(turn % C.STAGES), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, [sums, p])
        mbarrier.arrive(empty.index(turn % C.STAGES), count=1)
        turn += 1
    span_m, span_l, span_acc = fold_segment(span_m, span_l, span_acc, m, l, acc, C)
    return span_m, span_l, span_acc, turn


@gluon.jit
def _settle_span(m, l, acc, span, first, stop, item, kv_head, half, record, inputs, strides, C: gl.constexpr):
    """Writes the rows if theirs was the last span, or leaves the state where the spans meet: as in `take_tall`."""
    M: gl.constexpr = C.TALL_M // 2
    DV: gl.constexpr = C.DV
    states_ptr, counters_ptr = inputs[5], inputs[6]
    rows = half * M + gl.arange(0, M, gl.SliceLayout(1, acc.type.layout))
    offs_d = gl.arange(0, DV, gl.SliceLayout(0, acc.type.layout))
    token, head, live = tall_rows(record, rows, kv_head, C)
    pieces, first_item = tl.load(record + 8, volatile=True), tl.load(record + 9, volatile=True)
    slots = states_ptr + C.RUNS * (C.RUN_SEGMENTS + C.RUN_SPANS) * C.SHORT_STATE
    first_slot = tl.where(pieces > 1, first_item * C.K + kv_head, C.TALL_SLOTS + 2 * tl.program_id(0))
    slots += first_slot.to(tl.int64) * C.TALL_STATE
    is_last = span + 1 == stop
    if pieces > 1:
        own = slots + ((item - first_item) * C.K).to(tl.int64) * C.TALL_STATE
        put_state(own, rows, offs_d, m, l, acc, live, C.TALL_M, C)
        is_last = count_in(counters_ptr + 4 + 2 * C.RUNS + first_slot * 2 + half, 1, pieces)
        if is_last:
            m, l, acc = get_state(slots, rows, offs_d, live, C.TALL_M, C)
            for piece in range(1, pieces):
                m_next, l_next, acc_next = get_state(slots + (piece * C.K).to(tl.int64) * C.TALL_STATE, rows, offs_d, live, C.TALL_M, C)
                m, l, acc = fold(m, l, acc, m_next, l_next, acc_next)
    else:                                                        # in this program's slot, where each element stays with the thread that adds to it
        if span > first:
            m_before, l_before, acc_before = get_state(slots, rows, offs_d, live, C.TALL_M, C)
            m, l, acc = fold(m_before, l_before, acc_before, m, l, acc)
        if span + 1 < stop:
            put_state(slots, rows, offs_d, m, l, acc, live, C.TALL_M, C)
    if is_last:
        finish(m, l, acc, tl.load(record + 7, volatile=True), token, head, live, offs_d, kv_head, inputs, strides, C)


@gluon.jit
def _field(record, i: gl.constexpr):
    return tl.max(record.slice(i, 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _attend(half: gl.constexpr, buffers, barriers, tall_at, inputs, strides, extents, C: gl.constexpr):
    """This half of the rows of this program's items."""
    if C.AHEAD:
        cuda.gdc_wait()
        if half == 0:
            cuda.gdc_launch_dependents()
    q_tiles, k_ring, v_ring, tickets = buffers
    given, taken, asked, used, full, empty = barriers
    M: gl.constexpr = C.TALL_M // 2
    turn, serial, ticket = 0, 0, 0
    while ticket >= 0:
        slot = serial % TICKETS
        mbarrier.wait(given.index(slot), serial // TICKETS & 1)
        fields = tickets.index(slot)
        ticket, first, stop, row0 = _field(fields, ITEM), _field(fields, 5), _field(fields, 6), _field(fields, 4)
        request, first_token, query_len, kv_len = _field(fields, 0), _field(fields, 1), _field(fields, 2), _field(fields, 3)
        mbarrier.arrive(taken.index(slot), count=1)
        if ticket >= 0:
            item, kv_head = ticket // C.K, ticket % C.K
            place = serial % PLACES
            mbarrier.wait(asked.index(place), serial // PLACES & 1)
            fence_async_shared()                                                  # products do not read as threads write
            q = q_tiles.index(place).slice(half * M, M)
            for span in range(first, stop):
                m, l, acc, turn = _attend_span(
                    q, span, turn, row0, row0 + half * (M // C.GROUP), (request, first_token, query_len, kv_len, kv_head), k_ring, v_ring,
                    full, empty, inputs, strides, extents, C)
                _settle_span(m, l, acc, span, first, stop, item, kv_head, half, inputs[4] + (tall_at + item) * C.RECORD, inputs, strides, C)
            mbarrier.arrive(used.index(place), count=1)
        serial += 1


@gluon.jit(do_not_specialize=["T", "R", "W", "N", "left", "right", "tall_at", "stride_br", "stride_ar"])
def _attention_tall_kernel(
    k_boxes, v_boxes,                # of the caches, as rows of a slot
    q_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, work_ptr, states_ptr, counters_ptr, out_ptr, lse_ptr, sinks_ptr, alibi_ptr, tree_ptr,
    scale, cap, stride_qt, stride_qh, stride_kn, stride_kp, stride_kh, stride_vn, stride_vp, stride_vh, stride_br, stride_ot, stride_oh, stride_lt,
    stride_ar, T, R, W, N, left, right, tall_at,
    C: gl.constexpr,
):
    """The other parameters are those of `_attention_kernel`."""
    inputs = (q_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, work_ptr, states_ptr, counters_ptr, out_ptr, lse_ptr, sinks_ptr, alibi_ptr, tree_ptr,
              None, None, scale, cap)
    strides = (stride_qt, stride_qh, stride_kn, stride_kp, stride_kh, stride_vn, stride_vp, stride_vh, stride_br, stride_ot, stride_oh, stride_lt,
               stride_ar)
    extents = (T, R, W, N, left, right)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    STAGES: gl.constexpr = C.STAGES
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    # Products read queries from here, which leaves a thread the registers for a span's state beside that of a segment. In shared memory instead, each
    # segment's fold would take 900 cycles, a half of a tile.
    q_tiles = gl.allocate_shared_memory(dtype, [PLACES, C.TALL_M, C.D], gl.NVMMASharedLayout.get_default_for([C.TALL_M, C.D], dtype))
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, C.BLOCK_N, C.D], gl.NVMMASharedLayout.get_default_for([C.BLOCK_N, C.D], dtype))
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, C.BLOCK_N, C.DV], gl.NVMMASharedLayout.get_default_for([C.BLOCK_N, C.DV], dtype))
    tickets = gl.allocate_shared_memory(gl.int32, [TICKETS, C.RECORD], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    given, taken = gl.allocate_shared_memory(gl.int64, [TICKETS, 1], BARRIER), gl.allocate_shared_memory(gl.int64, [TICKETS, 1], BARRIER)
    asked, used = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BARRIER), gl.allocate_shared_memory(gl.int64, [PLACES, 1], BARRIER)
    full, empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER), gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(TICKETS):
        mbarrier.init(given.index(i), count=1)
        mbarrier.init(taken.index(i), count=2)                                    # each half
    for i in gl.static_range(PLACES):
        mbarrier.init(asked.index(i), count=32)                                   # each thread that fetches
        mbarrier.init(used.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    buffers, barriers = (q_tiles, k_ring, v_ring, tickets), (given, taken, asked, used, full, empty)
    gl.warp_specialize([
        (_attend, (0, buffers, barriers, tall_at, inputs, strides, extents, C)),
        (_attend, (1, buffers, barriers, tall_at, inputs, strides, extents, C)),
        (_fetch, ((k_boxes, v_boxes), buffers, barriers, tall_at, inputs, strides, extents, C)),
    ], [4, 1], [232, 40])                                                         # registers a thread of the second half, and of the fetching warp
