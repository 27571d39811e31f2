"""What becomes of the pairs of a head of q, k or v, [HALF, BLOCK_M] each: rotation, and the way to q's rows or the caches' slots."""

import triton
import triton.language as tl

from .kv_cache import locate_slot


@triton.jit
def store_pairs(tile, first, second, offs_first, offs_second, mask_first, mask_second):
    """first and second [HALF, BLOCK_M] at tile [1, BLOCK_M] + offs [HALF, 1]."""
    tl.store(tile + offs_first, first.to(tile.dtype.element_ty), mask_first)
    tl.store(tile + offs_second, second.to(tile.dtype.element_ty), mask_second)


@triton.jit
def write_head(first, second, cos, sin, is_known, is_rotary, offs_first, offs_second, is_first, is_second, is_token, mask_live, slot, head, num_pages,
               q_out, k_cache_ptr, v_cache_ptr, stride_kcn, stride_kcp, stride_kch, stride_vcn, stride_vcp, stride_vch,
               H: tl.constexpr, KV: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Rotates the pairs of a head of q or k, NaN where the position is not known, and stores them; of v it only stores them. Masks and offsets are
    those of `_norm_qkv_kernel`."""
    if head < H + KV:
        # explicit fma: the bits do not depend on which of the two products a compiler would fuse
        turned, nan = tl.fma(first, cos, -(second * sin)), float("nan")
        second = tl.where(is_known, tl.where(is_rotary, tl.fma(second, cos, first * sin), second), nan)
        first = tl.where(is_known, tl.where(is_rotary, turned, first), nan)
    if head < H:
        first, second = tl.where(mask_live[None, :], first, 0.0), tl.where(mask_live[None, :], second, 0.0)
        store_pairs(q_out, first, second, offs_first, offs_second, is_first & is_token, is_second & is_token)
    else:
        slot = tl.where(mask_live[None, :], slot, -1)
        if head < H + KV:
            offset, is_slot = locate_slot(slot, num_pages, stride_kcn, stride_kcp, PAGE_SIZE)
            k_tile = k_cache_ptr + offset + (head - H).to(tl.int64) * stride_kch
            store_pairs(k_tile, first, second, offs_first, offs_second, is_first & is_slot, is_second & is_slot)
        else:
            offset, is_slot = locate_slot(slot, num_pages, stride_vcn, stride_vcp, PAGE_SIZE)
            v_tile = v_cache_ptr + offset + (head - H - KV).to(tl.int64) * stride_vch
            store_pairs(v_tile, first, second, offs_first, offs_second, is_first & is_slot, is_second & is_slot)
