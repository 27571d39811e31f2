"""The product of few rows with a weight on Hopper: one warp of a program fetches the weight, one fetches x and the constants of a converted weight,
fp8 or int4, and four multiply, what is converted in registers.

In one loop for everything, warps copy, convert and wait by turns: 8B's gate_up in int4 takes 23.5 us where its floor is 14. Here hardware copies
the weight by itself, before the node ahead has ended, since no node writes weights. The arithmetic is that of `_product`: same splits, same order,
same instructions, so the bits are the same too. Triton's own language gives warps kinds only around one loop without dots of operands that it
converts, so this is Gluon; device functions of `_product` and `_quantized` serve both languages.

Barriers, one of each a stage: `full`, where multiplying warps wait for a weight's tile, x and constants; `empty`, where both fetching warps wait
until these have been multiplied.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, mma_v2, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra import cuda

from ._quantized import fp8_tile, int4_tile

WARPS = gl.constexpr(4)                           # that multiply
FETCHING_REGISTERS = gl.constexpr((40, 40))       # a thread of the others


@gluon.constexpr_function
def _groups(C):
    """Of columns that share a constant, in a step."""
    return C.BLOCK_K // C.GROUP if 0 < C.GROUP < C.BLOCK_K else 1


@gluon.constexpr_function
def _has_constants(C):
    return C.KIND in ("int4", "fp8 block")


@gluon.jit
def rings(weight_boxes, x_boxes, C: gl.constexpr):
    """Shared memory of a program: (weight, constants, x), a tile a stage, x in slices of what one dot multiplies, one below the other; and its
    barriers (full, empty)."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    STAGES: gl.constexpr = C.num_stages
    SLICE: gl.constexpr = x_boxes.block_shape[-1]
    SLICES: gl.constexpr = C.BLOCK_K // SLICE
    constant: gl.constexpr = gl.int32 if C.KIND == "int4" else gl.float32
    weights = gl.allocate_shared_memory(weight_boxes.dtype, [STAGES, C.BLOCK_N, weight_boxes.block_shape[1]], weight_boxes.layout)
    constants = gl.allocate_shared_memory(constant, [STAGES, _groups(C) * C.BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    xs = gl.allocate_shared_memory(x_boxes.dtype, [STAGES, SLICES * C.BLOCK_M, SLICE],
                                   gl.NVMMASharedLayout.get_default_for([SLICES * C.BLOCK_M, SLICE], x_boxes.dtype))
    full, empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER), gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=34 if _has_constants(C) else 2)       # the weight's bytes, x's, and each thread that fetches constants
        mbarrier.init(empty.index(stage), count=1)
    return (weights, constants, xs), (full, empty)


@gluon.jit
def fetch_weight(weight_boxes, first_row, second_row, split, buffers, barriers, C: gl.constexpr):
    """The weight's tiles: BLOCK_N / 2 rows from first_row on, and as many from second_row on."""
    weights, _, _ = buffers
    full, empty = barriers
    COLUMNS: gl.constexpr = weights.shape[2]
    HALF: gl.constexpr = C.BLOCK_N // 2
    for step in range(C.STEPS):
        stage, column = step % C.num_stages, (split * C.STEPS + step) * COLUMNS
        mbarrier.wait(empty.index(stage), (step // C.num_stages + 1) & 1)
        mbarrier.expect(full.index(stage), C.BLOCK_N * 128)
        tma.async_copy_global_to_shared(weight_boxes, [first_row, column], full.index(stage), weights.index(stage).slice(0, HALF))
        tma.async_copy_global_to_shared(weight_boxes, [second_row, column], full.index(stage), weights.index(stage).slice(HALF, HALF))


@gluon.jit
def fetch_rest(x_boxes, scale_ptr, first_row, second_row, split, buffers, barriers, C: gl.constexpr):
    """x, zeros past its rows, and the constants of the tiles' rows. Waits for the node before."""
    _, constants, xs = buffers
    full, empty = barriers
    HALF: gl.constexpr = C.BLOCK_N // 2
    GROUPS: gl.constexpr = _groups(C)
    n = gl.arange(0, HALF, gl.BlockedLayout([2], [32], [1], [0]))
    cuda.gdc_wait()
    for step in range(C.STEPS):
        stage, step_of_all = step % C.num_stages, split * C.STEPS + step
        mbarrier.wait(empty.index(stage), (step // C.num_stages + 1) & 1)
        mbarrier.expect(full.index(stage), C.BLOCK_M * C.BLOCK_K * (x_boxes.dtype.primitive_bitwidth // 8))
        ring, first_k = constants.index(stage), step_of_all * C.BLOCK_K
        if C.KIND == "int4":
            slices = xs.index(stage)._reinterpret(x_boxes.dtype, x_boxes.block_shape, x_boxes.layout)
            tma.async_copy_global_to_shared(x_boxes, [step_of_all * x_boxes.block_shape[0], 0, 0], full.index(stage), slices)
            for j in gl.static_range(GROUPS):
                group = scale_ptr + (first_k // C.GROUP + j) * C.N
                async_copy.async_copy_global_to_shared(ring.slice(j * C.BLOCK_N, HALF), group + tl.multiple_of(first_row, HALF) + n)
                async_copy.async_copy_global_to_shared(ring.slice(j * C.BLOCK_N + HALF, HALF), group + tl.multiple_of(second_row, HALF) + n)
        else:
            tma.async_copy_global_to_shared(x_boxes, [0, first_k], full.index(stage), xs.index(stage))
            if C.KIND == "fp8 block":
                block = scale_ptr + first_k // 128
                async_copy.async_copy_global_to_shared(ring.slice(0, HALF), block + (first_row + n) // 128 * (C.K // 128))
                async_copy.async_copy_global_to_shared(ring.slice(HALF, HALF), block + (second_row + n) // 128 * (C.K // 128))
        if _has_constants(C):
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
    async_copy.wait_group(0)


@gluon.constexpr_function
def sums_layout(C):
    """Of the sums [BLOCK_N, BLOCK_M]. A half's rows are a thread's own, so that halves meet without an exchange."""
    return _layout(C.KIND, 64, C.BLOCK_M)


@gluon.constexpr_function
def half_layout(C):
    """Of a half of them [BLOCK_N / 2, BLOCK_M]."""
    return _layout(C.KIND, 32, C.BLOCK_M)


@gluon.constexpr_function
def _layout(kind, rows, columns):
    if kind != "plain":
        return gl.NVMMADistributedLayout([2, 0], [WARPS.value, 1], [16, 8])
    # Eight rows in a piece a thread, which are one store, and of 64 the same eight of both halves; four threads share a column
    bits = [[0, 1 << b] for b in range(columns.bit_length() - 1)]
    threads, own = [[8, 0], [16, 0], *bits[:5]] + [[0, 0]] * (5 - len(bits)), [[1, 0], [2, 0], [4, 0], [32, 0]][:rows.bit_length() - 3]
    return gl.DistributedLinearLayout(own + bits[5:], threads[:5], threads[5:], [], [rows, columns])


@gluon.jit
def weight_rows(first_row, second_row, C: gl.constexpr):
    """Of a tile [BLOCK_N], whose halves need not lie in one piece."""
    n = gl.arange(0, C.BLOCK_N, gl.SliceLayout(1, sums_layout(C)))
    return tl.where(n < C.BLOCK_N // 2, first_row + n, second_row + n - C.BLOCK_N // 2)


@gluon.jit
def streamed_sums(scale_ptr, first_row, second_row, zero, buffers, barriers, C: gl.constexpr):
    """The split's products [BLOCK_N, BLOCK_M] of the weight rows of `fetch_weight`; zero: as in `_product.sums`."""
    if C.KIND == "plain":
        return _plain_sums(zero, buffers, barriers, C)
    else:
        return _converted_sums(scale_ptr, first_row, second_row, buffers, barriers, C)


@gluon.jit
def _plain_sums(zero, buffers, barriers, C: gl.constexpr):
    weights, _, xs = buffers
    full, empty = barriers
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, C.BLOCK_M, 16])
    acc = gl.full([C.BLOCK_N, C.BLOCK_M], 0.0, gl.float32, PRODUCT) + zero
    for step in range(C.STEPS):
        stage = step % C.num_stages
        mbarrier.wait(full.index(stage), step // C.num_stages & 1)
        sums = warpgroup_mma(weights.index(stage), xs.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [sums])
        mbarrier.arrive(empty.index(stage), count=1)
    return gl.convert_layout(acc, sums_layout(C))


@gluon.jit
def _converted_sums(scale_ptr, first_row, second_row, buffers, barriers, C: gl.constexpr):
    weights, constants, xs = buffers
    full, empty = barriers
    SUMS: gl.constexpr = sums_layout(C)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2 if C.KIND == "int4" else 4)      # neighbours a thread loads at once: as Triton has it
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2 if C.KIND == "int4" else 4)
    GROUPS: gl.constexpr = _groups(C)
    NIBBLES: gl.constexpr = 8 // GROUPS
    zeros = gl.full([C.BLOCK_N, C.BLOCK_M], 0.0, gl.float32, SUMS)
    acc = zeros
    if C.KIND == "fp8 row":
        scale = tl.load(scale_ptr + weight_rows(first_row, second_row, C))
    for step in range(C.STEPS):
        stage = step % C.num_stages
        mbarrier.wait(full.index(stage), step // C.num_stages & 1)
        weight, ring = weights.index(stage).load(LEFT), constants.index(stage)
        if C.KIND == "int4":
            parts = ()
            for _ in gl.static_range(GROUPS):
                parts += (zeros,)                                                  # type: ignore[assignment]
            for i in tl.static_range(NIBBLES):                                     # group by group in turns: one's products wait for no other's
                sums = ()
                for j in tl.static_range(GROUPS):
                    constant = ring.slice(j * C.BLOCK_N, C.BLOCK_N).load(gl.SliceLayout(1, LEFT))
                    x = xs.index(stage).slice((j * NIBBLES + i) * C.BLOCK_M, C.BLOCK_M).permute((1, 0)).load(RIGHT)
                    tile = int4_tile(weight, constant & 31, x, j * NIBBLES + i, C)
                    sums += (mma_v2(tile, x, parts[j]),)                           # type: ignore[assignment]
                parts = sums
            for j in tl.static_range(GROUPS):
                constant = ring.slice(j * C.BLOCK_N, C.BLOCK_N).load(gl.SliceLayout(1, SUMS))
                acc = tl.fma(parts[j], tl.broadcast_to((constant & -32).to(gl.float32, bitcast=True)[:, None], acc.shape), acc)
        else:
            x = xs.index(stage).permute((1, 0)).load(RIGHT)
            if C.KIND == "fp8 row":
                acc = mma_v2(fp8_tile(weight, x), x, acc)
            else:
                part = mma_v2(fp8_tile(weight, x), x, zeros)
                scale = ring.slice(0, C.BLOCK_N).load(gl.SliceLayout(1, SUMS))
                acc = tl.fma(part, tl.broadcast_to(scale[:, None], part.shape), acc)
        mbarrier.arrive(empty.index(stage), count=1)
    if C.KIND == "fp8 row":
        acc *= scale[:, None]
    return acc
