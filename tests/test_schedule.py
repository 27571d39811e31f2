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


def run(schedule_out, query_start_loc, seq_lens, block_table, page_size, num_pages, T, block_q):
    """The schedule in buffers that held junk: what the device does not fill shows."""
    out = room.Schedule.allocate(T, len(seq_lens), block_q, seq_lens.device)
    for field in (*FIELDS, "items"):
        getattr(out, field).fill_(-123)
    schedule_out(query_start_loc, seq_lens, block_table, page_size, num_pages, block_q, out)
    return out


def check_equals_reference(schedule_out, *arguments):
    got, want = run(schedule_out, *arguments), twin.schedule(*arguments)
    for field in FIELDS:
        assert_same(getattr(got, field), getattr(want, field))
    assert [tuple(item) for item in got.items[:len(want.items)].tolist()] == want.items
    return got


@given(batches(), block_qs)
def test_equals_reference(device, batch, block_q):
    got = check_equals_reference(room.schedule_out, *batch.metadata(device), batch.page_size, batch.N, batch.T, block_q)
    assert not got.status.any() and got.num_tokens.item() == batch.num_tokens


def breaks(change):
    """schedule_out, and then `change` of what it wrote: the broken variants of the controls below."""
    def broken(*arguments):
        room.schedule_out(*arguments)
        change(arguments[-1])
    return broken


def loses_an_item(out):
    n = out.num_items.item()
    out.items[1:n - 1] = out.items[2:n].clone()
    out.num_items.sub_(1)


def doubles_an_item(out):
    out.items[1:] = out.items[:-1].clone()
    out.num_items.add_(1)


def exchanges_items(out):
    out.items[:2] = out.items[:2].flip(0)


@pytest.mark.parametrize("change", [
    lambda out: out.positions[:4].add_(1),
    lambda out: out.slot_mapping[:4].add_(1),
    lambda out: out.last_token.add_(1),
    lambda out: out.positions[4:].fill_(-123),
    lambda out: out.slot_mapping[4:].fill_(-123),
    lambda out: out.token_to_request[4:].fill_(-123),
    lambda out: out.last_token[2:].fill_(-123),
    lambda out: out.status[2:].fill_(-123),
    lambda out: out.items[out.num_items.item() - 1].fill_(-123),
    loses_an_item, doubles_an_item, exchanges_items,
], ids=["positions off by one", "slots off by one", "last tokens off by one", "positions of pads", "slots of pads", "requests of pads",
        "last tokens of spare requests", "status of spare requests", "items of pads", "an item lost", "an item doubled", "items exchanged"])
def test_broken_schedules_are_caught(device, change):
    batch = Batch([3, 1], [5, 9], 4, pads=2, spare_requests=1)
    arguments = *batch.metadata(device), batch.page_size, batch.N, batch.T, 2
    check_equals_reference(room.schedule_out, *arguments)
    with pytest.raises(AssertionError):
        check_equals_reference(breaks(change), *arguments)


def check_items(schedule_out, device, batch, block_q):
    """Every row is in one item, and the heaviest come first."""
    got = run(schedule_out, *batch.metadata(device), batch.page_size, batch.N, batch.T, block_q)
    items = got.items[:got.num_items.item()].tolist()
    assert sorted(t for _, token, rows, _ in items for t in range(token, token + rows)) == list(range(batch.T))
    assert all(1 <= rows <= block_q for _, _, rows, _ in items)
    lens = [batch.lens[request] if request >= 0 else 0 for request, *_ in items]
    assert lens == sorted(lens, reverse=True)
    assert len(items) <= room.max_items(batch.T, batch.R, block_q)


@given(batches(), block_qs)
def test_every_row_is_in_one_item_and_the_heaviest_come_first(device, batch, block_q):
    check_items(room.schedule_out, device, batch, block_q)


@pytest.mark.parametrize("change", [loses_an_item, doubles_an_item, exchanges_items])
def test_broken_work_lists_are_caught(device, change):
    with pytest.raises(AssertionError):
        check_items(breaks(change), device, Batch([1, 3], [9, 5], 4, pads=2, spare_requests=1), 2)


def check_junk(schedule_out, device, batch, block_q, victim, length=None, page=None):
    """The request `victim` gets this length, or (index, page) in its row of the table: it is flagged, and no other request changes."""
    query_start_loc, seq_lens, block_table = batch.metadata(device)
    arguments = query_start_loc, seq_lens, block_table, batch.page_size, batch.N, batch.T, block_q
    want = run(room.schedule_out, *arguments)
    if page is None:
        seq_lens[victim] = length
    else:
        block_table[victim, page[0]] = page[1]
    got = run(schedule_out, *arguments)
    flag = room.BAD_LENGTH if page is None else room.BAD_PAGE
    assert got.status.tolist() == [flag if r == victim else 0 for r in range(batch.R)]
    others = want.token_to_request != victim
    assert_same(got.slot_mapping[others], want.slot_mapping[others])
    assert_same(got.positions[others], want.positions[others])
    return arguments


@given(batches(), block_qs, st.booleans(), st.data())
def test_junk_stays_in_its_row(device, batch, block_q, is_length, data):
    live = [r for r in range(batch.R) if batch.query_lens[r]]
    if not live:
        return
    victim = data.draw(st.sampled_from(live))
    if is_length:
        junk = dict(length=data.draw(st.one_of(st.integers(-2**31, batch.query_lens[victim] - 1).filter(bool),
                                               st.integers(batch.W * batch.page_size + 1, 2**31 - 1))))
    else:
        junk = dict(page=(data.draw(st.integers(0, len(batch.pages[victim]) - 1)),
                          data.draw(st.one_of(st.integers(-2**31, -1), st.integers(batch.N, 2**31 - 1)))))
    check_equals_reference(room.schedule_out, *check_junk(room.schedule_out, device, batch, block_q, victim, **junk))


def clamps(query_start_loc, seq_lens, block_table, page_size, num_pages, *rest):
    most = block_table.shape[1] * page_size
    room.schedule_out(query_start_loc, seq_lens.clamp(0, most), block_table.clamp(0, num_pages - 1), page_size, num_pages, *rest)


def flags_the_next_request(out):
    out.status.copy_(out.status.roll(1))


def takes_the_slots_of_the_next_request(out):
    out.slot_mapping[3] = -1


def moves_the_next_request(out):
    out.positions[3] = 0


@pytest.mark.parametrize("junk", [dict(length=2**31 - 1), dict(page=(1, -5))])
@pytest.mark.parametrize("broken", [clamps, *map(breaks, (flags_the_next_request, takes_the_slots_of_the_next_request, moves_the_next_request))],
                         ids=["clamps", "flags the next", "takes the next one's slots", "moves the next"])
def test_spilt_junk_is_caught(device, broken, junk):
    with pytest.raises(AssertionError):
        check_junk(broken, device, Batch([3, 1], [5, 9], 4), 2, 0, **junk)


@given(st.lists(st.integers(-2**31, 2**31 - 1), min_size=5, max_size=5), st.lists(st.integers(-2**31, 2**31 - 1), min_size=4, max_size=4),
       st.integers(0, 20), block_qs)
def test_any_integers_at_all(device, starts, lens, T, block_q):
    table = torch.randint(-2**31, 2**31 - 1, (4, 3), generator=torch.Generator().manual_seed(T)).to(device, torch.int32)
    metadata = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lens))
    got = check_equals_reference(room.schedule_out, *metadata, table, 4, 7, T, block_q)
    assert ((got.slot_mapping >= -1) & (got.slot_mapping < 28)).all()
    assert ((got.last_token >= -1) & (got.last_token < max(T, 1))).all()


def test_rows_of_length_zero_with_tokens_are_pads(device):
    """Some engines pad a decode batch with requests of one token and length 0."""
    starts, lens, table = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 2], [5, 0], [[1, 2], [9, 9]]))
    got = check_equals_reference(room.schedule_out, starts, lens, table, 4, 3, 2, 4)
    assert got.token_to_request.tolist() == [0, -1] and got.slot_mapping.tolist() == [8, -1] and got.status.tolist() == [0, 0]


def test_many_requests_and_long_prefill(device):
    batch = Batch([700] + [1] * 70, [3] + list(range(70)), 16, pads=600)
    check_equals_reference(room.schedule_out, *batch.metadata(device), batch.page_size, batch.N, batch.T, 4)


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
