"""Paged attention, one request at a time. Twin of gkernels/kernels/attention.py."""

import torch
from einops import rearrange, repeat


def attention(q, k_cache, v_cache, query_start_loc, seq_lens, block_table, scale=None, *, causal=True, window=(-1, -1), softcap=0.0, sinks=None,
              alibi_slopes=None, tree_mask=None, k_scale=None, v_scale=None):
    """Returns out [T, H, DV] and lse [T, H]; rows of no request are zeros with lse -inf, as are rows that see no key and no sink; rows of a
    request with bad data are NaN."""
    T, H, D = q.shape
    (N, P), DV = v_cache.shape[:2], v_cache.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = D ** -0.5 if scale is None else scale
    left, right = window[0], 0 if causal else window[1]
    out, lse = q.new_zeros(T, H, DV), torch.full((T, H), float("-inf"), dtype=wide, device=q.device)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for r, length in enumerate(lens):
        start, end = starts[r], starts[r + 1]
        if length == 0 or start == end:
            continue
        context = length - (end - start)
        pages = block_table[r, :-(-length // P)].long() if 0 < length <= block_table.shape[1] * P else None
        if pages is None or (causal and context < 0) or ((pages < 0) | (pages >= N)).any():
            out[start:end], lse[start:end] = float("nan"), float("nan")
            continue
        keys, values = (live_rows(cache[pages], length, factor, H, wide) for cache, factor in ((k_cache, k_scale), (v_cache, v_scale)))
        key = torch.arange(length, device=q.device)
        position = torch.arange(context, length, device=q.device)[:, None]
        seen = torch.ones(end - start, length, dtype=torch.bool, device=q.device)
        if left >= 0:
            seen &= key >= position - left
        if right >= 0:
            seen &= key <= position + right
        if tree_mask is not None:
            new = key - context
            seen &= (new < 0) | (new > 63) | (tree_mask[start:end, None] >> new.clamp(0, 63) & 1 == 1)
        scores = scale * torch.einsum("thd,nhd->htn", q[start:end].to(wide), keys)
        if softcap > 0:
            scores = softcap * (scores / softcap).tanh()
        if alibi_slopes is not None:
            slopes = alibi_slopes[r] if alibi_slopes.dim() == 2 else alibi_slopes
            scores = scores - slopes.to(wide)[:, None, None] * (position - key).abs()
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:                                          # one more key, whose value is zero
            scores = torch.cat([scores, repeat(sinks.to(wide), "h -> h t 1", t=end - start)], -1)
            values = torch.cat([values, torch.zeros_like(values[:1])])
        total = scores.logsumexp(-1)                                   # [H, t]
        weights = scores.softmax(-1).masked_fill(total[..., None] == float("-inf"), 0.0)
        out[start:end] = torch.einsum("htn,nhd->thd", weights, values).to(q.dtype)
        lse[start:end] = total.T
    return out, lse


def live_rows(pages, length, factor, H, wide):
    """[n, P, K, D] -> [length, H, D], multiplied with `factor` [1] or [K] where given."""
    rows = rearrange(pages.to(wide), "n p k d -> (n p) k d")[:length]
    if factor is not None:
        rows = rows * factor.to(wide)[:, None]
    return repeat(rows, "n k d -> n (k g) d", g=H // rows.shape[1])
