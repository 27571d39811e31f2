"""schedule against its plain-Python twin, for sound batches and for junk; and its work list against what attention has to do."""

from collections import Counter
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.schedule as twin
from gkernels.kernels import schedule as room
from tests.close import assert_same
from tests.strategies import Batch, seeds

FIELDS = ("positions", "slot_mapping", "token_to_request", "last_token", "num_tokens", "status")
JUNK = -123


def tiling(kv_heads=2, short_rows=2, tall_rows=4, has_tall=True, programs=3, tall_slots=8, causal=True, left=-1, is_apart=False):
    """Segments of 8 tokens, spans of 32, and tall requests from 5 rows on, so that small batches are cut in every way. is_apart: tall items have
    a launch of their own."""
    is_shared, tall_programs = has_tall and not is_apart, 2 if has_tall and is_apart else 0
    runs, tall_slots = 2 * programs if is_shared else programs, tall_slots if has_tall else 0
    return room.Tiling(kv_heads, short_rows, tall_rows, 4, has_tall, 8, 4, programs, runs, tall_slots, 0, 0, causal, left, tall_programs)


tilings = st.builds(lambda shape, **others: tiling(*shape, **others), st.sampled_from([(2, 2, 4), (1, 4, 8), (3, 1, 5), (2, 3, 6)]),
                    has_tall=st.booleans(), programs=st.sampled_from([2, 1, 7, 132, 3]), tall_slots=st.sampled_from([8, 40, 200, 0, 3]),
                    causal=st.booleans(), left=st.sampled_from([-1, 0, 5, 40]), is_apart=st.booleans())


@st.composite
def cases(draw):
    """A tiling, and a batch that it allows: without a causal mask, a request may have more query rows than keys."""
    cut, page_size = draw(tilings), draw(st.sampled_from([4, 16, 1, 3]))
    query_lens = draw(st.lists(st.sampled_from([9, 1, 16, 3, 6, 0]), min_size=2, max_size=5))
    contexts = [draw(st.one_of(st.sampled_from([30, 150, 600]), st.integers(0 if cut.causal else -n, 40))) if n else 0 for n in query_lens]
    return cut, Batch(query_lens, contexts, page_size, draw(st.integers(0, 5)), draw(st.integers(0, 2)), draw(st.integers(0, 3)), draw(seeds))


def arguments_of(batch, cut, device):
    return *batch.metadata(device), batch.page_size, batch.N, batch.T, cut


def run(schedule_out, query_start_loc, seq_lens, block_table, page_size, num_pages, T, cut):
    """The schedule in buffers that held junk: what the device does not fill shows."""
    out = room.Schedule.allocate(T, len(seq_lens), cut, seq_lens.device)
    for field in (*FIELDS, "work"):
        getattr(out, field).fill_(JUNK)
    schedule_out(query_start_loc, seq_lens, block_table, page_size, num_pages, cut, out)
    return out


def decode(out, cut):
    """The work list as the twin has it. Each run's copy of its request must be one, and what lies past the counts must still be junk."""
    work, (fills_at, short_at, runs_at, tall_at, rows) = out.work.tolist(), cut.sections(len(out.positions), len(out.status))
    num_tall, num_short, num_fills, run_length, is_split, num_runs, streams = work[0][:7]

    def take(begin, count, end, fields):
        assert 0 <= count <= end - begin and {JUNK}.issuperset(field for record in work[begin + count:end] for field in record)
        return [tuple(record[:fields]) for record in work[begin:begin + count]]

    short, records = take(short_at, num_short, runs_at, 8), take(runs_at, cut.runs + 1, tall_at, 10)
    total = records[-1][9]
    runs = [(index if begin < total else None, begin) for *_, index, begin in records]
    assert all(short[index:index + 1] == [record[:8]] for (index, _), record in zip(runs, records, strict=True) if index is not None)
    return SimpleNamespace(fills=take(fills_at, num_fills, short_at, 3), short=short, runs=runs, tall=take(tall_at, num_tall, rows, 10),
                           run_length=run_length, is_split=bool(is_split), num_runs=num_runs, streams=streams)


def compare(got, *arguments):
    want = twin.schedule(*arguments)
    for field in FIELDS:
        assert_same(getattr(got, field), getattr(want, field))
    assert vars(decode(got, arguments[-1])) == vars(want.work)
    return got


def check_equals_reference(schedule_out, *arguments):
    return compare(run(schedule_out, *arguments), *arguments)


@given(cases())
def test_equals_reference(device, case):
    cut, batch = case
    got = check_equals_reference(room.schedule_out, *arguments_of(batch, cut, device))
    assert not got.status.any() and got.num_tokens.item() == batch.num_tokens


def breaks(change):
    """schedule_out, and then `change` of what it wrote: the broken variants of the controls below."""
    def broken(*arguments):
        room.schedule_out(*arguments)
        change(arguments[-1], *sections(*arguments[-2:]))
    return broken


def sections(cut, out):
    """Views of the work list: the header, fills, short requests, runs, tall items."""
    at = cut.sections(len(out.positions), len(out.status))
    return [out.work[0], *(out.work[begin:end] for begin, end in pairwise(at))]


def adds(part, row, field, value=1):
    """A change of one number in a section."""
    def change(out, *parts):
        parts[("header", "fills", "short", "runs", "tall").index(part)][row, field] += value
    return change


def loses_an_item(out, header, fills, short, runs, tall):
    n = header[0].item()
    tall[1:n - 1] = tall[2:n].clone()
    tall[n - 1] = JUNK
    header[0] -= 1


def doubles_an_item(out, header, fills, short, runs, tall):
    tall[1:] = tall[:-1].clone()
    header[0] += 1


def exchanges_items(out, header, fills, short, runs, tall):
    tall[:header[0]] = tall[:header[0]].flip(0)


def loses_a_fill(out, header, fills, short, runs, tall):
    fills[header[2] - 1] = JUNK
    header[2] -= 1


def doubles_a_fill(out, header, fills, short, runs, tall):
    fills[header[2]] = fills[header[2] - 1]
    header[2] += 1


def doubles_a_short_request(out, header, fills, short, runs, tall):
    short[1:] = short[:-1].clone()
    header[1] += 1


def ends_early(out, header, fills, short, runs, tall):
    runs[:, 9].clamp_(max=runs[-1, 9].item() - 1)


def repeats_a_run(out, header, fills, short, runs, tall):
    """The second run begins where the first one does, which then has nothing to do."""
    runs[1] = runs[0]


def leaves_a_run(out, header, fills, short, runs, tall):
    header[5] -= 1


def leaves_tall_items(out, header, fills, short, runs, tall):
    header[6] = BROKEN_CUT.programs


WORK_CHANGES = {
    "an item lost": loses_an_item, "an item doubled": doubles_an_item, "items exchanged": exchanges_items, "rows moved": adds("tall", 0, 4),
    "a span too many": adds("tall", 1, 5, -1), "a span lost": adds("tall", 0, 6, -1), "another tile's slots": adds("tall", 1, 9),
    "a piece too many": adds("tall", 0, 8), "a fill lost": loses_a_fill, "a fill doubled": doubles_a_fill,
    "a row not filled": adds("fills", 0, 1, -1), "a short request doubled": doubles_a_short_request, "an ordinal moved": adds("short", 1, 6),
    "a segment lost": adds("short", 0, 5, -1),
    "a run moved": adds("runs", 1, 9), "the first run moved": adds("runs", 0, 9), "a run of another request": adds("runs", 1, 8),
    "a run with another copy": adds("runs", 1, 2), "the last ordinal lost": ends_early, "a run repeated": repeats_a_run, "a run left": leaves_a_run,
    "no program for tall items": leaves_tall_items,
}
work_changes = pytest.mark.parametrize("change", WORK_CHANGES.values(), ids=WORK_CHANGES.keys())
BROKEN = Batch([1, 9, 3, 7], [60, 30, 45, 0], 4, pads=2, spare_requests=1)            # short, tall, short, tall
BROKEN_CUT = tiling(programs=8, tall_slots=16)                                        # several runs; as many slots as the spans of both tall ones


@pytest.mark.parametrize("programs", [1, 7, 20])
@pytest.mark.parametrize("query_lens, contexts", [([1, 9, 3, 7], [600, 30, 45, 0]), ([1, 1, 16], [300, 150, 600]), ([1, 3], [600, 2]),
                                                  ([9, 40], [1, 0])])
def test_mixed_batches_share_the_programs(device, programs, query_lens, contexts):
    """Few runs or many of them for each program, tall items beside them, runs alone and tall items alone."""
    cut = tiling(programs=programs)
    check_equals_reference(room.schedule_out, *arguments_of(Batch(query_lens, contexts, 4), cut, device))


@pytest.mark.parametrize("change", [
    lambda out, *_: out.positions[:4].add_(1),
    lambda out, *_: out.slot_mapping[:4].add_(1),
    lambda out, *_: out.last_token.add_(1),
    lambda out, *_: out.positions[20:].fill_(JUNK),
    lambda out, *_: out.slot_mapping[20:].fill_(JUNK),
    lambda out, *_: out.token_to_request[20:].fill_(JUNK),
    lambda out, *_: out.last_token[4:].fill_(JUNK),
    lambda out, *_: out.status[4:].fill_(JUNK),
    lambda out, header, *_: header[3].add_(1),
    lambda out, header, *_: header[4].sub_(1),
    lambda out, header, *_: header[5].add_(1),
    lambda out, header, *_: header[6].add_(1),
    lambda out, header, fills, *_: fills[0, 2].add_(1),
    lambda out, header, fills, short, *_: short[2, 5].fill_(1),
], ids=["positions off by one", "slots off by one", "last tokens off by one", "positions of pads", "slots of pads", "requests of pads",
        "last tokens of spare requests", "status of spare requests", "the length of runs", "whether spans are items", "the number of runs",
        "programs that begin with runs", "NaN for pads",
        "junk past the last short request overwritten"])
def test_broken_schedules_are_caught(device, change):
    arguments = arguments_of(BROKEN, BROKEN_CUT, device)
    check_equals_reference(room.schedule_out, *arguments)
    with pytest.raises(AssertionError):
        check_equals_reference(breaks(change), *arguments)


@work_changes
def test_broken_work_lists_differ_from_the_reference(device, change):
    with pytest.raises(AssertionError):
        check_equals_reference(breaks(change), *arguments_of(BROKEN, BROKEN_CUT, device))


def demanded(batch, cut):
    """Every (request, KV head, query row, segment) of which attention needs a state: of the request's keys, those that some row's window reaches."""
    for r, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.lens, strict=True)):
        yield from product([r], range(cut.kv_heads), range(query_len), seen_segments(query_len, kv_len, cut))


def seen_segments(query_len, kv_len, cut):
    first_key = kv_len - query_len - cut.left if cut.left >= 0 else 0
    return [segment for segment in range(twin.cdiv(kv_len, cut.segment)) if (segment + 1) * cut.segment > first_key]


def groups(record, cut):
    """(first ordinal, end, KV head, rows) of the parts of a short request that share their keys: a state for each of the segments."""
    _, _, query_len, _, _, segments, ordinal, _ = record
    for head, row in product(range(cut.kv_heads), range(0, query_len, cut.short_rows)):
        yield ordinal, ordinal + segments, head, range(row, min(row + cut.short_rows, query_len))
        ordinal += segments


def taken(work, cut):
    """Every (request, KV head, query row, segment) as attention's programs take them: runs by ordinals, tall items by spans."""
    for (index, begin), (_, run_end) in pairwise(work.runs):
        while begin < run_end:
            assert index is not None and index < len(work.short)
            request, *_, first_segment, segments, ordinal, _ = work.short[index]
            mine = list(groups(work.short[index], cut))
            end = min(run_end, mine[-1][1])
            assert ordinal <= begin < end
            for x in range(begin, end):
                _, _, head, rows = mine[(x - ordinal) // segments]
                yield from product([request], [head], rows, [first_segment + (x - ordinal) % segments])
            begin, index = end, index + 1
    for request, _, query_len, kv_len, row, first_span, end_span, *_ in work.tall:
        spans, rows = range(first_span, end_span), range(row, min(row + cut.tall_rows, query_len))
        mine = [segment for segment in seen_segments(query_len, kv_len, cut) if segment // cut.span in spans]
        yield from product([request], range(cut.kv_heads), rows, mine)


def check_runs(work, cut):
    """Attention finds a state's run by its ordinal: runs have one length and room for the spans that begin in them, or cut no group at all."""
    begins, mine = [begin for _, begin in work.runs], [group for record in work.short for group in groups(record, cut)]
    if begins != [min(run * work.run_length, begins[-1]) for run in range(cut.runs + 1)]:
        assert {0, *begins} <= {0, *(end for _, end, *_ in mine)}
        return
    counts = Counter()
    for record in work.short:
        for begin, end, *_ in groups(record, cut):
            run, first_segment = begin // work.run_length, record[4]
            if end > (run + 1) * work.run_length:                                      # another run has a part of the group
                heads = [x for x in range(begin, end) if x == begin or (first_segment + x - begin) % cut.span == 0]
                counts.update(x // work.run_length for x in heads)
    assert max(counts.values(), default=0) <= room.RUN_SPANS


def check_tall(work, cut):
    """Requests with most keys come first, in them the rows with most keys; items of one tile lie together, and split ones have slots."""
    order = [(-kv_len, request, -row, first_span) for request, _, _, kv_len, row, first_span, *_ in work.tall]
    assert order == sorted(order)
    for i, (request, *_, row, first_span, end_span, _, pieces, first_item) in enumerate(work.tall):
        assert first_item <= i < first_item + pieces <= len(work.tall)
        assert all(other[0] == request and other[4] == row and other[9] == first_item for other in work.tall[first_item:first_item + pieces])
        assert pieces == 1 or (end_span == first_span + 1 and (first_item + pieces) * cut.kv_heads <= cut.tall_slots)


def check_work_list(work, batch, cut):
    """All that attention needs is taken exactly once, every row is filled or computed, and states have places."""
    assert sorted(taken(work, cut)) == sorted(demanded(batch, cut))
    computed = {(first_token, query_len) for _, first_token, query_len, *_ in work.short + work.tall}
    rows = [token for first_token, n, *_ in [*work.fills, *computed] for token in range(first_token, first_token + n)]
    assert sorted(rows) == list(range(batch.T))
    check_runs(work, cut)
    check_tall(work, cut)
    total = work.runs[-1][1]
    assert all(begin == total for _, begin in work.runs[work.num_runs:]) and (not work.tall or work.streams < cut.programs)


@given(cases())
def test_every_segment_of_every_row_is_taken_once(device, case):
    cut, batch = case
    check_work_list(decode(run(room.schedule_out, *arguments_of(batch, cut, device)), cut), batch, cut)


@work_changes
def test_broken_work_lists_are_caught(device, change):
    arguments = arguments_of(BROKEN, BROKEN_CUT, device)
    check_work_list(decode(run(room.schedule_out, *arguments), BROKEN_CUT), BROKEN, BROKEN_CUT)
    with pytest.raises(AssertionError):
        check_work_list(decode(run(breaks(change), *arguments), BROKEN_CUT), BROKEN, BROKEN_CUT)


def rows_of(records):
    """(request, first token, query length, KV length) of each request in a section."""
    return {record[:4] for record in records}


def check_junk(schedule_out, device, batch, cut, victim, length=None, page=None):
    """The request `victim` gets this length, or (index, page) in its row of the table: it is flagged, and no other request changes."""
    query_start_loc, seq_lens, block_table = batch.metadata(device)
    arguments = query_start_loc, seq_lens, block_table, batch.page_size, batch.N, batch.T, cut
    want = twin.schedule(*arguments)
    before = want.work
    if page is None:
        seq_lens[victim] = length
    else:
        block_table[victim, page[0]] = page[1]
    got = run(schedule_out, *arguments)
    after = decode(got, cut)
    flag = room.BAD_LENGTH if page is None else room.BAD_PAGE
    assert got.status.tolist() == [flag if r == victim else 0 for r in range(batch.R)]
    others = want.token_to_request != victim
    assert_same(got.slot_mapping[others], want.slot_mapping[others])
    assert_same(got.positions[others], want.positions[others])
    first_token, query_len = sum(batch.query_lens[:victim]), batch.query_lens[victim]
    own = {(victim, first_token, query_len, batch.lens[victim])} if page is None else set()
    assert rows_of(after.short) == rows_of(before.short) - own and rows_of(after.tall) == rows_of(before.tall) - own
    assert sorted(after.fills) == sorted(before.fills + [(first_token, query_len, 1)] * (page is None))
    assert {record[0] for record in after.short + after.tall if record[7]} == (set() if page is None else {victim})
    assert all(record[7] for record in after.short + after.tall if record[0] == victim)
    return got, *arguments


@given(cases(), st.booleans(), st.data())
def test_junk_stays_in_its_row(device, case, is_length, data):
    cut, batch = case
    live = [r for r in range(batch.R) if batch.query_lens[r] and batch.lens[r]]
    if not live:
        return
    victim = data.draw(st.sampled_from(live))
    if is_length:
        least = batch.query_lens[victim] if cut.causal else 0
        junk = dict(length=data.draw(st.one_of(st.integers(-2**31, least - 1).filter(bool), st.integers(batch.W * batch.page_size + 1, 2**31 - 1))))
    else:
        junk = dict(page=(data.draw(st.integers(0, len(batch.pages[victim]) - 1)),
                          data.draw(st.one_of(st.integers(-2**31, -1), st.integers(batch.N, 2**31 - 1)))))
    compare(*check_junk(room.schedule_out, device, batch, cut, victim, **junk))


def clamps(query_start_loc, seq_lens, block_table, page_size, num_pages, *rest):
    most = block_table.shape[1] * page_size
    room.schedule_out(query_start_loc, seq_lens.clamp(0, most), block_table.clamp(0, num_pages - 1), page_size, num_pages, *rest)


def flags_the_next_request(out, *_):
    out.status.copy_(out.status.roll(1))


def takes_the_slots_of_the_next_request(out, *_):
    out.slot_mapping[3] = -1


def moves_the_next_request(out, *_):
    out.positions[3] = 0


def forgets_the_flags(out, header, fills, short, runs, tall):
    fills[:, 2].clamp_(max=0)
    for part in (short, runs, tall):
        part[:, 7].clamp_(max=0)


def flags_the_work_of_the_next_request(out, header, fills, short, runs, tall):
    for part in (short, runs):
        part[part[:, 0] == 1, 7] = 1


@pytest.mark.parametrize("junk", [dict(length=2**31 - 1), dict(page=(1, -5))])
@pytest.mark.parametrize("broken", [clamps, *map(breaks, (
    flags_the_next_request, takes_the_slots_of_the_next_request, moves_the_next_request, forgets_the_flags, flags_the_work_of_the_next_request))],
    ids=["clamps", "flags the next", "takes the next one's slots", "moves the next", "forgets the flags", "flags the next one's work"])
def test_spilt_junk_is_caught(device, broken, junk):
    check_junk(room.schedule_out, device, Batch([3, 1], [5, 9], 4), tiling(), 0, **junk)
    with pytest.raises(AssertionError):
        check_junk(broken, device, Batch([3, 1], [5, 9], 4), tiling(), 0, **junk)


integers = st.integers(-2**31, 2**31 - 1)


@given(st.lists(integers, min_size=5, max_size=5), st.lists(integers, min_size=4, max_size=4), st.integers(0, 20), tilings)
def test_any_integers_at_all(device, starts, lens, T, cut):
    table = torch.randint(-2**31, 2**31 - 1, (4, 3), generator=torch.Generator().manual_seed(T)).to(device, torch.int32)
    metadata = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lens))
    got = check_equals_reference(room.schedule_out, *metadata, table, 4, 7, T, cut)
    assert ((got.slot_mapping >= -1) & (got.slot_mapping < 28)).all()
    assert ((got.last_token >= -1) & (got.last_token < max(T, 1))).all()


def test_rows_of_length_zero_with_tokens_are_pads(device):
    """Some engines pad a decode batch with requests of one token and length 0."""
    starts, lens, table = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 2], [5, 0], [[1, 2], [9, 9]]))
    got = check_equals_reference(room.schedule_out, starts, lens, table, 4, 3, 3, tiling())
    assert got.token_to_request.tolist() == [0, -1, -1] and got.slot_mapping.tolist() == [8, -1, -1] and got.status.tolist() == [0, 0]
    assert decode(got, tiling()).fills == [(1, 1, 0), (2, 1, 0)]


@pytest.mark.parametrize("causal, status, slots, fills", [(True, room.BAD_LENGTH, [-1, -1, -1], [(0, 3, 1)]), (False, 0, [-1, 4, 5], [])])
def test_fewer_keys_than_rows_are_bad_only_under_a_causal_mask(device, causal, status, slots, fills):
    starts, lens, table = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 3], [2], [[1]]))
    got = check_equals_reference(room.schedule_out, starts, lens, table, 4, 3, 3, tiling(causal=causal))
    assert got.status.tolist() == [status] and got.slot_mapping.tolist() == slots and decode(got, tiling(causal=causal)).fills == fills


MANY = Batch([700] + [1] * 20, [3] + list(range(20)), 16, pads=600)                   # more rows and runs than one vector of the kernel holds
LONG = Batch([1, 3, 2], [5000, 3000, 1000], 16)                                       # 3008 ordinals
EQUAL = Batch([9, 1, 6, 9], [21, 29, 30, 21], 4)                                      # as many keys in two tall requests


@pytest.mark.parametrize("batch, cut, run_length, is_split", [
    (MANY, tiling(programs=400), 1, False),
    (MANY, tiling(programs=400, tall_slots=8000), 1, True),
    (MANY, tiling(programs=2, has_tall=False), 30848, True),                          # any run past 56 segments, 14 spans, holds whole groups
    (LONG, tiling(programs=54, has_tall=False), 56, True),
    (LONG, tiling(programs=53, has_tall=False), 60, True),
    (LONG, tiling(programs=30), 104, True),                                           # nothing is tall: as many runs as programs
    (LONG, tiling(programs=1, has_tall=False, left=2000), 1760, True),
    (EQUAL, tiling(), 2, False),
    (EQUAL, tiling(tall_slots=40), 2, True),
])
def test_batches_at_limits(device, batch, cut, run_length, is_split):
    work = decode(check_equals_reference(room.schedule_out, *arguments_of(batch, cut, device)), cut)
    check_work_list(work, batch, cut)
    assert work.run_length == run_length and work.is_split == is_split


@pytest.mark.parametrize("change, error, words", [
    (dict(page_size=0), ValueError, "schedule: page_size: got 0, expected 1 to 256"),
    (dict(num_pages=0), ValueError, "schedule: num_pages: got 0"),
    (dict(seq_lens=torch.zeros(3, dtype=torch.int32)), ValueError, r"query_start_loc: got shape \[3\], expected \[4\]"),
    (dict(seq_lens=torch.zeros(0, dtype=torch.int32)), ValueError, "seq_lens: got R = 0, expected 1 to 4096 requests"),
    (dict(block_table=torch.zeros(2, 4)), TypeError, "block_table: got torch.float32, expected torch.int32"),
])
def test_misuse_is_named(device, change, error, words):
    batch = Batch([2, 1], [0, 3], 4)
    query_start_loc, seq_lens, block_table = batch.metadata(device)
    arguments = dict(query_start_loc=query_start_loc, seq_lens=seq_lens, block_table=block_table, page_size=4, num_pages=batch.N, T=3,
                     tiling=tiling())
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(error, match=words):
        room.schedule(**arguments | change)


def test_a_work_list_of_another_tiling_is_named(device):
    arguments = arguments_of(BROKEN, BROKEN_CUT, device)
    out = room.Schedule.allocate(BROKEN.T, BROKEN.R, tiling(programs=4), device)
    with pytest.raises(ValueError, match=r"schedule: out.work: got shape \[\d+, 16\], expected \[\d+, 16\]"):
        room.schedule_out(*arguments[:5], BROKEN_CUT, out)
