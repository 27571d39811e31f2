"""FlashAttention's face against plain PyTorch, sequence by sequence, and what makes it safe to capture."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import TorchDispatchMode

from gkernels.graph.launches import record
from gkernels.graph.memory import fill_with_junk, tensors_in
from gkernels.integrations import flash_attn as face
from gkernels.kernels import rotary as rotary_room
from tests.close import assert_close, assert_same
from tests.strategies import binaries, poisons, randn, seeds

EMPTY = float("-inf")
dtypes = binaries([torch.bfloat16, torch.float32, torch.float16], 1)
heads = binaries([(4, 2), (2, 2), (3, 1)], 1)                                           # (H, K)
lengths = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30)), min_size=1, max_size=3)     # (queries, keys) of each sequence
options = st.fixed_dictionaries({}, optional=dict(
    causal=st.booleans(), window_size=st.sampled_from([(-1, -1), (0, 0), (4, 0), (5, 2), (-1, 3), (7, -1)]), softcap=binaries([0.0, 3.0], 1),
    softmax_scale=st.sampled_from([None, 0.3]), alibi_slopes=st.sampled_from(["[H]", "[B, H]"])))


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def starts(lens, device):
    return ints([sum(lens[:i]) for i in range(len(lens) + 1)], device)


def slopes_of(kwargs, B, H, device):
    """The options with tensors for names."""
    shape = {"[H]": (H,), "[B, H]": (B, H)}.get(kwargs.get("alibi_slopes"))
    return kwargs if shape is None else kwargs | {"alibi_slopes": randn(5, *shape, device=device).abs()}


def one_sequence(q, k, v, b=0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, s_aux=None):
    """q [n, H, D], k [m, K, D], v [m, K, DV] -> out [n, H, DV], lse [H, n], as FlashAttention documents them but for lse -inf without keys."""
    n, m, group, wide = len(q), len(k), q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    rows, keys, values = (t.to(wide).transpose(0, 1) for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    scores = rows @ keys.mT * (q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale)
    scores = scores if softcap == 0 else softcap * (scores / softcap).tanh()
    distance = torch.arange(m, device=q.device) - torch.arange(m - n, m, device=q.device)[:, None]          # of key and position
    if alibi_slopes is not None:
        slopes = alibi_slopes[b] if alibi_slopes.dim() == 2 else alibi_slopes
        scores = scores - slopes.to(wide)[:, None, None] * distance.abs()
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = (distance > right) & (right >= 0) | (distance < -left) & (left >= 0)
    scores = scores.masked_fill(hidden, EMPTY)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.to(wide)[:, None, None].expand(-1, n, 1)], -1)
        values = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:2], EMPTY)
    weights = (scores - lse.clamp(min=-1e30)[..., None]).exp()
    return (weights @ values).transpose(0, 1).to(q.dtype), lse


@pytest.mark.parametrize("causal, window, softmax_scale", [(False, (-1, -1), None), (True, (-1, -1), 0.3), (False, (2, 1), None)])
def test_the_plain_form_is_torchs_own(device, causal, window, softmax_scale):
    q, k, v = (randn(i, 6, 4, 16, device=device).double() for i in range(3))
    at = torch.arange(6, device=device)
    seen = (at <= at[:, None] + 1) & (at >= at[:, None] - 2) if window != (-1, -1) else None
    want = sdpa(*(t.transpose(0, 1) for t in (q, k, v)), attn_mask=seen, is_causal=causal, scale=softmax_scale).transpose(0, 1)
    got = one_sequence(q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window)[0]
    assert_close(got.float(), want, want)


def compare(out, lse, sequences, kwargs):
    """out and lse by sequence, against the same sequences (q, k, v) in float64 and in their own dtypes."""
    for b, (rows, row_lse, tensors) in enumerate(zip(out, lse, sequences, strict=True)):
        want, plain = one_sequence(*(t.double() for t in tensors), b, **kwargs), one_sequence(*tensors, b, **kwargs)
        assert_close(rows, want[0], plain[0])
        assert_close(row_lse, want[1], plain[1])


class Varlen:
    """Packed sequences: queries with pad rows, keys with rows that belong to nobody, and the same keys in pages of a shuffled cache."""

    def __init__(self, seed, dtype, device, lens, heads, D=16, DV=16, page_size=None, poison=0.0):
        (self.q_lens, self.k_lens), (H, K), self.device = zip(*lens, strict=True), heads, device
        total_q, total_k = sum(self.q_lens), sum(self.k_lens)
        q, k, v = (randn(seed + i, n, h, d, dtype=dtype, device=device)
                   for i, (n, h, d) in enumerate([(total_q, H, D), (total_k, K, D), (total_k, K, DV)]))
        self.sequences = list(zip(q.split(self.q_lens), k.split(self.k_lens), v.split(self.k_lens), strict=True))
        pad = lambda t, n: torch.cat([t, torch.full((n, *t.shape[1:]), poison, dtype=dtype, device=device)])
        self.arguments = dict(q=pad(q, 2), k=pad(k, 3), v=pad(v, 3), cu_seqlens_q=starts(self.q_lens, device),
                              cu_seqlens_k=starts(self.k_lens, device), max_seqlen_q=max(self.q_lens), max_seqlen_k=max(self.k_lens))
        if page_size:
            pages = [-(-n // page_size) for n in self.k_lens]
            order = torch.randperm(sum(pages) + 1, generator=torch.Generator().manual_seed(seed)).tolist()
            table = torch.full((len(pages), max(*pages, 1) + 1), -7, dtype=torch.int32)
            caches = [torch.full((sum(pages) + 1, page_size, K, d), poison, dtype=dtype, device=device) for d in (D, DV)]
            for b, n in enumerate(self.k_lens):
                at, own = torch.arange(n), torch.tensor([order.pop() for _ in range(pages[b])], dtype=torch.long)
                table[b, :pages[b]] = own
                for cache, rows in zip(caches, self.sequences[b][1:], strict=True):
                    cache[own[at // page_size].to(device), (at % page_size).to(device)] = rows
            self.arguments |= dict(k=caches[0], v=caches[1], block_table=table.to(device))

    def judge(self, varlen, kwargs):
        kwargs = slopes_of(kwargs, len(self.q_lens), self.arguments["q"].shape[1], self.device)
        out, lse, probabilities = varlen(**self.arguments, **kwargs, return_attn_probs=True)
        assert probabilities is None and out.shape[0] == lse.shape[1] == len(self.arguments["q"])
        live = sum(self.q_lens)
        compare(out[:live].split(self.q_lens), lse[:, :live].split(self.q_lens, 1), self.sequences, kwargs)
        assert_same(out[live:], torch.zeros_like(out[live:]))
        assert (lse[:, live:] == EMPTY).all()


@given(seeds, dtypes, lengths, heads, binaries([16, None, 1, 4]), poisons, options)
def test_varlen_equals_plain(device, seed, dtype, lens, heads, page_size, poison, kwargs):
    """Packed and paged; queries longer than their keys too; poison in all that belongs to no sequence."""
    Varlen(seed, dtype, device, lens, heads, page_size=page_size, poison=poison).judge(face.flash_attn_varlen_func, kwargs)


LENS = [(3, 20), (1, 9), (5, 2)]


def without(name):
    return lambda **kwargs: face.flash_attn_varlen_func(**{key: value for key, value in kwargs.items() if key != name})


def a_key_too_many(**kwargs):
    return face.flash_attn_varlen_func(**kwargs, seqused_k=kwargs["cu_seqlens_k"].diff() + 1)


def causal_is_bad_data(**kwargs):
    out, lse, _ = face.flash_attn_varlen_func(**kwargs)
    return torch.where((lse == EMPTY).T[..., None], float("nan"), out), lse, None


def infinite_lse(**kwargs):
    out, lse, _ = face.flash_attn_varlen_func(**kwargs)
    return out, lse.abs(), None


@pytest.mark.parametrize("broken, kwargs", [
    (without("causal"), dict(causal=True)), (without("window_size"), dict(window_size=(5, 2))), (without("softcap"), dict(softcap=3.0)),
    (without("alibi_slopes"), dict(alibi_slopes="[B, H]")), (without("softmax_scale"), dict(softmax_scale=0.3)), (a_key_too_many, {}),
    (causal_is_bad_data, dict(causal=True)), (infinite_lse, dict(causal=True)),
])
@pytest.mark.parametrize("page_size", [None, 4])
def test_what_ignores_an_option_is_caught(device, broken, kwargs, page_size):
    problem = Varlen(0, torch.float32, device, LENS, (4, 2), page_size=page_size)
    problem.judge(face.flash_attn_varlen_func, kwargs)
    with pytest.raises(AssertionError):
        problem.judge(broken, kwargs)


@pytest.mark.parametrize("page_size", [257, 300, 512])
def test_pages_of_more_than_256_tokens(device, page_size):
    """257 is prime: pages of one token."""
    Varlen(1, torch.float16, device, [(2, page_size + 5), (1, 40)], (4, 2), page_size=page_size).judge(face.flash_attn_varlen_func, dict(causal=True))


def test_values_narrower_than_keys_and_slices_of_a_packed_qkv(device):
    Varlen(2, torch.float16, device, LENS, (4, 2), D=32, DV=16).judge(face.flash_attn_varlen_func, {})
    problem = Varlen(3, torch.float16, device, [(5, 5), (3, 3)], (4, 2))
    q, k, v = (problem.arguments[name][:8] for name in "qkv")
    q, k, v = torch.cat([q, k, v], 1).split([4, 2, 2], 1)
    problem.arguments |= dict(q=q, k=k, v=v)
    problem.judge(face.flash_attn_varlen_func, dict(causal=True))


def test_no_keys_at_all(device):
    out, lse, _ = face.flash_attn_varlen_func(torch.ones(3, 2, 16, device=device), *torch.ones(2, 0, 2, 16, device=device),
                                              ints([0, 3], device), ints([0, 0], device), 3, 0, return_attn_probs=True)
    assert_same(out, torch.zeros_like(out))
    assert (lse == EMPTY).all()


def check_vllm_extras(varlen, device):
    """seqused_k with and without pages, s_aux, return_softmax_lse, and out, which is the tensor that comes back."""
    for page_size in (None, 4):
        problem = Varlen(4, torch.float16, device, LENS, (4, 2), page_size=page_size)
        lens, s_aux, out = ints([17, 9, 1], device), randn(9, 4, dtype=torch.float16, device=device), torch.empty(13 - 2, 4, 16, device=device).half()
        arguments = problem.arguments | dict(seqused_k=lens, s_aux=s_aux, out=out, return_softmax_lse=True)
        got, lse = varlen(**arguments | (dict(cu_seqlens_k=None) if page_size else {}))
        assert got is out
        cut = [(q, k[:n], v[:n]) for (q, k, v), n in zip(problem.sequences, lens.tolist(), strict=True)]
        compare(out[:9].split(problem.q_lens), lse[:, :9].split(problem.q_lens, 1), cut, dict(s_aux=s_aux))
        assert_same(varlen(**arguments | dict(return_softmax_lse=False, out=None)), out)


def test_vllm_extras(device):
    check_vllm_extras(face.flash_attn_varlen_func, device)


@pytest.mark.parametrize("name", ["seqused_k", "s_aux", "out"])
def test_what_ignores_a_vllm_extra_is_caught(device, name):
    with pytest.raises((AssertionError, TypeError)):
        check_vllm_extras(lambda **kwargs: face.flash_attn_varlen_func(**kwargs | {name: None}), device)


def check_descale(varlen, device, make):
    """Keys and values in float8 with their factors, as vLLM hands them over: the plain form of what the bytes mean."""
    problem = Varlen(5, torch.float16, device, LENS, (4, 2), page_size=4)
    factors = torch.tensor([0.5, 2.0], device=device), torch.tensor([4.0, 0.25], device=device)
    shared = [f if make != "one" else f[:1] for f in factors]
    given = [f.expand(len(LENS), 2) if make == "expanded" else f[:1].expand(len(LENS), 2) if make == "one" else f for f in shared]
    bytes_ = {name: problem.arguments[name].to(torch.float8_e4m3fn) for name in "kv"}
    out, lse = varlen(**problem.arguments | bytes_, k_descale=given[0], v_descale=given[1], return_softmax_lse=True)
    meant = [(q, *((t.to(torch.float8_e4m3fn).float() * f[:, None]).half() for t, f in zip((k, v), shared, strict=True)))
             for q, k, v in problem.sequences]
    compare(out[:9].split(problem.q_lens), lse[:, :9].split(problem.q_lens, 1), meant, {})


@pytest.mark.parametrize("make", ["[K]", "expanded", "one"])
def test_descale(device, make):
    check_descale(face.flash_attn_varlen_func, device, make)
    with pytest.raises(AssertionError):                                     # control: the factors exchanged
        check_descale(lambda k_descale, v_descale, **rest: face.flash_attn_varlen_func(**rest, k_descale=v_descale, v_descale=k_descale),
                      device, make)


def check_bad_lengths(varlen, device, cu_seqlens_k, max_seqlen_k, bad):
    """A sequence whose keys lie outside k, or are more than max_seqlen_k: NaN, and no other bit changes."""
    problem = Varlen(6, torch.float32, device, LENS, (4, 2))
    want = varlen(**problem.arguments)
    got = varlen(**problem.arguments | dict(cu_seqlens_k=ints(cu_seqlens_k, device), max_seqlen_k=max_seqlen_k))
    for b, (rows, clean) in enumerate(zip(got[:9].split(problem.q_lens), want[:9].split(problem.q_lens), strict=True)):
        if b == bad:
            assert rows.isnan().all()
        else:
            assert_same(rows, clean)


@pytest.mark.parametrize("cu_seqlens_k, max_seqlen_k, bad", [([0, 20, 29, 2**31 - 1], 20, 2), ([-1, 20, 29, 31], 30, 0), ([0, 20, 29, 31], 19, 0)])
def test_bad_lengths_stay_in_their_rows(device, cu_seqlens_k, max_seqlen_k, bad):
    check_bad_lengths(face.flash_attn_varlen_func, device, cu_seqlens_k, max_seqlen_k, bad)
    with pytest.raises(AssertionError):                                     # control: hidden
        check_bad_lengths(lambda **kwargs: face.flash_attn_varlen_func(**kwargs).nan_to_num(), device, cu_seqlens_k, max_seqlen_k, bad)


LAYOUTS = [("dense", 24), ("dense", 300), ("rows", 24), ("rows", 300), ("heads first", 24), ("heads first", 300),
           ("paged", 1), ("paged", 4), ("paged", 16), ("paged", 300)]


class Cached:
    """Requests with lens[b] keys in a cache, and `new` more to append; rows, pages and slots of no request hold poison."""

    def __init__(self, seed, dtype, device, lens, heads, Sq=1, new=None, layout=("dense", 24), D=16, DV=16, poison=0.0):
        (kind, size), B, (H, K) = layout, len(lens), heads
        self.lens, self.new, self.device, after = lens, new or 0, device, [n + (new or 0) for n in lens]
        draw = lambda i, *shape: randn(seed + i, *shape, dtype=dtype, device=device)
        order = torch.randperm(1 + sum(-(-n // size) for n in after) if kind == "paged" else B + 1, generator=torch.Generator().manual_seed(seed))
        self.N, self.size, order = len(order), size, order.tolist()
        self.pages = [[order.pop() for _ in range(-(-n // size))] if kind == "paged" else [order[b] if kind == "rows" else b]
                      for b, n in enumerate(after)]
        shape = lambda d: (self.N, K, size, d) if kind == "heads first" else (self.N, size, K, d)
        caches = [torch.full(shape(d), poison, dtype=dtype, device=device) for d in (D, DV)]
        self.caches = [cache.transpose(1, 2) if kind == "heads first" else cache for cache in caches]
        self.old = [[draw(10 * b + i, n, K, d) for i, d in enumerate((D, DV))] for b, n in enumerate(lens)]
        for b, rows in enumerate(self.old):
            self.place(self.caches, b, 0, rows)
        self.arguments = dict(q=draw(100, B, Sq, H, D), cache_seqlens=ints(lens, device))
        if new is not None:
            self.arguments |= dict(k=draw(101, B, new, K, D), v=draw(102, B, new, K, DV))
        if kind == "rows":
            self.arguments["cache_batch_idx"] = ints([own[0] for own in self.pages], device)
        if kind == "paged":
            width = max(*map(len, self.pages), 1) + 1
            self.arguments["block_table"] = ints([own + [-7] * (width - len(own)) for own in self.pages], device)

    def place(self, caches, b, start, rows):
        at = torch.arange(start, start + len(rows[0]), device=self.device)
        for cache, t in zip(caches, rows, strict=True):
            cache[ints(self.pages[b] or [0], self.device)[at // self.size], at % self.size] = t

    def turned(self, kwargs):
        """(q, k) as rotary is documented to turn them, request by request."""
        q, k = self.arguments["q"], self.arguments.get("k")
        if "rotary_cos" not in kwargs:
            return q, k
        is_local = kwargs.get("causal") or kwargs.get("window_size", (-1, -1)) != (-1, -1)
        table = torch.cat([kwargs["rotary_cos"], kwargs["rotary_sin"]], 1)
        at = lambda n, length: length + torch.arange(n, dtype=torch.int32, device=self.device)
        turn = lambda x, positions: rotary_room.rotary(x, x, positions, table.float(), kwargs.get("rotary_interleaved", True))[0]
        return ([turn(x, at(len(x), n) if is_local else at(len(x), n) * 0 + n) for x, n in zip(q, self.lens, strict=True)],
                [turn(x, at(len(x), n)) for x, n in zip(k, self.lens, strict=True)])

    def judge(self, kvcache, kwargs):
        kwargs = slopes_of(kwargs, len(self.lens), self.arguments["q"].shape[2], self.device)
        (q, k), got_caches, want_caches = self.turned(kwargs), [c.clone() for c in self.caches], [c.clone() for c in self.caches]
        out, lse = kvcache(k_cache=got_caches[0], v_cache=got_caches[1], **self.arguments, **kwargs, return_softmax_lse=True)
        sequences = []
        for b, (keys, values) in enumerate(self.old):
            if k is not None:
                self.place(want_caches, b, len(keys), [k[b], self.arguments["v"][b]])
                keys, values = torch.cat([keys, k[b]]), torch.cat([values, self.arguments["v"][b]])
            sequences.append((q[b], keys, values))
        for got, want in zip(got_caches, want_caches, strict=True):
            assert_same(got, want)
        compare(out, lse, sequences, {key: value for key, value in kwargs.items() if not key.startswith("rotary")})


cached = st.lists(st.integers(0, 20), min_size=1, max_size=3)


@given(seeds, dtypes, cached, heads, st.integers(1, 4), st.sampled_from([None, 0, 1, 3]), st.sampled_from(LAYOUTS), poisons, options)
def test_kvcache_equals_plain(device, seed, dtype, lens, heads, Sq, new, layout, poison, kwargs):
    """Dense rows, chosen rows and pages, of sizes above and below 256; the caches are compared whole."""
    Cached(seed, dtype, device, lens, heads, Sq, new, layout, poison=poison).judge(face.flash_attn_with_kvcache, kwargs)


def rotary_tables(dtype, device, rotary_dim=16, L=32):
    return dict(zip(("rotary_cos", "rotary_sin"), rotary_room.cos_sin_table(rotary_dim, L, device=device).to(dtype).chunk(2, 1), strict=True))


@settings(max_examples=8)
@given(seeds, dtypes, cached, st.integers(1, 4), st.integers(1, 4), st.sampled_from([("dense", 24), ("paged", 4)]), st.sampled_from([8, 16]),
       st.sampled_from([{}, {"rotary_interleaved": False}]), st.sampled_from([{}, {"causal": True}, {"window_size": (5, 2)}]))
def test_rotary(device, seed, dtype, lens, Sq, new, layout, rotary_dim, style, mask):
    problem = Cached(seed, dtype, device, lens, (4, 2), Sq, new, layout)
    problem.judge(face.flash_attn_with_kvcache, rotary_tables(dtype, device, rotary_dim) | style | mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_of_one_length(device, layout):
    """cache_seqlens as an int, and None for a cache that is full."""
    for new in (None, 2):
        problem = Cached(7, torch.float32, device, [8, 8], (4, 2), 2, new, layout)
        problem.judge(lambda **kwargs: face.flash_attn_with_kvcache(**kwargs | dict(cache_seqlens=8)), dict(causal=True))
    if layout[0] != "paged":
        problem = Cached(7, torch.float32, device, [layout[1]] * 2, (4, 2), 2, None, layout)
        problem.judge(lambda **kwargs: face.flash_attn_with_kvcache(**kwargs | dict(cache_seqlens=None)), dict(causal=True))


def changed(**changes):
    """The call with each named argument replaced by what its function makes of it."""
    return lambda **kwargs: face.flash_attn_with_kvcache(**kwargs | {key: change(kwargs.get(key)) for key, change in changes.items()})


def rows_first(**kwargs):
    out, lse = face.flash_attn_with_kvcache(**kwargs)
    return out, lse.mT.reshape(lse.shape)


@pytest.mark.parametrize("broken, layout, kwargs", [
    (changed(cache_seqlens=lambda n: n + 1), ("dense", 24), {}), (changed(k=lambda k: k.flip(1)), ("paged", 4), {}),
    (changed(v=lambda v: v.flip(0)), ("dense", 300), {}), (changed(cache_batch_idx=lambda rows: None), ("rows", 24), {}),
    (changed(block_table=lambda table: table.flip(0)), ("paged", 4), {}), (rows_first, ("dense", 24), {}),
    (changed(rotary_interleaved=lambda flag: False), ("dense", 24), "rotary"), (changed(rotary_sin=lambda sin: -sin), ("dense", 24), "rotary"),
    (changed(causal=lambda flag: True), ("dense", 24), "rotary"), (changed(softcap=lambda cap: 0.0), ("dense", 24), dict(softcap=3.0)),
])
def test_what_ignores_part_of_the_cache_is_caught(device, broken, layout, kwargs):
    kwargs = rotary_tables(torch.float32, device) if kwargs == "rotary" else kwargs
    problem = Cached(8, torch.float32, device, [9, 3, 14], (4, 2), 2, 2, layout)
    problem.judge(face.flash_attn_with_kvcache, kwargs)
    with pytest.raises(AssertionError):
        problem.judge(broken, kwargs)


def check_bad_requests(kvcache, device, layout, name, bad):
    """Request 1 gets bad data: NaN, nothing appended to rows or pages of others, and no other bit changes."""
    problem = Cached(9, torch.float32, device, [9, 3, 14], (4, 2), 2, 2, layout)
    runs = []
    for value in (None, bad):
        arguments, caches = {key: t.clone() for key, t in problem.arguments.items()}, [c.clone() for c in problem.caches]
        if value is not None:
            arguments[name][1] = value
        runs.append((kvcache(k_cache=caches[0], v_cache=caches[1], **arguments), *caches))
    (want, *want_caches), (got, *got_caches) = runs
    assert got[1].isnan().all()
    assert_same(got[[0, 2]], want[[0, 2]])
    others = [i for i in range(problem.N) if i not in problem.pages[1]]
    for a, b in zip(got_caches, want_caches, strict=True):
        assert_same(a[others], b[others])


BAD = [(("dense", 24), "cache_seqlens", -1), (("dense", 24), "cache_seqlens", 23), (("dense", 300), "cache_seqlens", 2**31 - 1),
       (("rows", 24), "cache_batch_idx", -1), (("rows", 24), "cache_batch_idx", 4), (("rows", 300), "cache_batch_idx", -2**31),
       (("rows", 300), "cache_batch_idx", 4), (("rows", 300), "cache_batch_idx", 2**31 - 1), (("paged", 4), "block_table", 2**31 - 1),
       (("paged", 4), "block_table", -1), (("paged", 300), "block_table", 2**30)]


@pytest.mark.parametrize("layout, name, bad", BAD)
def test_bad_requests_stay_in_their_rows(device, layout, name, bad):
    check_bad_requests(face.flash_attn_with_kvcache, device, layout, name, bad)
    clamp = lambda t: t.clamp(0, 14 if name == "cache_seqlens" else 3)
    with pytest.raises(AssertionError):                                     # control: made good in silence
        check_bad_requests(lambda **kwargs: face.flash_attn_with_kvcache(**kwargs | {name: clamp(kwargs[name])}), device, layout, name, bad)


def test_positions_past_the_rotary_table_are_nan(device):
    problem = Cached(10, torch.float32, device, [2, 30], (4, 2), 2, 2, ("dense", 40))
    out = face.flash_attn_with_kvcache(k_cache=problem.caches[0], v_cache=problem.caches[1], **problem.arguments,
                                       **rotary_tables(torch.float32, device, L=31), causal=True)
    assert out[1, 1].isnan().all() and not out[0].isnan().any()


def check_layouts_agree(varlen, kvcache, device):
    """The same sequences packed, in pages of three sizes and in a dense cache: the same bits."""
    results = []
    for page_size in (None, 1, 4, 300):
        problem = Varlen(11, torch.float16, device, [(2, 20), (2, 9), (2, 13)], (4, 2), page_size=page_size)
        results.append(varlen(**problem.arguments, causal=True)[:6])
    cache = [torch.zeros(3, 24, 2, 16, dtype=torch.float16, device=device) for _ in range(2)]
    for b, (_, *rows) in enumerate(problem.sequences):
        for t, own in zip(cache, rows, strict=True):
            t[b, :len(own)] = own
    q = problem.arguments["q"][:6].unflatten(0, (3, 2))
    results.append(kvcache(q, *cache, cache_seqlens=ints(problem.k_lens, device), causal=True).flatten(0, 1))
    for result in results[1:]:
        assert_same(result, results[0])


def test_layouts_agree_bit_for_bit(device):
    check_layouts_agree(face.flash_attn_varlen_func, face.flash_attn_with_kvcache, device)
    sees_the_layout = lambda k, **rest: face.flash_attn_varlen_func(k=k, **rest) * (1 + 2**-9 * (k.dim() == 3))
    with pytest.raises(AssertionError, match="elements differ"):            # control
        check_layouts_agree(sees_the_layout, face.flash_attn_with_kvcache, device)


class Operations(TorchDispatchMode):
    """What torch is asked, with the results' shapes and strides."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen.append((str(function), [(t.shape, t.stride(), t.dtype) for t in tensors_in([result])]))
        return result


CALLS = {
    "packed": (face.flash_attn_varlen_func, lambda device: Varlen(0, torch.float16, device, LENS, (4, 2)).arguments),
    "pages": (face.flash_attn_varlen_func, lambda device: Varlen(0, torch.float16, device, LENS, (4, 2), page_size=300).arguments),
    "append": (face.flash_attn_with_kvcache, lambda device: cache_call(device, ("dense", 300))),
    "append to pages": (face.flash_attn_with_kvcache, lambda device: cache_call(device, ("paged", 4))),
    "append to rows": (face.flash_attn_with_kvcache, lambda device: cache_call(device, ("rows", 24))),
}


def cache_call(device, layout):
    problem = Cached(0, torch.float16, device, [9, 3, 14], (4, 2), 2, 2, layout)
    return problem.arguments | dict(k_cache=problem.caches[0], v_cache=problem.caches[1]) | rotary_tables(torch.float16, device)


def check_contents_change_nothing(function, arguments):
    """No tensor is read on the host, and torch's operations and the launches are the same for any contents, as a captured graph's are;
    keys and values are attended where they lie."""
    generator, first = torch.Generator().manual_seed(0), None
    for _ in range(5):
        with Operations() as operations, record() as launches:
            function(**arguments)
        assert not [name for name, _ in operations.seen if "_local_scalar_dense" in name or "nonzero" in name], "reads a tensor on the host"
        this = operations.seen, [(launch.kernel, launch.grid, launch.scalars) for launch in launches]
        first = first or this
        assert this == first, "what is launched depends on what tensors contain"
        used = {address for launch in launches for address in launch.pointers.values()}
        assert {t.data_ptr() for name, t in arguments.items() if name in ("q", "k", "v", "k_cache", "v_cache")} <= used, "copied"
        fill_with_junk(tensors_in(arguments), generator)


@pytest.mark.parametrize("case", CALLS)
def test_contents_change_nothing(device, case):
    function, make = CALLS[case]
    check_contents_change_nothing(function, make(device))


@pytest.mark.parametrize("broken, words", [
    (lambda cu_seqlens_k, max_seqlen_k, **rest: face.flash_attn_varlen_func(
        **rest, cu_seqlens_k=cu_seqlens_k, max_seqlen_k=int(cu_seqlens_k.diff().max())), "reads a tensor on the host"),
    (lambda k, **rest: face.flash_attn_varlen_func(k=k[:, [1, 0]], **rest), "copied"),
    (lambda q, **rest: face.flash_attn_varlen_func(q=q[(q == q)[:, 0, 0].nonzero()[:, 0]], **rest), "reads a tensor on the host"),
])
def test_what_a_graph_could_not_hold_is_caught(device, broken, words):
    with pytest.raises(AssertionError, match=words):
        check_contents_change_nothing(broken, CALLS["packed"][1](device))


@pytest.mark.gpu
def test_a_captured_call_serves_other_lengths(device):
    static, other = (Varlen(13 + i, torch.float16, device, LENS[i:] + LENS[:i], (4, 2)).arguments for i in range(2))
    want = face.flash_attn_varlen_func(**other)
    with torch.cuda.stream(torch.cuda.Stream()):
        face.flash_attn_varlen_func(**static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = face.flash_attn_varlen_func(**static)
    for name, t in other.items():
        if isinstance(t, torch.Tensor):
            static[name].copy_(t)
    out.fill_(float("nan"))
    with pytest.raises(AssertionError, match="elements differ"):            # control: nothing was replayed yet
        assert_same(out, want)
    graph.replay()
    assert_same(out, want)


REQUIRED = inspect.Parameter.empty
SIGNATURES = {   # flash-attn 2.8
    "flash_attn_varlen_func": [
        ("q", REQUIRED), ("k", REQUIRED), ("v", REQUIRED), ("cu_seqlens_q", REQUIRED), ("cu_seqlens_k", REQUIRED), ("max_seqlen_q", REQUIRED),
        ("max_seqlen_k", REQUIRED), ("dropout_p", 0.0), ("softmax_scale", None), ("causal", False), ("window_size", (-1, -1)), ("softcap", 0.0),
        ("alibi_slopes", None), ("deterministic", False), ("return_attn_probs", False), ("block_table", None)],
    "flash_attn_with_kvcache": [
        ("q", REQUIRED), ("k_cache", REQUIRED), ("v_cache", REQUIRED), ("k", None), ("v", None), ("rotary_cos", None), ("rotary_sin", None),
        ("cache_seqlens", None), ("cache_batch_idx", None), ("cache_leftpad", None), ("block_table", None), ("softmax_scale", None),
        ("causal", False), ("window_size", (-1, -1)), ("softcap", 0.0), ("rotary_interleaved", True), ("alibi_slopes", None), ("num_splits", 0),
        ("return_softmax_lse", False)],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_flash_attns(name):
    parameters = inspect.signature(getattr(face, name)).parameters.values()
    assert [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == SIGNATURES[name]
    assert all(p.kind is p.KEYWORD_ONLY and not p.default for p in list(parameters)[len(SIGNATURES[name]):])


def test_what_changes_nothing(device):
    """num_splits, deterministic and max_seqlen_q are taken and change no bit."""
    problem = Varlen(12, torch.float16, device, LENS, (4, 2))
    assert_same(face.flash_attn_varlen_func(**problem.arguments | dict(max_seqlen_q=99), deterministic=True),
                face.flash_attn_varlen_func(**problem.arguments))
    problem = Cached(12, torch.float16, device, [9, 3], (4, 2))
    call = lambda **kwargs: face.flash_attn_with_kvcache(k_cache=problem.caches[0], v_cache=problem.caches[1], **problem.arguments, **kwargs)
    assert_same(call(num_splits=4), call())


@pytest.mark.parametrize("change, error, words", [
    (dict(dropout_p=0.1), ValueError, r"flash_attn_varlen_func: dropout_p: got 0.1, expected 0.0"),
    (dict(q=torch.zeros(11, 4)), ValueError, r"q: got shape \[11, 4\], expected \[any, any, any\]"),
    (dict(k=torch.zeros(34, 2, 16).half()), TypeError, "k: got torch.float16, expected torch.float32"),
    (dict(v=torch.zeros(33, 2, 16)), ValueError, r"v: got shape \[33, 2, 16\], expected \[34, 2, any\]"),
    (dict(cu_seqlens_q=torch.zeros(4, dtype=torch.int64)), TypeError, "cu_seqlens_q: got torch.int64, expected torch.int32"),
    (dict(cu_seqlens_k=torch.zeros(5, dtype=torch.int32)), ValueError, r"cu_seqlens_k: got shape \[5\], expected \[4\]"),
    (dict(cu_seqlens_k=None), TypeError, "cu_seqlens_k: got NoneType"),
    (dict(block_table=torch.zeros(3, 2, dtype=torch.int32)), ValueError, r"k: got shape \[34, 2, 16\], expected \[any, any, any, any\]"),
    (dict(seqused_k=torch.zeros(2, dtype=torch.int32)), ValueError, r"seqused_k: got shape \[2\], expected \[3\]"),
    (dict(out=torch.zeros(11, 4, 8)), ValueError, r"out: got shape \[11, 4, 8\], expected \[11, 4, 16\]"),
    (dict(k_descale=torch.ones(3, 2)), ValueError, r"k_descale: got strides \[2, 1\], expected .* made with .expand\(\)"),
])
def test_misuse_of_varlen_is_named(device, change, error, words):
    arguments = Varlen(0, torch.float32, device, LENS, (4, 2)).arguments
    on_device = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)          # .to() would lose the strides
    change = {key: on_device(value) if isinstance(value, torch.Tensor) else value for key, value in change.items()}
    with pytest.raises(error, match=words):
        face.flash_attn_varlen_func(**arguments | change)


TABLE, ROWS = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
NEW = dict(k=torch.zeros(2, 1, 2, 16), v=torch.zeros(2, 1, 2, 16))


@pytest.mark.parametrize("change, error, words", [
    (dict(q=torch.zeros(2, 4, 16)), ValueError, r"flash_attn_with_kvcache: q: got shape \[2, 4, 16\]"),
    (dict(k_cache=torch.zeros(3, 24, 2, 8)), ValueError, r"k_cache: got shape \[3, 24, 2, 8\], expected \[any, any, any, 16\]"),
    (dict(v_cache=torch.zeros(3, 23, 2, 16)), ValueError, r"v_cache: got shape \[3, 23, 2, 16\], expected \[3, 24, 2, any\]"),
    (dict(cache_leftpad=ROWS), ValueError, "cache_leftpad: got a tensor, expected None"),
    (dict(block_table=TABLE, cache_batch_idx=ROWS), ValueError, "cache_batch_idx: got a tensor, expected None where block_table"),
    (dict(block_table=TABLE.long()), TypeError, "block_table: got torch.int64, expected torch.int32"),
    (dict(cache_batch_idx=ROWS[:1]), ValueError, r"cache_batch_idx: got shape \[1\], expected \[2\]"),
    (dict(k_cache=torch.zeros(1, 24, 2, 16), v_cache=torch.zeros(1, 24, 2, 16)), ValueError, "k_cache: got 1 rows, expected 2, one a request"),
    (dict(k=NEW["k"]), ValueError, "v: got NoneType, expected k and v together"),
    (NEW | dict(cache_seqlens=None), ValueError, "cache_seqlens: got None, expected an int"),
    (NEW | dict(cache_seqlens=24), ValueError, "cache_seqlens: got 24, expected 0 to 23"),
    (dict(cache_seqlens=ROWS.long()), TypeError, "cache_seqlens: got torch.int64"),
    (dict(cache_seqlens=-1), ValueError, "cache_seqlens: got -1, expected 0 to 24"),
    (NEW | dict(k=torch.zeros(2, 1, 3, 16)), ValueError, r"k: got shape \[2, 1, 3, 16\], expected \[2, any, 2, 16\]"),
    (NEW | dict(rotary_cos=torch.zeros(9, 8)), ValueError, "rotary_sin: got NoneType, expected cos and sin together"),
    (dict(rotary_cos=torch.zeros(9, 8), rotary_sin=torch.zeros(9, 8)), ValueError, "rotary_cos: got a tensor without k"),
    (NEW | dict(rotary_cos=torch.zeros(9, 8), rotary_sin=torch.zeros(9, 7)), ValueError, r"rotary_sin: got shape \[9, 7\], expected \[9, 8\]"),
    (NEW | dict(rotary_cos=torch.zeros(0, 8), rotary_sin=torch.zeros(0, 8)), ValueError, "rotary_cos: got no positions"),
    (dict(k_cache=torch.zeros(3, 300 * 32 + 8)[:, :9600].view(3, 300, 2, 16), v_cache=torch.zeros(3, 300, 2, 16)), ValueError,
     r"k_cache: got strides \[9608, 32, 16, 1\], expected pages of 300 tokens .* call .contiguous\(\)"),
    (dict(k_cache=torch.zeros(3, 301, 2, 16)[:, :300], v_cache=torch.zeros(3, 300, 2, 16)), ValueError,
     "v_cache: got pages 300 tokens apart, expected 301, as in k_cache"),
])
def test_misuse_of_kvcache_is_named(device, change, error, words):
    problem = Cached(0, torch.float32, device, [9, 3], (4, 2))
    arguments = problem.arguments | dict(k_cache=problem.caches[0], v_cache=problem.caches[1])
    on_device = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)          # .to() would lose the strides
    change = {key: on_device(value) if isinstance(value, torch.Tensor) else value for key, value in change.items()}
    with pytest.raises(error, match=words):
        face.flash_attn_with_kvcache(**arguments | change)
