"""Rotary embedding:  (a, b) -> (a cos - b sin, b cos + a sin),  with the angle position * inverse_frequency[pair].

q [T, H, D], k [T, K, D] with any strides under a contiguous last dimension, positions int32 [T], cos_sin [L, rotary_dim] -> as q and k.
The pairs (a, b) of a head are (d, d + rotary_dim / 2), as in NeoX and Llama, or (2d, 2d + 1) when interleaved; dimensions past rotary_dim
are copied. float32 inside, one cast at the store. `rotary_kv_write` does a decoder's three steps at once: RMSNorm of each head (Qwen 3),
rotation, and the write of k and v to their cache slots.
Graph-safe: the grid depends on T, H and K only; rows at or past num_tokens[0] are written as zeros and never read, and write to no slot.
A position outside the table gives a row of NaN. Batch-invariant: a program sees one token. Formulas: Su et al. 2021, arXiv 2104.09864.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from ._overlap import overlap, wait_for_node_before
from .kv_cache import check_cache, locate_slot

MAX_D = 256
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


def inverse_frequencies(rotary_dim: int, max_len: int, theta: float = 10000.0, scaling: dict | None = None) -> tuple[torch.Tensor, float]:
    """(float32 [rotary_dim / 2] radians a token, the factor of cos and sin), on the CPU; arguments as in `cos_sin_table`."""
    op, scaling = "cos_sin_table", scaling or {}
    kind, theta = scaling.get("rope_type", scaling.get("type", "default")), scaling.get("rope_theta", theta)
    _check.require(kind in ROPE_TYPES, op, "scaling['rope_type']", repr(kind), " or ".join(map(repr, ROPE_TYPES)))
    _check.require(isinstance(theta, (int, float)) and 1 < theta < math.inf, op, "theta", repr(theta), "a number above 1")

    def number(key, at_least=0, default=None):
        value = default if scaling.get(key) is None else scaling[key]
        _check.require(isinstance(value, (int, float)) and value >= at_least and 0 < value < math.inf, op, f"scaling[{key!r}]", repr(value),
                       f"a number of at least {at_least} and above 0, for rope_type {kind!r}")
        return value

    powers = lambda base: base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    if kind == "default":
        return 1 / powers(theta), 1.0
    factor = number("factor", at_least=1)
    if kind == "linear":
        return 1 / powers(theta) / factor, 1.0
    original = number("original_max_position_embeddings", at_least=1)
    if kind == "dynamic":
        _check.require(rotary_dim > 2, op, "rotary_dim", rotary_dim, "4 or more, for rope_type 'dynamic'")
        stretch = factor * max(max_len, original) / original - (factor - 1)
        return 1 / powers(theta * stretch ** (rotary_dim / (rotary_dim - 2))), 1.0
    plain = 1 / powers(theta)
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        _check.require(low < high, op, "scaling['low_freq_factor']", low, f"less than high_freq_factor = {high}")
        circles = original / (2 * math.pi / plain)                       # within the original context
        keep = ((circles - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * plain / factor + keep * plain, 1.0
    fast, slow = number("beta_fast", default=32), number("beta_slow", default=1)
    _check.require(slow <= fast, op, "scaling['beta_slow']", slow, f"at most beta_fast = {fast}")
    first, last = (rotary_dim * math.log(original / (circles * 2 * math.pi)) / (2 * math.log(theta)) for circles in (fast, slow))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)               # pairs before first keep their frequency, pairs past last do not
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float32)
    keep = 1 - ((pairs - first) / (last - first or 1e-3)).clamp(0, 1)
    magnitude = lambda weight: 0.1 * weight * math.log(factor) + 1.0
    is_split = scaling.get("mscale") and scaling.get("mscale_all_dim")   # DeepSeek's ratio
    attention = magnitude(number("mscale")) / magnitude(number("mscale_all_dim")) if is_split else magnitude(1.0)
    return 1 / (factor * powers(theta)) * (1 - keep) + plain * keep, number("attention_factor", default=attention)


def cos_sin_table(rotary_dim: int, max_len: int, theta: float = 10000.0, scaling: dict | None = None,
                  device: torch.device | str | None = None) -> torch.Tensor:
    """Returns float32 [max_len, rotary_dim]: row p holds the cosines of p's angles, then the sines. Build it once, at load.

    scaling is a checkpoint's `rope_scaling` or `rope_parameters` of Hugging Face Transformers: rope_type (or type) default, linear,
    dynamic, llama3 or yarn, with their parameters; a `rope_theta` in it wins over theta. "dynamic" there changes its base with the longest
    sequence seen; here the base is that of a sequence of max_len: it depends on the table's capacity and on no batch, so that a prompt
    prefilled whole or in chunks is rotated alike.
    Raises ValueError, naming the parameter, for an unknown type and for missing or absurd parameters.
    """
    _check.require(rotary_dim >= 2 and rotary_dim % 2 == 0, "cos_sin_table", "rotary_dim", rotary_dim, "an even number of at least 2")
    _check.require(1 <= max_len <= 2**24, "cos_sin_table", "max_len", max_len, "1 to 2^24, where float32 still counts every position")
    frequencies, factor = inverse_frequencies(rotary_dim, max_len, theta, scaling)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1).mul_(factor).to(device)


@triton.jit
def _load_angles(
    positions_ptr,  # [T] int32
    cos_sin_ptr,    # [L, 2 * HALF]
    token, max_len,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
):
    """(cos, sin, whether the position has them); both are NaN [1, BLOCK_HALF] where it does not."""
    position = tl.load(positions_ptr + token).to(tl.int64)
    is_known = (position >= 0) & (position < max_len)
    offs_i = tl.arange(0, BLOCK_HALF)[None, :]
    row = cos_sin_ptr + tl.where(is_known, position, 0) * (2 * HALF) + offs_i
    mask = (offs_i < HALF) & is_known
    return tl.load(row, mask, other=float("nan")), tl.load(row + HALF, mask, other=float("nan")), is_known


@triton.jit
def _load_pairs(row, mask, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """The first and second members of the rotated pairs as float32 [BLOCK_G, BLOCK_HALF]; row and mask are [BLOCK_G, 1]."""
    if IS_INTERLEAVED:
        offs_d = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.load(row + offs_d, mask & (offs_d < 2 * HALF), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (both.shape[0], BLOCK_HALF, 2)))
    else:
        offs_i = tl.arange(0, BLOCK_HALF)[None, :]
        first = tl.load(row + offs_i, mask & (offs_i < HALF), other=0.0).to(tl.float32)
        second = tl.load(row + HALF + offs_i, mask & (offs_i < HALF), other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _load_rotated(
    x_ptr,       # [heads, D], at the tile's first head
    norm_ptr,    # [D]; None without qk-norm
    cos, sin, is_known,
    stride_xh, heads, eps,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    """rotate(rmsnorm(x)) of one token's heads: both members of the pairs [BLOCK_G, BLOCK_HALF], and the rest [BLOCK_G, BLOCK_D]."""
    offs_g, offs_d = tl.arange(0, BLOCK_G)[:, None].to(tl.int64), tl.arange(0, BLOCK_D)
    row, mask = x_ptr + offs_g * stride_xh, offs_g < heads
    mask_rest = (offs_d >= 2 * HALF) & (offs_d < D)
    first, second = _load_pairs(row, mask, HALF, BLOCK_HALF, IS_INTERLEAVED)
    rest = first
    if D > 2 * HALF:
        rest = tl.load(row + offs_d[None, :], mask & mask_rest[None, :], other=0.0).to(tl.float32)
    if norm_ptr is not None:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if D > 2 * HALF:
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        one_row = tl.zeros((1, 1), tl.int32)
        norm_first, norm_second = _load_pairs(norm_ptr + one_row, one_row == 0, HALF, BLOCK_HALF, IS_INTERLEAVED)
        first, second = first * scale * norm_first, second * scale * norm_second
        if D > 2 * HALF:
            rest = rest * scale * tl.load(norm_ptr + offs_d, mask_rest, other=0.0).to(tl.float32)[None, :]
    # explicit fma: the bits do not depend on which of the two products a compiler would fuse
    return tl.fma(first, cos, -(second * sin)), tl.fma(second, cos, first * sin), tl.where(is_known, rest, float("nan"))


@triton.jit
def _store_heads(
    out_ptr,  # [heads, D], at the tile's first head
    first, second, rest, stride_oh, heads,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    offs_g = tl.arange(0, BLOCK_G)[:, None].to(tl.int64)
    row, mask = out_ptr + offs_g * stride_oh, offs_g < heads
    if IS_INTERLEAVED:
        offs_r = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        tl.store(row + offs_r, tl.interleave(first, second).to(out_ptr.dtype.element_ty), mask & (offs_r < 2 * HALF))
    else:
        offs_i = tl.arange(0, BLOCK_HALF)[None, :]
        tl.store(row + offs_i, first.to(out_ptr.dtype.element_ty), mask & (offs_i < HALF))
        tl.store(row + HALF + offs_i, second.to(out_ptr.dtype.element_ty), mask & (offs_i < HALF))
    if D > 2 * HALF:
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        tl.store(row + offs_d, rest.to(out_ptr.dtype.element_ty), mask & (offs_d >= 2 * HALF) & (offs_d < D))


@triton.jit
def _zero_heads(out_ptr, stride_oh, heads, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_g, offs_d = tl.arange(0, BLOCK_G)[:, None].to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    zeros = tl.zeros((BLOCK_G, BLOCK_D), out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_g * stride_oh + offs_d, zeros, (offs_g < heads) & (offs_d < D))


@triton.jit(do_not_specialize=["max_len"], do_not_specialize_on_alignment=["positions_ptr", "num_tokens_ptr"])
def _rotary_kernel(
    q_ptr,           # [T, H, D]
    k_ptr,           # [T, K, D]
    positions_ptr,   # [T] int32
    cos_sin_ptr,     # [L, 2 * HALF]
    q_out_ptr,       # [T, H, D]
    k_out_ptr,       # [T, K, D]
    num_tokens_ptr,  # [1] int32; None when every row is live
    max_len,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_qot, stride_qoh, stride_kot, stride_koh,
    G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, IS_INTERLEAVED: tl.constexpr, HAS_NUM_TOKENS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr, TILES: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    token, kv_head, tile = tl.program_id(0).to(tl.int64), (tl.program_id(1) // TILES).to(tl.int64), tl.program_id(1) % TILES
    head, heads, kv_heads = kv_head * G + tile * BLOCK_G, G - tile * BLOCK_G, (tile == 0).to(tl.int32)
    q_out = q_out_ptr + token * stride_qot + head * stride_qoh
    k_out = k_out_ptr + token * stride_kot + kv_head * stride_koh
    if HAS_NUM_TOKENS:
        if token >= tl.load(num_tokens_ptr):
            _zero_heads(q_out, stride_qoh, heads, D, BLOCK_G, BLOCK_D)
            _zero_heads(k_out, stride_koh, kv_heads, D, 1, BLOCK_D)
            return
    cos, sin, is_known = _load_angles(positions_ptr, cos_sin_ptr, token, max_len, HALF, BLOCK_HALF)
    # every load before the first store: a load cannot overtake a store that might alias it
    q_first, q_second, q_rest = _load_rotated(q_ptr + token * stride_qt + head * stride_qh, None, cos, sin, is_known,
                                              stride_qh, heads, 0.0, D, HALF, BLOCK_G, BLOCK_D, BLOCK_HALF, IS_INTERLEAVED)
    k_first, k_second, k_rest = _load_rotated(k_ptr + token * stride_kt + kv_head * stride_kh, None, cos, sin, is_known,
                                              stride_kh, kv_heads, 0.0, D, HALF, 1, BLOCK_D, BLOCK_HALF, IS_INTERLEAVED)
    _store_heads(q_out, q_first, q_second, q_rest, stride_qoh, heads, D, HALF, BLOCK_G, BLOCK_D, BLOCK_HALF, IS_INTERLEAVED)
    _store_heads(k_out, k_first, k_second, k_rest, stride_koh, kv_heads, D, HALF, 1, BLOCK_D, BLOCK_HALF, IS_INTERLEAVED)


@triton.jit(do_not_specialize=["max_len", "num_pages"],
            do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr", "num_tokens_ptr"])
def _rotary_kv_write_kernel(
    q_ptr,             # [T, H, D]
    k_ptr,             # [T, K, D]
    v_ptr,             # [T, K, DV]
    positions_ptr,     # [T] int32
    cos_sin_ptr,       # [L, 2 * HALF]
    slot_mapping_ptr,  # [T] int64
    k_cache_ptr,       # [N, P, K, D]
    v_cache_ptr,       # [N, P, K, DV]
    q_out_ptr,         # [T, H, D]
    q_norm_ptr,        # [D]; None without qk-norm
    k_norm_ptr,        # [D]; None without qk-norm
    num_tokens_ptr,    # [1] int32; None when every row is live
    max_len, num_pages, eps,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_kcn, stride_kcp, stride_kch, stride_vcn, stride_vcp, stride_vch, stride_qot, stride_qoh,
    PAGE_SIZE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr, HAS_NUM_TOKENS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_DV: tl.constexpr, TILES: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    token, kv_head, tile = tl.program_id(0).to(tl.int64), (tl.program_id(1) // TILES).to(tl.int64), tl.program_id(1) % TILES
    head, heads = kv_head * G + tile * BLOCK_G, G - tile * BLOCK_G
    q_out = q_out_ptr + token * stride_qot + head * stride_qoh
    if HAS_NUM_TOKENS:
        if token >= tl.load(num_tokens_ptr):
            _zero_heads(q_out, stride_qoh, heads, D, BLOCK_G, BLOCK_D)
            return
    slot = tl.load(slot_mapping_ptr + token)
    k_offset, is_slot = locate_slot(slot, num_pages, stride_kcn, stride_kcp, PAGE_SIZE)
    v_offset, _ = locate_slot(slot, num_pages, stride_vcn, stride_vcp, PAGE_SIZE)
    is_slot, offs_dv = is_slot & (tile == 0), tl.arange(0, BLOCK_DV)
    cos, sin, is_known = _load_angles(positions_ptr, cos_sin_ptr, token, max_len, HALF, BLOCK_HALF)
    # every load before the first store: a load cannot overtake a store that might alias it
    q_first, q_second, q_rest = _load_rotated(q_ptr + token * stride_qt + head * stride_qh, q_norm_ptr, cos, sin, is_known,
                                              stride_qh, heads, eps, D, HALF, BLOCK_G, BLOCK_D, BLOCK_HALF, IS_INTERLEAVED)
    k_first, k_second, k_rest = _load_rotated(k_ptr + token * stride_kt + kv_head * stride_kh, k_norm_ptr, cos, sin, is_known,
                                              stride_kh, is_slot.to(tl.int32), eps, D, HALF, 1, BLOCK_D, BLOCK_HALF, IS_INTERLEAVED)
    v = tl.load(v_ptr + token * stride_vt + kv_head * stride_vh + offs_dv, (offs_dv < DV) & is_slot).to(tl.float32)
    _store_heads(q_out, q_first, q_second, q_rest, stride_qoh, heads, D, HALF, BLOCK_G, BLOCK_D, BLOCK_HALF, IS_INTERLEAVED)
    _store_heads(k_cache_ptr + k_offset + kv_head * stride_kch, k_first, k_second, k_rest, stride_kch, is_slot.to(tl.int32),
                 D, HALF, 1, BLOCK_D, BLOCK_HALF, IS_INTERLEAVED)
    tl.store(v_cache_ptr + v_offset + kv_head * stride_vch + offs_dv, v.to(v_cache_ptr.dtype.element_ty), (offs_dv < DV) & is_slot)


@dataclass(frozen=True)
class Config:
    BLOCK_G: int
    BLOCK_D: int
    BLOCK_HALF: int
    TILES: int
    num_warps: int


def config(G: int, D: int, rotary_dim: int) -> Config:
    """Tiles of at most 2048 elements, 64 a thread: larger groups are cut into TILES programs. One warp, because the rmsnorm room gives rows
    of this size one, and the order of a sum follows the number of threads."""
    block_d = triton.next_power_of_2(D)
    block_g = min(triton.next_power_of_2(G), 2048 // block_d)
    return Config(block_g, block_d, triton.next_power_of_2(rotary_dim // 2), triton.cdiv(G, block_g), 1)


def _check_rotary(op, q, k, positions, cos_sin, q_out, num_tokens):
    _check.tensor(op, "q", q, (None, None, None), _check.FLOATS)
    T, H, D = q.shape
    _check.require(2 <= D <= MAX_D, op, "q", f"D = {D}", f"2 to {MAX_D}")
    _check.tensor(op, "k", k, (T, None, D), (q.dtype,), q.device)
    K = k.shape[1]
    _check.require(K >= 1 and H >= 1 and H % K == 0, op, "q", f"{H} heads over {K} of k", "a multiple")
    _check.tensor(op, "positions", positions, (T,), (torch.int32,), q.device, aligned=False)
    _check.tensor(op, "cos_sin", cos_sin, (None, None), (torch.float32,), q.device, dense=2)
    rotary_dim = cos_sin.shape[1]
    _check.require(2 <= rotary_dim <= D and rotary_dim % 2 == 0, op, "cos_sin", f"{rotary_dim} columns", f"an even number, 2 to D = {D}")
    _check.tensor(op, "q_out", q_out, (T, H, D), (q.dtype,), q.device, writes=True)
    _check.counter(op, "num_tokens", num_tokens, q.device)


def rotary_out(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool,
               q_out: torch.Tensor, k_out: torch.Tensor, num_tokens: torch.Tensor | None = None) -> None:
    """Writes q and k, rotated, to `q_out` and `k_out`, which may be `q` and `k`. Shapes: see the module. Raises ValueError or TypeError."""
    _check_rotary("rotary", q, k, positions, cos_sin, q_out, num_tokens)
    _check.tensor("rotary", "k_out", k_out, tuple(k.shape), (k.dtype,), q.device, writes=True)
    (T, H, D), K, (L, rotary_dim) = q.shape, k.shape[1], cos_sin.shape
    if T == 0:
        return
    c = config(H // K, D, rotary_dim)
    _rotary_kernel[(T, K * c.TILES)](
        q, k, positions, cos_sin, q_out, k_out, num_tokens, L,
        *q.stride()[:2], *k.stride()[:2], *q_out.stride()[:2], *k_out.stride()[:2],
        G=H // K, D=D, HALF=rotary_dim // 2, IS_INTERLEAVED=interleaved, HAS_NUM_TOKENS=num_tokens is not None,
        BLOCK_G=c.BLOCK_G, BLOCK_D=c.BLOCK_D, BLOCK_HALF=c.BLOCK_HALF, TILES=c.TILES, num_warps=c.num_warps, **overlap())


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool = False,
           num_tokens: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns q and k rotated by their positions; rows at or past num_tokens[0] are zeros."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    rotary_out(q, k, positions, cos_sin, interleaved, q_out, k_out, num_tokens)
    return q_out, k_out


def rotary_kv_write(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor,
                    slot_mapping: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, q_out: torch.Tensor,
                    interleaved: bool = False, q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None,
                    eps: float = 1e-6, num_tokens: torch.Tensor | None = None) -> None:
    """rmsnorm(q, q_norm) and rmsnorm(k, k_norm) where weights [D] are given, then rotary, then kv_write: q goes to `q_out`, which may be
    `q`, k and v to their slots. In float32 and without norms it has the bits of that chain. Shapes: see here and kv_cache. Raises ValueError
    or TypeError."""
    op = "rotary_kv_write"
    check_cache(op, k, v, k_cache, v_cache, slot_mapping)
    _check_rotary(op, q, k, positions, cos_sin, q_out, num_tokens)
    (T, H, D), (K, DV), (N, P), (L, rotary_dim) = q.shape, v.shape[1:], k_cache.shape[:2], cos_sin.shape
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            _check.tensor(op, name, weight, (D,), _check.FLOATS, q.device)
    if T == 0:
        return
    c = config(H // K, D, rotary_dim)
    _rotary_kv_write_kernel[(T, K * c.TILES)](
        q, k, v, positions, cos_sin, slot_mapping, k_cache, v_cache, q_out, q_norm, k_norm, num_tokens, L, N, eps,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *q_out.stride()[:2],
        PAGE_SIZE=P, G=H // K, D=D, DV=DV, HALF=rotary_dim // 2, IS_INTERLEAVED=interleaved, HAS_NUM_TOKENS=num_tokens is not None,
        BLOCK_G=c.BLOCK_G, BLOCK_D=c.BLOCK_D, BLOCK_HALF=c.BLOCK_HALF, BLOCK_DV=triton.next_power_of_2(DV), TILES=c.TILES,
        num_warps=c.num_warps, **overlap())
