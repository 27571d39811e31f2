"""merge against its twin, the properties that the twin does not show, and the cascade that it is for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.attention as attention_twin
import reference.merge as twin
from gkernels.kernels import merge as room
from tests.close import assert_close, assert_same
from tests.strategies import Batch, counter, dtypes, far, poisons, randn, seeds, strided

EMPTY = float("-inf")
NAMES = ("a", "a_lse", "b", "b_lse")
shapes = st.sampled_from([(1, 1), (3, 80), (8, 128), (40, 64), (5, 1000), (2, 7)])     # (H, D)
spreads = st.sampled_from([1.0, 30.0, 1e4])     # of the lse: both sides count, the weaker is lost in rounding, its weight is zero
sides = st.sampled_from([0.0, 0.5, 1.0])        # the share of rows that have no keys on a side


def problem(seed, dtype, device, T, H, D, spread=1.0, empty=0.0):
    a, b = (randn(seed + i, T, H, D, dtype=dtype, device=device) for i in (0, 1))
    lse, keyless = randn(seed + 2, 2, T, H) * spread, torch.rand(2, T, H, generator=torch.Generator().manual_seed(seed)) < empty
    a_lse, b_lse = torch.where(keyless, EMPTY, lse).to(device)
    return [a, a_lse, b, b_lse]


def check_equals_reference(merge, device, seed, dtype, T, H, D, spread=1.0, empty=0.0, is_strided=False):
    a, a_lse, b, b_lse = problem(seed, dtype, device, T, H, D, spread, empty)
    want, want_lse = twin.merge(*(t.double() for t in (a, a_lse, b, b_lse)))
    plain, plain_lse = twin.merge(a, a_lse, b, b_lse)
    if is_strided:
        a, a_lse, b_lse = strided(a), a_lse.T.contiguous().T, strided(b_lse)
    out, lse = merge(a, a_lse, b, b_lse)
    assert_close(out, want, plain)
    assert_close(lse, want_lse, plain_lse)


@given(seeds, dtypes, st.integers(0, 4), shapes, spreads, sides, st.booleans())
def test_equals_reference(device, seed, dtype, T, shape, spread, empty, is_strided):
    check_equals_reference(room.merge, device, seed, dtype, T, *shape, spread, empty, is_strided)


def mean_of_both(a, a_lse, b, b_lse):
    return (a + b) / 2, room.merge(a, a_lse, b, b_lse)[1]


def base_two(a, a_lse, b, b_lse):
    out, lse = room.merge(a, a_lse * 0.6931472, b, b_lse * 0.6931472)
    return out, lse / 0.6931472


def sides_exchanged(a, a_lse, b, b_lse):
    return room.merge(b, a_lse, a, b_lse)


def greater_lse(a, a_lse, b, b_lse):
    return room.merge(a, a_lse, b, b_lse)[0], torch.maximum(a_lse, b_lse)


@pytest.mark.parametrize("broken", [mean_of_both, base_two, sides_exchanged, greater_lse])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_broken_merges_are_caught(device, broken, dtype):
    check_equals_reference(room.merge, device, 0, dtype, 3, 8, 128)
    with pytest.raises(AssertionError, match=r"relative RMS error|greatest error"):
        check_equals_reference(broken, device, 0, dtype, 3, 8, 128)


def check_one_side(merge, device, seed, dtype, T, H, D, poison):
    """A row without keys on one side is the other's, bit for bit, and without keys on both 0 and -inf; what stands there is not read."""
    a, a_lse, b, b_lse = problem(seed, dtype, device, T, H, D)
    a[..., 0] = -0.0
    case = torch.arange(T * H, device=device).view(T, H) % 3
    a_lse, b_lse = a_lse.masked_fill(case != 0, EMPTY), b_lse.masked_fill(case != 1, EMPTY)
    a[case != 0], b[case != 1] = poison, poison
    out, lse = merge(a, a_lse, b, b_lse)
    for i, (side, side_lse) in enumerate(((a, a_lse), (b, b_lse), (torch.zeros_like(a), torch.full_like(a_lse, EMPTY)))):
        assert_same(out[case == i], side[case == i])
        assert_same(lse[case == i], side_lse[case == i])


@given(seeds, dtypes, st.integers(1, 4), shapes, poisons)
def test_one_side_keeps_its_bits(device, seed, dtype, T, shape, poison):
    check_one_side(room.merge, device, seed, dtype, T, *shape, poison)


def reads_keyless_rows(a, a_lse, b, b_lse):
    out, lse = room.merge(a, a_lse, b, b_lse)
    return out + 0 * a, lse


def subtracts_infinities(a, a_lse, b, b_lse):
    out, lse = room.merge(a, a_lse, b, b_lse)
    return out, lse + 0 * torch.maximum(a_lse, b_lse)


def loses_the_sign_of_zero(a, a_lse, b, b_lse):
    out, lse = room.merge(a, a_lse, b, b_lse)
    return out + 0.0, lse


@pytest.mark.parametrize("broken", [reads_keyless_rows, subtracts_infinities, loses_the_sign_of_zero])
def test_a_side_without_keys_that_counts_is_caught(device, broken):
    with pytest.raises(AssertionError, match="elements differ"):
        check_one_side(broken, device, 0, torch.float16, 2, 3, 16, float("nan"))


def check_nan(merge, device, seed, dtype, T, H, D, both):
    """The rows of a request with bad data are NaN on one side or on both: they stay NaN, and no other bit changes."""
    arguments = problem(seed, dtype, device, T, H, D, empty=0.3)
    want = merge(*arguments)
    bad = torch.rand(T, H, generator=torch.Generator().manual_seed(seed)).to(device) < 0.4
    for t in arguments if both else arguments[:2] if seed % 2 else arguments[2:]:
        t[bad] = float("nan")
    for got, clean in zip(merge(*arguments), want, strict=True):
        assert got[bad].isnan().all()
        assert_same(got[~bad], clean[~bad])


@given(seeds, dtypes, st.integers(1, 4), shapes, st.booleans())
def test_nan_stays_in_its_row(device, seed, dtype, T, shape, both):
    check_nan(room.merge, device, seed, dtype, T, *shape, both)


def hides_nan(*arguments):
    return [t.nan_to_num() for t in room.merge(*arguments)]


def spreads_nan(*arguments):
    return [t + 0 * t.sum() for t in room.merge(*arguments)]


@pytest.mark.parametrize("broken", [hides_nan, spreads_nan])
def test_nan_that_hides_or_spreads_is_caught(device, broken):
    with pytest.raises(AssertionError):
        check_nan(broken, device, 0, torch.float32, 3, 4, 16, True)


def check_pads(merge, device, seed, dtype, live, pads, H, D, poison):
    arguments = problem(seed, dtype, device, live + pads, H, D)
    want = room.merge(*(t[:live] for t in arguments))
    for t in arguments:
        t[live:] = poison
    for got, clean, fill in zip(merge(*arguments, counter(live, device)), want, (0.0, EMPTY), strict=True):
        assert_same(got[:live], clean)
        assert_same(got[live:], torch.full_like(got[live:], fill))


@given(seeds, dtypes, st.integers(0, 3), st.integers(0, 4), shapes, poisons)
def test_pads_are_empty_and_leak_nothing(device, seed, dtype, live, pads, shape, poison):
    check_pads(room.merge, device, seed, dtype, live, pads, *shape, poison)


@pytest.mark.parametrize("broken", [
    lambda a, a_lse, b, b_lse, num_tokens: room.merge(a, a_lse, b, b_lse),
    lambda a, a_lse, b, b_lse, num_tokens: room.merge(a, a_lse, b, b_lse, num_tokens - 1),
    lambda *arguments: [t.nan_to_num(neginf=0.0) for t in room.merge(*arguments)],
], ids=["num_tokens ignored", "a live row too few", "an lse of zero"])
def test_broken_pads_are_caught(device, broken):
    for poison in (float("nan"), 6e4):
        with pytest.raises(AssertionError):
            check_pads(broken, device, 0, torch.float32, 2, 2, 3, 16, poison)


def check_rows_keep_their_bits(merge, device, seed, dtype, order, H, D, spread, empty):
    """Each row alone equals the row in any place among any others."""
    arguments = problem(seed, dtype, device, 4, H, D, spread, empty)
    alone = [merge(*(t[i:i + 1].clone() for t in arguments)) for i in range(4)]
    for got, want in zip(merge(*(t[order] for t in arguments)), map(torch.cat, zip(*alone, strict=True)), strict=True):
        assert_same(got, want[order])


@given(seeds, dtypes, st.permutations(range(4)), shapes, spreads, sides)
def test_rows_keep_their_bits(device, seed, dtype, order, shape, spread, empty):
    check_rows_keep_their_bits(room.merge, device, seed, dtype, order, *shape, spread, empty)


def test_a_merge_that_sees_the_batch_is_caught(device):
    def broken(a, a_lse, b, b_lse):
        top = torch.maximum(a_lse, b_lse).max()
        out, lse = room.merge(a, a_lse - top, b, b_lse - top)
        return out, lse + top

    with pytest.raises(AssertionError, match="elements differ"):
        check_rows_keep_their_bits(broken, device, 0, torch.float32, [2, 0, 3, 1], 8, 64, 30.0, 0.0)


def check_commutes(merge, device, seed, dtype, T, H, D, spread, empty, ties):
    a, a_lse, b, b_lse = problem(seed, dtype, device, T, H, D, spread, empty)
    b_lse[:ties] = a_lse[:ties]
    for got, want in zip(merge(b, b_lse, a, a_lse), merge(a, a_lse, b, b_lse), strict=True):
        assert_same(got, want)


@given(seeds, dtypes, st.integers(1, 4), shapes, spreads, sides, st.integers(0, 2))
def test_commutes(device, seed, dtype, T, shape, spread, empty, ties):
    check_commutes(room.merge, device, seed, dtype, T, *shape, spread, empty, ties)


def test_a_first_side_that_counts_more_is_caught(device):
    def broken(a, a_lse, b, b_lse):
        weight = (b_lse - a_lse).exp()
        return ((a + b * weight[..., None]) / (1 + weight[..., None])).to(a.dtype), a_lse + weight.log1p()

    check_equals_reference(broken, device, 0, torch.float32, 4, 8, 64)
    with pytest.raises(AssertionError, match="elements differ"):
        check_commutes(broken, device, 0, torch.float32, 4, 8, 64, 1.0, 0.0, 0)


def check_in_place(merge_out, device, seed, dtype, T, H, D, side):
    arguments = dict(zip(NAMES, problem(seed, dtype, device, T, H, D, empty=0.3), strict=True))
    want = room.merge(**arguments)
    merge_out(**arguments, out=arguments[side], lse=arguments[f"{side}_lse"])
    assert_same(arguments[side], want[0])
    assert_same(arguments[f"{side}_lse"], want[1])


@given(seeds, dtypes, st.integers(1, 4), shapes, st.sampled_from("ab"))
def test_in_place(device, seed, dtype, T, shape, side):
    check_in_place(room.merge_out, device, seed, dtype, T, *shape, side)


@pytest.mark.parametrize("side", "ab")
def test_an_lse_written_too_early_is_caught(device, side):
    def broken(a, a_lse, b, b_lse, out, lse):
        room.merge_out(a, a_lse, b, b_lse, out.clone(), lse)
        room.merge_out(a, a_lse, b, b_lse, out)

    with pytest.raises(AssertionError, match="elements differ"):
        check_in_place(broken, device, 0, torch.float32, 2, 3, 16, side)


def check_lse_is_optional(merge_out, device):
    arguments = problem(0, torch.float16, device, 3, 3, 16, empty=0.3)
    out = torch.empty_like(arguments[0])
    merge_out(*arguments, out)
    assert_same(out, room.merge(*arguments)[0])


def test_lse_is_optional(device):
    check_lse_is_optional(room.merge_out, device)
    with pytest.raises(AssertionError, match="elements differ"):                      # control: nothing was written
        check_lse_is_optional(lambda *arguments: None, device)


FAR_DIMS = [(name, dim) for name in ("a", "b", "out", "a_lse", "b_lse", "lse") for dim in (0, 1)]


def check_far(merge_out, device, name, dim):
    """The same bits where the last token or head of one tensor lies past element 2^31."""
    near = dict(zip(NAMES, problem(0, torch.float16, device, 3, 5, 16), strict=True))
    near |= {"out": torch.zeros_like(near["a"]), "lse": torch.zeros_like(near["a_lse"])}
    distant = {key: far(t, dim) if key == name else t.clone() for key, t in near.items()}
    room.merge_out(**near)
    merge_out(**distant)
    for key in near:
        assert_same(distant[key], near[key])


@pytest.mark.parametrize("name, dim", FAR_DIMS)
def test_strides_pass_32_bits(device, name, dim):
    check_far(room.merge_out, device, name, dim)


@pytest.mark.parametrize("name, dim", FAR_DIMS)
def test_another_place_past_32_bits_is_caught(device, name, dim):
    def broken(**arguments):
        wrap = lambda: arguments[name].select(dim, -1).copy_(arguments[name].select(dim, 0))
        wrap()
        room.merge_out(**arguments)
        wrap()

    with pytest.raises(AssertionError, match="elements differ"):
        check_far(broken, device, name, dim)


def check_cascade(merge, device, seed, dtype, batch, prefix_pages):
    """Every request begins with the same pages: attended once, by all rows together and without a mask, then merged with the rest."""
    P, prefix = batch.page_size, prefix_pages * batch.page_size
    q, (k_cache, v_cache) = randn(seed, batch.num_tokens, 4, 16, dtype=dtype, device=device), batch.caches(2, 16, dtype, device)
    k_cache, v_cache = (torch.cat([randn(seed + i, prefix_pages, P, 2, 16, dtype=dtype, device=device), cache])
                        for i, cache in enumerate((k_cache, v_cache), 1))
    starts, lens, table = batch.metadata(device)
    own, shared = table + prefix_pages, torch.arange(prefix_pages, dtype=torch.int32, device=device)[None]
    ends = torch.tensor([0, batch.num_tokens], dtype=torch.int32, device=device)

    def whole(*tensors):
        used = torch.where(lens == 0, 0, lens + prefix)
        return attention_twin.attention(*tensors, starts, used, torch.cat([shared.expand(batch.R, -1), own], 1))

    parts = (attention_twin.attention(q, k_cache, v_cache, ends, torch.full_like(ends[:1], prefix), shared, causal=False),
             attention_twin.attention(q, k_cache, v_cache, starts, lens, own))
    got = merge(*(t for part in parts for t in part))
    for result, want, plain in zip(got, whole(q.double(), k_cache.double(), v_cache.double()), whole(q, k_cache, v_cache), strict=True):
        assert_close(result, want, plain)


cascades = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 20)), min_size=1, max_size=4)


@given(seeds, cascades, st.sampled_from([1, 4]), st.integers(1, 6))
def test_a_cascade_equals_the_whole(device, seed, requests, page_size, prefix_pages):
    check_cascade(room.merge, device, seed, torch.float32, Batch(*map(list, zip(*requests, strict=True)), page_size), prefix_pages)


@pytest.mark.parametrize("broken", [
    lambda a, a_lse, b, b_lse: (b, b_lse),
    lambda a, a_lse, b, b_lse: room.merge(a, a_lse, b, torch.logaddexp(a_lse, b_lse)),
], ids=["the prefix forgotten", "the prefix counted twice"])
def test_a_broken_cascade_is_caught(device, broken):
    with pytest.raises(AssertionError, match=r"relative RMS error|greatest error"):
        check_cascade(broken, device, 0, torch.float32, Batch([2, 1, 3], [5, 0, 9], 4), 3)


@pytest.mark.parametrize("change, error, words", [
    (dict(a=torch.zeros(2, 8)), ValueError, r"merge: a: got shape \[2, 8\], expected \[any, any, any\]"),
    (dict(a=torch.zeros(2, 3, 8, dtype=torch.int32)), TypeError, "merge: a: got torch.int32, expected torch.float16"),
    (dict(a=torch.zeros(2, 3, 1032)), ValueError, "merge: a: got D = 1032, expected 1 to 1024"),
    (dict(b=torch.zeros(2, 4, 8)), ValueError, r"merge: b: got shape \[2, 4, 8\], expected \[2, 3, 8\]"),
    (dict(b=torch.zeros(2, 3, 8, dtype=torch.float16)), TypeError, r"merge: b: got torch.float16, expected torch.float32; convert with .to\(\)"),
    (dict(b=torch.zeros(2, 8, 3).mT), ValueError, r"merge: b: got strides .* call .contiguous\(\)"),
    (dict(out=torch.zeros(1, 3, 8).expand(2, 3, 8)), ValueError, "merge: out: got strides .* expected rows that do not overlap"),
    (dict(a_lse=torch.zeros(3, 2)), ValueError, r"merge: a_lse: got shape \[3, 2\], expected \[2, 3\]"),
    (dict(b_lse=torch.zeros(2, 3, dtype=torch.float16)), TypeError, "merge: b_lse: got torch.float16, expected torch.float32"),
    (dict(lse=torch.zeros(2, 1).expand(2, 3)), ValueError, "merge: lse: got strides .* expected rows that do not overlap"),
    (dict(num_tokens=torch.ones(2, dtype=torch.int32)), ValueError, r"merge: num_tokens: got shape \[2\]"),
])
def test_misuse_is_named(device, change, error, words):
    arguments = dict(a=torch.zeros(2, 3, 8), a_lse=torch.zeros(2, 3), b=torch.zeros(2, 3, 8), b_lse=torch.zeros(2, 3),
                     out=torch.zeros(2, 3, 8), lse=torch.zeros(2, 3)) | change
    with pytest.raises(error, match=words):
        on_device = {name: t.to(device).as_strided(t.shape, t.stride()) for name, t in arguments.items()}       # a copy loses strides of 0
        room.merge_out(**on_device)
