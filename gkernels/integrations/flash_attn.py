"""FlashAttention's two calls for inference, with the arguments of flash-attn 2.8 by name, order and default, so that an engine swaps an import:

    from gkernels.integrations.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

Both may be captured in a CUDA graph and replayed with other lengths, tables and contents: nothing here waits for the device or looks at what
a tensor holds. Keys and values are attended where they lie, and row by row the bits are those of `gkernels.ops.attention`.
Also taken: float32, any head dimension up to 256, values narrower than keys, pages of any size (there multiples of 256), and vLLM's
keywords out, seqused_k, s_aux, k_descale, v_descale and return_softmax_lse.
Differs: rows that see no key are zeros, as there, but their lse is -inf, the neutral element of `merge` (there +inf); with slopes and a causal
mask the lse counts the bias as defined below (there slope * key, so that it is greater by slope * position); a request with bad lengths or
pages is NaN; rows past cu_seqlens_q[-1] are zeros. There is no dropout and no backward pass. Needs no package but gkernels.
"""

from __future__ import annotations

import math

import torch

from ..kernels import _check
from ..ops import attention, kv_write, rotary

MAX_PAGE = 256      # of attention
INT32 = (torch.int32,)
Tensor = torch.Tensor
Result = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, None]


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                           max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                           window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
                           deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None, *,
                           seqused_k: Tensor | None = None, s_aux: Tensor | None = None, k_descale: Tensor | None = None,
                           v_descale: Tensor | None = None, return_softmax_lse: bool = False, out: Tensor | None = None) -> Result:
    """Attention of packed sequences: out [total_q, H, DV], with return_softmax_lse (out, lse [H, total_q]), with return_attn_probs
    (out, lse, None).

    q [total_q, H, D], k [total_k, K, D], v [total_k, K, DV]; with block_table int32 [B, W] pages k [N, P, K, D], v [N, P, K, DV].
    cu_seqlens_q, cu_seqlens_k int32 [B + 1] prefix sums of the lengths; seqused_k int32 [B] replaces the key lengths, so that with it pages
    need no cu_seqlens_k (None). Masks are aligned to the last query and the last key; alibi_slopes float32 [H] or [B, H] add
    -slope * |key - position|, where the last query stands at the last key; s_aux [H] are logits without a value. max_seqlen_k is a capacity:
    packed keys take a table of B * max_seqlen_k * 4 bytes, and a longer sequence is NaN. max_seqlen_q and deterministic change nothing.
    k_descale, v_descale: factors [1], [K], or [B, K] expanded from one row. `out` costs a copy. Raises ValueError or TypeError on a misfit.
    """
    op = "flash_attn_varlen_func"
    _check.require(dropout_p == 0, op, "dropout_p", dropout_p, "0.0: these are kernels for inference")
    _check.tensor(op, "q", q, (None, None, None), _check.FLOATS)
    _check.tensor(op, "cu_seqlens_q", cu_seqlens_q, (None,), INT32, q.device)
    _check.tensor(op, "k", k, (None,) * (3 if block_table is None else 4), (q.dtype, torch.float8_e4m3fn), q.device)
    _check.tensor(op, "v", v, (*k.shape[:-1], None), (k.dtype,), q.device)
    if block_table is None or seqused_k is None:
        _check.tensor(op, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), INT32, q.device, aligned=False)
    if seqused_k is not None:
        _check.tensor(op, "seqused_k", seqused_k, (len(cu_seqlens_q) - 1,), INT32, q.device)
    lens = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    if block_table is None:        # a page a token; entries that lead outside k are bad data, as they are in any table
        k, v = (t[:, None] if len(t) else t.new_zeros(1, 1, *t.shape[1:]) for t in (k, v))
        block_table = cu_seqlens_k[:-1, None] + torch.arange(max(max_seqlen_k, 1), dtype=torch.int32, device=q.device)
    k, v, block_table = _small_pages(op, k, v, block_table)
    rows, lse = _attend(op, q, k, v, cu_seqlens_q, lens, block_table, softmax_scale, causal, window_size, softcap, alibi_slopes,
                        s_aux, k_descale, v_descale)
    rows = _deliver(op, rows, out)
    if not (return_attn_probs or return_softmax_lse):
        return rows
    lse = lse.T.contiguous()
    return (rows, lse, None) if return_attn_probs else (rows, lse)


def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
                            rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: int | Tensor | None = None,
                            cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
                            softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
                            softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0,
                            return_softmax_lse: bool = False, *, s_aux: Tensor | None = None, k_descale: Tensor | None = None,
                            v_descale: Tensor | None = None, out: Tensor | None = None) -> Result:
    """Attention over a cache, after appending k and v to it in place: out [B, Sq, H, DV], with return_softmax_lse (out, lse [B, H, Sq]).

    q [B, Sq, H, D]; k_cache [C, S, K, D], v_cache [C, S, K, DV], of which request b has row b or cache_batch_idx[b] (int32 [B]), or with
    block_table int32 [B, W] pages [N, P, K, D]. k [B, Snew, K, D] and v go to the positions cache_seqlens[b], cache_seqlens[b] + 1, ...;
    those outside the cache are dropped, and the request is NaN. cache_seqlens: an int, int32 [B], or None for a full cache.
    rotary_cos, rotary_sin [L, rotary_dim / 2] turn k by these positions, and q by the same with a causal or windowed mask, else all of it
    by cache_seqlens; positions from L on are NaN. num_splits changes nothing: splits lie at fixed positions, so that a row's bits do not
    depend on its batch. cache_leftpad is not taken. `out` costs a copy. Raises ValueError or TypeError on a misfit.
    """
    op = "flash_attn_with_kvcache"
    _check.tensor(op, "q", q, (None, None, None, None), _check.FLOATS)
    B, Sq, _, D = q.shape
    _check.require(cache_leftpad is None, op, "cache_leftpad", "a tensor", "None: a request's keys begin at slot 0; use block_table")
    _check.tensor(op, "k_cache", k_cache, (None, None, None, D), (q.dtype, torch.float8_e4m3fn), q.device)
    _check.tensor(op, "v_cache", v_cache, (*k_cache.shape[:3], None), (k_cache.dtype,), q.device)
    _check.require(block_table is None or cache_batch_idx is None, op, "cache_batch_idx", "a tensor", "None where block_table names the pages")
    _check.require((k is None) == (v is None), op, "v", type(v).__name__, "k and v together, or neither")
    _check.require((rotary_cos is None) == (rotary_sin is None), op, "rotary_sin", type(rotary_sin).__name__, "cos and sin together, or neither")
    _check.require(rotary_cos is None or k is not None, op, "rotary_cos", "a tensor without k", "k and v to append; keys in the cache are turned")
    _check.require(cache_seqlens is not None or k is None, op, "cache_seqlens", None, "an int or int32 [B], where k is to be appended")
    if k is not None and v is not None:
        _check.tensor(op, "k", k, (B, None, k_cache.shape[2], D), (q.dtype,), q.device)
        _check.tensor(op, "v", v, (B, k.shape[1], *v_cache.shape[2:]), (q.dtype,), q.device)
    if block_table is not None:
        _check.tensor(op, "block_table", block_table, (B, None), INT32, q.device)
    elif cache_batch_idx is not None:
        _check.tensor(op, "cache_batch_idx", cache_batch_idx, (B,), INT32, q.device)
    else:
        _check.require(len(k_cache) >= B, op, "k_cache", f"{len(k_cache)} rows", f"{B}, one a request, or cache_batch_idx")
    if block_table is None:
        block_table = (torch.arange(B, dtype=torch.int32, device=q.device) if cache_batch_idx is None else cache_batch_idx)[:, None]
    k_cache, v_cache, block_table = _small_pages(op, k_cache, v_cache, block_table)
    capacity = block_table.shape[1] * k_cache.shape[1]
    if isinstance(cache_seqlens, Tensor):
        _check.tensor(op, "cache_seqlens", cache_seqlens, (B,), INT32, q.device)
        lens = cache_seqlens
    else:
        most = capacity - (0 if k is None else k.shape[1])
        _check.require(cache_seqlens is None or 0 <= cache_seqlens <= most, op, "cache_seqlens", cache_seqlens, f"0 to {most}, what the cache holds")
        lens = torch.full((B,), capacity if cache_seqlens is None else cache_seqlens, dtype=torch.int32, device=q.device)
    if k is not None and v is not None:
        after = lambda n: lens[:, None] + torch.arange(n, dtype=torch.int32, device=q.device)                 # [B, n]
        positions = after(k.shape[1])
        if rotary_cos is not None:
            is_local = causal or tuple(window_size) != (-1, -1)
            k = _turn(op, k, positions, rotary_cos, rotary_sin, rotary_interleaved)
            q = _turn(op, q, after(Sq) if is_local else lens[:, None].expand(B, Sq), rotary_cos, rotary_sin, rotary_interleaved)
        kv_write(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, _slots(positions, block_table, k_cache.shape[1]))
        lens = torch.where(lens < 0, lens, lens + k.shape[1])                                                 # bad lengths stay bad
    starts = torch.arange(B + 1, dtype=torch.int32, device=q.device) * Sq
    rows, lse = _attend(op, q.flatten(0, 1), k_cache, v_cache, starts, lens, block_table, softmax_scale, causal, window_size, softcap,
                        alibi_slopes, s_aux, k_descale, v_descale)
    rows = _deliver(op, rows.unflatten(0, (B, Sq)), out)
    return (rows, lse.unflatten(0, (B, Sq)).transpose(1, 2).contiguous()) if return_softmax_lse else rows


def _attend(op, q, k_cache, v_cache, starts, lens, block_table, scale, causal, window_size, softcap, alibi_slopes, s_aux, k_descale, v_descale):
    """attention whose causal mask lets a query be longer than its keys: `causal=True` there calls that bad data, a window that ends at the
    query's own position does not."""
    left, right = window_size
    return attention(q, k_cache, v_cache, starts, lens, block_table, scale, causal=False, window=(left, 0 if causal else right),
                     softcap=softcap, alibi_slopes=alibi_slopes, sinks=None if s_aux is None else s_aux.float(),
                     k_scale=_shared_row(op, "k_descale", k_descale), v_scale=_shared_row(op, "v_descale", v_descale))


def _small_pages(op, k_cache, v_cache, block_table):
    """Pages of more than MAX_PAGE tokens, such as the rows of a dense cache, as several pages each: views, and a table of them."""
    (N, P), apart = k_cache.shape[:2], []
    if P <= MAX_PAGE:
        return k_cache, v_cache, block_table
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        token, page = cache.stride(1), cache.stride(0) if N > 1 else P * cache.stride(1)
        _check.require(token > 0 and page % token == 0 and page >= P * token, op, name, f"strides {list(cache.stride())}",
                       f"pages of {P} tokens that lie a whole number of tokens apart; call .contiguous()")
        apart.append(page // token)
    _check.require(apart[0] == apart[1], op, "v_cache", f"pages {apart[1]} tokens apart", f"{apart[0]}, as in k_cache; lay both out alike")
    both = math.gcd(P, apart[0])
    size = next(size for size in range(MAX_PAGE, 0, -1) if both % size == 0)
    pages, step = P // size, apart[0] // size
    k_cache, v_cache = (t.as_strided(((N - 1) * step + pages, size, *t.shape[2:]), (size * t.stride(1), *t.stride()[1:])) for t in (k_cache, v_cache))
    table = block_table.long()[:, :, None] * step + torch.arange(pages, device=block_table.device)
    return k_cache, v_cache, table.flatten(1).clamp(-1, 2**31 - 1).int()            # what named no page before names none after


def _slots(positions, block_table, P):
    """int64 [B * n]: the cache slots of positions int32 [B, n]; -1 for those outside the table."""
    capacity = block_table.shape[1] * P
    inside = positions.clamp(0, capacity - 1).long()
    slots = block_table.gather(1, inside // P).long() * P + inside % P
    return torch.where((positions >= 0) & (positions < capacity), slots, -1).flatten()


def _turn(op, x, positions, cos, sin, interleaved):
    """x [B, n, heads, D] turned by positions int32 [B, n]; the table is gathered for these tokens alone."""
    _check.tensor(op, "rotary_cos", cos, (None, None), _check.FLOATS, x.device, dense=0, aligned=False)
    _check.tensor(op, "rotary_sin", sin, tuple(cos.shape), (cos.dtype,), x.device, dense=0, aligned=False)
    L = len(cos)
    _check.require(L >= 1, op, "rotary_cos", "no positions", "[L, rotary_dim / 2] with L of at least 1")
    flat, at = x.flatten(0, 1), positions.flatten()
    rows = at.clamp(0, L - 1)
    table = torch.cat([cos.index_select(0, rows), sin.index_select(0, rows)], 1).float()
    own = torch.arange(len(at), dtype=torch.int32, device=x.device)
    return rotary(flat, flat[:, :1], torch.where((at >= 0) & (at < L), own, -1), table, interleaved)[0].unflatten(0, x.shape[:2])


def _shared_row(op, name, factors):
    """[1] or [K] from [B, K] that every request shares."""
    if factors is None or factors.dim() < 2:
        return factors
    _check.require(factors.stride(0) == 0 or len(factors) == 1, op, name, f"strides {list(factors.stride())}",
                   "[1], [K], or one row for all requests, made with .expand()")
    return factors[0, :1] if factors.stride(1) == 0 else factors[0]


def _deliver(op, rows, out):
    if out is None:
        return rows
    _check.tensor(op, "out", out, tuple(rows.shape), (rows.dtype,), rows.device, writes=True)
    return out.copy_(rows)
