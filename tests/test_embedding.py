"""embedding against its twin, bit for bit, with ids that do not exist."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.embedding as twin
from gkernels.kernels import embedding as room
from tests.close import assert_same
from tests.strategies import counter, dtypes, poisons, randn, seeds, strided

widths = st.sampled_from([1, 3, 16, 80, 128, 1000, 1030])
id_types = st.sampled_from([torch.int32, torch.int64])
padding = st.sampled_from([None, -1, 0, 4])


def draw_ids(seed, T, V, dtype):
    """Ids of which about a third do not exist: -1, just past either end, and the type's extremes."""
    random = torch.Generator().manual_seed(seed)
    bad = torch.tensor([-1, -V, V, V + 1, torch.iinfo(dtype).min, torch.iinfo(dtype).max])[torch.randint(6, (T,), generator=random)]
    return torch.where(torch.rand(T, generator=random) < 0.35, bad, torch.randint(V, (T,), generator=random)).to(dtype)


def check_equals_reference(op, device, seed, dtype, id_type, T, D, padding_index, is_strided=False):
    weight, ids = randn(seed, 7, D, dtype=dtype, device=device), draw_ids(seed, T, 7, id_type).to(device)
    got = op(ids, strided(weight) if is_strided else weight, padding_index=padding_index)
    want = twin.embedding(ids, weight, None, padding_index)
    assert_same(got.isnan(), want.isnan())                 # which NaN a conversion gives is the device's affair
    assert_same(got.nan_to_num(0.0), want.nan_to_num(0.0))


def check_pads(op, device, seed, dtype, live, pads, D, junk):
    weight, ids = randn(seed, 7, D, dtype=dtype, device=device), draw_ids(seed, live + pads, 7, torch.int32).to(device)
    want = room.embedding(ids[:live], weight, padding_index=-1)
    ids[live:] = junk
    got = op(ids, weight, counter(live, device), -1)
    assert_same(got[:live], want)
    assert_same(got[live:], torch.zeros_like(got[live:]))


@given(seeds, dtypes, id_types, st.integers(0, 8), widths, padding, st.booleans())
def test_equals_reference(device, seed, dtype, id_type, T, D, padding_index, is_strided):
    check_equals_reference(room.embedding, device, seed, dtype, id_type, T, D, padding_index, is_strided)


@given(seeds, dtypes, st.integers(1, 4), st.integers(0, 4), widths, st.sampled_from([0, 6, 7, -2**31, 2**31 - 1]))
def test_pads_are_zero_whatever_their_ids(device, seed, dtype, live, pads, D, junk):
    check_pads(room.embedding, device, seed, dtype, live, pads, D, junk)


def test_broken_variants_are_caught(device):
    with pytest.raises(AssertionError):                    # ids clamped into the table instead of failing closed
        check_equals_reference(lambda ids, weight, padding_index: room.embedding(ids.clamp(0, 6), weight), device, 3, torch.float32,
                               torch.int32, 8, 16, None)
    with pytest.raises(AssertionError):                    # a padding id treated as an unknown one
        check_equals_reference(lambda ids, weight, padding_index: room.embedding(ids, weight), device, 3, torch.float32,
                               torch.int64, 8, 16, -1)
    with pytest.raises(AssertionError):                    # num_tokens ignored
        check_pads(lambda ids, weight, num_tokens, index: room.embedding(ids, weight, None, index), device, 0, torch.float32, 2, 3, 16, 6)


@given(seeds, dtypes, poisons)
def test_copies_every_bit_and_reads_no_other_row(device, seed, dtype, poison):
    weight = torch.full((5, 40), poison, dtype=dtype, device=device)
    weight[3] = randn(seed, 40, dtype=dtype, device=device)
    got = room.embedding(torch.tensor([3, 2, 3], device=device), weight)
    assert_same(got, weight[[3, 2, 3]])


def check_rows_keep_their_bits(op, device, seed, dtype, order):
    """Each row alone equals the row in any place among any others."""
    weight, ids = randn(seed, 7, 40, dtype=dtype, device=device), draw_ids(seed, 5, 7, torch.int32).to(device)
    assert_same(op(ids[order], weight), torch.cat([op(id[None].clone(), weight) for id in ids])[order])


@given(seeds, dtypes, st.permutations(range(5)))
def test_rows_keep_their_bits(device, seed, dtype, order):
    check_rows_keep_their_bits(room.embedding, device, seed, dtype, order)


@pytest.mark.parametrize("broken", [
    lambda ids, weight: room.embedding(ids, weight) + 2**-20 * len(ids),
    lambda ids, weight: room.embedding(ids.sort().values, weight),
    lambda ids, weight: room.embedding(ids.clamp(max=6), weight).masked_fill(((ids < 0) | (ids > 6)).any(), float("nan")),
], ids=["sees the batch", "ids in order", "one unknown id spoils all"])
def test_a_look_up_that_sees_the_batch_is_caught(device, broken):
    with pytest.raises(AssertionError, match="elements differ"):
        check_rows_keep_their_bits(broken, device, 3, torch.float32, [3, 0, 4, 1, 2])


def test_offsets_pass_32_bits(device):
    V, D = 2**17 + 1, 2**14                               # 2^31 elements and a row more; only two rows are ever touched
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        weight = torch.empty(V, D, dtype=torch.float16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    weight[0], weight[-1] = 0, randn(0, D, dtype=torch.float16, device=device)
    assert_same(room.embedding(torch.tensor([V - 1], dtype=torch.int32, device=device), weight), weight[-1:])


def test_table_without_rows(device):
    got = room.embedding(torch.tensor([0, -1], device=device), torch.empty(0, 8, device=device), padding_index=-1)
    assert got[0].isnan().all()
    assert_same(got[1], torch.zeros_like(got[1]))


@pytest.mark.parametrize("change, error, words", [
    (dict(ids=torch.ones(3)), TypeError, "embedding: ids: got torch.float32, expected torch.int32 or torch.int64"),
    (dict(ids=torch.ones(3, 1, dtype=torch.int32)), ValueError, r"ids: got shape \[3, 1\], expected \[any\]"),
    (dict(weight=torch.ones(8, 5).T), ValueError, r"weight: got strides .* call .contiguous\(\)"),
    (dict(out=torch.ones(2, 8)), ValueError, r"out: got shape \[2, 8\], expected \[3, 8\]"),
    (dict(out=torch.ones(3, 8, dtype=torch.float16)), TypeError, "out: got torch.float16, expected torch.float32"),
    (dict(padding_index=0.0), TypeError, "padding_index: got float, expected an int or None"),
    (dict(num_tokens=torch.ones(1)), TypeError, "num_tokens: got torch.float32"),
])
def test_misuse_is_named(device, change, error, words):
    arguments = dict(ids=torch.zeros(3, dtype=torch.int32), weight=torch.ones(5, 8), out=torch.ones(3, 8)) | change
    with pytest.raises(error, match=words):
        room.embedding_out(**{name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in arguments.items()})
