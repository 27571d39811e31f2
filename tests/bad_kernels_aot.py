"""Kernels that break a rule of compilation, one each; tests/test_aot.py must catch them. The same face as tests/calls.py."""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda


@triton.jit
def _specialised_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, 1.0, offs < n)


@triton.jit
def _specialised_stride_kernel(table_ptr, stride_tr, BLOCK: tl.constexpr):
    tl.store(table_ptr + tl.program_id(0) * stride_tr, 1)


@triton.jit(do_not_specialize=["n"])
def _specialised_alignment_kernel(count_ptr, x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, 1.0, offs < tl.minimum(tl.load(count_ptr), n))


@triton.jit(do_not_specialize=["n"])
def _scalar_loads_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs, offs < n) * 2, offs < n)


@triton.jit
def _spilling_kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.debug_barrier()
    tl.store(x_ptr + offs, x * tl.sum(x))


@triton.jit
def _greedy_for_shared_memory_kernel(x_ptr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    for i in range(8):
        tile = tl.load(x_ptr + (i * BLOCK + rows) * BLOCK + columns)
        tl.store(x_ptr + rows * BLOCK + columns, tl.dot(tile, tl.trans(tile)).to(x_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def _dropping_kernel(x_ptr, weight_ptr, out_ptr, T, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m, offs_n, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    live, acc = offs_m < T, tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        weight = tl.load(weight_ptr + offs_n[:, None] * K + k + offs_k[None, :])
        x = tl.load(x_ptr + offs_m[:, None] * K + k + offs_k[None, :], live[:, None], other=0.0)
        acc = tl.dot(weight, x.T, acc)
    acc = tl.where(live[None, :], acc, 0.0)
    tl.store(out_ptr + offs_m[None, :] * BLOCK_N + offs_n[:, None], acc, live[None, :])


@triton.jit
def _early_kernel(x_ptr, MODE: tl.constexpr):
    x = x_ptr + tl.program_id(0)
    if MODE == "good":
        cuda.gdc_wait()
    early = 1.0
    if MODE == "load":
        early = tl.load(x)
    if MODE == "hint" or MODE == "unused":
        hint = tl.load(x, cache_modifier=".cg")
        line = (x + hint.to(tl.int32)).to(tl.int64)
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1)
        if MODE == "hint":
            early = hint
    if MODE == "branch":
        if tl.program_id(0) > 0:
            cuda.gdc_wait()
    elif MODE != "none" and MODE != "good":
        cuda.gdc_wait()
    tl.store(x, tl.load(x) + early)


@gluon.jit
def _store_early(x, MODE: gl.constexpr):
    early = 0.0
    if MODE == "half hint":
        early = tl.load(x, cache_modifier=".cg")
    if MODE == "half unused":
        tl.load(x, cache_modifier=".cg")
    if MODE != "one half waits":
        cuda.gdc_wait()
    tl.store(x, 1.0 + early)


@gluon.jit
def _store_late(x):
    cuda.gdc_wait()
    tl.store(x, 2.0)


@gluon.jit
def _early_half_kernel(x_ptr, MODE: gl.constexpr):
    gl.warp_specialize([(_store_late, (x_ptr,)), (_store_early, (x_ptr + 1, MODE))], [1], [24])


@gluon.jit
def _copy(boxes, to, MODE: gl.constexpr, name: gl.constexpr):
    barrier = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier.index(0), count=1)
    if MODE != name:
        cuda.gdc_wait()
    mbarrier.expect(barrier.index(0), 16 * 128)
    tma.async_copy_global_to_shared(boxes, [0, 0], barrier.index(0), to)
    mbarrier.wait(barrier.index(0), 0)
    cuda.gdc_wait()


@gluon.jit
def _copying_streamed_kernel(first_boxes, second_boxes, MODE: gl.constexpr):
    first = gl.allocate_shared_memory(first_boxes.dtype, first_boxes.block_shape, first_boxes.layout)
    second = gl.allocate_shared_memory(second_boxes.dtype, second_boxes.block_shape, second_boxes.layout)
    gl.warp_specialize([(_copy, (first_boxes, first, MODE, "first")), (_copy, (second_boxes, second, MODE, "second"))], [1], [24])


@gluon.jit
def _store_beside(x, MODE: gl.constexpr):
    if MODE != "no fence":
        tl.inline_asm_elementwise("fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(x, 2.0)
    if MODE != "no end":
        if tl.program_id(0) + 1 == tl.num_programs(0):
            cuda.gdc_wait()
            cuda.gdc_launch_dependents()


@gluon.jit
def _following_kernel(x_ptr, MODE: gl.constexpr, WAITS: gl.constexpr):
    gl.warp_specialize([(_store_beside, (x_ptr, MODE)), (_store_beside, (x_ptr + 1, "no end"))], [1], [24])


def fill(x):
    _specialised_kernel[(1,)](x, x.shape[0], BLOCK=64)


def fill_table(table):
    _specialised_stride_kernel[(table.shape[0],)](table, table.stride(0), BLOCK=64)


def fill_live(count, x):
    _specialised_alignment_kernel[(1,)](count, x, x.shape[0], BLOCK=64)


def double(x):
    _scalar_loads_kernel[(1,)](x, x.shape[0], BLOCK=1024)


def scale(x):
    _spilling_kernel[(1,)](x, BLOCK=16384, num_warps=1)


def square(x):
    _greedy_for_shared_memory_kernel[(1,)](x, BLOCK=256, num_warps=8)


def product(x, weight, out):
    _dropping_kernel[(1,)](x, weight, out, x.shape[0], K=2048, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=4)


def overlap(x, mode):
    _early_kernel[(4,)](x, MODE=mode, launch_pdl=True)


def overlap_halves(x, mode):
    _early_half_kernel[(4,)](x, MODE=mode, launch_pdl=True)


def copy(x, mode):
    boxes = TensorDescriptor(x, [16384 // 32, 32], [32, 1], [16, 32], gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
    _copying_streamed_kernel[(1,)](boxes, boxes, MODE=mode, launch_pdl=True)


def follow(x, mode):
    _following_kernel[(4,)](x, MODE=mode, WAITS="last", launch_pdl=True)


def all_calls(device, dtypes=(torch.float32,)):
    for dtype in dtypes:
        x = torch.zeros(16384, dtype=dtype, device=device)
        yield "specialised", fill, (x,)
        yield "stride", fill_table, (torch.zeros(4, 8, dtype=torch.int32, device=device),)
        yield "alignment", fill_live, (torch.ones(1, dtype=torch.int32, device=device), x)
        yield "scalar loads", double, (x,)
        yield "spilling", scale, (x,)
        yield "shared", square, (x,)
        yield "dropped", product, (x[:8192].view(4, 2048), torch.zeros(64, 2048, dtype=dtype, device=device), torch.zeros(4, 64, device=device))
        for mode in ("good", "load", "hint", "unused", "branch", "none"):
            yield f"overlap {mode}", overlap, (x, mode)
        for mode in ("halves wait", "one half waits", "half unused", "half hint"):
            yield f"overlap {mode}", overlap_halves, (x, mode)
        for mode in ("good", "first", "second"):
            yield f"copying {mode}", copy, (x, mode)
        for mode in ("good", "no fence", "no end"):
            yield f"following {mode}", follow, (x, mode)
