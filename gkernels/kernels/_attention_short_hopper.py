"""Short requests on Hopper: a warp of a program fetches keys, one values, 4 attend.

In one loop for everything, a tile of keys takes a program 300 instructions and 10 barriers, 1.2 us, and what is fp8 passes through registers byte by
byte. Here the hardware copies pages by itself as soon as a tile's place is free, and a warp meets no other between a tile's two products: each has 16
rows of Hopper's 64, of which the first warp's alone count. Beside fp8, two warps each fetch keys and values, and turn them into operands too. What a
row is made of, and in what order, is that of `_attention_short`, whose functions decide what becomes of every segment.

Where the node ahead writes no keys but those of this step's rows, fetching begins beside it.

Barriers, and who waits there for what: landed, those that fetch fp8, for a tile; full, attending warps, for a tile of operands; empty, those that
fetch, until it has been multiplied with.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra import cuda

from ._attention import fill
from ._attention_ahead import ask_ahead
from ._attention_short import leave_segment, next_tile, open_item, open_run, settle_ends, tile_after, tiles_of
from ._attention_tall import keys_of
from ._attention_tile import as_operand, operand, pages_of, quad_sums, rows_of
from ._attention_tile_hopper import fetch_boxes, fetch_last, fold_segment, weights

ROWS = gl.constexpr(64)               # of Hopper's products
STAGES = gl.constexpr(2)              # tiles that a program asks for at once: a third costs batches 2 to 4 % on the H200
BATCH = gl.constexpr(16)              # states that a program asks for at once, where they meet
CONVERTED_ROWS = gl.constexpr(32)     # at a time


@gluon.jit
def _start(C: gl.constexpr):
    """Waits for the node ahead, or begins beside it. Then that one has waited itself before it let this one start, so what nodes before it wrote is
    there; the fence sees to it that the L1 has nothing older."""
    if C.WAITS == "first":
        cuda.gdc_wait()
    else:
        tl.inline_asm_elementwise("fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@gluon.jit
def _entries(table, n, kv_len, BOX: gl.constexpr, C: gl.constexpr):
    """What the table says of the boxes of keys from n on."""
    entries = ()
    for i in gl.static_range(C.BLOCK_N // BOX):
        entries += (tl.load(table + (n + i * BOX) // C.P, n + i * BOX < kv_len, other=0),)       # type: ignore[assignment]
    return entries


@gluon.jit
def _convert(turn, ring, landed, operands, C: gl.constexpr):
    """The tile of fp8 at `turn` as an operand of products."""
    LANES: gl.constexpr = ring.shape[2] // 8                                      # 8 columns each: 16 would meet banks twice as they are stored
    AS_STORED: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    tiles, full, empty = operands
    stage = turn % STAGES
    mbarrier.wait(landed.index(stage), turn // STAGES & 1)
    mbarrier.wait(empty.index(stage), (turn // STAGES + 1) & 1)
    for i in gl.static_range(C.BLOCK_N // CONVERTED_ROWS):
        x = ring.index(stage).slice(i * CONVERTED_ROWS, CONVERTED_ROWS).load(AS_STORED)
        tiles.index(stage).slice(i * CONVERTED_ROWS, CONVERTED_ROWS).store(operand(x, tiles.dtype, C))
    fence_async_shared()                                                          # products do not read as threads write
    gl.thread_barrier()
    mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _fetch(boxes, ring, landed, operands, which: gl.constexpr, short_at, runs_at, inputs, strides, extents, C: gl.constexpr):
    """Keys (which = 1) or values (2) of this program's run."""
    _start(C)
    cache_ptr, work_ptr, N = inputs[which], inputs[4], extents[3]
    stride_n, stride_p, stride_h = strides[3 * which - 1], strides[3 * which], strides[3 * which + 1]
    BOX: gl.constexpr = boxes.block_shape[0]
    BYTES: gl.constexpr = C.BLOCK_N * ring.shape[2] * boxes.dtype.primitive_bitwidth // 8
    # Places in boxes take 32 bits, which `attention` has seen to, also where strides take more. A head takes no rows where heads lie side by side.
    rows_a_page, rows_a_head = (stride_n // stride_p).to(tl.int32), (stride_h // stride_p).to(tl.int32)
    columns_a_head = (stride_h % stride_p).to(tl.int32)
    run, record, index = open_run(tl.program_id(0), runs_at, work_ptr, C)
    begin, run_end = run[2], run[3]
    turn = 0
    while begin < run_end:
        item, first, last = open_item(record, begin, run_end, C)
        kv_len = item[3]
        first_key, num_rows, group_tiles, first_tile, end_tile = tiles_of(first, last, item, C)
        tile, row, kv_head = first_tile % group_tiles, first_tile // group_tiles % num_rows, first_tile // group_tiles // num_rows
        table = inputs[3] + item[0].to(tl.int64) * strides[8]
        entries = _entries(table, first_key + tile * C.BLOCK_N, kv_len, BOX, C)
        for _ in range(first_tile, end_tile):
            n = first_key + tile * C.BLOCK_N
            stage = turn % STAGES
            if not C.HAS_SCALE:
                mbarrier.wait(operands[2].index(stage), (turn // STAGES + 1) & 1)
            if n + C.BLOCK_N <= kv_len:
                if C.WAITS == "between":
                    if n + C.BLOCK_N > kv_len - item[2]:                          # keys of this step's rows, which the node ahead may write
                        cuda.gdc_wait()
                mbarrier.expect(landed.index(stage), BYTES)
                rows = ()
                for i in gl.static_range(C.BLOCK_N // BOX):
                    rows += (pages_of(entries[i], N) * rows_a_page + kv_head * rows_a_head + (n + i * BOX) % C.P,)       # type: ignore[assignment]
                fetch_boxes(ring.index(stage), boxes, landed.index(stage), rows, kv_head * columns_a_head)
            else:
                if C.WAITS == "between":
                    cuda.gdc_wait()
                fetch_last(ring.index(stage), cache_ptr, table, n, kv_len, kv_head, N, stride_n, stride_p, stride_h, C)
                async_copy.commit_group()
                async_copy.wait_group(0)
                fence_async_shared()
                gl.thread_barrier()
                mbarrier.arrive(landed.index(stage), count=1)
            turn += 1
            if C.HAS_SCALE:
                if turn >= STAGES:
                    _convert(turn - STAGES, ring, landed, operands, C)
            # A tile before they are used, but after the fence in `_convert`, which would wait for them.
            entries = _entries(table, first_key + tile_after(tile, group_tiles) * C.BLOCK_N, kv_len, BOX, C)
            tile, row, kv_head = next_tile(tile, row, kv_head, group_tiles, num_rows)
        begin = item[6] + last
        index += 1
        record = work_ptr + (short_at + index) * C.RECORD
    if C.HAS_SCALE:
        for left in range(tl.maximum(turn - STAGES + 1, 0), turn):
            _convert(left, ring, landed, operands, C)


@gluon.jit
def _load_queries(q_tile, row0, query_len, first_token, kv_head, inputs, strides, C: gl.constexpr):
    """q's rows into the first of the tile's, zeros where they are not live; what the others hold counts for nothing. Returns the scale of logits."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C.D, C.D // 8], [4, 1], [1, 0])
    M: gl.constexpr = C.SHORT_M
    D: gl.constexpr = C.D
    m, d = gl.arange(0, M, gl.SliceLayout(1, LAYOUT)), gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    token, head, live = rows_of(row0, m, query_len, first_token, kv_head, C)
    row_at = tl.multiple_of(token * strides[0] + head * strides[1], 8)                            # of 16 bytes, as `attention` has seen to
    q = tl.load(inputs[0] + row_at[:, None] + d[None, :], live[:, None], other=0.0)
    scale = inputs[14] * tl.load(inputs[12] + kv_head * strides[13]) if C.HAS_SCALE else inputs[14]
    gl.thread_barrier()                                                           # all warps have multiplied with the rows before
    q_tile.slice(0, M).store(as_operand(q, C))
    fence_async_shared()
    gl.thread_barrier()
    return scale


@gluon.jit
def _stream(turn, begin, end, run, item, q_tile, keys, values, inputs, strides, extents, C: gl.constexpr):
    """Attends to the ordinals [begin, end) of one short request, and returns the next turn."""
    request, first_token, query_len, kv_len, _, _, _, _ = item
    k_tiles, k_full, k_empty = keys
    v_tiles, v_full, v_empty = values
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C.BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C.DV, 16])
    TILE_ROWS: gl.constexpr = C.SHORT_M // C.GROUP
    TILES: gl.constexpr = C.SEGMENT // C.BLOCK_N
    nothing = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    no_logits = gl.full([ROWS, C.BLOCK_N], 0.0, gl.float32, S)
    no_sums = quad_sums(no_logits, ROWS, C.BLOCK_N)
    zeros = gl.full([ROWS, C.DV], 0.0, gl.float32, O)
    empty_state = (gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, O)), gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, O)), zeros)
    offs_m, offs_d = gl.arange(0, ROWS, gl.SliceLayout(1, O)), gl.arange(0, C.DV, gl.SliceLayout(0, O))
    first_key, num_rows, group_tiles, first_tile, end_tile = tiles_of(begin, end, item, C)
    tile, row, kv_head = first_tile % group_tiles, first_tile // group_tiles % num_rows, first_tile // group_tiles // num_rows
    m, l, acc, span = nothing, no_sums, zeros, empty_state
    scale = _load_queries(q_tile, row * TILE_ROWS, query_len, first_token, kv_head, inputs, strides, C)
    for _ in range(first_tile, end_tile):
        n = first_key + tile * C.BLOCK_N
        stage, phase = turn % STAGES, turn // STAGES & 1
        mbarrier.wait(k_full.index(stage), phase)
        logits = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), no_logits, use_acc=False, is_async=True)
        context, _, _, all_begin, all_end = keys_of(query_len, kv_len, row * TILE_ROWS, n // C.SEGMENT // C.SPAN, C.SHORT_M, extents, C)
        s = warpgroup_mma_wait(0, [logits])
        mbarrier.arrive(k_empty.index(stage), count=1)
        m, l, alpha, p = weights(s, (n + C.BLOCK_N > all_end) | (n < all_begin), n, row * TILE_ROWS, context,
                                 (request, first_token, query_len, kv_len, kv_head), scale, m, l, inputs, strides, extents, q_tile.dtype, C)
        mbarrier.wait(v_full.index(stage), phase)
        sums = warpgroup_mma(p, v_tiles.index(stage), acc * alpha[:, None], is_async=True)
        acc, p = warpgroup_mma_wait(0, [sums, p])
        mbarrier.arrive(v_empty.index(stage), count=1)
        turn += 1
        if (tile % TILES == TILES - 1) | (tile == group_tiles - 1):
            span = fold_segment(span[0], span[1], span[2], m, l, acc, C)
            m, l, acc = nothing, no_sums, zeros
            # A row's spans meet in memory: a third accumulator has no registers.
            span = leave_segment(span, empty_state, empty_state, tile // TILES, row, kv_head, num_rows, run, item, offs_m, offs_d, inputs, strides,
                                 True, C)[0]
            if tile == group_tiles - 1:
                _, row, kv_head = next_tile(tile, row, kv_head, group_tiles, num_rows)
                more = tl.where(kv_head < C.K, query_len, 0)                      # rows of the next group, if there is one
                scale = _load_queries(q_tile, row * TILE_ROWS, more, first_token, tl.minimum(kv_head, C.K - 1), inputs, strides, C)
        tile = tile_after(tile, group_tiles)
    return turn


@gluon.jit
def _attend(q_tile, keys, values, fills_at, short_at, runs_at, inputs, strides, extents, C: gl.constexpr):
    """This program's run, and its share of the fills."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    FEW: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    is_last = tl.program_id(0) + 1 == tl.num_programs(0)
    if C.WAITS != "last":
        ask_ahead(tl.program_id(0), runs_at, gl.arange(0, C.AHEAD, LINE), inputs, strides, extents, C)
    _start(C)
    if C.WAITS == "first":
        cuda.gdc_launch_dependents()
    if C.WAITS == "last":
        if is_last == 0:
            cuda.gdc_launch_dependents()
    offs_d = gl.arange(0, C.DV, gl.SliceLayout(0, FEW))
    ONE: gl.constexpr = gl.SliceLayout(1, FEW)
    empty_state = (gl.full([C.GROUP], float("-inf"), gl.float32, ONE), gl.full([C.GROUP], 0.0, gl.float32, ONE),
                   gl.full([C.GROUP, C.DV], 0.0, gl.float32, FEW))
    num_fills = tl.load(inputs[4] + 2)                                            # behind a run it would come from the L2 again, in 0.6 us
    run, record, index = open_run(tl.program_id(0), runs_at, inputs[4], C)
    _, run_length, begin, run_end = run
    item, first, last = open_item(record, begin, run_end, C)
    if C.WAITS == "between":
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    turn = 0
    while begin < run_end:
        turn = _stream(turn, first, last, run, item, q_tile, keys, values, inputs, strides, extents, C)
        settle_ends(first, last, run_length, item, empty_state, gl.arange(0, C.GROUP, ONE), offs_d, inputs, strides, BATCH, C)
        begin = item[6] + last
        index += 1
        record = inputs[4] + (short_at + index) * C.RECORD
        if begin < run_end:
            item, first, last = open_item(record, begin, run_end, C)
    fill(num_fills, fills_at, gl.arange(0, C.FILL_H, ONE), offs_d, inputs, strides, C)
    if C.WAITS == "last":                                                         # this launch must not end before that of tall tiles
        if is_last:
            cuda.gdc_wait()
            cuda.gdc_launch_dependents()


@gluon.jit
def _barriers(count: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def _places(D: gl.constexpr, dtype: gl.constexpr, stored: gl.constexpr, C: gl.constexpr):
    """Where tiles of a cache land, with a barrier each, and where they are operands, with two: the same places but for fp8."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C.BLOCK_N, D], dtype)
    operands = gl.allocate_shared_memory(dtype, [STAGES, C.BLOCK_N, D], LAYOUT), _barriers(STAGES), _barriers(STAGES)
    ring, landed = operands[0], operands[1]
    if C.HAS_SCALE:
        ring = gl.allocate_shared_memory(stored, [STAGES, C.BLOCK_N, D], gl.NVMMASharedLayout.get_default_for([C.BLOCK_N, D], stored))
        landed = _barriers(STAGES)
    return ring, landed, operands


@gluon.jit(do_not_specialize=["T", "R", "W", "N", "left", "right", "fills_at", "short_at", "runs_at", "tall_at", "stride_br", "stride_ar",
                              "stride_ks", "stride_vs"])
def _attention_short_kernel(
    k_boxes, v_boxes,                # of the caches, as rows of a slot
    q_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, work_ptr, states_ptr, counters_ptr, out_ptr, lse_ptr, sinks_ptr, alibi_ptr, tree_ptr,
    k_scale_ptr, v_scale_ptr, scale, cap, stride_qt, stride_qh, stride_kn, stride_kp, stride_kh, stride_vn, stride_vp, stride_vh, stride_br,
    stride_ot, stride_oh, stride_lt, stride_ar, stride_ks, stride_vs, T, R, W, N, left, right, fills_at, short_at, runs_at, tall_at,
    C: gl.constexpr,
):
    """The other parameters are those of `_attention_kernel`."""
    inputs = (q_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, work_ptr, states_ptr, counters_ptr, out_ptr, lse_ptr, sinks_ptr, alibi_ptr, tree_ptr,
              k_scale_ptr, v_scale_ptr, scale, cap)
    strides = (stride_qt, stride_qh, stride_kn, stride_kp, stride_kh, stride_vn, stride_vp, stride_vh, stride_br, stride_ot, stride_oh, stride_lt,
               stride_ar, stride_ks, stride_vs)
    extents = (T, R, W, N, left, right)
    WARPS: gl.constexpr = 2 if C.HAS_SCALE else 1
    REGISTERS: gl.constexpr = 40 if C.IS_ALONE else 32
    dtype: gl.constexpr = gl.float16 if C.HAS_SCALE else q_ptr.dtype.element_ty                   # see `as_operand`
    q_tile = gl.allocate_shared_memory(dtype, [ROWS, C.D], gl.NVMMASharedLayout.get_default_for([ROWS, C.D], dtype))
    k_ring, k_landed, keys = _places(C.D, dtype, k_cache_ptr.dtype.element_ty, C)
    v_ring, v_landed, values = _places(C.DV, dtype, v_cache_ptr.dtype.element_ty, C)
    gl.warp_specialize([
        (_attend, (q_tile, keys, values, fills_at, short_at, runs_at, inputs, strides, extents, C)),
        (_fetch, (k_boxes, k_ring, k_landed, keys, 1, short_at, runs_at, inputs, strides, extents, C)),
        (_fetch, (v_boxes, v_ring, v_landed, values, 2, short_at, runs_at, inputs, strides, extents, C)),
    ], [WARPS, WARPS], [REGISTERS, REGISTERS])                                    # a thread of those that fetch
