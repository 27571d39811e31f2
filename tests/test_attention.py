"""Paged attention against its twin, and the contract: what may not change a bit, and what must stay in its row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.attention as twin
from gkernels.kernels import attention as room
from tests.close import assert_close, assert_same
from tests.strategies import Batch, batches, dtypes, poisons, randn, seeds

heads = st.sampled_from([(1, 1), (4, 2), (3, 1), (7, 1), (16, 1), (6, 2)])      # (H, K): groups of 1, 2, 3, 7, 16 and 3
head_dims = st.sampled_from([16, 32, 80, 96])
lone_requests = st.tuples(st.integers(1, 5), st.integers(0, 80))


def problem(batch, seed, dtype, device, heads, D, poison=0.0):
    H, K = heads
    q = randn(seed, batch.T, H, D, dtype=dtype, device=device)
    q[batch.num_tokens:] = poison
    return (q, *batch.caches(K, D, dtype, device, poison), *batch.metadata(device))


def judge(arguments, num_tokens, scale=None):
    out, lse = room.attention(*arguments, scale=scale)
    want, want_lse = twin.attention(*(t.double() for t in arguments[:3]), *arguments[3:], scale=scale)
    plain, plain_lse = twin.attention(*arguments, scale=scale)
    assert_close(out[:num_tokens], want[:num_tokens], plain[:num_tokens])
    assert_close(lse[:num_tokens], want_lse[:num_tokens], plain_lse[:num_tokens])
    return out, lse


@given(seeds, dtypes, batches(), heads, head_dims, st.sampled_from([None, 0.3]))
def test_equals_reference(device, seed, dtype, batch, heads, D, scale):
    judge(problem(batch, seed, dtype, device, heads, D), batch.num_tokens, scale)


@pytest.mark.parametrize("D", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_wide_heads_and_long_context(device, D, dtype):
    batch = Batch([1, 70, 3], [300, 20, 130], 16, pads=3)
    judge(problem(batch, 0, dtype, device, (8, 2), D), batch.num_tokens)


@pytest.mark.parametrize("page_size", [1, 2, 7, 16, 100, 256])
def test_any_page_size(device, page_size):
    batch = Batch([1, 5, 2], [120, 0, 40], page_size)
    judge(problem(batch, 1, torch.float16, device, (4, 2), 32), batch.num_tokens)


@given(seeds, dtypes, batches(), heads, poisons)
def test_poison_changes_no_bit(device, seed, dtype, batch, heads, poison):
    """Unused slots, unowned pages, unused table entries (junk in every batch) and pad rows."""
    clean, dirty = (problem(batch, seed, dtype, device, heads, 16, fill) for fill in (0.0, poison))
    for got, want in zip(room.attention(*dirty), room.attention(*clean), strict=True):
        assert_same(got, want)


@given(seeds, dtypes, batches(), heads, poisons)
def test_pads_are_zero(device, seed, dtype, batch, heads, poison):
    out, lse = room.attention(*problem(batch, seed, dtype, device, heads, 16, poison))
    assert_same(out[batch.num_tokens:], torch.zeros_like(out[batch.num_tokens:]))
    assert (lse[batch.num_tokens:] == float("-inf")).all()


@given(seeds, dtypes, st.lists(lone_requests, min_size=2, max_size=4), heads, st.sampled_from([1, 4, 16]), st.randoms(use_true_random=False))
def test_a_request_does_not_see_its_batch(device, seed, dtype, requests, heads, page_size, random):
    """Batch and page permutation, other pads and spare rows, and each request alone: the same bits."""
    H, K = heads
    q = [randn(seed + 31 * i, n, H, 16, dtype=dtype, device=device) for i, (n, _) in enumerate(requests)]
    keys, values = ([randn(seed + 31 * i + j, n + c, K, 16, dtype=dtype, device=device) for i, (n, c) in enumerate(requests)] for j in (1, 2))

    def run(order, pads, spare):
        batch = Batch([requests[i][0] for i in order], [requests[i][1] for i in order], page_size, pads, spare, 2, random.randrange(2**31))
        caches = [torch.zeros(batch.N, page_size, K, 16, dtype=dtype, device=device) for _ in range(2)]
        for cache, rows in zip(caches, (keys, values), strict=True):
            for r, i in enumerate(order):
                at = torch.arange(len(rows[i]), device=device)
                cache[torch.tensor(batch.pages[r], device=device)[at // page_size], at % page_size] = rows[i]
        padded = torch.cat([q[i] for i in order] + [torch.full((pads, H, 16), float("nan"), dtype=dtype, device=device)])
        out, lse = room.attention(padded, *caches, *batch.metadata(device))
        lens = [len(q[i]) for i in order]
        return {i: (o, l) for i, o, l in zip(order, out[:batch.num_tokens].split(lens), lse[:batch.num_tokens].split(lens), strict=True)}

    order = list(range(len(requests)))
    together = run(order, 0, 0)
    random.shuffle(order)
    shuffled = run(order, 3, 2)
    for i in order:
        alone = run([i], 1, 0)
        for a, b, c in zip(together[i], shuffled[i], alone[i], strict=True):
            assert_same(b, a)
            assert_same(c, a)


@given(seeds, dtypes, st.integers(2, 40), st.integers(0, 40), heads, st.data())
def test_chunked_prefill_equals_whole(device, seed, dtype, query, context, heads, data):
    """And so append equals recompute: the last chunk may be one decoded token."""
    whole = Batch([query], [context], 4, seed=seed)
    q, k_cache, v_cache, _, _, table = problem(whole, seed, dtype, device, heads, 16)
    want, want_lse = room.attention(q, k_cache, v_cache, *whole.metadata(device))
    cut = data.draw(st.integers(1, query - 1))
    for first, last in ((0, cut), (cut, query)):
        starts, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, last - first], [context + last]))
        got, lse = room.attention(q[first:last].clone(), k_cache, v_cache, starts, lens, table)
        assert_same(got, want[first:last])
        assert_same(lse, want_lse[first:last])


@given(seeds, dtypes, st.sampled_from([2, 3, 4]), batches(max_requests=3))
def test_repeated_keys_equal_grouped_heads(device, seed, dtype, group, batch):
    """Within rounding: other tiles, so no promise of bits."""
    arguments = problem(batch, seed, dtype, device, (2 * group, 2), 16)
    repeated = [c.repeat_interleave(group, 2) for c in arguments[1:3]]
    got = room.attention(arguments[0], *repeated, *arguments[3:])[0]
    assert_close(got, twin.attention(*(t.double() for t in arguments[:3]), *arguments[3:])[0], twin.attention(*arguments)[0])


@given(seeds, dtypes, batches(max_requests=3, empty=False), st.data())
def test_bad_data_stays_in_its_row(device, seed, dtype, batch, data):
    arguments = problem(batch, seed, dtype, device, (4, 2), 16)
    want = room.attention(*arguments)
    starts, lens, table = arguments[3:]
    victim = data.draw(st.sampled_from([r for r in range(batch.R) if batch.query_lens[r]]))
    if data.draw(st.booleans()):
        lens[victim] = data.draw(st.one_of(st.integers(-2**31, -1), st.integers(batch.W * batch.page_size + 1, 2**31 - 1)))
    else:
        table[victim, 0] = data.draw(st.one_of(st.integers(-2**31, -1), st.integers(batch.N, 2**31 - 1)))
    mine = torch.zeros(batch.T, dtype=torch.bool, device=device)
    mine[starts[victim]:starts[victim + 1]] = True
    for got, clean in zip(room.attention(*arguments), want, strict=True):
        assert got[mine].isnan().all()
        assert_same(got[~mine], clean[~mine])


@given(seeds, dtypes, batches())
def test_any_cache_layout(device, seed, dtype, batch):
    """Heads before slots, and K and V as halves of one tensor: vLLM's and Hugging Face's views."""
    q, k_cache, v_cache, *metadata = problem(batch, seed, dtype, device, (4, 2), 16)
    want = room.attention(q, k_cache, v_cache, *metadata)
    joint = torch.cat([k_cache, v_cache], -1).transpose(1, 2).contiguous().transpose(1, 2)
    for views in (joint.split(16, -1), (k_cache.transpose(1, 2).contiguous().transpose(1, 2), v_cache)):
        for got, clean in zip(room.attention(q, *views, *metadata), want, strict=True):
            assert_same(got, clean)


def test_no_tokens_at_all(device):
    batch = Batch([0, 0], [0, 0], 4)
    out, lse = room.attention(*problem(batch, 0, torch.float16, device, (4, 2), 16))
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_control_a_key_too_many_is_seen(device):
    """Negative control of the comparison: one key past the length, on long rows, where loose tolerances are blind."""
    batch = Batch([1, 1], [2000, 523], 16)
    arguments = problem(batch, 3, torch.float16, device, (4, 2), 64, poison=0.5)
    longer = (*arguments[:4], arguments[4] + 1, arguments[5])
    want = twin.attention(*(t.double() for t in arguments[:3]), *arguments[3:])[0]
    with pytest.raises(AssertionError, match=r"relative RMS error|greatest error"):
        assert_close(room.attention(*longer)[0], want, twin.attention(*arguments)[0])


def test_control_unmasked_values_leak(device):
    """Negative control of the poison: a twin that reads dead slots does change."""
    batch = Batch([1], [5], 16)
    q, k_cache, v_cache, starts, lens, table = problem(batch, 0, torch.float32, device, (2, 1), 16, poison=float("nan"))
    with pytest.raises(AssertionError):
        assert_same(room.attention(q, k_cache, v_cache, starts, lens + 4, table)[0], room.attention(q, k_cache, v_cache, starts, lens, table)[0])


@pytest.mark.parametrize("change, error, words", [
    (dict(q=torch.zeros(3, 4, 8)), ValueError, r"k_cache: got shape \[4, 4, 2, 16\], expected \[4, 4, 2, 8\]"),
    (dict(q=torch.zeros(3, 5, 16)), ValueError, "q: got 5 query heads for 2 KV heads"),
    (dict(q=torch.zeros(3, 4, 16, dtype=torch.float16)), TypeError, "k_cache: got torch.float32, expected torch.float16"),
    (dict(block_table=torch.zeros(2, 2, dtype=torch.int64)), TypeError, "block_table: got torch.int64"),
    (dict(v_cache=torch.zeros(4, 4, 16, 2).transpose(2, 3)), ValueError, "v_cache: got strides"),
])
def test_misuse_is_named(device, change, error, words):
    batch = Batch([2, 1], [0, 3], 4)
    names = ("q", "k_cache", "v_cache", "query_start_loc", "seq_lens", "block_table")
    arguments = dict(zip(names, problem(batch, 0, torch.float32, device, (4, 2), 16), strict=True))
    arguments["k_cache"], arguments["v_cache"] = (torch.zeros(4, 4, 2, 16, device=device) for _ in range(2))
    with pytest.raises(error, match=words):
        room.attention(**arguments | {k: v.to(device) for k, v in change.items()})
