"""A decoder's way into attention in one node: the rest of an RMSNorm, q, k and v projections, RMSNorm of the heads of q and k (Qwen 3), rotary
embedding, and the write of k and v to their cache slots.

  [q, k, v] = rmsnorm(row, norm) @ weight.T + bias;  q_out = rotate(rmsnorm(q, q_norm));  cache[slot] = rotate(rmsnorm(k, k_norm)), v
scaled: x = row * norm [T, K] with any row stride, and the rows' squares (see _product.Scaled); weight [(H + 2 KV) D, K] (the rows of q, then k,
then v), which may be Quantized (see _quantized), bias [(H + 2 KV) D] or None, q_norm and k_norm [D] or None, positions int32 [T], cos_sin float32
[L, rotary_dim], slot_mapping int64 [T], caches [N, P, KV, D] -> q_out [T, H, D].
The pairs of a head are (d, d + rotary_dim / 2); dimensions past rotary_dim are copied. float32 from the product on, one cast at each store.
Graph-safe: the grid and the tiles depend on T, K and the heads only; rows at or past num_tokens[0] are zeros in q_out, change nothing,
and write to no slot, and neither does a slot outside the cache. A position outside the table gives NaN in q and k.
Batch-invariant: a program holds one head or a part of it, see _product. Beyond MOST_TOKENS rows rmsnorm, linear and rotary_kv_write apart are faster.
On Hopper weight may be read before the node ahead has ended, which must not write it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _check, _product, _tile
from ._heads import store_pairs, write_head
from ._product import Scaled, Workspace
from ._quantized import PLAIN, Kind, Quantized, check_weight
from ._tile import Tile

if _check.HAS_GLUON:
    from ._nodes_hopper import _norm_qkv_streamed_kernel, operands

MAX_D = 128               # wider heads spill
MOST_ROWS = 64            # of a tile, unless norms need a whole head


@triton.jit(do_not_specialize=["T", "max_len", "num_pages"],
            do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr", "num_tokens_ptr"])
def _norm_qkv_kernel(
    x_ptr,             # [T, K]
    squares_ptr,       # [T, PARTS]
    weight_ptr,        # [(H + 2 KV) D, K], or as _quantized describes it
    scale_ptr,         # of a quantised weight; None for a plain one
    bias_ptr,          # [(H + 2 KV) D]; None without a bias
    q_norm_ptr,        # [D]; None without a norm of q's heads
    k_norm_ptr,        # [D]; None without a norm of k's heads
    positions_ptr,     # [T] int32
    cos_sin_ptr,       # [L, 2 * ROTARY]
    slot_mapping_ptr,  # [T] int64
    k_cache_ptr,       # [N, P, KV, D]
    v_cache_ptr,       # [N, P, KV, D]
    q_out_ptr,         # [T, H, D]
    partials_ptr,      # float32; None without a workspace
    counters_ptr,      # int32; None without a workspace
    num_tokens_ptr,    # [1] int32; None when every row is live
    T, max_len, num_pages, eps,
    stride_xt, stride_kcn, stride_kcp, stride_kch, stride_vcn, stride_vcp, stride_vch, stride_qot, stride_qoh,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, PAGE_SIZE: tl.constexpr, PARTS: tl.constexpr,
    C: tl.constexpr,
):
    BLOCK_M: tl.constexpr = C.BLOCK_M
    HALF: tl.constexpr = C.BLOCK_N // 2
    REST: tl.constexpr = (D - 2 * ROTARY + 1) // 2          # what is not rotated lies in pairs too, of which the last may be half a pair
    CUTS: tl.constexpr = C.TILES // (H + 2 * KV)            # tiles a head
    # Whether angles are loaded before the sums: beside converted weights and whole heads of 128 they spill
    IS_EARLY: tl.constexpr = C.KIND == "plain" and C.BLOCK_N <= 64
    pid_m, pid_n, split, tile = _product.place(T, C)
    head, first_pair = pid_n // CUTS, pid_n % CUTS * HALF
    offs_m, offs_n, pair = pid_m * C.BLOCK_M + tl.arange(0, C.BLOCK_M), tl.arange(0, C.BLOCK_N), first_pair + tl.arange(0, HALF)
    # [BLOCK_N]: the first of each pair of the tile, then the second
    pair_n = first_pair + offs_n % HALF
    column = pair_n + tl.where(pair_n < ROTARY, offs_n // HALF * ROTARY, ROTARY + offs_n // HALF * REST)
    is_row = (pair_n < ROTARY + REST) & (column < D)
    rows = tl.where(is_row, head * D + column, C.N).to(tl.int64)
    _product.enter(weight_ptr, scale_ptr, rows, split, C)
    # [HALF, 1]
    is_rotary = (pair < ROTARY)[:, None]
    offs_first, offs_second = (pair + tl.where(pair < ROTARY, 0, ROTARY))[:, None], (pair + tl.where(pair < ROTARY, ROTARY, ROTARY + REST))[:, None]
    is_first, is_second = (pair < ROTARY + REST)[:, None], (pair < ROTARY + REST)[:, None] & (offs_second < D)
    # [1, BLOCK_M]
    q_out = q_out_ptr + offs_m.to(tl.int64)[None, :] * stride_qot + head.to(tl.int64) * stride_qoh
    is_token = (offs_m < T)[None, :]
    live, mask_x = T, offs_m < T
    if num_tokens_ptr is not None:
        live = tl.minimum(tl.load(num_tokens_ptr), T)
        if not C.ONE:
            if pid_m * C.BLOCK_M >= live:
                writes, zeros = is_token & (head < H) & (split == 0), tl.zeros((HALF, BLOCK_M), tl.float32)
                store_pairs(q_out, zeros, zeros, offs_first, offs_second, is_first & writes, is_second & writes)
                return
            mask_x = offs_m < live
    squares = _product.load_squares(squares_ptr, offs_m, mask_x, PARTS)
    # Early, so that a finished tile waits for none of them; pads' are masked where they are used
    position = tl.load(positions_ptr + offs_m, mask_x, other=0).to(tl.int64)[None, :]
    slot = tl.load(slot_mapping_ptr + offs_m, mask_x, other=-1)[None, :]
    is_known = (position >= 0) & (position < max_len)
    angles = cos_sin_ptr + tl.where(is_known, position, 0) * (2 * ROTARY) + pair[:, None]
    is_turned = is_rotary & is_known & (head < H + KV)
    if IS_EARLY:
        cos, sin = tl.load(angles, is_turned, other=1.0), tl.load(angles + ROTARY, is_turned, other=0.0)
    zero = (T >> 31).to(tl.float32)
    if C.SERIAL:
        acc = _product.serial_sums(x_ptr, weight_ptr, scale_ptr, rows, offs_m, mask_x, stride_xt, zero, C)
    else:
        acc = _product.sums(x_ptr, weight_ptr, scale_ptr, rows, offs_m, mask_x, stride_xt, split, zero, C)
        if C.SPLITS > 1:
            n, m = tl.arange(0, C.BLOCK_N), tl.arange(0, C.BLOCK_M)
            if not _product.leave(acc, partials_ptr, counters_ptr, tile, split, n, m, C):
                return
            acc = _product.collect(partials_ptr, tile, n, m, C)
    mask_live = offs_m < live
    first, second = _product.halves(_product.normed(acc, _product.inverse_rms(squares, eps, C), bias_ptr, rows, C), C)      # [HALF, BLOCK_M]
    if q_norm_ptr is not None or k_norm_ptr is not None:
        scale = tl.rsqrt(_product.column_sums(tl.fma(first, first, second * second)) / D + eps)[None, :]
        if q_norm_ptr is not None:
            if head < H:
                first *= scale * tl.load(q_norm_ptr + offs_first, is_first, other=0.0).to(tl.float32)
                second *= scale * tl.load(q_norm_ptr + offs_second, is_second, other=0.0).to(tl.float32)
        if k_norm_ptr is not None:
            if (head >= H) & (head < H + KV):
                first *= scale * tl.load(k_norm_ptr + offs_first, is_first, other=0.0).to(tl.float32)
                second *= scale * tl.load(k_norm_ptr + offs_second, is_second, other=0.0).to(tl.float32)
    if not IS_EARLY:
        cos, sin = tl.load(angles, is_turned, other=1.0), tl.load(angles + ROTARY, is_turned, other=0.0)
    write_head(first, second, cos, sin, is_known, is_rotary, offs_first, offs_second, is_first, is_second, is_token, mask_live, slot, head, num_pages,
               q_out, k_cache_ptr, v_cache_ptr, stride_kcn, stride_kcp, stride_kch, stride_vcn, stride_vcp, stride_vch, H, KV, PAGE_SIZE)


def config(T: int, heads: int, D: int, rotary_dim: int, K: int, dtype: torch.dtype, splits: bool, kind: Kind = PLAIN,
           has_norms: bool = False, stride: int = 8) -> Tile:
    """A tile is a head, its pairs padded to a power of two, or where no norm needs all of a head, MOST_ROWS of its rows."""
    c = _tile.streamed(T, heads * D, K, dtype, splits, kind, stride)
    if c is not None and D == rotary_dim == c.BLOCK_N and not has_norms:
        return c
    pairs = rotary_dim // 2 + (D - rotary_dim + 1) // 2
    rows = max(2 * triton.next_power_of_2(pairs), 16)
    cuts = 1 if has_norms else max(rows // MOST_ROWS, 1)
    c = _tile.tile(T, heads * D, K, dtype, splits, (rows // cuts, heads * cuts), kind)
    return _tile.plain_streamed(c, T, dtype, stride) if D == rotary_dim and not has_norms else c


def norm_qkv(scaled: Scaled, weight: torch.Tensor | Quantized, eps: float, positions: torch.Tensor, cos_sin: torch.Tensor,
             slot_mapping: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, q_out: torch.Tensor, bias: torch.Tensor | None = None,
             q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None, num_tokens: torch.Tensor | None = None,
             workspace: Workspace | None = None) -> None:
    """Writes q to `q_out`, k and v to their slots, all heads' norms with one eps. Shapes: see the module. Raises ValueError or TypeError."""
    op, x, device = "norm_qkv", scaled.x, scaled.x.device
    parts = _product.check_scaled(op, "scaled", scaled, None, None, _check.FLOATS, None)
    T, K = x.shape
    _check.tensor(op, "q_out", q_out, (T, None, None), (x.dtype,), device, writes=True)
    H, D = q_out.shape[1:]
    _check.require(H >= 1 and 2 <= D <= MAX_D, op, "q_out", f"{H} heads of D = {D}", f"at least one, 2 to {MAX_D}")
    _check.tensor(op, "k_cache", k_cache, (None, None, None, D), _check.FLOATS, device, writes=True)
    N, P, KV, _ = k_cache.shape
    _check.tensor(op, "v_cache", v_cache, (N, P, KV, D), (k_cache.dtype,), device, writes=True)
    _check.require(N * P * KV >= 1 and H % KV == 0, op, "k_cache", f"shape {list(k_cache.shape)}", f"pages, and heads that divide the {H} of q")
    weight, scale, kind = check_weight(op, weight, (H + 2 * KV) * D, K, x)
    _check.require(K >= 1, op, "scaled.x", "no columns", "at least one")
    _check.tensor(op, "positions", positions, (T,), (torch.int32,), device, aligned=False)
    _check.tensor(op, "slot_mapping", slot_mapping, (T,), (torch.int64,), device, aligned=False)
    _check.tensor(op, "cos_sin", cos_sin, (None, None), (torch.float32,), device, dense=2)
    L, rotary_dim = cos_sin.shape
    _check.require(2 <= rotary_dim <= D and rotary_dim % 2 == 0, op, "cos_sin", f"{rotary_dim} columns", f"an even number, 2 to D = {D}")
    for name, t, n in (("bias", bias, (H + 2 * KV) * D), ("q_norm", q_norm, D), ("k_norm", k_norm, D)):
        if t is not None:
            _check.tensor(op, name, t, (n,), (x.dtype,), device)
    _check.counter(op, "num_tokens", num_tokens, device)
    if T == 0:
        return
    c = config(T, H + 2 * KV, D, rotary_dim, K, x.dtype, workspace is not None, kind, q_norm is not None or k_norm is not None,
               x.stride(0))
    scratch = _product.check_workspace(op, workspace, c, T, device)
    strides = *k_cache.stride()[:3], *v_cache.stride()[:3], *q_out.stride()[:2]
    if c.IS_STREAMED:
        _norm_qkv_streamed_kernel[c.grid(T)](
            *operands(weight, x, c), scaled.squares, scale, bias, positions, cos_sin, slot_mapping, k_cache, v_cache, q_out, *scratch, num_tokens,
            T, L, N, eps, *strides, H=H, KV=KV, PAGE_SIZE=P, PARTS=parts, C=c, **c.options())
        return
    _norm_qkv_kernel[c.grid(T)](
        x, scaled.squares, weight, scale, bias, q_norm, k_norm, positions, cos_sin, slot_mapping, k_cache, v_cache, q_out,
        *scratch, num_tokens, T, L, N, eps, x.stride(0), *strides,
        H=H, KV=KV, D=D, ROTARY=rotary_dim // 2, PAGE_SIZE=P, PARTS=parts, C=c, **c.options())
