"""Paged attention against its twin, and the contract: what may not change a bit, and what must stay in its row."""

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.attention as twin
from gkernels.kernels import attention as room
from tests.close import assert_close, assert_same
from tests.strategies import Batch, batches, dtypes, far, poisons, randn, seeds

heads = st.sampled_from([(1, 1), (4, 2), (3, 1), (7, 1), (16, 1), (6, 2)])      # (H, K): groups of 1, 2, 3, 7, 16 and 3
head_dims = st.sampled_from([16, 32, 80, 96])
NAMES = ("q", "k_cache", "v_cache", "query_start_loc", "seq_lens", "block_table")
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


def check_poison(attention, device, seed, dtype, batch, heads, poison):
    """Unused slots, unowned pages, unused table entries (junk in every batch) and pad rows."""
    clean, dirty = (problem(batch, seed, dtype, device, heads, 16, fill) for fill in (0.0, poison))
    for got, want in zip(attention(*dirty), attention(*clean), strict=True):
        assert_same(got, want)


@given(seeds, dtypes, batches(), heads, poisons)
def test_poison_changes_no_bit(device, seed, dtype, batch, heads, poison):
    check_poison(room.attention, device, seed, dtype, batch, heads, poison)


def reads_dead_slots(q, k_cache, v_cache, starts, lens, table):
    return room.attention(q, k_cache, v_cache, starts, lens + 4, table)


def reads_the_null_page(q, k_cache, v_cache, *metadata):
    return [t + 0 * k_cache[0].sum() for t in room.attention(q, k_cache, v_cache, *metadata)]


def reads_pad_rows(q, *rest):
    return [t + 0 * q[-1].sum() for t in room.attention(q, *rest)]


@pytest.mark.parametrize("broken", [reads_dead_slots, reads_the_null_page, reads_pad_rows])
def test_control_what_reads_poison_is_caught(device, broken):
    batch = Batch([1], [5], 16, pads=1)
    with pytest.raises(AssertionError, match="elements differ"):
        check_poison(broken, device, 0, torch.float32, batch, (2, 1), float("nan"))
    check_poison(broken, device, 0, torch.float32, batch, (2, 1), 0.0)       # equal fills: it was the poison that told


def check_pads(attention, device, seed, dtype, batch, heads, poison):
    out, lse = attention(*problem(batch, seed, dtype, device, heads, 16, poison))
    assert_same(out[batch.num_tokens:], torch.zeros_like(out[batch.num_tokens:]))
    assert (lse[batch.num_tokens:] == float("-inf")).all()


@given(seeds, dtypes, batches(), heads, poisons)
def test_pads_are_zero(device, seed, dtype, batch, heads, poison):
    check_pads(room.attention, device, seed, dtype, batch, heads, poison)


@pytest.mark.parametrize("left", [0, 1], ids=["out", "lse"])
def test_control_pads_left_unwritten_are_caught(device, left):
    def broken(q, k_cache, v_cache, starts, lens, table):
        results = room.attention(q, k_cache, v_cache, starts, lens, table)
        results[left][starts[-1]:] = 1.0
        return results

    with pytest.raises(AssertionError):
        check_pads(broken, device, 0, torch.float16, Batch([1, 2], [5, 0], 4, pads=2), (4, 2), 6e4)


def check_a_request_alone(attention, device, seed, dtype, requests, heads, page_size, random):
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
        out, lse = attention(padded, *caches, *batch.metadata(device))
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


@given(seeds, dtypes, st.lists(lone_requests, min_size=2, max_size=4), heads, st.sampled_from([1, 4, 16]), st.randoms(use_true_random=False))
def test_a_request_does_not_see_its_batch(device, seed, dtype, requests, heads, page_size, random):
    check_a_request_alone(room.attention, device, seed, dtype, requests, heads, page_size, random)


def sees_the_batch(q, k_cache, v_cache, starts, lens, table):
    return [t + 2**-20 * len(lens) for t in room.attention(q, k_cache, v_cache, starts, lens, table)]


def sees_the_pages(q, k_cache, v_cache, starts, lens, table):
    return [t + 2**-20 * table[0, 0] for t in room.attention(q, k_cache, v_cache, starts, lens, table)]


def sees_the_pads(q, *rest):
    return [t + 2**-20 * len(q) for t in room.attention(q, *rest)]


@pytest.mark.parametrize("broken", [sees_the_batch, sees_the_pages, sees_the_pads])
def test_control_what_sees_the_batch_is_caught(device, broken):
    with pytest.raises(AssertionError, match="elements differ"):
        check_a_request_alone(broken, device, 0, torch.float32, [(2, 9), (1, 20), (3, 0)], (4, 2), 4, Random(0))


def check_chunks(attention, device, seed, dtype, query, context, heads, cut):
    whole = Batch([query], [context], 4, seed=seed)
    q, k_cache, v_cache, _, _, table = problem(whole, seed, dtype, device, heads, 16)
    want, want_lse = attention(q, k_cache, v_cache, *whole.metadata(device))
    for first, last in ((0, cut), (cut, query)):
        starts, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, last - first], [context + last]))
        got, lse = attention(q[first:last].clone(), k_cache, v_cache, starts, lens, table)
        assert_same(got, want[first:last])
        assert_same(lse, want_lse[first:last])


@given(seeds, dtypes, st.integers(2, 40), st.integers(0, 40), heads, st.data())
def test_chunked_prefill_equals_whole(device, seed, dtype, query, context, heads, data):
    """And so append equals recompute: the last chunk may be one decoded token."""
    check_chunks(room.attention, device, seed, dtype, query, context, heads, data.draw(st.integers(1, query - 1)))


def restarts_positions(q, k_cache, v_cache, starts, lens, table):
    return room.attention(q, k_cache, v_cache, starts, starts.diff(), table)


def sees_its_chunk(q, *rest):
    return [t + 2**-20 * len(q) for t in room.attention(q, *rest)]


@pytest.mark.parametrize("broken", [restarts_positions, sees_its_chunk])
def test_control_what_sees_its_chunk_is_caught(device, broken):
    with pytest.raises(AssertionError, match="elements differ"):
        check_chunks(broken, device, 0, torch.float32, 9, 0, (4, 2), 5)


@given(seeds, dtypes, st.sampled_from([2, 3, 4]), batches(max_requests=3))
def test_repeated_keys_equal_grouped_heads(device, seed, dtype, group, batch):
    """Within rounding: other tiles, so no promise of bits."""
    arguments = problem(batch, seed, dtype, device, (2 * group, 2), 16)
    repeated = [c.repeat_interleave(group, 2) for c in arguments[1:3]]
    got = room.attention(arguments[0], *repeated, *arguments[3:])[0]
    assert_close(got, twin.attention(*(t.double() for t in arguments[:3]), *arguments[3:])[0], twin.attention(*arguments)[0])


def check_bad_data(attention, device, seed, dtype, batch, victim, length=None, page=None):
    """The request `victim` gets this length, or this page as its first: its rows are NaN, and no other bit changes."""
    arguments = problem(batch, seed, dtype, device, (4, 2), 16)
    want = room.attention(*arguments)
    starts, lens, table = arguments[3:]
    if page is None:
        lens[victim] = length
    else:
        table[victim, 0] = page
    mine = torch.zeros(batch.T, dtype=torch.bool, device=device)
    mine[starts[victim]:starts[victim + 1]] = True
    for got, clean in zip(attention(*arguments), want, strict=True):
        assert got[mine].isnan().all()
        assert_same(got[~mine], clean[~mine])


@given(seeds, dtypes, batches(max_requests=3, empty=False), st.booleans(), st.data())
def test_bad_data_stays_in_its_row(device, seed, dtype, batch, is_length, data):
    victim = data.draw(st.sampled_from([r for r in range(batch.R) if batch.query_lens[r]]))
    past = batch.W * batch.page_size + 1 if is_length else batch.N
    bad = data.draw(st.one_of(st.integers(-2**31, -1), st.integers(past, 2**31 - 1)))
    check_bad_data(room.attention, device, seed, dtype, batch, victim, **{"length" if is_length else "page": bad})


def clamps_lengths(q, k_cache, v_cache, starts, lens, table):
    return room.attention(q, k_cache, v_cache, starts, lens.clamp(max=table.shape[1] * k_cache.shape[1]), table)


def clamps_pages(q, k_cache, v_cache, starts, lens, table):
    return room.attention(q, k_cache, v_cache, starts, lens, table.clamp(0, k_cache.shape[0] - 1))


def spills_to_the_next_row(*arguments):
    return [torch.where(t.isnan().roll(1, 0), float("nan"), t) for t in room.attention(*arguments)]


@pytest.mark.parametrize("broken, bad", [(clamps_lengths, dict(length=2**31 - 1)), (clamps_pages, dict(page=-7)),
                                         (spills_to_the_next_row, dict(length=-1)), (spills_to_the_next_row, dict(page=2**31 - 1))])
def test_control_what_spreads_or_hides_bad_data_is_caught(device, broken, bad):
    batch = Batch([2, 3], [9, 4], 4)
    check_bad_data(room.attention, device, 0, torch.float16, batch, 0, **bad)
    with pytest.raises(AssertionError):
        check_bad_data(broken, device, 0, torch.float16, batch, 0, **bad)


def check_any_cache_layout(attention, device, seed, dtype, batch):
    """Heads before slots, and K and V as halves of one tensor: vLLM's and Hugging Face's views."""
    q, k_cache, v_cache, *metadata = problem(batch, seed, dtype, device, (4, 2), 16)
    want = room.attention(q, k_cache, v_cache, *metadata)
    joint = torch.cat([k_cache, v_cache], -1).transpose(1, 2).contiguous().transpose(1, 2)
    for views in (joint.split(16, -1), (k_cache.transpose(1, 2).contiguous().transpose(1, 2), v_cache)):
        for got, clean in zip(attention(q, *views, *metadata), want, strict=True):
            assert_same(got, clean)


@given(seeds, dtypes, batches())
def test_any_cache_layout(device, seed, dtype, batch):
    check_any_cache_layout(room.attention, device, seed, dtype, batch)


def test_ignored_strides_are_caught(device):
    def dense(q, k_cache, v_cache, *metadata):
        return room.attention(q, *(c.as_strided(c.shape, torch.empty(c.shape).stride()) for c in (k_cache, v_cache)), *metadata)

    with pytest.raises(AssertionError, match="elements differ"):
        check_any_cache_layout(dense, device, 0, torch.float16, Batch([1, 5], [30, 0], 4))


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


FAR_DIMS = [("q", 0), ("q", 1), ("k_cache", 0), ("k_cache", 1), ("k_cache", 2), ("v_cache", 0), ("v_cache", 1), ("v_cache", 2)]


def check_far(attention, device, name, dim):
    """The same bits from a tensor whose last token, head, page or slot lies past element 2^31."""
    batch = Batch([3, 1], [20, 7], 9)
    arguments = dict(zip(NAMES, problem(batch, 0, torch.float16, device, (6, 3), 16), strict=True))
    want = room.attention(**arguments)
    for got, near in zip(attention(**arguments | {name: far(arguments[name], dim)}), want, strict=True):
        assert_same(got, near)


@pytest.mark.parametrize("name, dim", FAR_DIMS)
def test_strides_pass_32_bits(device, name, dim):
    check_far(room.attention, device, name, dim)


@pytest.mark.parametrize("name, dim", FAR_DIMS)
def test_control_another_place_past_32_bits_is_caught(device, name, dim):
    def broken(**arguments):
        arguments[name].select(dim, -1).copy_(arguments[name].select(dim, 0))
        return room.attention(**arguments)

    with pytest.raises(AssertionError, match="elements differ"):
        check_far(broken, device, name, dim)


def check_last_page(attention, device):
    """2^31 elements and two pages more, of which only the last page is ever touched."""
    N, P, K, D = 2**17 + 2, 16, 8, 128
    q, *near = (randn(i, *shape, dtype=torch.float16, device=device) for i, shape in enumerate([(1, K, D), (1, P, K, D), (1, P, K, D)]))
    starts, lens, table = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1], [P], [[0]]))
    caches = []
    for page in near:
        memory = torch.UntypedStorage(N * page.numel() * page.itemsize, device=page.device)
        caches.append(torch.empty(0, dtype=page.dtype, device=device).set_(memory, 0, (N, P, K, D), page.stride()))
        caches[-1][-1] = page[0]
    want = room.attention(q, *near, starts, lens, table)
    for got, clean in zip(attention(q, *caches, starts, lens, table + N - 1), want, strict=True):
        assert_same(got, clean)


def test_offsets_pass_32_bits(device):
    check_last_page(room.attention, device)


def test_control_a_wrapped_page_is_caught(device):
    with pytest.raises(AssertionError, match="elements differ"):
        check_last_page(lambda *arguments: room.attention(*arguments[:5], arguments[5] % 2**17), device)


@pytest.mark.parametrize("change, error, words", [
    (dict(q=torch.zeros(3, 4, 8)), ValueError, r"k_cache: got shape \[4, 4, 2, 16\], expected \[4, 4, 2, 8\]"),
    (dict(q=torch.zeros(3, 5, 16)), ValueError, "q: got 5 query heads for 2 KV heads"),
    (dict(q=torch.zeros(3, 4, 16, dtype=torch.float16)), TypeError, "k_cache: got torch.float32, expected torch.float16"),
    (dict(block_table=torch.zeros(2, 2, dtype=torch.int64)), TypeError, "block_table: got torch.int64"),
    (dict(v_cache=torch.zeros(4, 4, 16, 2).transpose(2, 3)), ValueError, "v_cache: got strides"),
])
def test_misuse_is_named(device, change, error, words):
    batch = Batch([2, 1], [0, 3], 4)
    arguments = dict(zip(NAMES, problem(batch, 0, torch.float32, device, (4, 2), 16), strict=True))
    arguments["k_cache"], arguments["v_cache"] = (torch.zeros(4, 4, 2, 16, device=device) for _ in range(2))
    with pytest.raises(error, match=words):
        room.attention(**arguments | {k: v.to(device) for k, v in change.items()})
