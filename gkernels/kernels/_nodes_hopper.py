"""The nodes of `linear`, `gate_up` and `qkv` for few rows and converted weights on Hopper, whose products are those of `_product_hopper`.

Each does what the kernel of its room does, and leaves the same bits. Its parameters are those of that kernel, but that the weight comes as boxes that
the hardware copies.
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
from ._product_hopper import FETCHING_REGISTERS, fetch_rest, fetch_weight, rings, streamed_sums, sums_layout
from ._tile import STREAMED_ROWS


def weight_box(weight: torch.Tensor) -> TensorDescriptor:
    """A converted weight as boxes of half a tile's rows and 128 bytes."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * weight.element_size(), rank=2)
    return TensorDescriptor(weight, list(weight.shape), [weight.stride(0), 1], [STREAMED_ROWS // 2, 128 // weight.element_size()], layout)


@gluon.constexpr_function
def _whole_columns(rows, columns):
    """Of a tile [rows, columns] whose columns are each a thread's own, up to two threads' where it has 128 rows."""
    log2 = lambda n: n.bit_length() - 1
    lanes = [[0, 1 << b] for b in range(log2(columns))] + [[1 << b, 0] for b in range(6, log2(rows))]
    return gl.DistributedLinearLayout([[1 << b, 0] for b in range(min(log2(rows), 6))], lanes + [[0, 0]] * (5 - len(lanes)), [[0, 0], [0, 0]], [],
                                      [rows, columns])


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
    return gl.convert_layout(inverse_rms(squares, eps, C), gl.SliceLayout(0, sums_layout()))


@gluon.jit
def _places(first_row, second_row, C: gl.constexpr):
    """n [BLOCK_N] and m [BLOCK_M], places in the tile, and its weight rows [BLOCK_N]."""
    HALF: gl.constexpr = C.BLOCK_N // 2
    n, m = gl.arange(0, C.BLOCK_N, gl.SliceLayout(1, sums_layout())), gl.arange(0, C.BLOCK_M, gl.SliceLayout(0, sums_layout()))
    return n, m, tl.where(n < HALF, first_row + n, second_row + n - HALF)


@gluon.jit
def _live(num_tokens_ptr, T):
    live = T
    if num_tokens_ptr is not None:
        live = tl.minimum(tl.load(num_tokens_ptr), T)
    return live


@gluon.jit
def _over_splits(acc, partials_ptr, counters_ptr, tile, split, n, m, C: gl.constexpr):
    """Whether this program ends the tile, and its sums over all splits then."""
    is_last = True
    if C.SPLITS > 1:
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
    n, m, rows = _places(first_row, second_row, C)
    live, mask_out = _live(num_tokens_ptr, T), (n >= 0)[:, None] & (m < T)[None, :]
    out = out_ptr + m.to(gl.int64)[None, :] * stride_ot + rows[:, None]
    if squares_ptr is not None:
        inverse = _inverse_rms(squares_ptr, T, eps, PARTS, C)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + rows)
    acc = streamed_sums(scale_ptr, rows, buffers, barriers, C)
    if IS_RESIDUAL:                         # before it is known who ends the tile, which takes as long; before the sums, beside 16 rows, it spills
        residual = tl.load(out, mask_out, other=0.0).to(gl.float32)
    is_last, acc = _over_splits(acc, partials_ptr, counters_ptr, tile, split, n, m, C)
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
    """Sums of the squares of each half of a tile."""
    HALF: gl.constexpr = C.BLOCK_N // 2
    by_half = gl.permute(gl.reshape(squares, (2, HALF, C.BLOCK_M)), (1, 0, 2))
    sums = column_sums(gl.reshape(by_half, (HALF, 2 * C.BLOCK_M)))                 # a column: of a half and a row
    at = gl.arange(0, 2 * C.BLOCK_M, sums.type.layout)
    half, m = at // C.BLOCK_M, at % C.BLOCK_M
    tl.store(squares_ptr + m * (2 * C.TILES) + 2 * tile + half, sums, m < live)


@gluon.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _linear_streamed_kernel(
    boxes, x_ptr, squares_ptr, scale_ptr, bias_ptr, out_ptr, norm_ptr, scaled_ptr, scaled_squares_ptr, partials_ptr, counters_ptr, num_tokens_ptr,
    T, stride_xt, stride_ot, stride_st, eps,
    IS_RESIDUAL: gl.constexpr, PARTS: gl.constexpr, C: gl.constexpr,
):
    buffers, barriers = rings(boxes, x_ptr, C)
    tile, split = gl.program_id(0) // C.SPLITS, gl.program_id(0) % C.SPLITS
    first_row, second_row = tile * C.BLOCK_N, tile * C.BLOCK_N + C.BLOCK_N // 2
    gl.warp_specialize([
        (_multiply_linear, (tile, split, first_row, second_row, buffers, barriers, squares_ptr, scale_ptr, bias_ptr, out_ptr, norm_ptr, scaled_ptr,
                            scaled_squares_ptr, partials_ptr, counters_ptr, num_tokens_ptr, T, stride_ot, stride_st, eps, IS_RESIDUAL, PARTS, C)),
        (fetch_weight, (boxes, first_row, second_row, split, buffers, barriers, C)),
        (fetch_rest, (x_ptr, scale_ptr, T, stride_xt, first_row, second_row, split, buffers, barriers, C)),
    ], [1, 1], FETCHING_REGISTERS)


@gluon.jit
def _multiply_gate_up(tile, first_row, second_row, buffers, barriers, squares_ptr, scale_ptr, bias_ptr, out_ptr, num_tokens_ptr, T, stride_ot,
                      eps, PARTS: gl.constexpr, C: gl.constexpr):
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()
    _, m, rows = _places(first_row, second_row, C)
    live, inverse = _live(num_tokens_ptr, T), _inverse_rms(squares_ptr, T, eps, PARTS, C)
    acc = streamed_sums(scale_ptr, rows, buffers, barriers, C)
    gate, up = halves(normed(acc, inverse, bias_ptr, rows, C), C)
    gate, up = gl.convert_layout(gate, sums_layout(), assert_trivial=True), gl.convert_layout(up, sums_layout(), assert_trivial=True)
    out_tile = tl.where((m < live)[None, :], gate / (1.0 + tl.exp(-gate)) * up, 0.0)
    f = first_row + gl.arange(0, C.BLOCK_N // 2, gl.SliceLayout(1, sums_layout()))
    tl.store(out_ptr + m.to(gl.int64)[None, :] * stride_ot + f[:, None], out_tile.to(out_ptr.dtype.element_ty), (f >= 0)[:, None] & (m < T)[None, :])


@gluon.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _norm_gate_up_streamed_kernel(
    boxes, x_ptr, squares_ptr, scale_ptr, bias_ptr, out_ptr, num_tokens_ptr,
    T, stride_xt, stride_ot, eps,
    F: gl.constexpr, PARTS: gl.constexpr, C: gl.constexpr,
):
    buffers, barriers = rings(boxes, x_ptr, C)
    tile = gl.program_id(0)
    first_row = tile * (C.BLOCK_N // 2)
    second_row = F + first_row
    gl.warp_specialize([
        (_multiply_gate_up, (tile, first_row, second_row, buffers, barriers, squares_ptr, scale_ptr, bias_ptr, out_ptr, num_tokens_ptr, T,
                             stride_ot, eps, PARTS, C)),
        (fetch_weight, (boxes, first_row, second_row, 0, buffers, barriers, C)),
        (fetch_rest, (x_ptr, scale_ptr, T, stride_xt, first_row, second_row, 0, buffers, barriers, C)),
    ], [1, 1], FETCHING_REGISTERS)


@gluon.jit
def _multiply_qkv(head, split, first_row, second_row, buffers, barriers, squares_ptr, scale_ptr, bias_ptr, positions_ptr, cos_sin_ptr,
                  slot_mapping_ptr, k_cache_ptr, v_cache_ptr, q_out_ptr, partials_ptr, counters_ptr, num_tokens_ptr, T, max_len, num_pages, eps,
                  strides, H: gl.constexpr, KV: gl.constexpr, PAGE_SIZE: gl.constexpr, PARTS: gl.constexpr, C: gl.constexpr):
    stride_kcn, stride_kcp, stride_kch, stride_vcn, stride_vcp, stride_vch, stride_qot, stride_qoh = strides
    HALF: gl.constexpr = C.BLOCK_N // 2
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()
    n, m, rows = _places(first_row, second_row, C)
    live, inverse = _live(num_tokens_ptr, T), _inverse_rms(squares_ptr, T, eps, PARTS, C)
    position = tl.load(positions_ptr + m, m < T, other=0).to(gl.int64)[None, :]
    slot = tl.load(slot_mapping_ptr + m, m < T, other=-1)[None, :]
    is_known, pair = (position >= 0) & (position < max_len), gl.arange(0, HALF, gl.SliceLayout(1, sums_layout()))[:, None]
    is_pair = pair >= 0
    angles, is_turned = cos_sin_ptr + tl.where(is_known, position, 0) * C.BLOCK_N + pair, is_pair & is_known & (head < H + KV)
    cos, sin = tl.load(angles, is_turned, other=1.0), tl.load(angles + HALF, is_turned, other=0.0)
    acc = streamed_sums(scale_ptr, rows, buffers, barriers, C)
    is_last, acc = _over_splits(acc, partials_ptr, counters_ptr, head, split, n, m, C)
    if is_last:
        first, second = halves(normed(acc, inverse, bias_ptr, rows, C), C)
        first, second = gl.convert_layout(first, sums_layout(), assert_trivial=True), gl.convert_layout(second, sums_layout(), assert_trivial=True)
        q_out = q_out_ptr + m.to(gl.int64)[None, :] * stride_qot + head.to(gl.int64) * stride_qoh
        write_head(first, second, cos, sin, is_known, is_pair, pair, pair + HALF, is_pair, is_pair, (m < T)[None, :], m < live, slot, head, num_pages,
                   q_out, k_cache_ptr, v_cache_ptr, stride_kcn, stride_kcp, stride_kch, stride_vcn, stride_vcp, stride_vch, H, KV, PAGE_SIZE)


@gluon.jit(do_not_specialize=["T", "max_len", "num_pages"],
           do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr", "num_tokens_ptr"])
def _norm_qkv_streamed_kernel(
    boxes, x_ptr, squares_ptr, scale_ptr, bias_ptr, positions_ptr, cos_sin_ptr, slot_mapping_ptr, k_cache_ptr, v_cache_ptr, q_out_ptr, partials_ptr,
    counters_ptr, num_tokens_ptr,
    T, max_len, num_pages, eps,
    stride_xt, stride_kcn, stride_kcp, stride_kch, stride_vcn, stride_vcp, stride_vch, stride_qot, stride_qoh,
    H: gl.constexpr, KV: gl.constexpr, PAGE_SIZE: gl.constexpr, PARTS: gl.constexpr, C: gl.constexpr,
):
    """For heads of 128 dimensions that are all rotated, without norms of their own: a tile is a head."""
    buffers, barriers = rings(boxes, x_ptr, C)
    head, split = gl.program_id(0) // C.SPLITS, gl.program_id(0) % C.SPLITS
    first_row, second_row = head * C.BLOCK_N, head * C.BLOCK_N + C.BLOCK_N // 2
    strides = (stride_kcn, stride_kcp, stride_kch, stride_vcn, stride_vcp, stride_vch, stride_qot, stride_qoh)
    gl.warp_specialize([
        (_multiply_qkv, (head, split, first_row, second_row, buffers, barriers, squares_ptr, scale_ptr, bias_ptr, positions_ptr, cos_sin_ptr,
                         slot_mapping_ptr, k_cache_ptr, v_cache_ptr, q_out_ptr, partials_ptr, counters_ptr, num_tokens_ptr, T, max_len, num_pages,
                         eps, strides, H, KV, PAGE_SIZE, PARTS, C)),
        (fetch_weight, (boxes, first_row, second_row, split, buffers, barriers, C)),
        (fetch_rest, (x_ptr, scale_ptr, T, stride_xt, first_row, second_row, split, buffers, barriers, C)),
    ], [1, 1], FETCHING_REGISTERS)
