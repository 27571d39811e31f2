"""What both of attention's kernels of two kinds of warps do with a tile: copy it into shared memory, and weigh and fold it in Hopper's layouts.

The arithmetic is that of `_attention_tile`, whose functions serve both of Triton's languages.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

from ._attention_tile import fold, pages_of, quad_sums, row_sums, sight_of, visibility, weigh


@gluon.constexpr_function
def _columns(D, dtype):
    """A tile's columns that lie in one block: of 128 bytes, or all of them."""
    return min(D, 1024 // dtype.primitive_bitwidth)


@gluon.constexpr_function
def copies(D, dtype, warps):
    """How threads share a chunk's copies of 16 bytes."""
    vector = 128 // dtype.primitive_bitwidth
    lanes = _columns(D, dtype) // vector
    return gl.BlockedLayout([1, vector], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def chunks_of(tile):
    """A tile [rows, D] in shared memory as [chunks, 16, COLUMNS]: its columns lie in blocks, one block's rows after the other's."""
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = _columns(tile.shape[1], tile.dtype)
    CHUNKS: gl.constexpr = ROWS // 16 * (tile.shape[1] // COLUMNS)
    dtype: gl.constexpr = tile.dtype
    return tile._reinterpret(dtype, [CHUNKS, 16, COLUMNS], gl.NVMMASharedLayout.get_default_for([16, COLUMNS], dtype))


@gluon.jit
def fetch_last(tile, cache_ptr, table, n, kv_len, kv_head, N, stride_n, stride_p, stride_h, C: gl.constexpr):
    """The tile of keys or values from n on that the request ends in: those that are not live come as zeros."""
    BLOCK_N: gl.constexpr = tile.shape[0]
    D: gl.constexpr = tile.shape[1]
    COLUMNS: gl.constexpr = _columns(D, tile.dtype)
    VECTOR: gl.constexpr = 128 // tile.dtype.primitive_bitwidth
    LAYOUT: gl.constexpr = copies(D, tile.dtype, gl.num_warps())
    chunks, row, column = chunks_of(tile), gl.arange(0, 16, gl.SliceLayout(1, LAYOUT)), gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    for i in range(BLOCK_N // 16 * (D // COLUMNS)):
        key = n + i % (BLOCK_N // 16) * 16 + row
        page = pages_of(tl.load(table + key // C.P, key < kv_len, other=0), N).to(tl.int64)
        slot = tl.multiple_of(page * stride_n + (key % C.P).to(tl.int64) * stride_p + kv_head.to(tl.int64) * stride_h, VECTOR)
        async_copy.async_copy_global_to_shared(chunks.index(i), cache_ptr + slot[:, None] + (i // (BLOCK_N // 16) * COLUMNS + column)[None, :],
                                               (key < kv_len)[:, None])


@gluon.jit
def fetch_boxes(tile, boxes, is_full, rows, first_column):
    """The tile of keys or values whose boxes, a page or 64 slots of one by at most 128 bytes, begin at these rows."""
    ROWS: gl.constexpr = boxes.block_shape[0]
    COLUMNS: gl.constexpr = boxes.block_shape[1]
    BLOCK_N: gl.constexpr = tile.shape[0]
    BLOCKS: gl.constexpr = tile.shape[1] // COLUMNS
    flat = tile._reinterpret(boxes.dtype, [BLOCK_N * BLOCKS, COLUMNS], boxes.layout)
    for i in gl.static_range(BLOCK_N // ROWS):
        for j in gl.static_range(BLOCKS):
            tma.async_copy_global_to_shared(boxes, [rows[i], first_column + j * COLUMNS], is_full, flat.slice(j * BLOCK_N + i * ROWS, ROWS))


@gluon.jit
def weights(s, masked, n, row0, context, item, scale, m, l, inputs, strides, extents, dtype: gl.constexpr, C: gl.constexpr):
    """m, l, alpha and the weights, as an operand, of the tile at n: see `weigh`."""
    S: gl.constexpr = s.type.layout
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C.DV, 16])
    M: gl.constexpr = s.shape[0]
    request, first_token, query_len, kv_len, kv_head = item
    offs_m, key = gl.arange(0, M, gl.SliceLayout(1, S)), n + gl.arange(0, C.BLOCK_N, gl.SliceLayout(0, S))
    position, first, stop, tree, slope = sight_of(row0, offs_m, query_len, kv_len, request, first_token, kv_head, inputs, strides, extents, C)
    seen = visibility(key, first, stop, tree, context, C)
    if masked:
        s = tl.where(seen, s, float("-inf"))
    m, alpha, p = weigh(s, seen, False, key, position, slope, scale, inputs[15], m, C)
    sums = quad_sums(p, M, C.BLOCK_N)
    wide_alpha = gl.convert_layout(alpha, gl.SliceLayout(1, gl.SliceLayout(2, sums.type.layout)))[:, None, None]
    p = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, O, 2))
    return m, tl.fma(l, wide_alpha, sums), gl.convert_layout(alpha, gl.SliceLayout(1, O)), p


@gluon.jit
def fold_segment(span_m, span_l, span_acc, m, l, acc, C: gl.constexpr):
    """The span's state with a segment's folded in."""
    ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    l = gl.convert_layout(row_sums(l, acc.shape[0], C.BLOCK_N // 4), ROWS)
    return fold(span_m, span_l, span_acc, gl.convert_layout(m, ROWS), l, acc)
