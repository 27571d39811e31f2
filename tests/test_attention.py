"""Paged attention against its twin, and the contract: what may not change a bit, and what must stay in its row, with every feature in use."""

from functools import partial
from random import Random
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.language.extra import cuda

import reference.attention as twin
from gkernels.kernels import attention as room
from gkernels.kernels.rmsnorm import rmsnorm, rmsnorm_out
from tests.close import assert_close, assert_same
from tests.strategies import Batch, Features, batches, binaries, far, features, poisons, randn, seeds

heads = binaries([(4, 2), (7, 1), (1, 1), (3, 1), (16, 1), (6, 2)])            # (H, K): groups of 2, 7, 1, 3, 16 and 3
few_heads = binaries([(2, 1), (1, 1), (3, 1), (2, 2)], 1)
head_dims = binaries([32, 80, 16, 96])
dtypes = binaries([torch.bfloat16, torch.float32, torch.float16])
SMALL_PAGES = (4, 16) if torch.cuda.is_available() else (1, 3, 4, 16)
few_dtypes = binaries([torch.bfloat16, torch.float32, torch.float16], 1)        # for what compares a kernel with itself, in all its features:
FEW_PAGES = SMALL_PAGES[:1] if torch.cuda.is_available() else SMALL_PAGES       # 12 binaries on a GPU; all dtypes and pages were 48, in 179 s
NAMES = ("q", "k_cache", "v_cache", "query_start_loc", "seq_lens", "block_table")
PLAIN, FP8 = Features(), torch.float8_e4m3fn
ALL = Features(window=(9, -1), tree=True, softcap=1.5, sinks=True, alibi=2, scales=2, DV=24)


@st.composite
def cases(draw, max_requests=2, max_query=5, page_sizes=SMALL_PAGES, **sizes):
    """Features, and a batch that they allow: without a causal mask, a request may have more query rows than keys."""
    drawn = draw(features())
    return drawn, draw(batches(max_requests, max_query, page_sizes=page_sizes, crossed=not drawn.causal, **sizes))


def problem(batch, seed, dtype, device, heads, D, drawn=PLAIN, poison=0.0):
    """Arguments and options; `poison` is in pad rows and wherever else nothing may look."""
    H, K = heads
    q = randn(seed, batch.T, H, D, dtype=dtype, device=device)
    q[batch.num_tokens:] = poison
    caches = batch.caches(K, D, dtype, "cpu", poison, drawn.DV)
    if drawn.scales:
        caches = [cache.to(FP8) for cache in caches]                                 # any poison becomes NaN
    return (q, *(cache.to(device) for cache in caches), *batch.metadata(device)), drawn.options(batch, H, K, device, poison)


def doubled(arguments):
    return [t.double() for t in arguments[:3]] + [*arguments[3:]]


def judge(arguments, options, num_tokens):
    out, lse = room.attention(*arguments, **options)
    want, want_lse = twin.attention(*doubled(arguments), **options)
    plain, plain_lse = twin.attention(*arguments, **options)
    assert_close(out[:num_tokens], want[:num_tokens], plain[:num_tokens])
    assert_close(lse[:num_tokens], want_lse[:num_tokens], plain_lse[:num_tokens])


@given(seeds, dtypes, cases(max_requests=3, max_query=9), heads, head_dims, st.sampled_from([None, 0.3]))
def test_equals_reference(device, seed, dtype, case, heads, D, scale):
    drawn, batch = case
    arguments, options = problem(batch, seed, dtype, device, heads, D, drawn)
    judge(arguments, options | {"scale": scale}, batch.num_tokens)


@pytest.mark.parametrize("D", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_wide_heads_and_long_context(device, D, dtype):
    batch = Batch([1, 20], [300, 130], 16, pads=3)
    judge(*problem(batch, 0, dtype, device, (4, 1), D), batch.num_tokens)


@pytest.mark.parametrize("page_size", [1, 2, 7, 16, 100, 256])
def test_any_page_size(device, page_size):
    batch = Batch([1, 5, 2], [120, 0, 40], page_size)
    judge(*problem(batch, 1, torch.float16, device, (4, 2), 32, ALL), batch.num_tokens)


def check_poison(attention, device, seed, dtype, case, heads, poison):
    """Unused slots, unowned pages, unused table entries (junk in every batch), slopes of unused requests, pad rows and their tree bits."""
    drawn, batch = case
    (clean, options), (dirty, dirty_options) = (problem(batch, seed, dtype, device, heads, 16, drawn, fill) for fill in (0.0, poison))
    for got, want in zip(attention(*dirty, **dirty_options), attention(*clean, **options), strict=True):
        assert_same(got, want)


@given(seeds, few_dtypes, cases(page_sizes=FEW_PAGES), few_heads, poisons)
def test_poison_changes_no_bit(device, seed, dtype, case, heads, poison):
    check_poison(room.attention, device, seed, dtype, case, heads, poison)


def reads_dead_slots(q, k_cache, v_cache, starts, lens, table, **options):
    return room.attention(q, k_cache, v_cache, starts, torch.where(lens == 0, 0, lens + 4), table, **options)


def reads_the_null_page(q, k_cache, v_cache, *metadata, **options):
    return [t + 0 * k_cache[0].float().sum() for t in room.attention(q, k_cache, v_cache, *metadata, **options)]


def reads_pad_rows(q, *rest, **options):
    return [t + 0 * q[-1].sum() for t in room.attention(q, *rest, **options)]


def reads_slopes_of_unused_requests(*arguments, alibi_slopes, **options):
    return [t + 0 * alibi_slopes[-1].sum() for t in room.attention(*arguments, alibi_slopes=alibi_slopes, **options)]


def reads_tree_bits_of_pads(*arguments, tree_mask, **options):
    return [t + 2**-5 * (tree_mask[-1] != 0) for t in room.attention(*arguments, tree_mask=tree_mask, **options)]


@pytest.mark.parametrize("broken, drawn", [(reads_dead_slots, PLAIN), (reads_dead_slots, Features(scales=1)), (reads_the_null_page, PLAIN),
                                           (reads_the_null_page, Features(scales=1)), (reads_pad_rows, PLAIN),
                                           (reads_slopes_of_unused_requests, Features(alibi=2)), (reads_tree_bits_of_pads, Features(tree=True))])
def test_control_what_reads_poison_is_caught(device, broken, drawn):
    case = drawn, Batch([1], [5], 16, pads=1, spare_requests=1)
    with pytest.raises(AssertionError, match="elements differ"):
        check_poison(broken, device, 0, torch.float32, case, (2, 1), float("nan"))
    check_poison(broken, device, 0, torch.float32, case, (2, 1), 0.0)        # equal fills: it was the poison that told


def check_pads(attention, device, seed, dtype, case, heads, poison):
    drawn, batch = case
    arguments, options = problem(batch, seed, dtype, device, heads, 16, drawn, poison)
    out, lse = attention(*arguments, **options)
    assert_same(out[batch.num_tokens:], torch.zeros_like(out[batch.num_tokens:]))
    assert (lse[batch.num_tokens:] == float("-inf")).all()


@given(seeds, few_dtypes, cases(page_sizes=FEW_PAGES), few_heads, poisons)
def test_pads_are_zero(device, seed, dtype, case, heads, poison):
    check_pads(room.attention, device, seed, dtype, case, heads, poison)


@pytest.mark.parametrize("left", [0, 1], ids=["out", "lse"])
@pytest.mark.parametrize("drawn", [PLAIN, Features(sinks=True)], ids=["plain", "sinks"])
def test_control_pads_left_unwritten_are_caught(device, left, drawn):
    def broken(q, k_cache, v_cache, starts, lens, table, **options):
        results = room.attention(q, k_cache, v_cache, starts, lens, table, **options)
        results[left][starts[-1]:] = 1.0
        return results

    with pytest.raises(AssertionError):
        check_pads(broken, device, 0, torch.float16, (drawn, Batch([1, 2], [5, 0], 4, pads=2)), (4, 2), 6e4)


def check_a_request_alone(attention, device, seed, dtype, case, heads, random):
    """Batch and page permutation, other pads and spare rows, and a request alone: the same bits."""
    (drawn, batch), (H, K) = case, heads
    lens, widths = batch.query_lens, (16, drawn.DV or 16)
    q = [randn(seed + 31 * i, n, H, 16, dtype=dtype, device=device) for i, n in enumerate(lens)]
    keys, values = ([randn(seed + 31 * i + j, n, K, widths[j - 1], dtype=dtype) for i, n in enumerate(batch.lens)] for j in (1, 2))
    options = drawn.options(batch, H, K, device)

    def run(order, pads, spare):
        other = Batch([lens[i] for i in order], [batch.contexts[i] for i in order], batch.page_size, pads, spare, 2, random.randrange(2**31))
        caches = [torch.zeros(other.N, batch.page_size, K, width, dtype=dtype) for width in widths]
        for cache, rows in zip(caches, (keys, values), strict=True):
            for r, i in enumerate(order):
                at = torch.arange(len(rows[i]))
                cache[torch.tensor(other.pages[r], dtype=torch.long)[at // batch.page_size], at % batch.page_size] = rows[i]
        caches = [cache.to(device, FP8 if drawn.scales else dtype) for cache in caches]
        mine = {**options}
        if drawn.alibi == 2:
            mine["alibi_slopes"] = torch.cat([options["alibi_slopes"][order], torch.full((spare, H), float("nan"), device=device)])
        if drawn.tree:
            bits = options["tree_mask"].split([*lens, batch.T - batch.num_tokens])
            mine["tree_mask"] = torch.cat([*(bits[i] for i in order), torch.arange(pads, device=device)])
        padded = torch.cat([q[i] for i in order] + [torch.full((pads, H, 16), float("nan"), dtype=dtype, device=device)])
        out, lse = attention(padded, *caches, *other.metadata(device), **mine)
        rows = [lens[i] for i in order]
        return {i: (o, l) for i, o, l in zip(order, out[:other.num_tokens].split(rows), lse[:other.num_tokens].split(rows), strict=True)}

    order = list(range(batch.R))
    together = run(order, 0, 0)
    random.shuffle(order)
    for others in (run(order, 3, 2), run(order[-1:], 1, 0)):
        for i in others:
            for got, want in zip(others[i], together[i], strict=True):
                assert_same(got, want)


@given(seeds, dtypes, cases(max_requests=3, max_context=80, min_requests=2), few_heads, st.randoms(use_true_random=False))
def test_a_request_does_not_see_its_batch(device, seed, dtype, case, heads, random):
    check_a_request_alone(room.attention, device, seed, dtype, case, heads, random)


def sees_the_batch(q, k_cache, v_cache, starts, lens, table, **options):
    return [t + 2**-20 * len(lens) for t in room.attention(q, k_cache, v_cache, starts, lens, table, **options)]


def sees_the_pages(q, k_cache, v_cache, starts, lens, table, **options):
    return [t + 2**-20 * table[0, 0] for t in room.attention(q, k_cache, v_cache, starts, lens, table, **options)]


def sees_the_pads(q, *rest, **options):
    return [t + 2**-20 * len(q) for t in room.attention(q, *rest, **options)]


def takes_the_first_slopes(*arguments, alibi_slopes, **options):
    return room.attention(*arguments, alibi_slopes=alibi_slopes[0], **options)


def takes_the_first_bits(*arguments, tree_mask, **options):
    return room.attention(*arguments, tree_mask=tree_mask[:1].expand(len(tree_mask)).contiguous(), **options)


@pytest.mark.parametrize("broken, drawn", [(sees_the_batch, PLAIN), (sees_the_pages, PLAIN), (sees_the_pads, PLAIN),
                                           (takes_the_first_slopes, Features(alibi=2)), (takes_the_first_bits, Features(tree=True))])
def test_control_what_sees_the_batch_is_caught(device, broken, drawn):
    with pytest.raises(AssertionError, match="elements differ"):
        check_a_request_alone(broken, device, 0, torch.float32, (drawn, Batch([5, 4], [9, 0], 4)), (2, 1), Random(0))


def check_chunks(attention, device, seed, dtype, drawn, query, context, heads, cut):
    """The rows before the cut while its keys are all there are, and those after it. A tree's bits count from its first row, so only the former;
    without a causal mask rows look ahead, so only the latter."""
    whole = Batch([query], [context], 4, seed=seed)
    (q, k_cache, v_cache, _, _, table), options = problem(whole, seed, dtype, device, heads, 16, drawn)
    want, want_lse = attention(q, k_cache, v_cache, *whole.metadata(device), **options)
    for first, last in [(0, cut)] * drawn.causal + [(cut, query)] * (not drawn.tree):
        starts, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, last - first], [context + last]))
        mine = options | ({"tree_mask": options["tree_mask"][first:last]} if drawn.tree else {})
        got, lse = attention(q[first:last].clone(), k_cache, v_cache, starts, lens, table, **mine)
        assert_same(got, want[first:last])
        assert_same(lse, want_lse[first:last])


@given(seeds, dtypes, features(), st.integers(2, 24), st.integers(0, 40), binaries([(2, 2), (8, 1), (3, 1), (16, 1)]), st.data())
def test_chunked_prefill_equals_whole(device, seed, dtype, drawn, query, context, heads, data):
    """And so append equals recompute: the last chunk may be one decoded token."""
    check_chunks(room.attention, device, seed, dtype, drawn, query, context, heads, data.draw(st.integers(1, query - 1)))


def restarts_positions(q, k_cache, v_cache, starts, lens, table, **options):
    return room.attention(q, k_cache, v_cache, starts, starts.diff(), table, **options)


def sees_its_chunk(q, *rest, **options):
    return [t + 2**-20 * len(q) for t in room.attention(q, *rest, **options)]


@pytest.mark.parametrize("broken, drawn", [(restarts_positions, PLAIN), (restarts_positions, Features(causal=False)), (sees_its_chunk, PLAIN),
                                           (sees_its_chunk, Features(causal=False)), (sees_its_chunk, Features(tree=True))])
def test_control_what_sees_its_chunk_is_caught(device, broken, drawn):
    with pytest.raises(AssertionError, match="elements differ"):
        check_chunks(broken, device, 0, torch.float32, drawn, 9, 0, (2, 1), 5)


@given(seeds, dtypes, st.sampled_from([2, 3]), batches(max_requests=2, max_query=5, page_sizes=SMALL_PAGES))
def test_repeated_keys_equal_grouped_heads(device, seed, dtype, group, batch):
    """Within rounding: other tiles, so no promise of bits."""
    arguments, _ = problem(batch, seed, dtype, device, (group, 1), 16)
    repeated = [c.repeat_interleave(group, 2) for c in arguments[1:3]]
    got = room.attention(arguments[0], *repeated, *arguments[3:])[0]
    assert_close(got, twin.attention(*doubled(arguments))[0], twin.attention(*arguments)[0])


def check_bad_data(attention, device, seed, dtype, case, victim, length=None, page=None):
    """The request `victim` gets this length, or this page as its first: its rows are NaN, and no other bit changes."""
    drawn, batch = case
    arguments, options = problem(batch, seed, dtype, device, (2, 1), 16, drawn)
    want = room.attention(*arguments, **options)
    starts, lens, table = arguments[3:]
    if page is None:
        lens[victim] = length
    else:
        table[victim, 0] = page
    mine = torch.zeros(batch.T, dtype=torch.bool, device=device)
    mine[starts[victim]:starts[victim + 1]] = True
    for got, clean in zip(attention(*arguments, **options), want, strict=True):
        assert got[mine].isnan().all()
        assert_same(got[~mine], clean[~mine])


@given(seeds, dtypes, cases(empty=False), st.booleans(), st.data())
def test_bad_data_stays_in_its_row(device, seed, dtype, case, is_length, data):
    """A length is bad past the table or below 0, and where rows look back only, below the number of query rows."""
    drawn, batch = case
    victim = data.draw(st.sampled_from(range(batch.R)).filter(lambda r: batch.query_lens[r] and (is_length or batch.lens[r])))
    past, rows = batch.W * batch.page_size + 1 if is_length else batch.N, batch.query_lens[victim]
    bad = st.integers(-2**31, -1) | st.integers(past, 2**31 - 1)
    if is_length and drawn.causal and rows > 1:
        bad |= st.integers(1, rows - 1)
    check_bad_data(room.attention, device, seed, dtype, case, victim, **{"length" if is_length else "page": data.draw(bad)})


def clamps_lengths(q, k_cache, v_cache, starts, lens, table, **options):
    most = table.shape[1] * k_cache.shape[1]
    return room.attention(q, k_cache, v_cache, starts, torch.maximum(lens.clamp(max=most), starts.diff()), table, **options)


def clamps_pages(q, k_cache, v_cache, starts, lens, table, **options):
    return room.attention(q, k_cache, v_cache, starts, lens, table.clamp(0, k_cache.shape[0] - 1), **options)


def spills_to_the_next_row(*arguments, **options):
    return [torch.where(t.isnan().roll(1, 0), float("nan"), t) for t in room.attention(*arguments, **options)]


@pytest.mark.parametrize("broken, bad, drawn", [
    (clamps_lengths, dict(length=2**31 - 1), PLAIN), (clamps_lengths, dict(length=1), PLAIN), (clamps_pages, dict(page=-7), PLAIN),
    (clamps_pages, dict(page=-7), ALL), (spills_to_the_next_row, dict(length=-1), ALL), (spills_to_the_next_row, dict(page=2**31 - 1), PLAIN)])
def test_control_what_spreads_or_hides_bad_data_is_caught(device, broken, bad, drawn):
    case = drawn, Batch([2, 3], [9, 4], 4)
    check_bad_data(room.attention, device, 0, torch.float16, case, 0, **bad)
    with pytest.raises(AssertionError):
        check_bad_data(broken, device, 0, torch.float16, case, 0, **bad)


def check_any_cache_layout(attention, device, seed, dtype, case, are_halves):
    """K and V as halves of one tensor, or heads before slots: vLLM's and Hugging Face's views."""
    drawn, batch = case
    (q, k_cache, v_cache, *metadata), options = problem(batch, seed, dtype, device, (2, 2), 16, drawn)
    if are_halves:
        views = torch.cat([k_cache, v_cache], -1).transpose(1, 2).contiguous().transpose(1, 2).split([16, v_cache.shape[-1]], -1)
    else:
        views = k_cache.transpose(1, 2).contiguous().transpose(1, 2), v_cache
    for got, want in zip(attention(q, *views, *metadata, **options), room.attention(q, k_cache, v_cache, *metadata, **options), strict=True):
        assert_same(got, want)


@given(seeds, dtypes, cases(), st.booleans())
def test_any_cache_layout(device, seed, dtype, case, are_halves):
    check_any_cache_layout(room.attention, device, seed, dtype, case, are_halves)


@pytest.mark.parametrize("drawn, are_halves", [(PLAIN, True), (ALL, True), (ALL, False)])
def test_ignored_strides_are_caught(device, drawn, are_halves):
    def dense(q, k_cache, v_cache, *metadata, **options):
        caches = (c.as_strided(c.shape, torch.empty(c.shape).stride()) for c in (k_cache, v_cache))
        return room.attention(q, *caches, *metadata, **options)

    with pytest.raises(AssertionError, match="elements differ"):
        check_any_cache_layout(dense, device, 0, torch.float16, (drawn, Batch([1, 5], [30, 0], 4)), are_halves)


def check_programs(attention, device, seed, dtype, case, heads, programs):
    drawn, batch = case
    arguments, options = problem(batch, seed, dtype, device, heads, 16, drawn)
    for got, want in zip(attention(*arguments, **options, programs=programs), attention(*arguments, **options, programs=1), strict=True):
        assert_same(got, want)


@given(seeds, dtypes, cases(max_context=700, page_sizes=(16,)), binaries([(2, 1), (2, 2)], 1), st.sampled_from([2, 7, 32]))
def test_programs_change_no_bit(device, seed, dtype, case, heads, programs):
    check_programs(room.attention, device, seed, dtype, case, heads, programs)


@pytest.mark.parametrize("programs", [2, 32])
def test_control_what_sees_its_programs_is_caught(device, programs):
    def broken(*arguments, programs, **options):
        return [t + 2**-20 * programs for t in room.attention(*arguments, programs=programs, **options)]

    with pytest.raises(AssertionError, match="elements differ"):
        check_programs(broken, device, 0, torch.float32, (PLAIN, Batch([1], [9], 4)), (2, 1), programs)


def unused_options(batch, H, device, slip):
    """Pairs of options for the same bits: those that change nothing, and without them. With slip = 1 the former are a little off."""
    longest, make = max(batch.lens), lambda *shape, value, dtype=torch.float32: torch.full(shape, value, dtype=dtype, device=device)
    rows = torch.tensor([i for n in [*batch.query_lens, batch.T - batch.num_tokens] for i in range(n)], device=device)
    chain = torch.where(rows < 63, (1 << (rows + 1).clamp(max=63)) - 1, -1)
    slopes, capped = torch.linspace(0.1, 1, H, device=device), dict(softcap=1.5)
    return {
        "a window as long as the keys": (dict(window=(longest - 1 - slip, -1)), {}),
        "a right window, causal": (dict(causal=not slip, window=(-1, 3)), {}),
        "a right window of 0": (dict(causal=False, window=(5, slip)), dict(window=(5, -1))),
        "a full right window": (dict(causal=False, window=(-1, longest - slip * longest)), dict(causal=False)),
        "sinks of no weight": (dict(sinks=make(H, value=0.0 if slip else float("-inf"))), {}),
        "a tree of ones": (dict(tree_mask=make(batch.T, value=-1 - slip, dtype=torch.int64)), {}),
        "a chain": (dict(tree_mask=chain - slip), {}),
        "slopes of 0": (capped | dict(alibi_slopes=make(H, value=0.1 * slip)), capped),
        "slopes of equal requests": (dict(alibi_slopes=(slopes + slip).expand(batch.R, H).contiguous()), dict(alibi_slopes=slopes)),
    }


UNUSED = [*unused_options(Batch([1], [0], 1), 1, "cpu", 0)]


def check_unused(attention, device, seed, dtype, batch, heads, name, slip=0):
    used, unused = unused_options(batch, heads[0], device, slip)[name]
    arguments, _ = problem(batch, seed, dtype, device, heads, 16)
    for got, want in zip(attention(*arguments, **used), attention(*arguments, **unused), strict=True):
        assert_same(got, want)


@given(seeds, dtypes, batches(max_requests=2, max_query=20, page_sizes=SMALL_PAGES), binaries([(2, 1), (8, 1)], 1), st.sampled_from(UNUSED))
def test_options_that_change_nothing(device, seed, dtype, batch, heads, name):
    check_unused(room.attention, device, seed, dtype, batch, heads, name)


@pytest.mark.parametrize("name", UNUSED)
def test_control_options_that_change_something_are_caught(device, name):
    batch = Batch([5, 1], [0, 9], 4, pads=1)
    check_unused(room.attention, device, 0, torch.float32, batch, (2, 1), name)
    with pytest.raises(AssertionError, match="elements differ"):
        check_unused(room.attention, device, 0, torch.float32, batch, (2, 1), name, slip=1)


def check_no_mask_on_decodes(device, seed, dtype, batch, heads):
    arguments, _ = problem(batch, seed, dtype, device, heads, 16)
    for got, want in zip(room.attention(*arguments, causal=False), room.attention(*arguments), strict=True):
        assert_same(got, want)


@given(seeds, dtypes, batches(max_requests=2, max_query=1, page_sizes=SMALL_PAGES), few_heads)
def test_a_decode_needs_no_mask(device, seed, dtype, batch, heads):
    check_no_mask_on_decodes(device, seed, dtype, batch, heads)


def test_control_rows_that_need_a_mask_are_caught(device):
    with pytest.raises(AssertionError, match="elements differ"):
        check_no_mask_on_decodes(device, 0, torch.float32, Batch([2], [5], 4), (2, 1))


def check_nearly_unused(attention, device, seed, dtype, batch, heads, option):
    """An option that is hardly used: plain attention within rounding. All over caches of values that fp8 holds."""
    (q, k_cache, v_cache, *metadata), _ = problem(batch, seed, dtype, device, heads, 16)
    small = [k_cache.to(FP8), v_cache.to(FP8)]
    arguments = (q, *(cache.to(dtype) for cache in small), *metadata)
    if option == "scales":
        one = torch.ones(1, device=device)
        got = attention(q, *small, *metadata, k_scale=one, v_scale=one)
    else:
        got = attention(*arguments, **{"softcap": dict(softcap=1e4), "alibi": dict(alibi_slopes=torch.zeros(heads[0], device=device))}[option])
    assert_close(got[0], twin.attention(*doubled(arguments))[0], twin.attention(*arguments)[0])


@given(seeds, dtypes, batches(max_requests=2, max_query=5, page_sizes=SMALL_PAGES), few_heads, st.sampled_from(["softcap", "alibi", "scales"]))
def test_options_that_change_next_to_nothing(device, seed, dtype, batch, heads, option):
    check_nearly_unused(room.attention, device, seed, dtype, batch, heads, option)


@pytest.mark.parametrize("option", ["softcap", "alibi", "scales"])
def test_control_options_that_change_a_little_are_caught(device, option):
    def broken(*arguments, softcap=0.0, alibi_slopes=None, k_scale=None, v_scale=None):
        return room.attention(*arguments, softcap=softcap / 1e3, alibi_slopes=None if alibi_slopes is None else alibi_slopes + 0.01,
                              k_scale=k_scale, v_scale=None if v_scale is None else v_scale + 0.01)

    with pytest.raises(AssertionError, match=r"relative RMS error|greatest error"):
        check_nearly_unused(broken, device, 0, torch.float16, Batch([1, 2], [20, 30], 4), (2, 1), option)


@st.composite
def trees(draw, max_nodes=12):
    """For each node of a tree its parent, -1 for a root."""
    return [draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(1, max_nodes)))]


def path_to(tree, i):
    return [] if i < 0 else path_to(tree, tree[i]) + [i]


def check_trees(attention, device, seed, dtype, contexts, trees, heads):
    """A row of a tree equals the decode of its own path, within rounding: keys of the path stand in other places. Pages of one slot make a
    path a block table."""
    batch = Batch([len(tree) for tree in trees], contexts, 1, pads=2, seed=seed)
    (q, k_cache, v_cache, *metadata), _ = problem(batch, seed, dtype, device, heads, 16)
    paths = [path_to(tree, i) for tree in trees for i in range(len(tree))]
    mask = torch.tensor([sum(1 << j for j in path) for path in paths] + [0, 0], device=device)
    got = attention(q, k_cache, v_cache, *metadata, tree_mask=mask)
    tables = [[batch.pages[r][j] for j in [*range(context), *(context + j for j in path_to(tree, i))]]
              for r, (context, tree) in enumerate(zip(contexts, trees, strict=True)) for i in range(len(tree))]
    lens = [len(table) for table in tables]
    decodes = range(len(tables) + 1), lens, [table + [0] * (max(lens) - len(table)) for table in tables]
    arguments = q[:batch.num_tokens], k_cache, v_cache, *(torch.tensor(x, dtype=torch.int32, device=device) for x in decodes)
    for result, want, plain in zip(got, twin.attention(*doubled(arguments)), twin.attention(*arguments), strict=True):
        assert_close(result[:batch.num_tokens], want, plain)


@given(seeds, dtypes, st.lists(st.tuples(st.integers(0, 40), trees()), min_size=1, max_size=2), few_heads)
def test_a_row_of_a_tree_sees_its_path(device, seed, dtype, requests, heads):
    check_trees(room.attention, device, seed, dtype, *map(list, zip(*requests, strict=True)), heads)


def sees_siblings(*arguments, tree_mask):
    return room.attention(*arguments)


def sees_its_parent_only(*arguments, tree_mask):
    return room.attention(*arguments, tree_mask=tree_mask & ~1)


def counts_from_the_batch(*arguments, tree_mask):
    return room.attention(*arguments, tree_mask=tree_mask << 1)


@pytest.mark.parametrize("broken", [sees_siblings, sees_its_parent_only, counts_from_the_batch])
def test_control_a_row_that_leaves_its_path_is_caught(device, broken):
    requests = [3, 10], [[-1, 0, 0, 1], [-1, -1, 0]]
    check_trees(room.attention, device, 0, torch.float16, *requests, (2, 1))
    with pytest.raises(AssertionError, match=r"relative RMS error|greatest error|infinities differ"):
        check_trees(broken, device, 0, torch.float16, *requests, (2, 1))


# (rows, keys) of requests that share their pages, the first tall; keys that a row sees before itself; programs
BOUNDARIES = {
    "one segment and two": ([(24, 520), (3, 514), (1, 511), (1, 512), (1, 513)], -1, (7, 1, 132)),
    "two segments and three": ([(24, 1032), (1, 1024)], -1, (7,)),
    "two spans in sight": ([(40, 8200), (3, 8194), (1, 8191), (1, 8192), (1, 8193)], 600, (1, 132)),
    "all of two spans": ([(20, 9000), (1, 9000)], -1, (7,)),
}


def check_boundaries(attention, device, requests, left, programs):
    """Chunk, verify and decodes over the same keys: against the twin, and the same bits at the same position, also in a launch of their own
    and whatever the number of programs."""
    longest, options = max(keys for _, keys in requests), dict(window=(left, -1))
    (q, k_cache, v_cache, _, _, table), _ = problem(Batch([longest], [0], 16), 0, torch.float16, device, (4, 1), 16)
    at = [position for rows, keys in requests for position in range(keys - rows, keys)]
    starts = [sum(rows for rows, _ in requests[:i]) for i in range(len(requests) + 1)]
    starts, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, [keys for _, keys in requests]))
    arguments = q[at], k_cache, v_cache, starts, lens, table.expand(len(requests), -1).contiguous()
    first, *others = (attention(*arguments, **options, programs=count) for count in programs)
    decode = attention(arguments[0][-1:].clone(), k_cache, v_cache, starts.new_tensor([0, 1]), lens[-1:].clone(), table, **options, programs=33)
    wants = twin.attention(*doubled(arguments), **options), twin.attention(*arguments, **options)
    for got, want, plain, alone, *rest in zip(first, *wants, decode, *others, strict=True):
        assert_same(got, got[[at.index(position) for position in at]])              # the chunk's row of that position
        assert_same(alone, got[-1:])
        for other in rest:
            assert_same(other, got)
        assert_close(got, want, plain)


@pytest.mark.parametrize("requests, left, programs", BOUNDARIES.values(), ids=BOUNDARIES)
def test_segments_and_spans_change_no_bit(device, requests, left, programs):
    check_boundaries(room.attention, device, requests, left, programs)


def sees_its_request(q, k_cache, v_cache, starts, *rest, **options):
    rows = starts.diff().repeat_interleave(starts.diff())
    return [t + 2**-10 * rows.view(-1, *[1] * (t.dim() - 1)) for t in room.attention(q, k_cache, v_cache, starts, *rest, **options)]


def sees_its_programs(*arguments, programs, **options):
    return [t + 2**-10 * (programs == 132) for t in room.attention(*arguments, programs=programs, **options)]


def starts_late(*arguments, window, **options):
    return room.attention(*arguments, window=(500, -1), **options)


@pytest.mark.parametrize("broken, words", [(sees_its_request, "elements differ"), (sees_its_programs, "elements differ"),
                                           (starts_late, r"relative RMS error|greatest error")])
def test_control_bits_that_change_at_a_boundary_are_caught(device, broken, words):
    with pytest.raises(AssertionError, match=words):
        check_boundaries(broken, device, [(17, 520), (1, 512)], 600, (7, 132))


def test_no_tokens_at_all(device):
    batch = Batch([0, 0], [0, 0], 4)
    out, lse = room.attention(*problem(batch, 0, torch.float16, device, (4, 2), 16)[0])
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_control_a_key_too_many_is_seen(device):
    """Negative control of the comparison: one key past the length, on long rows, where loose tolerances are blind."""
    batch = Batch([1, 1], [2000, 523], 16)
    arguments, _ = problem(batch, 3, torch.float16, device, (2, 1), 64, poison=0.5)
    longer = (*arguments[:4], arguments[4] + 1, arguments[5])
    want = twin.attention(*doubled(arguments))[0]
    with pytest.raises(AssertionError, match=r"relative RMS error|greatest error"):
        assert_close(room.attention(*longer)[0], want, twin.attention(*arguments)[0])


FAR_DIMS = [(name, dim) for name, dims in dict(q=2, k_cache=3, v_cache=3, alibi_slopes=1).items() for dim in range(dims)]


def check_saturates(attention, device, dtype):
    """Beside keys in fp8 a query beyond float16 becomes its greatest number, one that is NaN stays, and other rows notice neither."""
    (q, *rest), options = problem(Batch([1, 1, 1, 1], [20, 33, 9, 40], 16), 0, dtype, device, (4, 2), 32, Features(scales=1))
    (want, _), q = attention(q, *rest, **options), q.clone()
    q[1, :, 0], q[2, :, 0] = torch.finfo(dtype).max, float("nan")
    got, _ = attention(q, *rest, **options)
    q[1, :, 0] = float("inf")
    assert_same(attention(q, *rest, **options)[0][:2], got[:2])
    assert_same(got[[0, 3]], want[[0, 3]])
    assert got[1].isfinite().all() and got[2].isnan().all()


def test_queries_beside_fp8_saturate(device):
    check_saturates(room.attention, device, torch.bfloat16)


def test_control_queries_that_do_not_saturate_are_caught(device):
    with pytest.raises(AssertionError, match="elements differ"):
        check_saturates(room.attention, device, torch.float16)                # which is multiplied as it is: inf gives NaN


def check_far(attention, device, name, dim):
    """The same bits from a tensor whose last token, head, page, slot or request lies past element 2^31."""
    arguments, options = problem(Batch([3, 1], [20, 7], 9), 0, torch.float16, device, (2, 2), 16, Features(alibi=2))
    near = dict(zip(NAMES, arguments, strict=True)) | options
    for got, want in zip(attention(**near | {name: far(near[name], dim)}), room.attention(**near), strict=True):
        assert_same(got, want)


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


HAS_OWN_LAUNCHES = room.HAS_GLUON and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
CASES = {    # heads, D, page size, dtype, features; as many rows and keys as cross tiles, segments of 512 and spans of 8192
    "plain": ((8, 2), 128, 16, torch.bfloat16, PLAIN),
    "causal, all options": ((14, 2), 128, 64, torch.float16, Features(window=(300, -1), tree=True, softcap=9.0, sinks=True, alibi=2)),
    "not causal": ((2, 2), 64, 8, torch.bfloat16, Features(causal=False, window=(100, 70), sinks=True)),
    "wider values": ((4, 1), 64, 32, torch.float16, Features(window=(600, -1), DV=128)),
    "narrower values": ((16, 1), 128, 128, torch.bfloat16, Features(tree=True, DV=64)),
    "pages that no box fits": ((4, 2), 128, 24, torch.bfloat16, PLAIN),
}
CONVERTED = {
    "fp8": ((8, 2), 128, 16, torch.bfloat16, Features(scales=1)),
    "fp8 of 64 columns, to float16": ((12, 4), 64, 8, torch.float16, Features(scales=2, window=(700, -1))),
    "fp8, all options": ((6, 2), 128, 64, torch.bfloat16, Features(scales=2, tree=True, softcap=9.0, sinks=True, alibi=1, DV=64)),
}
TALL_BATCHES = [([100, 1, 333, 5, 64, 17], [0, 899, 1200, 72, 3000, 0], 264), ([200, 1, 40], [19800, 9000, 8152], 264), ([300, 70], [17000, 8100], 4)]
SHORT_BATCHES = [([1] * 9, [0, 63, 899, 1, 5000, 511, 512, 2047, 300], 264), ([1, 3, 1], [40000, 9000, 8152], 264), ([1, 6], [40000, 8100], 4)]


def check_launches(attention, device, heads, D, page_size, dtype, drawn, batch, spare, change=lambda arguments: arguments):
    """The same bits as from the launch that other GPUs have, with junk in what no one may look at, in all of five launches and with other programs;
    `change` makes other views of the same values. With as many spare requests as rows none is tall."""
    query_lens, contexts, programs = batch
    batch = Batch(query_lens, contexts, page_size, pads=7, spare_requests=spare)
    arguments, options = problem(batch, 3, dtype, device, heads, D, drawn, float("nan"))
    with patch.object(room, "_boxes", lambda cache: None):
        want = room.attention(*arguments, **options, programs=264)
    arguments = change(arguments)
    with patch.object(room, "APART_FROM", 0):
        for count in (programs, programs, programs, programs, 37):
            for got, same in zip(attention(*arguments, **options, programs=count), want, strict=True):
                assert_same(got, same)


only_on_hopper = pytest.mark.skipif(not HAS_OWN_LAUNCHES, reason="only on Hopper do warps of two kinds attend")


@only_on_hopper
@pytest.mark.parametrize("batch", TALL_BATCHES, ids=["tiles", "a span an item", "several spans an item"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_launch_of_their_own_changes_no_bit(device, case, batch):
    check_launches(room.attention, device, *case, batch, spare=1)


@only_on_hopper
@pytest.mark.parametrize("batch", SHORT_BATCHES, ids=["a segment a run", "rows of several runs", "several rows a run"])
@pytest.mark.parametrize("case", (CASES | CONVERTED).values(), ids=CASES | CONVERTED)
def test_a_launch_of_short_requests_alone_changes_no_bit(device, case, batch):
    check_launches(room.attention, device, *case, batch, spare=20)


@only_on_hopper
def test_the_next_node_finds_what_both_own_launches_wrote(device):
    """The second launch ends long before the first, whose rows the next node reads; both in a graph, behind a node that overwrites them with NaN. A
    third of the multiprocessors is left to 600 requests, which have one key each instead of a segment."""
    batch = Batch([2000] + [1] * 600, [6000] + [0] * 600, 16, pads=46, spare_requests=1)
    (q, k_cache, v_cache, starts, lens, table), _ = problem(batch, 3, torch.bfloat16, device, (32, 8), 128)
    cut = room.tiling(batch.T, len(lens), 32, 8, 128, 128, q.dtype, device)
    assert cut.tall_programs
    work, workspace = room.schedule(starts, lens, table, 16, k_cache.shape[0], batch.T, cut).work, room.Workspace.allocate(cut, device)
    assert cut.tall_programs // 4 < work[0, 6] < cut.tall_programs // 2
    out, ones = torch.empty_like(q), torch.ones(32 * 128, dtype=q.dtype, device=device)
    rows, got = out.view(batch.T, -1), out.new_empty(batch.T, 32 * 128)

    def step():
        out.fill_(float("nan"))
        room.attention_out(q, k_cache, v_cache, table, work, workspace, out, tiling=cut)
        rmsnorm_out(rows, ones, 1e-6, got)

    step()
    torch.cuda.synchronize()
    want = rmsnorm(rows, ones)
    assert want[:batch.num_tokens].isfinite().all() and want[:batch.num_tokens].any(1).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(20):
        graph.replay()
        assert_same(got, want)


@triton.jit
def _late_copy_kernel(from_ptr, to_ptr, n, NANOSECONDS: tl.constexpr, BLOCK: tl.constexpr):
    """Lets the next node start, then waits, then copies. Beside programs without shared memory a multiprocessor sets little of it aside: the next
    node's programs start where there are none of these."""
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()
    start = cuda.globaltimer()
    now = start
    while now - start < NANOSECONDS:
        now = cuda.globaltimer()
    for base in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = base + tl.arange(0, BLOCK)
        tl.store(to_ptr + at, tl.load(from_ptr + at, at < n), at < n)


def attend_behind_a_late_copy(device, ready, late):
    """Attention's result, and the right one, of 20 replays where the node ahead writes, over NaN and long after attention may start, queries and the
    keys and values of this step's rows (late = "new"), or those of all rows before them."""
    query_lens, contexts = [1] * 12 + [3, 2, 9], [0, 62, 63, 64, 127, 700, 1500, 511, 512, 513, 40, 300] + [61, 126, 800]
    batch = Batch(query_lens, contexts, 16, pads=3, spare_requests=20)
    (q, k_cache, v_cache, starts, lens, table), _ = problem(batch, 3, torch.bfloat16, device, (32, 8), 128)
    plan = room.schedule(starts, lens, table, 16, len(k_cache), batch.T, cut := room.tiling(batch.T, len(lens), 32, 8, 128, 128, q.dtype, device))
    assert not cut.has_tall
    sizes = [t.numel() for t in (q, k_cache, v_cache)]
    parts = lambda flat: [part.view_as(t) for part, t in zip(flat.split(sizes), (q, k_cache, v_cache), strict=True)]
    fresh = torch.cat([t.flatten() for t in (q, k_cache, v_cache)])
    stale, flat, out, workspace = fresh.clone(), fresh.clone(), torch.empty_like(q), room.Workspace.allocate(cut, device)
    is_new = torch.zeros(len(k_cache) * 16, dtype=torch.bool, device=device).index_fill_(0, plan.slot_mapping[:batch.num_tokens], True)
    old_q, *caches = parts(stale)
    for cache in caches:
        cache.view(-1, 8, 128)[is_new if late == "new" else ~is_new] = float("nan")
    if late == "new":
        old_q.fill_(float("nan"))

    def step(ready, between=lambda: None):
        flat.copy_(stale)
        _late_copy_kernel[(32,)](fresh, flat, len(flat), NANOSECONDS=30_000, BLOCK=8192, launch_pdl=True)
        between()
        room.attention_out(*parts(flat), table, plan.work, workspace, out, tiling=cut, ready=ready)

    step(False, torch.cuda.synchronize)
    want = out.clone()
    assert want[:batch.num_tokens].isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(ready)
    for _ in range(20):
        graph.replay()
        yield out, want


@only_on_hopper
@pytest.mark.parametrize("ready, late", [(True, "new"), (False, "new"), (False, "old")])
def test_the_node_ahead_may_write_late(device, ready, late):
    for got, want in attend_behind_a_late_copy(device, ready, late):
        assert_same(got, want)


@only_on_hopper
def test_control_keys_that_are_not_ready_are_caught(device):
    got, want = next(attend_behind_a_late_copy(device, True, "old"))
    with pytest.raises(AssertionError):
        assert_same(got, want)


def spread(t, between):
    return torch.cat([t, t.new_full((*t.shape[:-1], between), float("nan"))], -1)[..., :t.shape[-1]]


def far_pages(t):
    """Pages whole slots apart, so that the hardware still copies them, and the last past element 2^31."""
    N, slot = t.shape[0], t.stride(1)
    memory = torch.UntypedStorage((2**31 + N * slot + t.numel()) * t.itemsize, device=t.device)
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(memory, 0, t.shape, ((2**31 // (N - 1) // slot + 1) * slot, *t.stride()[1:])).copy_(t)


VIEWS = {"heads first": lambda q, k, v: (q, *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))),
         "halves of one": lambda q, k, v: (q, *torch.stack([k, v], 1).unbind(1)),
         "8 columns between heads": lambda q, k, v: tuple(spread(t, 8) for t in (q, k, v)),
         "far pages by whole slots": lambda q, k, v: (q, far_pages(k), v),
         "1 column between query heads": lambda q, k, v: (spread(q, 1), k, v)} \
    | {f"{name} far in dimension {dim}": lambda q, k, v, i=i, dim=dim: tuple(far(t, dim) if i == j else t for j, t in enumerate((q, k, v)))
       for i, (name, dims) in enumerate(dict(q=2, k_cache=3, v_cache=3).items()) for dim in range(dims)}


@only_on_hopper
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("query_lens, spare", [([40, 1, 70], 1), ([1, 2, 1], 9)], ids=["tall", "short"])
def test_own_launches_take_any_strides(device, view, query_lens, spare):
    check_launches(room.attention, device, (4, 2), 64, 16, torch.float16, PLAIN, (query_lens, [30, 100, 0], 264), spare,
                   lambda arguments: (*view(*arguments[:3]), *arguments[3:]))


@only_on_hopper
@pytest.mark.parametrize("batch, spare, left", [(TALL_BATCHES[0], 1, 1531), (SHORT_BATCHES[0], 20, 4999)], ids=["tall", "short"])
def test_control_an_own_launch_with_other_bits_is_caught(device, batch, spare, left):
    def without_the_first_key(*arguments, **options):
        return room.attention(*arguments, **options | {"window": (left, -1)})

    with pytest.raises(AssertionError, match="elements differ"):
        check_launches(without_the_first_key, device, *CASES["plain"], batch, spare)


def cache_views(dtype, D, N=5, P=16, K=3):
    """Every layout in use: slots first, heads first, and each beside the other half of one tensor."""
    numbers = torch.randint(-128, 127, (N * 2 * P * K * D,), generator=torch.Generator().manual_seed(0)).to(dtype)
    both, pairs = numbers.view(N, 2, P, K, D), numbers.view(N, P, K, 2, D)
    yield from (both[:, 0].contiguous(), both[:, 1], pairs[..., 1, :])
    yield from (view.transpose(1, 2) for view in (both.view(N, 2, K, P, D)[:, 1], both[:, 0].contiguous().view(N, K, P, D)))


@pytest.mark.parametrize("dtype, D", [(torch.int16, 64), (torch.int8, 64), (torch.int8, 128)])
def test_boxes_hold_the_pages(dtype, D):
    for cache in cache_views(dtype, D):
        boxes = room._boxes(cache)
        rows, (stride, one) = torch.as_strided(cache, boxes.shape, boxes.strides), boxes.strides
        a_page, a_head, columns = cache.stride(0) // stride, cache.stride(2) // stride, cache.stride(2) % stride      # as `_fetch` has them
        for n, head, slot in ((0, 0, 0), (4, 2, 15), (3, 1, 7)):
            first = n * a_page + head * a_head + slot
            assert one == 1 and torch.equal(rows[first, head * columns:][:D], cache[n, slot, head])
        assert boxes.block_shape == [16, D]


half = partial(torch.zeros, dtype=torch.float16)


@pytest.mark.parametrize("cache", [half(3, 24, 2, 64), half(3, 4, 2, 64), half(3, 16, 2, 68)[..., :64],
                                   half(1, 16, 2, 64).expand(3, -1, -1, -1), half(9000).as_strided((3, 16, 2, 64), (2056, 128, 64, 1)),
                                   half(3, 16, 2, 64, device="meta").as_strided((3, 16, 2, 64), (2**36, 2**32, 2**31, 1)),
                                   torch.zeros(3, 16, 2, 72, dtype=torch.int8)[..., :64]],
                         ids=["page of 24", "page of 4", "rows off 16 bytes", "one page thrice", "pages apart by part of a row", "far columns",
                              "bytes off 16"])
def test_other_pages_have_no_boxes(cache):
    assert room._boxes(cache) is None


@pytest.mark.parametrize("R, D, others, programs", [
    (16, 128, {}, 4), (17, 128, {}, 8), (16, 64, {}, 8), (16, 128, dict(cache_dtype=FP8), 8), (16, 128, dict(page_size=24), 8),
    (16, 128, dict(page_size=128), 4), (16, 128, dict(softcap=30.0), 8)],
                         ids=["few", "many", "narrow heads", "fp8", "page of 24", "page of 128", "soft cap"])
def test_few_decodes_get_a_multiprocessor_a_program(R, D, others, programs):
    with patch.object(room, "config", lambda *model: room.Config(512, 16, 64, 16, 128, 64, 3, 4, 2, STAGES=4)):
        few, mixed = (room.tiling(T, R, 8, 2, D, D, torch.bfloat16, "cpu", **others) for T in (R, R + 1))
    assert few.programs == programs and mixed.programs == 8


@pytest.mark.parametrize("change, error, words", [
    (dict(q=torch.zeros(3, 4, 8)), ValueError, r"k_cache: got shape \[4, 4, 2, 16\], expected \[4, 4, 2, 8\]"),
    (dict(q=torch.zeros(3, 5, 16)), ValueError, "q: got 5 query heads for 2 KV heads"),
    (dict(q=torch.zeros(3, 4, 16, dtype=torch.float16)), TypeError, "k_cache: got torch.float32, expected torch.float16"),
    (dict(block_table=torch.zeros(2, 2, dtype=torch.int64)), TypeError, "block_table: got torch.int64"),
    (dict(v_cache=torch.zeros(4, 4, 16, 2).transpose(2, 3)), ValueError, "v_cache: got strides"),
    (dict(sinks=torch.zeros(2)), ValueError, r"sinks: got shape \[2\], expected \[4\]"),
    (dict(alibi_slopes=torch.zeros(3, 4)), ValueError, r"alibi_slopes: got shape \[3, 4\], expected \[2, 4\]"),
    (dict(tree_mask=torch.zeros(3, dtype=torch.int32)), TypeError, "tree_mask: got torch.int32, expected torch.int64"),
    (dict(tree_mask=torch.zeros(3, dtype=torch.int64), causal=False), ValueError, "tree_mask: got causal=False"),
    (dict(k_scale=torch.ones(1), v_scale=torch.ones(1)), TypeError, "k_cache: got torch.float32, expected torch.float8_e4m3fn"),
    (dict(k_cache=torch.zeros(4, 4, 2, 16).to(FP8)), TypeError, "k_cache: got torch.float8_e4m3fn, expected torch.float32"),
    (dict(k_cache=torch.zeros(4, 4, 2, 16).to(FP8), v_cache=torch.zeros(4, 4, 2, 16).to(FP8), k_scale=torch.ones(2)), TypeError, "v_scale: got None"),
    (dict(softcap=-1.0), ValueError, "softcap: got -1.0"),
])
def test_misuse_is_named(device, change, error, words):
    arguments = dict(zip(NAMES, problem(Batch([2, 1], [0, 3], 4), 0, torch.float32, device, (4, 2), 16)[0], strict=True))
    arguments["k_cache"], arguments["v_cache"] = (torch.zeros(4, 4, 2, 16, device=device) for _ in range(2))
    with pytest.raises(error, match=words):
        room.attention(**arguments | {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()})
