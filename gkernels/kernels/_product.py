"""The product of rows with a weight, plain or quantised, made for few rows, which linear, linear_fp8, linear_int4, norm_linear, linear_residual,
norm_gate_up and norm_qkv share.

A program holds a tile of weight rows as the M operand of the dot, because 64 of them fill it and 1 token does not. Where N gives fewer programs
than the device needs, K is split: the last program of a tile to arrive adds the float32 sums in the order of K. Beyond MOST_TOKENS rows there are
programs enough, and each makes and adds the sums of all splits itself, in the same order.
An RMSNorm is shared by two nodes: the one that writes a row leaves x * norm, rounded once, and its squares (`Scaled`); the product after it
multiplies that, as any other x, and scales each sum by the row's 1 / rms. No product has a norm to load or a row to touch twice.
Tiles of weight rows, splits and every order of addition follow from (N, K, dtype, kind of weight), see _tile, so a row's bits are the same for any T,
tile and place. Weights in fp8 and int4 (see _quantized) have the tiles of plain ones, and so leave as many parts of a row's squares.

On Hopper and later the nodes overlap (programmatic dependent launch): a program starts while the node before still runs, asks the L2 for
weights, which no node writes, and waits for that node's end before anything else is read or written. There _product_hopper makes most products of
few rows, which has copied the first weights by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _check, _quantized
from ._arrive import arrive
from ._overlap import wait_for_node_before
from ._tile import MOST_TOKENS, MULTIPROCESSORS, Tile, parts


@dataclass(frozen=True)
class Workspace:
    """Scratch of products whose K is split, for launches that follow each other in one stream: one size for all shapes."""

    partials: torch.Tensor    # float32
    counters: torch.Tensor    # int32, zeros between launches

    @classmethod
    def allocate(cls, device: torch.device | str) -> Workspace:
        return cls(torch.empty(MULTIPROCESSORS * 256 * MOST_TOKENS, dtype=torch.float32, device=device),
                   torch.zeros(MULTIPROCESSORS * 4, dtype=torch.int32, device=device))


class Scaled(NamedTuple):
    """What the writer of rows leaves to the products after it: rmsnorm(row, norm, eps) = x / sqrt(sum(squares) / K + eps)."""

    x: torch.Tensor           # [T, K]: row * norm, rounded once; in float16 it must stay below 65504
    squares: torch.Tensor     # [T, PARTS] float32: what the squares of parts of the row sum to

    @classmethod
    def empty(cls, T: int, K: int, dtype: torch.dtype, device: torch.device | str, splits: bool) -> Scaled:
        """splits: whether the product that writes the rows has a workspace."""
        return cls(torch.empty(T, K, dtype=dtype, device=device), torch.empty(T, parts(K, dtype, splits), device=device))


def check_scaled(op: str, name: str, scaled: Scaled, T: int | None, K: int | None, dtypes: tuple[torch.dtype, ...],
                 device: torch.device | None, writes: bool = False) -> int:
    """How many parts its squares have."""
    _check.require(scaled.squares.dim() != 2 or scaled.squares.shape[1] >= 1, op, f"{name}.squares", "no parts", "at least one")
    _check.tensor(op, f"{name}.x", scaled.x, (T, K), dtypes, device, writes=writes)
    _check.tensor(op, f"{name}.squares", scaled.squares, (scaled.x.shape[0], None), (torch.float32,), scaled.x.device, dense=2, writes=writes)
    return scaled.squares.shape[1]


def check_workspace(op: str, workspace: Workspace | None, c: Tile, T: int, device: torch.device) -> tuple:
    """(partials, counters) of a launch, which has to find room in them; Nones without a workspace."""
    if workspace is None:
        return None, None
    tiles = triton.cdiv(T, c.BLOCK_M) * c.TILES
    for name, t, dtype, need in (("partials", workspace.partials, torch.float32, tiles * c.SPLITS * c.BLOCK_N * c.BLOCK_M),
                                 ("counters", workspace.counters, torch.int32, tiles)):
        _check.tensor(op, f"workspace.{name}", t, (None,), (dtype,), device, writes=True)
        _check.require(c.SPLITS == 1 or c.SERIAL or t.numel() >= need, op, f"workspace.{name}", f"{t.numel()} elements",
                       f"at least {need} for {T} rows of {c.N} x {c.K}; Workspace.allocate makes enough for {MOST_TOKENS} rows of a model's")
    return workspace.partials, workspace.counters


@triton.jit
def place(T, C: tl.constexpr):
    """(row tile, tile of weight rows, split, tile of the output) of a program. Row tiles of one weight tile are neighbours: L2 holds it."""
    SHARES: tl.constexpr = 1 if C.SERIAL else C.SPLITS
    num_m = tl.cdiv(T, C.BLOCK_M)
    pid_m, rest = tl.program_id(0) % num_m, tl.program_id(0) // num_m
    return pid_m, rest // SHARES, rest % SHARES, rest // SHARES * num_m + pid_m


@triton.jit
def columns_of(pid_n, C: tl.constexpr):
    """Columns of the output [BLOCK_N] of a tile of weight rows, in one piece, or loads and stores would be no vectors; which of them are its own; and
    its weight rows (int64), N for those that are not."""
    offs_n = pid_n * C.ROWS + tl.arange(0, C.BLOCK_N)
    if C.ROWS == C.BLOCK_N:
        mask_n, rows = offs_n < C.N, offs_n.to(tl.int64)
    else:
        mask_n = (tl.arange(0, C.BLOCK_N) < C.ROWS) & (offs_n < C.N)
        rows = tl.where(mask_n, offs_n, C.N).to(tl.int64)
    return offs_n, mask_n, rows


@triton.jit
def _ask(addresses):
    """Asks the L2 for the lines of a tile of addresses, which a prefetch brings nowhere else."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def enter(weight_ptr, scale_ptr, rows, split, C: tl.constexpr):
    """Asks the L2 for the first lines of the weight rows [BLOCK_N] (int64) and their groups' constants, and waits for the node before."""
    if C.LINES:
        PER_LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
        COLUMNS: tl.constexpr = 8 if C.KIND == "int4" else 1                               # in an element of the weight
        known, offs = tl.minimum(rows, C.N - 1), split * (C.STEPS * C.BLOCK_K // COLUMNS) + tl.arange(0, C.LINES) * PER_LINE
        _ask(weight_ptr + (known[:, None] * C.ROW + tl.minimum(offs, C.ROW - 1)[None, :]))
        if C.KIND == "int4":
            GROUPS: tl.constexpr = C.LINES * (max(C.BLOCK_K // C.GROUP, 1) if C.GROUP < C.K else 1)
            groups = split * C.STEPS * C.BLOCK_K // C.GROUP + tl.arange(0, GROUPS)
            _ask(scale_ptr + (tl.minimum(groups, C.K // C.GROUP - 1)[:, None] * C.N + known[None, :]))
    wait_for_node_before(C.LINES > 0)


@triton.jit
def sums(
    x_ptr,         # [T, K]
    weight_ptr,    # [N, K], or a quantised weight as in _quantized
    scale_ptr,     # its scale; None for a plain weight
    rows,          # [BLOCK_N] int64: the tile's weight rows; those past N are masked
    rows_x,        # [BLOCK_M]: the rows of x
    mask_live,     # [BLOCK_M]
    stride_xt, split, zero,
    C: tl.constexpr,
):
    """The split's products [BLOCK_N, BLOCK_M]. `zero` is one that the assembler cannot know: ptxas 12.8 drops wgmma products whose sums start at 0
    and meet a select with 0, as they do at every op's end."""
    acc = tl.full((C.BLOCK_N, C.BLOCK_M), 0, tl.float32) + zero
    if C.KIND == "int4":
        x_tile = x_ptr + rows_x.to(tl.int64)[:, None] * stride_xt
        acc = _quantized.int4_sums(acc, x_tile, weight_ptr, scale_ptr, rows, mask_live, split, C)
    else:
        first_k, offs_k = split * (C.STEPS * C.BLOCK_K), tl.arange(0, C.BLOCK_K)
        x_tile = x_ptr + rows_x.to(tl.int64)[:, None] * stride_xt + (first_k + offs_k)[None, :]
        weight_tile = weight_ptr + rows[:, None] * C.K + (first_k + offs_k)[None, :]
        if C.KIND == "fp8 row":                                 # early: it comes while the weights do
            scale = tl.load(scale_ptr + rows, rows < C.N, other=0.0)
        # The loop's own stages fetch all its loads ahead, a block's scales too; the kernel's those that feed products alone
        for k in tl.range(0, C.STEPS * C.BLOCK_K, C.BLOCK_K, num_stages=C.num_stages if C.KIND == "fp8 block" else None):
            if C.EVEN:
                weight = tl.load(weight_tile + k, eviction_policy="evict_first")
                x = tl.load(x_tile + k, mask_live[:, None], other=0.0)
            elif C.EVEN_K:
                weight = tl.load(weight_tile + k, (rows < C.N)[:, None], other=0.0, eviction_policy="evict_first")
                x = tl.load(x_tile + k, mask_live[:, None], other=0.0)
            else:
                mask_k = (first_k + k + offs_k < C.K)[None, :]
                weight = tl.load(weight_tile + k, (rows < C.N)[:, None] & mask_k, other=0.0, eviction_policy="evict_first")
                x = tl.load(x_tile + k, mask_live[:, None] & mask_k, other=0.0)
            if C.KIND == "plain":
                acc = tl.dot(weight, x.T, acc, input_precision="ieee")
            else:
                acc = _quantized.fp8_dot(acc, weight, x, scale_ptr, rows, first_k + k, C)
        if C.KIND == "fp8 row":
            acc *= scale[:, None]
    return acc


@triton.jit
def serial_sums(x_ptr, weight_ptr, scale_ptr, rows, rows_x, mask_live, stride_xt, zero, C: tl.constexpr):
    """The sums over all splits, added as `collect` adds them. The arguments are those of `sums`."""
    acc = tl.full((C.BLOCK_N, C.BLOCK_M), 0, tl.float32)
    for split in range(C.SPLITS):
        acc += sums(x_ptr, weight_ptr, scale_ptr, rows, rows_x, mask_live, stride_xt, split, zero, C)
    return acc


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def column_sums(tile):
    """Sums over the rows of a tile [ROWS, BLOCK_M], a power of two of them, first half to second: in an order that no layout changes."""
    for _ in tl.static_range(_log2(tile.shape[0])):
        first, second = tl.split(tl.permute(tl.reshape(tile, (2, tile.shape[0] // 2, tile.shape[1])), (1, 2, 0)))
        tile = first + second
    return tl.reshape(tile, (tile.shape[1],))


@triton.jit
def load_squares(squares_ptr, rows_x, mask_live, PARTS: tl.constexpr):
    """The parts [PARTS to a power of two, BLOCK_M] of the rows' squares. Loaded before the sums, added up after them."""
    offs_p = tl.arange(0, triton.next_power_of_2(PARTS))
    return tl.load(squares_ptr + rows_x.to(tl.int64)[None, :] * PARTS + offs_p[:, None], (offs_p < PARTS)[:, None] & mask_live[None, :], other=0.0)


@triton.jit
def _partial(partials_ptr, tile, split, n, m, C: tl.constexpr):
    return partials_ptr + (tile * C.SPLITS + split) * (C.BLOCK_N * C.BLOCK_M) + n[:, None] * C.BLOCK_M + m[None, :]


@triton.jit
def leave(acc, partials_ptr, counters_ptr, tile, split, n, m, C: tl.constexpr):
    """Leaves a split's sums where the tile's last program finds them; true for that one. n [BLOCK_N], m [BLOCK_M]: places in the tile."""
    tl.store(_partial(partials_ptr, tile, split, n, m, C), acc)
    return arrive(counters_ptr + tile, C.SPLITS)


@triton.jit
def collect(partials_ptr, tile, n, m, C: tl.constexpr):
    """The sums over all splits, in their order."""
    SPLITS: tl.constexpr = C.SPLITS
    acc = 0.0 + tl.load(_partial(partials_ptr, tile, 0, n, m, C), cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):                # unrolled: all loads are under way before the first is waited for
        acc += tl.load(_partial(partials_ptr, tile, split, n, m, C), cache_modifier=".cg")
    return acc


@triton.jit
def write_rows(acc, norm, out, scaled, mask_out, mask_live):
    """Writes finished rows [BLOCK_N, BLOCK_M] and, where a norm follows, rows * norm, zeros where they are not live. Returns them as rounded."""
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out, rounded, mask_out)
    rounded = rounded.to(tl.float32)
    if norm is not None:
        tl.store(scaled, tl.where(mask_live[None, :], rounded * norm.to(tl.float32)[:, None], 0.0).to(out.dtype.element_ty), mask_out)
    return rounded


@triton.jit
def inverse_rms(squares, eps, C: tl.constexpr):
    """Each row's 1 / rms [BLOCK_M] from the parts of its squares."""
    return tl.rsqrt(column_sums(squares) / C.K + eps)


@triton.jit
def normed(acc, scale, bias_ptr, rows, C: tl.constexpr):
    """The sums, scaled by each row's 1 / rms, plus the bias; fused by name, so that no layout decides whether the compiler does it."""
    scale = tl.broadcast_to(scale[None, :], acc.shape)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows, rows < C.N, other=0.0).to(tl.float32)
        return tl.fma(acc, scale, tl.broadcast_to(bias[:, None], acc.shape))
    else:
        return acc * scale


@triton.jit
def halves(tile, C: tl.constexpr):
    """The first and the second BLOCK_N / 2 rows of a tile [BLOCK_N, BLOCK_M]."""
    return tl.split(tl.permute(tl.reshape(tile, (2, C.BLOCK_N // 2, C.BLOCK_M)), (1, 2, 0)))
