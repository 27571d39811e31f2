"""The product of few rows with a converted weight, fp8 or int4, on Hopper: one warp of a program fetches the weight, one fetches x and constants, and
four convert and multiply.

In one loop for everything, warps copy, convert and wait by turns: 8B's gate_up in int4 takes 23.5 us where its floor is 14. Here hardware copies
the weight by itself, before the node ahead has ended, since no node writes weights; two programs share a multiprocessor. The arithmetic is that of
`_product`: same splits, same order, same instructions, so the bits are the same too. Triton's own language gives warps kinds only around one loop
without dots of operands that it converts, so this is Gluon; device functions of `_product` and `_quantized` serve both languages.

Barriers, one of each a stage: `full`, where multiplying warps wait for a weight's tile, x and constants; `empty`, where both fetching warps wait
until these have been multiplied.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, mma_v2, tma
from triton.language.extra import cuda

from ._quantized import fp8_tile, int4_tile

WARPS = gl.constexpr(4)               # that multiply
FETCHING_REGISTERS = gl.constexpr((40, 96))       # a thread, of the warp that fetches the weight and of the one that fetches the rest


@gluon.constexpr_function
def _groups(C):
    """Of columns that share a constant, in a step."""
    return C.BLOCK_K // C.GROUP if 0 < C.GROUP < C.BLOCK_K else 1


@gluon.jit
def rings(weight_box, x_ptr, C: gl.constexpr):
    """Shared memory of a program: (weight, constants, x), a tile a stage, x in slices of what one dot multiplies; and its barriers (full, empty)."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    STAGES: gl.constexpr = C.num_stages
    SLICE: gl.constexpr = 32 if C.KIND == "int4" else C.BLOCK_K
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    constant: gl.constexpr = gl.int32 if C.KIND == "int4" else gl.float32
    weights = gl.allocate_shared_memory(weight_box.dtype, [STAGES, C.BLOCK_N, 128 * 8 // weight_box.dtype.primitive_bitwidth], weight_box.layout)
    constants = gl.allocate_shared_memory(constant, [STAGES, _groups(C) * C.BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    xs = gl.allocate_shared_memory(dtype, [STAGES * (C.BLOCK_K // SLICE), C.BLOCK_M, SLICE],
                                   gl.NVMMASharedLayout.get_default_for([C.BLOCK_M, SLICE], dtype))
    full, empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER), gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=33)                                # the weight's bytes, and each thread that fetches the rest
        mbarrier.init(empty.index(stage), count=1)
    return (weights, constants, xs), (full, empty)


@gluon.jit
def fetch_weight(weight_box, first_row, second_row, split, buffers, barriers, C: gl.constexpr):
    """The weight's tiles: BLOCK_N / 2 rows from first_row on, and as many from second_row on."""
    weights, _, _ = buffers
    full, empty = barriers
    COLUMNS: gl.constexpr = weights.shape[2]
    HALF: gl.constexpr = C.BLOCK_N // 2
    for step in range(C.STEPS):
        stage, column = step % C.num_stages, (split * C.STEPS + step) * COLUMNS
        mbarrier.wait(empty.index(stage), (step // C.num_stages + 1) & 1)
        mbarrier.expect(full.index(stage), C.BLOCK_N * 128)
        tma.async_copy_global_to_shared(weight_box, [first_row, column], full.index(stage), weights.index(stage).slice(0, HALF))
        tma.async_copy_global_to_shared(weight_box, [second_row, column], full.index(stage), weights.index(stage).slice(HALF, HALF))


@gluon.jit
def fetch_rest(x_ptr, scale_ptr, T, stride_xt, first_row, second_row, split, buffers, barriers, C: gl.constexpr):
    """x, zeros past T, and the constants of the tiles' rows. Waits for the node before."""
    _, constants, xs = buffers
    full, empty = barriers
    HALF: gl.constexpr = C.BLOCK_N // 2
    SLICE: gl.constexpr = xs.shape[2]
    SLICES: gl.constexpr = C.BLOCK_K // SLICE
    GROUPS: gl.constexpr = _groups(C)
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // SLICE, SLICE // 8], [1, 1], [1, 0])
    ROWS: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    m, k, n = gl.arange(0, C.BLOCK_M, gl.SliceLayout(1, TILE)), gl.arange(0, SLICE, gl.SliceLayout(0, TILE)), gl.arange(0, HALF, ROWS)
    x = x_ptr + tl.multiple_of(m.to(gl.int64) * stride_xt, 8)[:, None] + (split * (C.STEPS * C.BLOCK_K) + k)[None, :]
    live = (m < T)[:, None] & (k >= 0)[None, :]
    cuda.gdc_wait()
    for step in range(C.STEPS):
        stage, first_k = step % C.num_stages, (split * C.STEPS + step) * C.BLOCK_K
        mbarrier.wait(empty.index(stage), (step // C.num_stages + 1) & 1)
        for i in gl.static_range(SLICES):
            async_copy.async_copy_global_to_shared(xs.index(stage * SLICES + i), x + (step * C.BLOCK_K + i * SLICE), live)
        ring = constants.index(stage)
        if C.KIND == "int4":
            for j in gl.static_range(GROUPS):
                group = scale_ptr + (first_k // C.GROUP + j) * C.N
                async_copy.async_copy_global_to_shared(ring.slice(j * C.BLOCK_N, HALF), group + tl.multiple_of(first_row, HALF) + n)
                async_copy.async_copy_global_to_shared(ring.slice(j * C.BLOCK_N + HALF, HALF), group + tl.multiple_of(second_row, HALF) + n)
        elif C.KIND == "fp8 block":
            block = scale_ptr + first_k // 128
            async_copy.async_copy_global_to_shared(ring.slice(0, HALF), block + (first_row + n) // 128 * (C.K // 128))
            async_copy.async_copy_global_to_shared(ring.slice(HALF, HALF), block + (second_row + n) // 128 * (C.K // 128))
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
    async_copy.wait_group(0)


@gluon.constexpr_function
def sums_layout():
    """Of the sums [BLOCK_N, BLOCK_M]. A half's rows are a thread's own, so that halves meet without an exchange."""
    return gl.NVMMADistributedLayout([2, 0], [WARPS.value, 1], [16, 8])


@gluon.jit
def streamed_sums(scale_ptr, rows, buffers, barriers, C: gl.constexpr):
    """The split's products [BLOCK_N, BLOCK_M]; rows [BLOCK_N]: the tile's weight rows."""
    weights, constants, xs = buffers
    full, empty = barriers
    SUMS: gl.constexpr = sums_layout()
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2 if C.KIND == "int4" else 4)      # neighbours a thread loads at once: as Triton has it
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2 if C.KIND == "int4" else 4)
    GROUPS: gl.constexpr = _groups(C)
    NIBBLES: gl.constexpr = 8 // GROUPS
    zeros = gl.full([C.BLOCK_N, C.BLOCK_M], 0.0, gl.float32, SUMS)
    acc = zeros
    if C.KIND == "fp8 row":
        scale = tl.load(scale_ptr + rows)
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
                    x = xs.index(stage * 8 + j * NIBBLES + i).permute((1, 0)).load(RIGHT)
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
