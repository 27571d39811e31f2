"""Linear:  out = x @ weight.T + bias.

x [T, K] with any row stride, weight [N, K], bias [N] or None -> out [T, N] in x's dtype, or float32 (logits). float32 sums, one cast.
Graph-safe: the path, the grid and the tiles depend on T, N and K only; rows at or past num_tokens[0] are written as zeros and change nothing.
Batch-invariant up to TRITON_TOKENS rows: one program sums over K in one order, fixed by (N, K, dtype), so a row's bits are the same for
any T, tile, place and neighbours. Above it torch multiplies, whose bits may depend on T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check

TRITON_TOKENS = 64        # above it cuBLAS is 1.2 to 4 times faster on the H200; below, this is level with it or faster at most shapes
MULTIPROCESSORS = 132     # of the H200: fewer programs than this leave read bandwidth idle
SHARED_BYTES = 96 << 10   # what every GPU since 2020 gives a block


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _linear_kernel(
    x_ptr,             # [T, K]
    weight_ptr,        # [N, K]
    bias_ptr,          # [N]; None without a bias
    out_ptr,           # [T, N]
    num_tokens_ptr,    # [1] int32; None when every row is live
    T, stride_xt, stride_ot,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NUM_TOKENS: tl.constexpr,
):
    num_m = tl.cdiv(T, BLOCK_M)
    pid_m, pid_n = tl.program_id(0) % num_m, tl.program_id(0) // num_m     # row tiles of one weight tile are neighbours: L2 holds it
    offs_m, offs_n, offs_k = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < T, offs_n < N
    # [BLOCK_N, BLOCK_M]: weights are the M operand of the dot, because 64 of their rows fill it and 1 token does not
    out = out_ptr + offs_m.to(tl.int64)[None, :] * stride_ot + offs_n[:, None]
    mask_out = mask_n[:, None] & mask_m[None, :]
    live = T
    if HAS_NUM_TOKENS:
        live = tl.minimum(tl.load(num_tokens_ptr), T)
        if pid_m * BLOCK_M >= live:
            tl.store(out, tl.zeros((BLOCK_N, BLOCK_M), out_ptr.dtype.element_ty), mask_out)
            return
    mask_live = offs_m < live
    x_tile = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xt + offs_k[None, :]
    weight_tile = weight_ptr + pid_n.to(tl.int64) * BLOCK_N * K + (tl.arange(0, BLOCK_N)[:, None] * K + offs_k[None, :])
    # A zero that the assembler cannot know: ptxas 12.8 drops wgmma products whose sums start at 0 and meet a select with 0, as below
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32) + (T >> 31).to(tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN:
            weight = tl.load(weight_tile + k, eviction_policy="evict_first")
            x = tl.load(x_tile + k, mask_live[:, None], other=0.0)
        else:
            mask_k = (k + offs_k < K)[None, :]
            weight = tl.load(weight_tile + k, mask_n[:, None] & mask_k, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_tile + k, mask_live[:, None] & mask_k, other=0.0)
        acc = tl.dot(weight, x.T, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask_n, other=0.0).to(tl.float32)[:, None]
    acc = tl.where(mask_live[None, :], acc, 0.0)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask_out)


@triton.jit(do_not_specialize_on_alignment=["num_tokens_ptr"])
def _zero_pads_kernel(
    out_ptr,           # [T, N]
    num_tokens_ptr,    # [1] int32
    stride_ot,
    N: tl.constexpr, BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0)
    if token >= tl.load(num_tokens_ptr):
        for n in range(0, N, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            tl.store(out_ptr + token.to(tl.int64) * stride_ot + offs_n, tl.zeros((BLOCK_N,), out_ptr.dtype.element_ty), offs_n < N)


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def config(T: int, N: int, K: int, dtype: torch.dtype) -> Config:
    """BLOCK_N and BLOCK_K ignore T, which is what keeps rows bitwise the same; BLOCK_M and the stages change no bit."""
    if dtype == torch.float32:   # no tensor cores: tiles of 32 keep the fused multiply-adds in registers
        BLOCK_N, widest_m, widest_k = 32, 32, 32
    else:
        enough = {64: MULTIPROCESSORS, 32: 96}      # programs: with 96 of 32 rows the H200 reads 3072 x 2048 in 6.3 us, with 192 of 16 in 8.1
        BLOCK_N, widest_m, widest_k = next((b for b in enough if triton.cdiv(N, b) >= enough[b]), 16), 64, 128
    BLOCK_M = min(max(triton.next_power_of_2(T), 16), widest_m)
    BLOCK_K = next((b for b in (128, 64) if K % b == 0 and b <= widest_k), 32)   # masked tiles of 128 x 128 spill
    stage_bytes = (BLOCK_M + BLOCK_N) * BLOCK_K * dtype.itemsize
    wanted = {64: 4, 32: 6, 16: 6}[BLOCK_N]   # the best of 3 to 8 on the H200 at one token
    return Config(BLOCK_M, BLOCK_N, BLOCK_K, 4, min(wanted, SHARED_BYTES // stage_bytes))


def interpreter_config(T: int, N: int, K: int, dtype: torch.dtype) -> Config:
    """The CPU interpreter pays 0.1 ms an operation whatever its size: few tiles, each as large as may be."""
    BLOCK_N, BLOCK_K = (min(max(triton.next_power_of_2(n), 16), 256) for n in (N, K))
    return Config(max(triton.next_power_of_2(T), 16), BLOCK_N, BLOCK_K, 4, 1)


def _torch_linear(x, weight, bias, out, num_tokens):
    if not x.is_cuda:            # a CPU's 16-bit product may read past the end of a row into the next, and 0 * NaN is NaN
        wide = torch.mm(x.float(), weight.float().T)
        out.copy_(wide if bias is None else wide + bias)
    elif out.dtype != x.dtype:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
        if bias is not None:
            out.add_(bias)
    elif bias is not None:
        torch.addmm(bias, x, weight.T, out=out)
    else:
        torch.mm(x, weight.T, out=out)
    if num_tokens is not None:
        T, N = out.shape
        _zero_pads_kernel[(T,)](out, num_tokens, out.stride(0), N=N, BLOCK_N=min(triton.next_power_of_2(N), 4096), num_warps=4)


def linear_out(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None,
               num_tokens: torch.Tensor | None = None) -> None:
    """Writes x @ weight.T + bias to `out`, which must not overlap `x`. Shapes: see the module. Raises ValueError or TypeError."""
    op = "linear"
    _check.tensor(op, "x", x, (None, None), _check.FLOATS)
    T, K = x.shape
    _check.tensor(op, "weight", weight, (None, K), (x.dtype,), x.device, dense=2)
    N = weight.shape[0]
    _check.require(K >= 1 and N >= 1, op, "weight", f"shape [{N}, {K}]", "at least one row and one column")
    _check.tensor(op, "out", out, (T, N), tuple(dict.fromkeys((x.dtype, torch.float32))), x.device, writes=True)
    if bias is not None:
        _check.tensor(op, "bias", bias, (N,), (x.dtype,), x.device)
    _check.counter(op, "num_tokens", num_tokens, x.device)
    if T == 0:
        return
    if T > TRITON_TOKENS:
        _torch_linear(x, weight, bias, out, num_tokens)
        return
    c = (interpreter_config if triton.knobs.runtime.interpret else config)(T, N, K, x.dtype)
    _linear_kernel[(triton.cdiv(T, c.BLOCK_M) * triton.cdiv(N, c.BLOCK_N),)](
        x, weight, bias, out, num_tokens, T, x.stride(0), out.stride(0),
        N=N, K=K, BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, EVEN=N % c.BLOCK_N == 0 and K % c.BLOCK_K == 0,
        HAS_BIAS=bias is not None, HAS_NUM_TOKENS=num_tokens is not None, num_warps=c.num_warps, num_stages=c.num_stages)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, num_tokens: torch.Tensor | None = None,
           dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns x @ weight.T + bias in x's dtype, or in `dtype`; rows at or past num_tokens[0] are zeros."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype, device=x.device)
    linear_out(x, weight, out, bias, num_tokens)
    return out
