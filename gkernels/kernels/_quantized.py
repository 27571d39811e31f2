"""Quantised weights of products: their kinds, the checks of them, and how a tile of them comes into the registers.

  fp8 row    weight float8_e4m3fn [N, K], scale float32 [N]: W = weight * scale
  fp8 block  the same weight, scale float32 [ceil(N / 128), ceil(K / 128)]
  int4       weight int32 [N, ceil(K / 256) * 32], scale int32 [K / G, N], both as _int4 packs them: W = (q - zero) * scale of the group.
             G is 32, 64, 128, a multiple of 256, or K
Weights become x's dtype in registers, without rounding, and are multiplied there; scales meet float32 sums: a row's once at a program's end, a
block's after each 128 columns, a group's after each G, at most 256. x itself is never quantised.
On Hopper a product may read weight, though not scale, before the node ahead of it has ended: that node must not write it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _check
from ._int4 import BLOCK, WORDS, check_group

FLOAT8 = torch.float8_e4m3fn
SCALE_BLOCK = 128         # rows and columns that share a scale of fp8


class Quantized(NamedTuple):
    """A weight that products take in place of a Tensor [N, K]: see the module."""

    weight: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """As the weight is stored: the first number is N."""
        return self.weight.shape


class Kind(NamedTuple):
    """What a kernel has to know of a weight besides its numbers."""

    name: str                 # "plain", "fp8 row", "fp8 block" or "int4"
    group: int = 0            # columns that share a scale of int4

    def row(self, K: int) -> int:
        """Elements of a stored row of K columns."""
        return triton.cdiv(K, BLOCK) * WORDS if self.name == "int4" else K

    def bytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        """Of a tile of so many rows and columns, its scales included; dtype: x's."""
        if self.name == "int4":
            return rows * (columns // 2 + 4 * max(columns // self.group, 1))
        return rows * columns * dtype.itemsize if self.name == "plain" else rows * (columns + 4)


PLAIN = Kind("plain")


def check_weight(op: str, weight: torch.Tensor | Quantized, N: int | None, K: int, x: torch.Tensor,
                 names: tuple[str, str] = ("weight.weight", "weight.scale"),
                 dtypes: tuple[torch.dtype, ...] = (FLOAT8, torch.int32)) -> tuple[torch.Tensor, torch.Tensor | None, Kind]:
    """(weight, scale, kind) of a launch whose x has K columns; N None: any number of rows. names and dtypes: of a quantised weight's tensors."""
    if not isinstance(weight, Quantized):
        _check.tensor(op, "weight", weight, (N, K), (x.dtype,), x.device, dense=2)
        return weight, None, PLAIN
    (stored, scale), (name, scale_name) = weight, names
    _check.tensor(op, name, stored, (None, None), dtypes, x.device, dense=2)
    is_int4 = stored.dtype == torch.int32
    _check.tensor(op, name, stored, (N, Kind("int4").row(K) if is_int4 else K), dtypes)
    rows = stored.shape[0]
    _check.require(K >= 1 and rows >= 1, op, name, f"shape {list(stored.shape)}", "at least one row and one column")
    if not is_int4:
        check_scale(op, scale, rows, K, x.device, scale_name)
        return stored, scale, Kind("fp8 row" if scale.dim() == 1 else "fp8 block")
    _check.tensor(op, scale_name, scale, (None, rows), (torch.int32,), x.device, dense=2)
    return stored, scale, Kind("int4", check_group(op, K, scale.shape[0], scale_name))


def check_scale(op: str, scale: torch.Tensor, N: int, K: int, device: torch.device, name: str = "scale") -> None:
    """Checks the scale of an fp8 weight [N, K]."""
    blocks = -(-N // SCALE_BLOCK), -(-K // SCALE_BLOCK)
    _check.require(scale is not None, op, name, None, f"float32 [{N}] or [{blocks[0]}, {blocks[1]}]")
    _check.tensor(op, name, scale, blocks if scale.dim() == 2 else (N,), (torch.float32,), device, dense=scale.dim())


@triton.jit
def fp8_tile(weight, x):
    """A weight's tile in the dtype of x, exactly."""
    weight = weight.to(tl.float16)                                     # half an instruction an element; straight to bf16 F2F, 16 a clock
    if x.dtype != tl.float16:
        weight = weight.to(tl.float32).to(x.dtype)
    return weight


@triton.jit
def fp8_dot(acc, weight, x, scale_ptr, rows, k, C: tl.constexpr):
    """acc and the products of weight [BLOCK_N, BLOCK_K] at column k; a row's scale is yet to come."""
    weight = fp8_tile(weight, x)
    if C.KIND == "fp8 block":
        part = tl.dot(weight, x.T, input_precision="ieee")
        scales = scale_ptr + rows // 128 * tl.cdiv(C.K, 128) + k // 128      # a vector, so that they are fetched ahead like the tiles
        if C.EVEN:
            scale = tl.load(scales)
        else:
            scale = tl.load(scales, (rows < C.N) & (k < C.K), other=0.0)
        return tl.fma(part, tl.broadcast_to(scale[:, None], part.shape), acc)
    else:
        return tl.dot(weight, x.T, acc, input_precision="ieee")


@triton.constexpr_function
def _pair_of_nibbles(i, is_bf16):
    """Instructions that make 2^7 or 2^10 plus the i-th nibbles of two words a pair of 16-bit numbers, and add another pair."""
    halves, base = "0x5410" if i < 4 else "0x7632", "0x43004300" if is_bf16 else "0x64006400"
    add = "mov.b32 u, 0x3F803F80; fma.rn.bf16x2 $0, t, u, $3;" if is_bf16 else "add.rn.f16x2 $0, t, $3;"     # sm_80 adds no bf16
    return (f"{{ .reg .b32 t, u; prmt.b32 t, $1, $2, {halves}; shr.u32 t, t, {i % 4 * 4}; mov.b32 u, {base}; "
            f"lop3.b32 t, t, 0x000F000F, u, 0xEA; {add} }}")


@triton.jit
def int4_tile(words, zero, x, i: tl.constexpr, C: tl.constexpr):
    """q - zero [BLOCK_N, WORDS] of the i-th nibbles, in the dtype of x, exactly; zero [BLOCK_N] int32. A nibble in the low bits of 2^7, 2^10 or 2^23
    is that plus q, from which the same plus zero is taken: no conversion from integers, which runs at a quarter of the rate."""
    if C.PACKED:              # two neighbours at a time: 1.5 instructions an element, where the other way takes 3.5
        IS_BF16: tl.constexpr = x.dtype == tl.bfloat16
        BASE: tl.constexpr = 0xC300 if IS_BF16 else 0xE400
        minus = tl.broadcast_to((zero | BASE).to(tl.int16).to(x.dtype, bitcast=True)[:, None], words.shape)
        return tl.inline_asm_elementwise(_pair_of_nibbles(i, IS_BF16), "=r,r,r,r", [words, minus], dtype=x.dtype, is_pure=True, pack=2)
    else:
        bits = (words >> (i * 4)) & 15 | 0x4B000000
        return (bits.to(tl.float32, bitcast=True) - (zero | 0x4B000000).to(tl.float32, bitcast=True)[:, None]).to(x.dtype)


@triton.jit
def int4_sums(acc, x_tile, weight_ptr, scale_ptr, rows, mask_live, split, C: tl.constexpr):
    """acc [BLOCK_N, BLOCK_M] and the split's products; x_tile [BLOCK_M, 1]: the rows of x. A step is a block of 256 columns, one load of 128 bytes
    a row."""
    BLOCK: tl.constexpr = C.BLOCK_K
    WORDS: tl.constexpr = BLOCK // 8
    GROUPS: tl.constexpr = max(BLOCK // C.GROUP, 1) if C.GROUP < C.K else 1                # in a block of columns
    NIBBLES: tl.constexpr = 8 // GROUPS                                                    # of a word that belong to one group
    offs_w, mask_n = tl.arange(0, WORDS), rows < C.N
    weight_tile = weight_ptr + (rows[:, None] * C.ROW + offs_w[None, :])
    for step in tl.range(0, C.STEPS, num_stages=C.num_stages):      # which fetches constants ahead too, not what feeds products alone
        block = split * C.STEPS + step
        if C.EVEN:
            words = tl.load(weight_tile + block * WORDS, eviction_policy="evict_first")
        else:
            words = tl.load(weight_tile + block * WORDS, mask_n[:, None] & (block * WORDS < C.ROW), other=0, eviction_policy="evict_first")
        for j in tl.static_range(GROUPS):
            group = (block * BLOCK + j * C.GROUP) // C.GROUP
            if C.EVEN:
                constant = tl.load(scale_ptr + group * C.N + rows)
            else:
                constant = tl.load(scale_ptr + group * C.N + rows, mask_n & (group * C.GROUP < C.K), other=0)
            part = tl.zeros(acc.shape, tl.float32)
            for i in tl.static_range(j * NIBBLES, (j + 1) * NIBBLES):
                k = block * BLOCK + i * WORDS + offs_w[None, :]
                if C.EVEN:
                    x = tl.load(x_tile + k, mask_live[:, None], other=0.0)
                else:
                    x = tl.load(x_tile + k, mask_live[:, None] & (k < C.K), other=0.0)
                part = tl.dot(int4_tile(words, constant & 31, x, i, C), x.T, part, input_precision="ieee")
            scale = (constant & -32).to(tl.float32, bitcast=True)
            acc = tl.fma(part, tl.broadcast_to(scale[:, None], part.shape), acc)
    return acc
