"""Paged causal attention, one request at a time. Twin of gkernels/kernels/attention.py."""

import torch
from einops import rearrange, repeat


def attention(q, k_cache, v_cache, query_start_loc, seq_lens, block_table, scale=None):
    """Returns out [T, H, D] and lse [T, H]; rows of no request are zeros with lse -inf, rows of a request with bad data are NaN."""
    T, H, D = q.shape
    N, P, K, _ = k_cache.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = D ** -0.5 if scale is None else scale
    out, lse = torch.zeros_like(q), torch.full((T, H), float("-inf"), dtype=wide, device=q.device)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for r, length in enumerate(lens):
        start, end = starts[r], starts[r + 1]
        if length == 0 or start == end:
            continue
        pages = block_table[r, :-(-length // P)].long() if 0 < length <= block_table.shape[1] * P else None
        if pages is None or length < end - start or ((pages < 0) | (pages >= N)).any():
            out[start:end], lse[start:end] = float("nan"), float("nan")
            continue
        keys, values = (repeat(rearrange(cache[pages], "n p k d -> (n p) k d")[:length].to(wide), "n k d -> n (k g) d", g=H // K)
                        for cache in (k_cache, v_cache))
        scores = scale * torch.einsum("thd,nhd->htn", q[start:end].to(wide), keys)
        position = torch.arange(length - (end - start), length, device=q.device)
        scores = scores.masked_fill(torch.arange(length, device=q.device) > position[:, None], float("-inf"))
        out[start:end] = torch.einsum("htn,nhd->thd", scores.softmax(-1), values).to(q.dtype)
        lse[start:end] = scores.logsumexp(-1).T
    return out, lse
