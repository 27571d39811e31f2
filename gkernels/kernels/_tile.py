"""How a product of few rows with a weight is cut into tiles: the rules of _product, on the host, for every GPU.

Tiles of weight rows, splits and every order of addition follow from (N, K, dtype, kind of weight), so that a row's bits are the same for any number
of rows; BLOCK_M, warps and stages change no bit. Each number here was measured, or is what compiles without a spill.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from . import _check, _int4
from ._overlap import overlaps
from ._quantized import PLAIN, Kind

MOST_TOKENS = 64          # above it cuBLAS is 1.2 to 4 times faster on the H200; below, this is level with it or faster at most shapes
MOST_ROWS = 128           # of x that a tile has on Hopper above MOST_TOKENS
MULTIPROCESSORS = 132     # of the H100 and the H200: fewer programs than this leave read bandwidth idle
SHARED_BYTES = {80: 160 << 10, 90: 216 << 10, 100: 216 << 10, 0: 64 << 10}      # that a program may have, by compute capability; 0: AMD's GPUs
LEAST_SHARED_BYTES = 96 << 10    # of every other GPU since 2020
MOST_STAGES = 6           # of a program that has a multiprocessor to itself: 8 leave the next node no room, and cost the step of 1B 1 %
MOST_CONVERTED_STAGES = 12    # of one that converts weights, whose tiles are a half or a quarter as large
MOST_STREAMED_TOKENS = 16     # of a program of _product_hopper that converts: with 32 it takes more registers than two a multiprocessor have
LEAST_STREAMED_STEPS = 16     # of one that does not: with 8, o of 1B, a step of one token takes 3 % longer
MOST_STREAMED_SPLITS = 2      # of one that does not: with 4, down of 1B, 1 to 2 %
STREAMED_ROWS = 128           # of a converted weight's tile
STREAMED_BYTES = 112 << 10    # of shared memory that it may have where two share a multiprocessor
LEAST_ROWS = 16           # of a tile of 64 whose rows are shared out: 1280 x 8192 takes 128 programs of 40 rows and 7.6 us instead of 80 and 9.3
MOST_SPLITS = 4           # of one K: 8 gain 4 % at one token where N = 2048 and K = 8192, and lose 15 % at 64, where the last program has more to add
AHEAD_BYTES = 512         # of each weight row that a program asks for before it waits: 0 cost a layer of 8B 6.3 us more, 256 0.6, 1024 1.6


class Tile(NamedTuple):
    """All that is static about the products of a launch, as one constant: a tuple, since Triton's hooks are told of constants as JSON. BLOCK_M,
    num_warps and num_stages change no bit."""

    N: int
    K: int
    TILES: int                # of weight rows
    BLOCK_M: int
    BLOCK_N: int
    ROWS: int                 # of BLOCK_N that are the tile's own
    BLOCK_K: int
    SPLITS: int               # parts of a tile's K
    SERIAL: bool              # one program makes all of them; else each has its own
    ONE: bool                 # tile of rows of x, whose programs fetch pads too, rather than wait 0.65 us for the number of live rows
    STEPS: int                # blocks of K a program
    EVEN: bool                # no tile passes N or K
    EVEN_K: bool              # none passes K
    LINES: int                # of 128 bytes that a program asks of each weight row before it waits; 0 where no node overlaps, or if IS_STREAMED
    KIND: str                 # of the weight, and for int4 the columns that share a scale: see _quantized.Kind
    GROUP: int
    ROW: int                  # elements of a stored row of the weight
    PACKED: bool              # whether int4 becomes two 16-bit numbers at a time, by instructions of NVIDIA's GPUs
    num_warps: int
    num_stages: int
    IS_STREAMED: bool = False  # whether it is a program of _product_hopper

    def grid(self, T: int) -> tuple[int]:
        return (triton.cdiv(T, self.BLOCK_M) * self.TILES * (1 if self.SERIAL else self.SPLITS),)

    @property
    def parts(self) -> int:
        """Sums of squares that it leaves of a row of N: one for 64 rows, whether they are a tile or half of one."""
        return self.TILES * (self.BLOCK_N // 64 if self.IS_STREAMED else 1)

    def options(self) -> dict[str, int]:
        if self.IS_STREAMED:
            # Two a multiprocessor; or one that leaves no register to others: where the next node's start beside it, 1B takes 3 to 11 % longer
            two = {"maxnreg": 128} if self.TILES * self.SPLITS > MULTIPROCESSORS else {}
            return dict(num_warps=self.num_warps, launch_pdl=True) | two
        overlap = {"launch_pdl": True} if self.LINES else {}
        # 255 registers, or sm_80 spills at 72; but on Hopper, which does not, the node of q, k and v would take 218 instead of 79. There converted
        # weights spill, at 48 in tiles of 16 rows, at 168 beside 32 tokens
        is_free = _check.capability() // 10 == 9 and self.KIND == "plain"
        return dict(num_warps=self.num_warps, num_stages=self.num_stages) | overlap | ({} if is_free else _check.registers(255))


def parts(N: int, dtype: torch.dtype, splits: bool) -> int:
    """How many sums of squares the writer of rows of N leaves: one a tile."""
    return tile(1, N, 1, dtype, splits).parts


def tile(T: int, N: int, K: int, dtype: torch.dtype, splits: bool, group: tuple[int, int] | None = None, kind: Kind = PLAIN,
         shares: bool = False) -> Tile:
    """How the product of T rows with [N, K] is cut. group: (rows, tiles), where the caller's rows come in groups, each padded to that many.
    shares: whether a tile may have fewer rows than BLOCK_N, so that every multiprocessor gets a program."""
    if _check.INTERPRETED:    # which pays 0.1 ms an operation whatever its size: few tiles, each as large as may be
        BLOCK_M, BLOCK_N = (max(triton.next_power_of_2(n), 16) for n in (T, N))
        BLOCK_N, TILES = group or (min(BLOCK_N, 256), triton.cdiv(N, min(BLOCK_N, 256)))
        SPLITS, num_warps, num_stages = 2 if splits and K > 16 else 1, 4, 1
        BLOCK_K = min(max(triton.next_power_of_2(triton.cdiv(K, SPLITS)), 16), 128 if kind.name == "fp8 block" else 256)
        BLOCK_K = 256 if kind.name == "int4" else BLOCK_K
    else:
        BLOCK_N, TILES = group or _rows(N, dtype, splits)
        BLOCK_M, BLOCK_K, SPLITS, num_warps, num_stages = _block(T, K, dtype, splits, BLOCK_N, TILES, kind)
    STEPS, arch = triton.cdiv(triton.cdiv(K, BLOCK_K), SPLITS), _check.capability()
    ROWS = BLOCK_N
    # Where K is whole it gains nothing: 6144 x 4096 takes 16 us with 96 programs and 17 with 128
    if shares and SPLITS > 1 and (_check.INTERPRETED or (kind == PLAIN and dtype != torch.float32)):
        enough = 3 * BLOCK_N // 4 if _check.INTERPRETED else triton.cdiv(N, MULTIPROCESSORS // SPLITS)
        ROWS = min(max(triton.cdiv(enough, 8) * 8, LEAST_ROWS), BLOCK_N)
        TILES = triton.cdiv(N, ROWS)
    lines = max(min(STEPS * kind.bytes(1, BLOCK_K, dtype), AHEAD_BYTES) // 128, 1)
    is_even_k = K == BLOCK_K * SPLITS * STEPS
    return Tile(N, K, TILES, BLOCK_M, BLOCK_N, ROWS, BLOCK_K, SPLITS, SPLITS > 1 and T > MOST_TOKENS, T <= BLOCK_M, STEPS,
                is_even_k and ROWS == BLOCK_N and N == BLOCK_N * TILES, is_even_k,
                1 << (lines.bit_length() - 1) if overlaps() else 0, kind.name, kind.group, kind.row(K),
                arch > 0 and dtype != torch.float32, num_warps, num_stages)


def streamed(T: int, N: int, K: int, dtype: torch.dtype, splits: bool, kind: Kind, stride: int = 8) -> Tile | None:
    """The cut of a product of few rows with a converted weight that `_product_hopper` streams: that of `tile`, two tiles to one. None where it
    cannot. stride: of x's rows, which come as vectors."""
    if not (_check.HAS_GLUON and _check.capability() // 10 == 9 and kind != PLAIN and dtype != torch.float32 and 1 <= T <= MOST_STREAMED_TOKENS):
        return None
    BLOCK_K = _int4.BLOCK if kind.name == "int4" else 128
    SPLITS, TILES = _splits(K, BLOCK_K, triton.cdiv(N, 64), splits, kind), N // STREAMED_ROWS
    is_wide = 3 * TILES * SPLITS >= 2 * MULTIPROCESSORS          # else smaller tiles, of which there are twice as many, leave fewer of them idle
    if N % STREAMED_ROWS or K % (BLOCK_K * SPLITS) or (kind.name == "int4" and kind.group < 128) or stride % 8 or not is_wide:
        return None
    BLOCK_M = max(triton.next_power_of_2(T), 8)
    stage = BLOCK_M * BLOCK_K * dtype.itemsize + kind.bytes(STREAMED_ROWS, BLOCK_K, dtype)
    # Two programs a multiprocessor where there are more than those; else one, and no room for one more, which would pile up (see _converting)
    STEPS, stages = K // (BLOCK_K * SPLITS), STREAMED_BYTES // stage + (TILES * SPLITS <= MULTIPROCESSORS)
    return Tile(N, K, TILES, BLOCK_M, STREAMED_ROWS, STREAMED_ROWS, BLOCK_K, SPLITS, False, True, STEPS, True, True, 0, kind.name, kind.group,
                kind.row(K), True, 4, stages, True)


def plain_streamed(c: Tile, T: int, dtype: torch.dtype, stride: int) -> Tile:
    """The cut of a product of few rows with a plain weight that `_product_hopper` streams: c, of `tile`, in steps of 128 bytes a row; or c itself
    where it cannot. stride: of x's rows, which come as vectors."""
    BLOCK_K, is_shared = 128 // dtype.itemsize, c.TILES * c.SPLITS > MULTIPROCESSORS
    STEPS = c.STEPS * c.BLOCK_K // BLOCK_K
    if not (_check.HAS_GLUON and _check.capability() // 10 == 9 and c.KIND == "plain" and dtype != torch.float32 and 1 <= T <= MOST_TOKENS and c.EVEN
            and c.BLOCK_N == 64 and STEPS >= LEAST_STREAMED_STEPS and c.SPLITS <= MOST_STREAMED_SPLITS and stride % 8 == 0):
        return c
    BLOCK_M = 8 if T <= 8 else c.BLOCK_M
    room = (STREAMED_BYTES if is_shared else SHARED_BYTES[90]) - 4 * c.BLOCK_N * BLOCK_M          # where sums change hands
    stages = min(room // (128 * (BLOCK_M + c.BLOCK_N)), 6 if is_shared else 10)
    return c._replace(BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, STEPS=STEPS, LINES=0, num_warps=4, num_stages=stages, IS_STREAMED=True)


def _rows(N, dtype, splits):
    """(rows of a tile, tiles)"""
    if dtype == torch.float32:   # no tensor cores: tiles of 32 keep the fused multiply-adds in registers
        rows = 32
    elif splits and N >= 1024:
        rows = 64
    else:
        enough = {64: MULTIPROCESSORS, 32: 96}      # programs: with 96 of 32 rows the H200 reads 3072 x 2048 in 6.3 us, with 192 of 16 in 8.1
        rows = next((b for b in enough if triton.cdiv(N, b) >= enough[b]), 16)
    return rows, triton.cdiv(N, rows)


def _splits(K, BLOCK_K, TILES, splits, kind):
    """Parts of K. A plain weight's program has a multiprocessor of its own; of those that convert weights, two share one: one computes while the
    other waits."""
    SPLITS, most = 1, MULTIPROCESSORS if kind == PLAIN else 2 * MULTIPROCESSORS
    while splits and SPLITS < MOST_SPLITS and TILES * SPLITS * 2 <= most and K >= BLOCK_K * SPLITS * 4:
        SPLITS *= 2
    return SPLITS


def _block(T, K, dtype, splits, BLOCK_N, TILES, kind):
    """(BLOCK_M, BLOCK_K, SPLITS, num_warps, num_stages)"""
    half, arch = dtype != torch.float32, _check.capability()
    hopper = half and arch // 10 == 9
    # Tiles of 128 x 128 spill but on Hopper, which reads them from shared memory
    BLOCK_K = next((b for b in (128, 64) if K % b == 0 and half and (b * BLOCK_N <= 8192 or hopper)), 32 if half or BLOCK_N < 128 else 16)
    BLOCK_K = _int4.BLOCK if kind.name == "int4" else BLOCK_K
    SPLITS = _splits(K, BLOCK_K, TILES, splits, kind)
    if hopper and kind != PLAIN:
        return _converting(T, dtype, splits, BLOCK_N, BLOCK_K, TILES, SPLITS, kind)
    if T > MOST_TOKENS:
        # Two sums: a head of 128 with norms spills beside 64 rows on Hopper, sm_80 spills at 64 and gfx942 at 32
        widest = (MOST_ROWS if BLOCK_N <= 64 else 64) if hopper else 32 if arch else 16
    else:
        widest = 64 if half and arch != 100 else 32     # sm_100 spills beside 64 rows' squares
    # Sums of several groups at once: 64 rows spill 424 bytes on sm_80; and on gfx942 32 rows spill beside converted weights
    if (kind.name == "int4" and kind.group < 128) or (kind != PLAIN and not arch):
        widest = min(widest, 32) if arch else 16
    BLOCK_M = max(min(triton.next_power_of_2(T), widest if BLOCK_N <= 64 else widest // 2), 16)
    # 4 spill where two sums are held. Never fewer: 2 get mma.sync, whose sums have other bits than wgmma's
    num_warps = 8 if (BLOCK_N == 128 and not hopper) or T > MOST_TOKENS else 4
    shared = SHARED_BYTES.get(arch, LEAST_SHARED_BYTES)
    stage = BLOCK_M * BLOCK_K * dtype.itemsize + kind.bytes(BLOCK_N, BLOCK_K, dtype)
    if triton.cdiv(T, BLOCK_M) * TILES * SPLITS > MULTIPROCESSORS:         # two, where the half holds 3 stages of 64 tokens
        shared = max(shared // 2, LEAST_SHARED_BYTES if arch else 0, min(3 * stage, shared))
    return BLOCK_M, BLOCK_K, SPLITS, num_warps, max(min(shared // stage, MOST_STAGES), 2)


def _converting(T, dtype, splits, BLOCK_N, BLOCK_K, TILES, SPLITS, kind):
    """_block of weights that Hopper converts. wgmma would take them product by product; mma.sync does not, and Triton takes it for 8 tokens, and for
    any number where a program has 2 warps. All rows get it, since its sums have other bits than wgmma's."""
    # 64 tokens spill, as 32 do beside several groups' sums or the sums of all splits
    widest = 32 >> (kind.name == "int4" and kind.group < 128) + (splits and T > MOST_TOKENS) + (BLOCK_N > 64)
    BLOCK_M = max(min(triton.next_power_of_2(T), widest), 8)
    num_warps = 4 if BLOCK_M == 8 and BLOCK_N > 64 else 2
    stage = BLOCK_M * BLOCK_K * dtype.itemsize + kind.bytes(BLOCK_N, BLOCK_K, dtype)
    # Programs that share a multiprocessor, and no room for one more: those that start early take the places that the node before leaves first, and
    # where one piles up, the others wait for it. 8B in int4 took 7 % longer with half of the stages, in fp8 11 %
    resident = min(triton.cdiv(triton.cdiv(max(T, 1), BLOCK_M) * TILES * SPLITS, MULTIPROCESSORS), 4)
    return BLOCK_M, BLOCK_K, SPLITS, num_warps, max(min(1 + SHARED_BYTES[90] // resident // stage, MOST_CONVERTED_STAGES), 3)
