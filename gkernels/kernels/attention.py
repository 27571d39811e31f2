"""Paged causal attention for any mix of prefill chunks, decodes and short verify rows, in one launch of a fixed grid.

out = softmax(scale * q k^T + causal mask) v over each request's pages, with grouped query heads (H = G * K, any G from 1 to 16).
q [T, H, D]; k_cache, v_cache [N, P, K, D] with any strides but a contiguous last dimension; block_table int32 [R, W]; items and num_items
from `schedule`. -> out [T, H, D], and lse [T, H] float32 (natural log of the sum of exponentials) where asked for.
One program an item and KV head: a tile of BLOCK_Q query rows times the G heads of a group runs over the keys from absolute position 0 in
steps of BLOCK_N (Dao 2023, arXiv 2307.08691), so a row's bits depend on its own request alone: not on the batch, the bucket, the chunking
or the page layout. Pad rows are zeros with lse -inf; rows of a request with bad lengths or pages are NaN. Keys that are not live are never
read; but a value of the request's own that is not finite spoils every row of its tile, also rows before it (0 times NaN).
It does not: split one row's keys over programs, mask by window or tree, or scale fp8 caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _check
from .schedule import max_items, schedule

LOG2_E = 1.4426950408889634
MAX_GROUP = 16


@triton.jit(do_not_specialize=["T", "R", "W", "N", "stride_br"], do_not_specialize_on_alignment=["num_items_ptr"])
def _attention_kernel(
    q_ptr,             # [T, H, D]
    k_cache_ptr,       # [N, P, K, D]
    v_cache_ptr,       # [N, P, K, D]
    block_table_ptr,   # [R, W]
    items_ptr,         # [I, 4]: request or -1, first token, rows, position of the first row or -1
    num_items_ptr,     # [1]
    out_ptr,           # [T, H, D]
    lse_ptr,           # [T, H] float32, or None
    scale_log2,        # softmax scale times log2(e)
    stride_qt, stride_qh, stride_kn, stride_kp, stride_kh, stride_vn, stride_vp, stride_vh, stride_br, stride_ot, stride_oh, stride_lt,
    T, R, W, N,
    G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr, HAS_LSE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):
    if tl.program_id(0) >= tl.load(num_items_ptr):
        return
    item = items_ptr + tl.program_id(0).to(tl.int64) * 4
    request, first_token, rows, position = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    kv_head = tl.program_id(1)
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    row, member = offs_m // GROUP, offs_m % GROUP                                     # [BLOCK_M]: the group's heads lie side by side
    token, head = first_token.to(tl.int64) + row, (kv_head * G + member).to(tl.int64)
    live = (row < rows) & (member < G) & (token >= 0) & (token < T)
    mask_md = live[:, None] & (offs_d < D)[None, :]
    out = out_ptr + token[:, None] * stride_ot + head[:, None] * stride_oh + offs_d[None, :]

    stop = position.to(tl.int64) + rows                                               # keys that the tile's last row sees
    good = (position >= 0) & (rows > 0) & (request < R) & (stop <= W.to(tl.int64) * P)
    if (request < 0) | (good == 0):
        fill = tl.where(request < 0, 0.0, float("nan"))
        tl.store(out, (tl.zeros((BLOCK_M, BLOCK_D), tl.float32) + fill).to(out_ptr.dtype.element_ty), mask_md)
        if HAS_LSE:
            tl.store(lse_ptr + token * stride_lt + head, tl.zeros((BLOCK_M,), tl.float32) + tl.where(request < 0, float("-inf"), fill), live)
        return

    q = tl.load(q_ptr + token[:, None] * stride_qt + head[:, None] * stride_qh + offs_d[None, :], mask_md, other=0.0)   # [BLOCK_M, BLOCK_D]
    table = block_table_ptr + request.to(tl.int64) * stride_br
    k_head, v_head = k_cache_ptr + kv_head.to(tl.int64) * stride_kh, v_cache_ptr + kv_head.to(tl.int64) * stride_vh
    m_i, l_i = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    bad_pages = tl.zeros((BLOCK_N,), tl.int32)
    kv_len = stop.to(tl.int32)
    for n in tl.range(0, kv_len, BLOCK_N, num_stages=STAGES):
        key = n + offs_n                                                              # [BLOCK_N]: positions
        seen = key < kv_len
        page = tl.load(table + key // P, seen, other=0)
        bad_pages |= ((page < 0) | (page >= N)).to(tl.int32)
        page = tl.where((page >= 0) & (page < N), page, 0).to(tl.int64)
        slot = (key % P).to(tl.int64)
        mask_nd = seen[:, None] & (offs_d < D)[None, :]
        k = tl.load(k_head + page[:, None] * stride_kn + slot[:, None] * stride_kp + offs_d[None, :], mask_nd, other=0.0)
        v = tl.load(v_head + page[:, None] * stride_vn + slot[:, None] * stride_vp + offs_d[None, :], mask_nd, other=0.0)
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2                    # [BLOCK_M, BLOCK_N]
        s = tl.where(key[None, :] <= (position + row)[:, None], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p, alpha = tl.exp2(s - m_new[:, None]), tl.exp2(m_i - m_new)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new

    poison = tl.where(tl.max(bad_pages) > 0, float("nan"), 0.0)
    tl.store(out, (acc / l_i[:, None] + poison).to(out_ptr.dtype.element_ty), mask_md)
    if HAS_LSE:
        tl.store(lse_ptr + token * stride_lt + head, (m_i + tl.log2(l_i)) / 1.4426950408889634 + poison, live)


@dataclass(frozen=True)
class Config:
    BLOCK_Q: int     # query rows of one item: what `schedule` cuts requests into
    BLOCK_M: int     # query rows times the group, padded to a power of two
    BLOCK_N: int
    STAGES: int
    num_warps: int


def config(G: int, D: int, dtype: torch.dtype) -> Config:
    """Tiles from the model's constants alone: a change of tile is a change of bits, so no capacity and no length may decide it."""
    group = triton.next_power_of_2(G)
    if dtype == torch.float32:                       # exact products run on the scalar units: small tiles keep registers free
        block_m, block_n, stages, warps = 16, 32 if D <= 64 else 16, 1, 4 if D <= 64 else 8
    else:
        block_m, block_n, stages, warps = 64, 64 if D <= 64 else 32, 2, 4 if D <= 128 else 8
    return Config(block_m // group, block_m, block_n, stages, warps)


def _check_ranks(q, k_cache):
    _check.require(q.dim() == 3 and k_cache.dim() == 4, "attention", "q, k_cache", f"{q.dim()} and {k_cache.dim()} dimensions",
                   "[T, H, D] and [N, P, K, D]")


def attention_out(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, items: torch.Tensor,
                  num_items: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None = None, scale: float | None = None) -> None:
    """Writes attention to `out` and, where given, log-sum-exp to `lse`. scale defaults to D ** -0.5; shapes as in the module.
    `items` must have been cut with this op's BLOCK_Q. Raises ValueError or TypeError on shapes, strides or dtypes that do not fit."""
    _check_ranks(q, k_cache)
    (T, H, D), (N, P, K, _), R = q.shape, k_cache.shape, block_table.shape[0]
    _check.require(N >= 1, "attention", "k_cache", "no pages", "at least the null page")
    _check.require(K >= 1 and H % K == 0 and 1 <= H // K <= MAX_GROUP, "attention", "q", f"{H} query heads for {K} KV heads",
                   f"a multiple of the KV heads, at most {MAX_GROUP} times as many")
    _check.require(1 <= D <= 256, "attention", "q", f"D = {D}", "1 to 256")
    _check.require(1 <= P <= 256, "attention", "k_cache", f"page size {P}", "1 to 256")
    c = config(H // K, D, q.dtype)
    _check.tensor("attention", "q", q, (T, H, D), _check.FLOATS)
    _check.tensor("attention", "k_cache", k_cache, (N, P, K, D), (q.dtype,), q.device)
    _check.tensor("attention", "v_cache", v_cache, (N, P, K, D), (q.dtype,), q.device)
    _check.tensor("attention", "block_table", block_table, (R, None), (torch.int32,), q.device)
    _check.tensor("attention", "items", items, (max_items(T, R, c.BLOCK_Q), 4), (torch.int32,), q.device, dense=2)
    _check.counter("attention", "num_items", num_items, q.device)
    _check.tensor("attention", "out", out, (T, H, D), (q.dtype,), q.device, writes=True)
    if lse is not None:
        _check.tensor("attention", "lse", lse, (T, H), (torch.float32,), q.device, writes=True)
    if T == 0:
        return
    scale = D ** -0.5 if scale is None else scale
    _attention_kernel[(items.shape[0], K)](
        q, k_cache, v_cache, block_table, items, num_items, out, lse, scale * LOG2_E,
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2), block_table.stride(0), out.stride(0), out.stride(1),
        0 if lse is None else lse.stride(0), T, R, block_table.shape[1], N,
        G=H // K, D=D, P=P, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", HAS_LSE=lse is not None,
        GROUP=triton.next_power_of_2(H // K), BLOCK_D=max(triton.next_power_of_2(D), 16), BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N,
        STAGES=c.STAGES, num_warps=c.num_warps)


def attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, query_start_loc: torch.Tensor, seq_lens: torch.Tensor,
              block_table: torch.Tensor, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes the schedule, then returns (out [T, H, D], lse [T, H]). In a model, `schedule` runs once and `attention_out` in every layer."""
    _check_ranks(q, k_cache)
    T, H, D = q.shape
    block_q = config(H // k_cache.shape[2], D, q.dtype).BLOCK_Q
    plan = schedule(query_start_loc, seq_lens, block_table, k_cache.shape[1], k_cache.shape[0], T, block_q)
    out, lse = torch.empty_like(q), torch.empty(T, H, dtype=torch.float32, device=q.device)
    attention_out(q, k_cache, v_cache, block_table, plan.items, plan.num_items, out, lse, scale)
    return out, lse
