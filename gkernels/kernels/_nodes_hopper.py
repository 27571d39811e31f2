"""The nodes of `linear`, `gate_up` and `qkv` for few rows on Hopper, whose products are those of `_product_hopper`.

Each does what the kernel of its room does, and leaves the same bits. Its parameters are those of that kernel, but that the weight, and beside a plain
weight x, come as boxes that the hardware copies.
"""

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda

from ._heads import write_head
from ._product import collect, column_sums, halves, inverse_rms, leave, normed, write_rows
from ._product_hopper import FETCHING_REGISTERS, fetch_rest, fetch_weight, half_layout, rings, streamed_sums, sums_layout, weight_rows
from ._tile import Tile


def operands(weight: torch.Tensor, x: torch.Tensor, c: Tile) -> tuple[TensorDescriptor, TensorDescriptor]:
    """The weight as boxes of half a tile's rows and 128 bytes, and x as boxes of the tile's rows and a step's columns; for int4 in slices of 32
    columns, those of one nibble of each word, which a dot multiplies."""
    if c.KIND == "int4":
        x_boxes = _boxes(x.as_strided((c.K // 32, len(x), 32), (32, x.stride(0), 1)), c.BLOCK_K // 32, c.BLOCK_M, 32)
    else:
        x_boxes = _boxes(x, c.BLOCK_M, c.BLOCK_K)
    return _boxes(weight, c.BLOCK_N // 2, 128 // weight.element_size()), x_boxes


def _boxes(t, *box):
    layout = NVMMASharedLayout(min(box[-1] * t.element_size(), 128), 8 * t.element_size(), len(box))
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(box), layout)


@gluon.constexpr_function
def _whole_columns(rows, columns):
    """Of a tile [rows, columns] whose columns are each a thread's own, up to two threads' where it has 128 rows."""
    log2 = lambda n: n.bit_length() - 1
    threads = [[0, 1 << b] for b in range(log2(columns))] + [[1 << b, 0] for b in range(6, log2(rows))]
    threads += [[0, 0]] * (7 - len(threads))
    return gl.DistributedLinearLayout([[1 << b, 0] for b in range(min(log2(rows), 6))], threads[:5], threads[5:], [], [rows, columns])


@gluon.jit
def _squares(squares_ptr, T, first: gl.constexpr, step: gl.constexpr, count: gl.constexpr, ROWS: gl.constexpr, PARTS: gl.constexpr, C: gl.constexpr):
    """The parts of the rows' squares, `count` tiles [ROWS, BLOCK_M] of them, every step-th from `first` on, added up as `column_sums` would."""
    if count > 1:
        return (_squares(squares_ptr, T, first, 2 * step, count // 2, ROWS, PARTS, C)
                + _squares(squares_ptr, T, first + step, 2 * step, count // 2, ROWS, PARTS, C))
    else:
        LAYOUT: gl.constexpr = _whole_columns(ROWS, C.BLOCK_M)
        p, m = first * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), gl.arange(0, C.BLOCK_M, gl.SliceLayout(0, LAYOUT))
        return tl.load(squares_ptr + m[None, :] * PARTS + p[:, None], (p < PARTS)[:, None] & (m < T)[None, :], other=0.0)


@gluon.jit
def _inverse_rms(squares_ptr, T, eps, PARTS: gl.constexpr, C: gl.constexpr):
    """Each row's 1 / rms [BLOCK_M]; the order of addition is that of `column_sums`."""
    ALL: gl.constexpr = 1 << (PARTS - 1).bit_length()
    ROWS: gl.constexpr = ALL if ALL < 32 else 32                                   # that a thread holds at a time: a row has a part for 64 columns
    squares = _squares(squares_ptr, T, 0, 1, ALL // ROWS, ROWS, PARTS, C)
    return gl.convert_layout(inverse_rms(squares, eps, C), gl.SliceLayout(0, sums_layout(C)))


@gluon.jit
def _places(layout: gl.constexpr, rows: gl.constexpr, C: gl.constexpr):
    """n [rows] and m [BLOCK_M], places in the tile or in a half of it."""
    return gl.arange(0, rows, gl.SliceLayout(1, layout)), gl.arange(0, C.BLOCK_M, gl.SliceLayout(0, layout))


@gluon.jit
def _halves(acc, inverse, bias_ptr, first_row, second_row, C: gl.constexpr):
    """The finished sums of the tile's halves, whose weight rows do not lie in one piece."""
    first, second = halves(normed(acc, inverse, bias_ptr, weight_rows(first_row, second_row, C), C), C)
    return gl.convert_layout(first, half_layout(C), assert_trivial=True), gl.convert_layout(second, half_layout(C), assert_trivial=True)


@gluon.jit
def _zero(T):
    """Which the assembler cannot know to be one."""
    return (T >> 31).to(gl.float32)


@gluon.jit
def _live(num_tokens_ptr, T):
    live = T
    if num_tokens_ptr is not None:
        live = tl.minimum(tl.load(num_tokens_ptr), T)
    return live


@gluon.jit
def _over_splits(acc, partials_ptr, counters_ptr, tile, split, C: gl.constexpr):
    """Whether this program ends the tile, and its sums over all splits then."""
    is_last = True
    if C.SPLITS > 1:
        n, m = _places(sums_layout(C), C.BLOCK_N, C)
        is_last = leave(acc, partials_ptr, counters_ptr, tile, split, n, m, C)
        if is_last:
            acc = collect(partials_ptr, tile, n, m, C)
    return is_last, acc


@gluon.jit
def _multiply_linear(tile, split, first_row, second_row, buffers, barriers, squares_ptr, scale_ptr, bias_ptr, out_ptr, norm_ptr, scaled_ptr,
                     scaled_squares_ptr, partials_ptr, counters_ptr, num_tokens_ptr, T, stride_ot, stride_st, eps, IS_RESIDUAL: gl.constexpr,
                     PARTS: gl.constexpr, C: gl.constexpr):
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()
    n, m = _places(sums_layout(C), C.BLOCK_N, C)
    rows = first_row + n
    live, mask_out = _live(num_tokens_ptr, T), (n >= 0)[:, None] & (m < T)[None, :]
    out = out_ptr + m.to(gl.int64)[None, :] * stride_ot + rows[:, None]
    if squares_ptr is not None:
        inverse = _inverse_rms(squares_ptr, T, eps, PARTS, C)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + rows)
    # The residual early, as long as a small product takes; converted weights leave no room for it before the sums
    if IS_RESIDUAL and C.KIND == "plain":
        residual = tl.load(out, mask_out, other=0.0).to(gl.float32)
    acc = streamed_sums(scale_ptr, first_row, second_row, _zero(T), buffers, barriers, C)
    if IS_RESIDUAL and C.KIND != "plain":
        residual = tl.load(out, mask_out, other=0.0).to(gl.float32)
    is_last, acc = _over_splits(acc, partials_ptr, counters_ptr, tile, split, C)
    if is_last:
        if squares_ptr is not None:
            acc = normed(acc, inverse, bias_ptr, rows, C)
        elif bias_ptr is not None:
            acc += tl.load(bias_ptr + rows).to(gl.float32)[:, None]
        if IS_RESIDUAL:
            acc += residual
        mask_live = m < live
        acc = tl.where(mask_live[None, :], acc, 0.0)
        if norm_ptr is not None:
            rounded = write_rows(acc, norm, out, scaled_ptr + m.to(gl.int64)[None, :] * stride_st + rows[:, None], mask_out, mask_live)
            squares = gl.convert_layout(rounded * rounded, _whole_columns(C.BLOCK_N, C.BLOCK_M))
            _write_squares(squares, scaled_squares_ptr, tile, live, C)
        else:
            write_rows(acc, None, out, None, mask_out, mask_live)


@gluon.jit
def _write_squares(squares, squares_ptr, tile, live, C: gl.constexpr):
    """Sums of the squares of each 64 rows of a tile."""
    COUNT: gl.constexpr = C.BLOCK_N // 64
    by_part = gl.permute(gl.reshape(squares, (COUNT, 64, C.BLOCK_M)), (1, 0, 2))
    sums = column_sums(gl.reshape(by_part, (64, COUNT * C.BLOCK_M)))               # a column: of a part and a row
    at = gl.arange(0, COUNT * C.BLOCK_M, sums.type.layout)
    part, m = at // C.BLOCK_M, at % C.BLOCK_M
    tl.store(squares_ptr + m * (COUNT * C.TILES) + COUNT * tile + part, sums, m < live)


@gluon.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _linear_streamed_kernel(
    weight_boxes, x_boxes, squares_ptr, scale_ptr, bias_ptr, out_ptr, norm_ptr, scaled_ptr, scaled_squares_ptr, partials_ptr, counters_ptr,
    num_tokens_ptr, T, stride_ot, stride_st, eps,
    IS_RESIDUAL: gl.constexpr, PARTS: gl.constexpr, C: gl.constexpr,
):
    buffers, barriers = rings(weight_boxes, x_boxes, C)
    tile, split = gl.program_id(0) // C.SPLITS, gl.program_id(0) % C.SPLITS
    first_row, second_row = tile * C.BLOCK_N, tile * C.BLOCK_N + C.BLOCK_N // 2
    gl.warp_specialize([
        (_multiply_linear, (tile, split, first_row, second_row, buffers, barriers, squares_ptr, scale_ptr, bias_ptr, out_ptr, norm_ptr, scaled_ptr,
                            scaled_squares_ptr, partials_ptr, counters_ptr, num_tokens_ptr, T, stride_ot, stride_st, eps, IS_RESIDUAL, PARTS, C)),
        (fetch_weight, (weight_boxes, first_row, second_row, split, buffers, barriers, C)),
        (fetch_rest, (x_boxes, scale_ptr, first_row, second_row, split, buffers, barriers, C)),
    ], [1, 1], FETCHING_REGISTERS)


@gluon.jit
def _multiply_gate_up(tile, first_row, second_row, buffers, barriers, squares_ptr, scale_ptr, bias_ptr, out_ptr, num_tokens_ptr, T, stride_ot,
                      eps, PARTS: gl.constexpr, C: gl.constexpr):
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()
    pair, m = _places(half_layout(C), C.BLOCK_N // 2, C)
    live, inverse = _live(num_tokens_ptr, T), _inverse_rms(squares_ptr, T, eps, PARTS, C)
    acc = streamed_sums(scale_ptr, first_row, second_row, _zero(T), buffers, barriers, C)
    gate, up = _halves(acc, inverse, bias_ptr, first_row, second_row, C)
    out_tile = tl.where((m < live)[None, :], gate / (1.0 + tl.exp(-gate)) * up, 0.0)
    out = out_ptr + m.to(gl.int64)[None, :] * stride_ot + (first_row + pair)[:, None]
    tl.store(out, out_tile.to(out_ptr.dtype.element_ty), (pair >= 0)[:, None] & (m < T)[None, :])


@gluon.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _norm_gate_up_streamed_kernel(
    weight_boxes, x_boxes, squares_ptr, scale_ptr, bias_ptr, out_ptr, num_tokens_ptr,
    T, stride_ot, eps,
    F: gl.constexpr, PARTS: gl.constexpr, C: gl.constexpr,
):
    buffers, barriers = rings(weight_boxes, x_boxes, C)
    tile = gl.program_id(0)
    first_row = tile * (C.BLOCK_N // 2)
    second_row = F + first_row
    gl.warp_specialize([
        (_multiply_gate_up, (tile, first_row, second_row, buffers, barriers, squares_ptr, scale_ptr, bias_ptr, out_ptr, num_tokens_ptr, T,
                             stride_ot, eps, PARTS, C)),
        (fetch_weight, (weight_boxes, first_row, second_row, 0, buffers, barriers, C)),
        (fetch_rest, (x_boxes, scale_ptr, first_row, second_row, 0, buffers, barriers, C)),
    ], [1, 1], FETCHING_REGISTERS)


@gluon.jit
def _multiply_qkv(tile, split, first_row, second_row, buffers, barriers, squares_ptr, scale_ptr, bias_ptr, positions_ptr, cos_sin_ptr,
                  slot_mapping_ptr, k_cache_ptr, v_cache_ptr, q_out_ptr, partials_ptr, counters_ptr, num_tokens_ptr, T, max_len, num_pages, eps,
                  strides, H: gl.constexpr, KV: gl.constexpr, PAGE_SIZE: gl.constexpr, PARTS: gl.constexpr, C: gl.constexpr):
    stride_kcn, stride_kcp, stride_kch, stride_vcn, stride_vcp, stride_vch, stride_qot, stride_qoh = strides
    HALF: gl.constexpr = C.BLOCK_N // 2
    CUTS: gl.constexpr = C.TILES // (H + 2 * KV)                                   # tiles a head
    D: gl.constexpr = CUTS * C.BLOCK_N
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()
    head = tile // CUTS
    pair, m = _places(half_layout(C), HALF, C)
    live, inverse = _live(num_tokens_ptr, T), _inverse_rms(squares_ptr, T, eps, PARTS, C)
    position = tl.load(positions_ptr + m, m < T, other=0).to(gl.int64)[None, :]
    slot = tl.load(slot_mapping_ptr + m, m < T, other=-1)[None, :]
    is_known, pair = (position >= 0) & (position < max_len), (tile % CUTS * HALF + pair)[:, None]
    is_pair = pair >= 0
    angles, is_turned = cos_sin_ptr + tl.where(is_known, position, 0) * D + pair, is_pair & is_known & (head < H + KV)
    cos, sin = tl.load(angles, is_turned, other=1.0), tl.load(angles + D // 2, is_turned, other=0.0)
    acc = streamed_sums(scale_ptr, first_row, second_row, _zero(T), buffers, barriers, C)
    is_last, acc = _over_splits(acc, partials_ptr, counters_ptr, tile, split, C)
    if is_last:
        first, second = _halves(acc, inverse, bias_ptr, first_row, second_row, C)
        q_out = q_out_ptr + m.to(gl.int64)[None, :] * stride_qot + head.to(gl.int64) * stride_qoh
        write_head(first, second, cos, sin, is_known, is_pair, pair, pair + D // 2, is_pair, is_pair, (m < T)[None, :], m < live, slot, head,
                   num_pages, q_out, k_cache_ptr, v_cache_ptr, stride_kcn, stride_kcp, stride_kch, stride_vcn, stride_vcp, stride_vch, H, KV,
                   PAGE_SIZE)


@gluon.jit(do_not_specialize=["T", "max_len", "num_pages"],
           do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr", "num_tokens_ptr"])
def _norm_qkv_streamed_kernel(
    weight_boxes, x_boxes, squares_ptr, scale_ptr, bias_ptr, positions_ptr, cos_sin_ptr, slot_mapping_ptr, k_cache_ptr, v_cache_ptr, q_out_ptr,
    partials_ptr, counters_ptr, num_tokens_ptr,
    T, max_len, num_pages, eps,
    stride_kcn, stride_kcp, stride_kch, stride_vcn, stride_vcp, stride_vch, stride_qot, stride_qoh,
    H: gl.constexpr, KV: gl.constexpr, PAGE_SIZE: gl.constexpr, PARTS: gl.constexpr, C: gl.constexpr,
):
    """For heads whose dimensions are all rotated, without norms of their own: a tile is a head, or half of its pairs."""
    CUTS: gl.constexpr = C.TILES // (H + 2 * KV)
    buffers, barriers = rings(weight_boxes, x_boxes, C)
    tile, split = gl.program_id(0) // C.SPLITS, gl.program_id(0) % C.SPLITS
    first_row = tile // CUTS * (CUTS * C.BLOCK_N) + tile % CUTS * (C.BLOCK_N // 2)
    second_row = first_row + CUTS * C.BLOCK_N // 2
    strides = (stride_kcn, stride_kcp, stride_kch, stride_vcn, stride_vcp, stride_vch, stride_qot, stride_qoh)
    gl.warp_specialize([
        (_multiply_qkv, (tile, split, first_row, second_row, buffers, barriers, squares_ptr, scale_ptr, bias_ptr, positions_ptr, cos_sin_ptr,
                         slot_mapping_ptr, k_cache_ptr, v_cache_ptr, q_out_ptr, partials_ptr, counters_ptr, num_tokens_ptr, T, max_len, num_pages,
                         eps, strides, H, KV, PAGE_SIZE, PARTS, C)),
        (fetch_weight, (weight_boxes, first_row, second_row, split, buffers, barriers, C)),
        (fetch_rest, (x_boxes, scale_ptr, first_row, second_row, split, buffers, barriers, C)),
    ], [1, 1], FETCHING_REGISTERS)
