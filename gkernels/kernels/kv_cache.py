"""Paged KV cache: scatters new keys and values to their slots,  cache[slot // P, slot % P] = row.

k [T, K, D], v [T, K, DV] -> k_cache [N, P, K, D], v_cache [N, P, K, DV]. slot_mapping int64 [T] counts in tokens: page * P + offset.
The caches are logical shapes with any strides under a contiguous last dimension, so that token-major (NHD) and head-major (HND) pages,
the two halves of one [N, K, P, 2D] tensor and interleaved key and value pages all fit; k and v may be slices of a packed qkv.
Slot -1, like any slot outside [0, N * P), writes nothing and its row is not read. Rows are cast once, at the store, to the cache's dtype.
Graph-safe: the grid is (T,). It does not detect two live tokens with one slot: which of them stays is then undefined.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from ._overlap import overlap, wait_for_node_before

MAX_D = 1024


@triton.jit
def locate_slot(slot, num_pages, stride_n, stride_p, PAGE_SIZE: tl.constexpr):
    """(offset of the slot's first element in a cache, whether the slot exists). slot is int64, and so is the offset; it is 0 when not."""
    is_slot = (slot >= 0) & (slot < num_pages.to(tl.int64) * PAGE_SIZE)
    slot = tl.where(is_slot, slot, 0)
    return slot // PAGE_SIZE * stride_n + slot % PAGE_SIZE * stride_p, is_slot


@triton.jit(do_not_specialize=["num_pages"], do_not_specialize_on_alignment=["slot_mapping_ptr"])
def _kv_write_kernel(
    k_ptr,             # [T, K, D]
    v_ptr,             # [T, K, DV]
    k_cache_ptr,       # [N, P, K, D]
    v_cache_ptr,       # [N, P, K, DV]
    slot_mapping_ptr,  # [T] int64
    num_pages,
    stride_kt, stride_kh, stride_vt, stride_vh, stride_kcn, stride_kcp, stride_kch, stride_vcn, stride_vcp, stride_vch,
    PAGE_SIZE: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, OVERLAPS: tl.constexpr,
):
    wait_for_node_before(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    k_offset, is_slot = locate_slot(slot, num_pages, stride_kcn, stride_kcp, PAGE_SIZE)
    v_offset, _ = locate_slot(slot, num_pages, stride_vcn, stride_vcp, PAGE_SIZE)
    if is_slot:
        offs_d, offs_dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
        for start in tl.static_range(0, K, BLOCK_K):
            offs_k = (start + tl.arange(0, BLOCK_K)[:, None]).to(tl.int64)
            # [BLOCK_K, BLOCK_D]
            mask = (offs_k < K) & (offs_d < D)
            k = tl.load(k_ptr + token * stride_kt + offs_k * stride_kh + offs_d, mask).to(tl.float32)
            tl.store(k_cache_ptr + k_offset + offs_k * stride_kch + offs_d, k.to(k_cache_ptr.dtype.element_ty), mask)
            # [BLOCK_K, BLOCK_DV]
            mask = (offs_k < K) & (offs_dv < DV)
            v = tl.load(v_ptr + token * stride_vt + offs_k * stride_vh + offs_dv, mask).to(tl.float32)
            tl.store(v_cache_ptr + v_offset + offs_k * stride_vch + offs_dv, v.to(v_cache_ptr.dtype.element_ty), mask)


@dataclass(frozen=True)
class Config:
    BLOCK_K: int
    BLOCK_D: int
    BLOCK_DV: int
    num_warps: int


def config(K: int, D: int, DV: int) -> Config:
    """One 16-byte vector of half-precision keys a thread, and at most 4096 keys a tile: more would only add registers."""
    block_d, block_dv = triton.next_power_of_2(D), triton.next_power_of_2(DV)
    block_k = min(triton.next_power_of_2(K), 4096 // max(block_d, block_dv))
    return Config(block_k, block_d, block_dv, min(max(block_k * max(block_d, block_dv) // 256, 1), 8))


def check_cache(op, k, v, k_cache, v_cache, slot_mapping):
    """Checks what every op that writes to a paged cache must hold; k is [T, K, D] and v [T, K, DV]."""
    _check.tensor(op, "k", k, (None, None, None), _check.FLOATS)
    T, K, D = k.shape
    _check.tensor(op, "v", v, (T, K, None), _check.FLOATS, k.device)
    DV = v.shape[2]
    _check.require(K >= 1, op, "k", f"K = {K}", "1 or more")
    for name, width in (("k", D), ("v", DV)):
        _check.require(1 <= width <= MAX_D, op, name, f"a last dimension of {width}", f"1 to {MAX_D}")
    _check.tensor(op, "k_cache", k_cache, (None, None, K, D), _check.FLOATS, k.device, writes=True)
    _check.tensor(op, "v_cache", v_cache, (*k_cache.shape[:2], K, DV), _check.FLOATS, k.device, writes=True)
    _check.require(k_cache.shape[1] >= 1, op, "k_cache", f"a page size of {k_cache.shape[1]}", "1 or more")
    _check.tensor(op, "slot_mapping", slot_mapping, (T,), (torch.int64,), k.device, aligned=False)


def kv_write(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Writes k and v in place to their slots of the caches. Shapes: see the module. Raises ValueError or TypeError on a misfit."""
    check_cache("kv_write", k, v, k_cache, v_cache, slot_mapping)
    (T, K, D), DV, (N, P) = k.shape, v.shape[2], k_cache.shape[:2]
    if T * N == 0:
        return
    c = config(K, D, DV)
    _kv_write_kernel[(T,)](
        k, v, k_cache, v_cache, slot_mapping, N, *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        PAGE_SIZE=P, K=K, D=D, DV=DV, BLOCK_K=c.BLOCK_K, BLOCK_D=c.BLOCK_D, BLOCK_DV=c.BLOCK_DV, num_warps=c.num_warps, **overlap())
