"""Linear over quantised weights:  out = x @ W.T + bias, where W stays in fp8 or int4 and every product is with its exact value.

x [T, K] with any row stride, bias [N] or None -> out [T, N] in x's dtype, or float32 (logits). float32 sums, one cast.
  fp8   weight float8_e4m3fn [N, K]; scale float32 [N], one a row, or [ceil(N / 128), ceil(K / 128)], one a block: W = weight * scale
  int4  weight int32 [N, ceil(K / 256) * 32], scales int32 [K / G, N], both from `pack_gptq` or `pack_awq`: W = (q - zero) * scale of the group.
        G is 32, 64, 128, a multiple of 256, or K
Weights become x's dtype in registers, without rounding, and are multiplied there; scales meet float32 sums: a row's once at the end, a block's
after each 128 columns, a group's after each G, at most 256. x itself is never quantised. fp8 needs a GPU that converts it, capability 8.9 or later.
Graph-safe: the grid and the tiles depend on T, N and K only; rows at or past num_tokens[0] are written as zeros and change nothing.
Batch-invariant for any T: one program sums over K in one order, fixed by (N, K, dtype), so a row's bits are the same for any T, tile, place
and neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from ._int4 import BLOCK, WORDS, check_group, pack_awq, pack_gptq

SCALE_BLOCK = 128         # rows and columns that share a scale of fp8
MULTIPROCESSORS = 132     # of the H200: fewer programs than this leave read bandwidth idle
SHARED_BYTES = 64 << 10   # of stages: what AMD gives a program; on Hopper three such programs share a multiprocessor
FLOAT8 = torch.float8_e4m3fn

__all__ = ["check_fp8", "linear_fp8", "linear_fp8_out", "linear_int4", "linear_int4_out", "pack_awq", "pack_gptq"]


@triton.jit
def _fp8_sums(x_tile, weight_ptr, scale_ptr, pid_n, mask_live, acc, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
              STAGES: tl.constexpr, EVEN: tl.constexpr, HAS_BLOCKS: tl.constexpr):
    """acc [BLOCK_N, BLOCK_M] and the sums of K products; with a scale a row, that is yet to come."""
    offs_n, offs_k = pid_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    weight_tile = weight_ptr + pid_n.to(tl.int64) * BLOCK_N * K + (tl.arange(0, BLOCK_N)[:, None] * K + offs_k[None, :])
    scale_rows = scale_ptr + offs_n // 128 * tl.cdiv(K, 128)              # a vector, so that scales are fetched ahead like the tiles
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN:
            weight = tl.load(weight_tile + k, eviction_policy="evict_first")
            x = tl.load(x_tile + k + offs_k[None, :], mask_live[:, None], other=0.0)
        else:
            mask_k = (k + offs_k < K)[None, :]
            weight = tl.load(weight_tile + k, (offs_n < N)[:, None] & mask_k, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_tile + k + offs_k[None, :], mask_live[:, None] & mask_k, other=0.0)
        weight = weight.to(tl.float16).to(tl.float32).to(x.dtype)          # exact; straight to bf16 it is an F2F an element, 16 a clock
        if HAS_BLOCKS:
            part = tl.dot(weight, x.T, input_precision="ieee")
            scale = tl.load(scale_rows + k // 128, offs_n < N, other=0.0)
            acc = tl.fma(part, tl.broadcast_to(scale[:, None], part.shape), acc)
        else:
            acc = tl.dot(weight, x.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _int4_tile(words, minus_zero, i: tl.constexpr, WORDS: tl.constexpr):
    """(q - zero) * 2^-22 [BLOCK_N, WORDS] of the i-th nibbles, exactly: as bits of a float32 a nibble is the subnormal q * 2^(shift - 149), so that
    an AND and a fused multiply-add make each value, where a conversion from integers would run at a quarter of the rate."""
    SHIFT: tl.constexpr = i % 4 * 4
    FACTOR: tl.constexpr = 2.0 ** (127 - SHIFT)
    bits = (words >> (i // 4 * 16)) & (15 << SHIFT)
    return tl.fma(bits.to(tl.float32, bitcast=True), tl.full(words.shape, FACTOR, tl.float32), tl.broadcast_to(minus_zero[:, None], words.shape))


@triton.jit
def _int4_sums(x_tile, weight_ptr, scale_ptr, pid_n, mask_live, acc, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr,
               BLOCK_N: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr):
    """acc [BLOCK_N, BLOCK_M] and the sums of K products."""
    BLOCK: tl.constexpr = 8 * WORDS
    GROUPS: tl.constexpr = max(BLOCK // GROUP, 1) if GROUP < K else 1                      # in a block of columns
    NIBBLES: tl.constexpr = 8 // GROUPS                                                    # of a word that belong to one group
    offs_n, offs_w = pid_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, WORDS)
    mask_n = offs_n < N
    weight_tile = weight_ptr + pid_n.to(tl.int64) * BLOCK_N * (tl.cdiv(K, BLOCK) * WORDS) + (
        tl.arange(0, BLOCK_N)[:, None] * (tl.cdiv(K, BLOCK) * WORDS) + offs_w[None, :])
    for block in tl.range(0, tl.cdiv(K, BLOCK), num_stages=STAGES):
        if EVEN:
            words = tl.load(weight_tile + block * WORDS, eviction_policy="evict_first")
        else:
            words = tl.load(weight_tile + block * WORDS, mask_n[:, None], other=0, eviction_policy="evict_first")
        for j in tl.static_range(GROUPS):
            group = (block * BLOCK + j * GROUP) // GROUP
            if EVEN:
                constant = tl.load(scale_ptr + group * N + offs_n)
            else:
                constant = tl.load(scale_ptr + group * N + offs_n, mask_n & (group * GROUP < K), other=0)
            scale = (constant & -32).to(tl.float32, bitcast=True) * 4194304.0               # 2^22
            minus_zero = (constant & 31).to(tl.float32, bitcast=True) * -1.7014118346046923e38   # 2^127
            part = tl.zeros(acc.shape, tl.float32)
            for i in tl.static_range(j * NIBBLES, (j + 1) * NIBBLES):
                k = block * BLOCK + i * WORDS + offs_w[None, :]
                if EVEN:
                    x = tl.load(x_tile + k, mask_live[:, None], other=0.0)
                else:
                    x = tl.load(x_tile + k, mask_live[:, None] & (k < K), other=0.0)
                part = tl.dot(_int4_tile(words, minus_zero, i, WORDS).to(x.dtype), x.T, part, input_precision="ieee")
            acc = tl.fma(part, tl.broadcast_to(scale[:, None], part.shape), acc)
    return acc


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _linear_quantized_kernel(
    x_ptr,             # [T, K]
    weight_ptr,        # float8 [N, K], or int32 [N, ceil(K / 256) * 32]
    scale_ptr,         # float32 [N] or [ceil(N / 128), ceil(K / 128)]; or int32 [K / GROUP, N]
    bias_ptr,          # [N]; None without a bias
    out_ptr,           # [T, N]
    num_tokens_ptr,    # [1] int32; None when every row is live
    T, stride_xt, stride_ot,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, IS_INT4: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
):
    num_m = tl.cdiv(T, BLOCK_M)
    pid_m, pid_n = tl.program_id(0) % num_m, tl.program_id(0) // num_m     # row tiles of one weight tile are neighbours: L2 holds it
    offs_m, offs_n = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # [BLOCK_N, BLOCK_M]: weights are the M operand of the dot, because 64 of their rows fill it and 1 token does not
    out = out_ptr + offs_m.to(tl.int64)[None, :] * stride_ot + offs_n[:, None]
    mask_out = (offs_n < N)[:, None] & (offs_m < T)[None, :]
    live = T
    if HAS_NUM_TOKENS:
        live = tl.minimum(tl.load(num_tokens_ptr), T)
        if pid_m * BLOCK_M >= live:
            tl.store(out, tl.zeros((BLOCK_N, BLOCK_M), out_ptr.dtype.element_ty), mask_out)
            return
    mask_live = offs_m < live
    x_tile = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xt
    # A zero that the assembler cannot know: ptxas 12.8 drops wgmma products whose sums start at 0 and meet a select with 0, as below
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32) + (T >> 31).to(tl.float32)
    if IS_INT4:
        acc = _int4_sums(x_tile, weight_ptr, scale_ptr, pid_n, mask_live, acc, N, K, GROUP, WORDS, BLOCK_N, STAGES, EVEN)
    else:
        acc = _fp8_sums(x_tile, weight_ptr, scale_ptr, pid_n, mask_live, acc, N, K, BLOCK_N, BLOCK_K, STAGES, EVEN, HAS_BLOCKS)
        if not HAS_BLOCKS:
            acc *= tl.load(scale_ptr + offs_n, offs_n < N, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, offs_n < N, other=0.0).to(tl.float32)[:, None]
    acc = tl.where(mask_live[None, :], acc, 0.0)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask_out)


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    maxnreg: int | None      # registers a thread. Left to itself, ptxas spills 8 bytes at 72 of them to fit programs that never come


def config(T: int, N: int, K: int, dtype: torch.dtype, group: int = 0) -> Config:
    """For fp8, or for int4 in groups of `group` columns. BLOCK_N and BLOCK_K ignore T, which is what keeps rows bitwise the same; the rest
    changes no bit."""
    if dtype == torch.float32:   # no tensor cores: small tiles keep the fused multiply-adds in registers, and few warps let ptxas give them enough
        BLOCK_N, widest_m, BLOCK_K, num_warps = (16, 16, 32, 2) if group else (32, 32, 32, 4)
    else:
        enough = {64: MULTIPROCESSORS, 32: 96}      # programs, as in linear
        BLOCK_N, BLOCK_K, num_warps = next((b for b in enough if triton.cdiv(N, b) >= enough[b]), 16), SCALE_BLOCK, 4
        widest_m = 32 if 0 < group < 128 else 64    # sums of several groups at once: 64 rows spill 424 bytes on sm_80
    BLOCK_M = min(max(triton.next_power_of_2(T), 16), widest_m)
    stage_bytes = BLOCK * (BLOCK_M * dtype.itemsize + BLOCK_N // 2) if group else BLOCK_K * (BLOCK_M * dtype.itemsize + BLOCK_N)
    has_limit = dtype != torch.float32 and not _check.INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "cuda"
    return Config(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, min(max(SHARED_BYTES // stage_bytes, 2), 6), 255 if has_limit else None)


def interpreter_config(T: int, N: int, K: int, dtype: torch.dtype, group: int = 0) -> Config:
    """The CPU interpreter pays 0.1 ms an operation whatever its size: few tiles, each as large as may be."""
    return Config(min(max(triton.next_power_of_2(T), 16), 64), min(max(triton.next_power_of_2(N), 16), 1024), SCALE_BLOCK, 4, 1, None)


def _launch(x, weight, scale, out, bias, num_tokens, group=0):
    """Runs the kernel; `group` is int4's number of columns a scale, 0 for fp8."""
    (T, K), N = x.shape, weight.shape[0]
    if T == 0:
        return
    c = (interpreter_config if _check.INTERPRETED else config)(T, N, K, x.dtype, group)
    _linear_quantized_kernel[(triton.cdiv(T, c.BLOCK_M) * triton.cdiv(N, c.BLOCK_N),)](
        x, weight, scale, bias, out, num_tokens, T, x.stride(0), out.stride(0),
        N=N, K=K, GROUP=group, WORDS=WORDS, BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, STAGES=c.num_stages,
        EVEN=N % c.BLOCK_N == 0 and K % (BLOCK if group else c.BLOCK_K) == 0, IS_INT4=group > 0, HAS_BLOCKS=scale.dim() == 2 and not group,
        HAS_BIAS=bias is not None, HAS_NUM_TOKENS=num_tokens is not None, num_warps=c.num_warps, num_stages=c.num_stages,
        **({} if c.maxnreg is None else {"maxnreg": c.maxnreg}))     # AMD's compiler knows no such option


def _check_rows(op, x, N, out, bias, num_tokens):
    _check.tensor(op, "out", out, (x.shape[0], N), tuple(dict.fromkeys((x.dtype, torch.float32))), x.device, writes=True)
    if bias is not None:
        _check.tensor(op, "bias", bias, (N,), (x.dtype,), x.device)
    _check.counter(op, "num_tokens", num_tokens, x.device)


def linear_fp8_out(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None,
                   num_tokens: torch.Tensor | None = None) -> None:
    """Writes x @ W.T + bias to `out`, which must not overlap `x`. Shapes: see the module. Raises ValueError or TypeError."""
    op = "linear_fp8"
    _check.tensor(op, "x", x, (None, None), _check.FLOATS)
    K = x.shape[1]
    _check.tensor(op, "weight", weight, (None, K), (FLOAT8,), x.device, dense=2)
    N = weight.shape[0]
    _check.require(K >= 1 and N >= 1, op, "weight", f"shape [{N}, {K}]", "at least one row and one column")
    _check_scale(op, scale, N, K, x.device)
    _check_rows(op, x, N, out, bias, num_tokens)
    _launch(x, weight, scale, out, bias, num_tokens)


def linear_fp8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None,
               num_tokens: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns x @ W.T + bias in x's dtype, or in `dtype`; rows at or past num_tokens[0] are zeros."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype, device=x.device)
    linear_fp8_out(x, weight, scale, out, bias, num_tokens)
    return out


def linear_int4_out(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None,
                    num_tokens: torch.Tensor | None = None) -> None:
    """Writes x @ W.T + bias to `out`, which must not overlap `x`. Shapes: see the module. Raises ValueError or TypeError."""
    op = "linear_int4"
    _check.tensor(op, "x", x, (None, None), _check.FLOATS)
    K = x.shape[1]
    _check.tensor(op, "weight", weight, (None, triton.cdiv(K, BLOCK) * WORDS), (torch.int32,), x.device, dense=2)
    N = weight.shape[0]
    _check.require(K >= 1 and N >= 1, op, "weight", f"shape [{N}, {weight.shape[1]}]", "at least one row and one column")
    _check.tensor(op, "scales", scales, (None, N), (torch.int32,), x.device, dense=2)
    group = check_group(op, K, scales.shape[0])
    _check_rows(op, x, N, out, bias, num_tokens)
    _launch(x, weight, scales, out, bias, num_tokens, group)


def linear_int4(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None,
                num_tokens: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns x @ W.T + bias in x's dtype, or in `dtype`; rows at or past num_tokens[0] are zeros."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype, device=x.device)
    linear_int4_out(x, weight, scales, out, bias, num_tokens)
    return out


def _check_scale(op, scale, N, K, device):
    blocks = -(-N // SCALE_BLOCK), -(-K // SCALE_BLOCK)
    _check.require(scale is not None, op, "scale", None, f"float32 [{N}] or [{blocks[0]}, {blocks[1]}]")
    _check.tensor(op, "scale", scale, blocks if scale.dim() == 2 else (N,), (torch.float32,), device, dense=scale.dim())


def check_fp8(weight: torch.Tensor, scale: torch.Tensor) -> None:
    """What a loader asks of an fp8 weight and its scale, once: shapes as in the module, finite contents, and a GPU that converts fp8. It waits for
    the device. Raises ValueError or TypeError."""
    op = "linear_fp8"
    _check.tensor(op, "weight", weight, (None, None), (FLOAT8,), dense=2)
    N, K = weight.shape
    _check_scale(op, scale, N, K, weight.device)
    _check.require(bool(scale.isfinite().all()), op, "scale", "NaN or infinity", "finite numbers; convert the checkpoint again")
    _check.require(bool((weight.view(torch.uint8) & 127 != 127).all()), op, "weight", "NaN", "finite numbers; convert the checkpoint again")
    if weight.is_cuda and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(weight.device)
        _check.require((major, minor) >= (8, 9), op, "weight", f"a GPU of capability {major}.{minor}", "8.9 or later, which converts float8_e4m3fn; "
                       "load the checkpoint in bfloat16")
