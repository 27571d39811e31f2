"""schedule against its plain-Python twin, for sound batches and for junk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.schedule as twin
from gkernels.kernels import schedule as room
from tests.close import assert_same
from tests.strategies import Batch, batches

FIELDS = ("positions", "slot_mapping", "token_to_request", "last_token", "num_tokens", "num_items", "status")
block_qs = st.sampled_from([1, 2, 4, 16])


def check(query_start_loc, seq_lens, block_table, page_size, num_pages, T, block_q):
    arguments = query_start_loc, seq_lens, block_table, page_size, num_pages, T, block_q
    got, want = room.schedule(*arguments), twin.schedule(*arguments)
    for field in FIELDS:
        assert_same(getattr(got, field), getattr(want, field))
    assert [tuple(item) for item in got.items[:len(want.items)].tolist()] == want.items
    return got


@given(batches(), block_qs)
def test_equals_reference(device, batch, block_q):
    got = check(*batch.metadata(device), batch.page_size, batch.N, batch.T, block_q)
    assert not got.status.any() and got.num_tokens.item() == batch.num_tokens


@given(batches(), block_qs)
def test_every_row_is_in_one_item_and_the_heaviest_come_first(device, batch, block_q):
    got = room.schedule(*batch.metadata(device), batch.page_size, batch.N, batch.T, block_q)
    items = got.items[:got.num_items.item()].tolist()
    assert sorted(t for _, token, rows, _ in items for t in range(token, token + rows)) == list(range(batch.T))
    assert all(1 <= rows <= block_q for _, _, rows, _ in items)
    lens = [batch.lens[request] if request >= 0 else 0 for request, *_ in items]
    assert lens == sorted(lens, reverse=True)
    assert len(items) <= room.max_items(batch.T, batch.R, block_q)


@given(batches(), block_qs, st.data())
def test_junk_stays_in_its_row(device, batch, block_q, data):
    query_start_loc, seq_lens, block_table = batch.metadata(device)
    live = [r for r in range(batch.R) if batch.query_lens[r]]
    if not live:
        return
    victim = data.draw(st.sampled_from(live))
    want = room.schedule(query_start_loc, seq_lens, block_table, batch.page_size, batch.N, batch.T, block_q)
    if data.draw(st.booleans()):
        seq_lens[victim] = data.draw(st.one_of(st.integers(-2**31, batch.query_lens[victim] - 1).filter(bool),
                                               st.integers(batch.W * batch.page_size + 1, 2**31 - 1)))
        flag = room.BAD_LENGTH
    else:
        block_table[victim, data.draw(st.integers(0, len(batch.pages[victim]) - 1))] = data.draw(
            st.one_of(st.integers(-2**31, -1), st.integers(batch.N, 2**31 - 1)))
        flag = room.BAD_PAGE
    got = check(query_start_loc, seq_lens, block_table, batch.page_size, batch.N, batch.T, block_q)
    assert got.status.tolist() == [flag if r == victim else 0 for r in range(batch.R)]
    others = want.token_to_request != victim
    assert_same(got.slot_mapping[others], want.slot_mapping[others])
    assert_same(got.positions[others], want.positions[others])


@given(st.lists(st.integers(-2**31, 2**31 - 1), min_size=5, max_size=5), st.lists(st.integers(-2**31, 2**31 - 1), min_size=4, max_size=4),
       st.integers(0, 20), block_qs)
def test_any_integers_at_all(device, starts, lens, T, block_q):
    table = torch.randint(-2**31, 2**31 - 1, (4, 3), generator=torch.Generator().manual_seed(T)).to(device, torch.int32)
    metadata = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lens))
    got = check(*metadata, table, 4, 7, T, block_q)
    assert ((got.slot_mapping >= -1) & (got.slot_mapping < 28)).all()
    assert ((got.last_token >= -1) & (got.last_token < max(T, 1))).all()


def test_rows_of_length_zero_with_tokens_are_pads(device):
    """Some engines pad a decode batch with requests of one token and length 0."""
    starts, lens, table = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 2], [5, 0], [[1, 2], [9, 9]]))
    got = check(starts, lens, table, 4, 3, 2, 4)
    assert got.token_to_request.tolist() == [0, -1] and got.slot_mapping.tolist() == [8, -1] and got.status.tolist() == [0, 0]


def test_many_requests_and_long_prefill(device):
    batch = Batch([700] + [1] * 70, [3] + list(range(70)), 16, pads=600)
    check(*batch.metadata(device), batch.page_size, batch.N, batch.T, 4)


@pytest.mark.parametrize("change, error, words", [
    (dict(page_size=0), ValueError, "schedule: page_size: got 0, expected 1 to 256"),
    (dict(num_pages=0), ValueError, "schedule: num_pages: got 0"),
    (dict(seq_lens=torch.zeros(3, dtype=torch.int32)), ValueError, r"query_start_loc: got shape \[3\], expected \[4\]"),
    (dict(block_table=torch.zeros(2, 4)), TypeError, "block_table: got torch.float32, expected torch.int32"),
    (dict(block_q=0), ValueError, "block_q: got 0"),
])
def test_misuse_is_named(device, change, error, words):
    batch = Batch([2, 1], [0, 3], 4)
    query_start_loc, seq_lens, block_table = batch.metadata(device)
    arguments = dict(query_start_loc=query_start_loc, seq_lens=seq_lens, block_table=block_table, page_size=4, num_pages=batch.N, T=3, block_q=4)
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(error, match=words):
        room.schedule(**arguments | change)
