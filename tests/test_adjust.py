"""adjust against its twin, and what each option may not touch."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.adjust as twin
from gkernels.graph import interpreter
from gkernels.kernels import adjust as room
from tests.close import assert_close, assert_same
from tests.strategies import dtypes, randn, seeds, strided

INF, NAN = float("inf"), float("nan")
R = 3
vocabularies = st.sampled_from([1, 31, 32, 100, 300, 2500])
groups = st.lists(st.sampled_from(range(len(room.GROUPS))), unique=True)


def draw(seed, V, chosen, device):
    """Options of every kind for R rows, some of them off; None for groups that are not chosen."""
    random = torch.Generator().manual_seed(seed)
    ints = lambda low, high, *shape: torch.randint(low, high, shape, generator=random, dtype=torch.int64).to(torch.int32).to(device)
    reals = lambda *shape: torch.randn(shape, generator=random).to(device)
    off = lambda value, neutral: torch.where(torch.rand(R, generator=random).to(device) < 0.3, neutral, value)
    words = -(-V // 32)
    slots = torch.randperm(R + 2, generator=random)[:R].to(torch.int32).to(device) - 1 if seed % 2 else None
    lines = R if slots is None else R - 1                  # of allowed; slots lie in both tables, in one or in none
    every = dict(bias_ids=ints(-1, V, R, 5), bias=reals(R, 5) * 3, repetition=off(reals(R).exp(), 1.0), presence=off(reals(R), 0.0),
                 frequency=off(reals(R), 0.0), counts=ints(-2, 4, R, V), prompt=ints(-2**31, 2**31, R, words),
                 allowed=ints(-2**31, 2**31, lines, words), banned_ids=ints(-1, V, R, 3), stop_ids=ints(-1, V, R, 2),
                 min_tokens=ints(0, 4, R), generated=ints(0, 4, R))
    return room.Adjustments(**{name: every[name] for i in chosen for name in room.GROUPS[i]}, slots=slots)


def rows(device, lens=(5, 1, 9)):
    return torch.tensor(lens, dtype=torch.int32, device=device), torch.zeros(R, dtype=torch.int32, device=device)


@given(seeds, dtypes, vocabularies, groups, st.booleans())
def test_equals_reference(device, seed, dtype, V, chosen, is_strided):
    logits, options, (lens, status) = randn(seed, R, V, dtype=dtype, device=device), draw(seed, V, chosen, device), rows(device, (5, 0, 2))
    got = room.adjust(strided(logits) if is_strided else logits, options, lens, status)
    want, plain = (twin.adjust(x, options, lens, status.clone()) for x in (logits.double(), logits))
    assert got.dtype == torch.float32 and not status.any()
    assert_close(got, want, plain)


@given(seeds, dtypes, vocabularies, groups)
def test_in_place_is_the_same_rounded_once(device, seed, dtype, V, chosen):
    logits, options, (lens, status) = randn(seed, R, V, dtype=dtype, device=device), draw(seed, V, chosen, device), rows(device, (5, 0, 2))
    want = room.adjust(logits, options, lens, status).to(dtype)
    want[1] = logits[1]
    room.adjust_out(logits, options, lens, status, logits)
    assert_same(logits, want)


@given(seeds, dtypes, st.sampled_from([1, 300, 900, 1500]), groups)
def test_programs_of_several_tiles_change_no_bit(device, seed, dtype, V, chosen):
    """As where rows are many: chunks of four tiles, the last ragged, of which options touch some."""
    logits, options, (lens, status) = randn(seed, R, V, dtype=dtype, device=device), draw(seed, V, chosen, device), rows(device, (5, 0, 2))
    adjusted = []
    for config in (room.Config(128, 128, 1), room.Config(512, 128, 1)):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(room, "config", lambda R, V, config=config: config)
            in_place = logits.clone()
            room.adjust_out(in_place, options, lens, status, in_place)
            adjusted.append((room.adjust(logits, options, lens, status), in_place))
    for one_tile, four_tiles in zip(*adjusted, strict=True):
        assert_same(four_tiles, one_tile)
    assert_close(adjusted[1][0], *(twin.adjust(x, options, lens, status.clone()) for x in (logits.double(), logits)))
    assert not status.any()


def test_many_rows_share_their_options_among_tiles():
    assert (room.config(64, 128256), room.config(1, 128256)) == (room.Config(4096, 1024, 4), room.Config(1024, 1024, 4))


TOKEN = 2100                                                # in the third chunk of five


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the CPU interpreter")
@pytest.mark.parametrize("groups", [{"bias_ids": [TOKEN], "bias": [1.5]}, {"allowed": None}, {"banned_ids": [TOKEN]},
                                    {"stop_ids": [TOKEN], "min_tokens": 1, "generated": 0}], ids=lambda groups: next(iter(groups)))
def test_chunks_that_nothing_touches_stay_unread(groups):
    """In place, a token of one row: only its chunk of its row is read or written."""
    V, none = 5000, {"bias_ids": -1, "bias": 0.0, "banned_ids": -1, "stop_ids": -1, "min_tokens": 0, "generated": 0}
    given = {}
    for name, value in groups.items():
        if name == "allowed":
            given[name] = torch.full((R, -(-V // 32)), -1, dtype=torch.int32)
            given[name][1, TOKEN // 32] &= ~(1 << TOKEN % 32)
        else:
            value = torch.tensor(value, dtype=torch.float32 if name == "bias" else torch.int32)
            given[name] = torch.full((R, *value.shape), none[name], dtype=value.dtype)
            given[name][1] = value
    logits, (lens, status) = torch.zeros(R, V), rows("cpu")
    with interpreter.accesses() as launches:
        room.adjust_out(logits, room.Adjustments(**given), lens, status, logits)
    chunk, touched = room.config(R, V).CHUNK, torch.zeros(R, V, dtype=torch.bool)
    touched[1, TOKEN // chunk * chunk:][:chunk] = True
    assert logits[1, TOKEN] != 0
    for seen in (launches[0].read("logits_ptr"), launches[0].written("logits_ptr")):
        assert_same(torch.as_tensor(seen), touched)


def check_rows_are_their_own(adjust, device, seed):
    """Rows in another order are the same rows."""
    logits, options, (lens, status) = randn(seed, R, 300, device=device), draw(seed, 300, range(len(room.GROUPS)), device), rows(device)
    order = [2, 0, 1]
    options = replace(options, slots=torch.tensor([1, 2, 0], dtype=torch.int32, device=device))
    names = [field.name for field in fields(options) if field.name not in room.TABLES]
    moved = replace(options, **{name: getattr(options, name)[order].clone() for name in names})
    assert_same(adjust(logits[order].clone(), moved, lens[order], status), room.adjust(logits, options, lens, status)[order])


@given(seeds)
def test_row_order_changes_no_bit(device, seed):
    check_rows_are_their_own(room.adjust, device, seed)


@pytest.mark.parametrize("name", ["repetition", "counts", "allowed"])
def test_options_of_another_row_are_caught(device, name):
    def broken(logits, options, *rest):
        return room.adjust(logits, replace(options, **{name: getattr(options, name).roll(1, 0)}), *rest)

    with pytest.raises(AssertionError):
        check_rows_are_their_own(broken, device, 0)


def neutral(V, device):
    """Every group, with nothing switched on."""
    full = lambda value, *shape, dtype=torch.int32: torch.full((R, *shape), value, dtype=dtype, device=device)
    words, real = -(-V // 32), torch.float32
    return room.Adjustments(full(-1, 4), full(NAN, 4, dtype=real), full(1, dtype=real), full(0, dtype=real), full(0, dtype=real), full(7, V),
                            full(-1, words), full(-1, words), full(-1, 2), full(5, 2), full(3), full(3))


@given(seeds, vocabularies.filter(lambda V: V > 5))
def test_neutral_options_change_no_bit(device, seed, V):
    logits, (lens, status) = randn(seed, R, V, device=device), rows(device)
    logits[0, 0] = NAN
    assert_same(room.adjust(logits, neutral(V, device), lens, status), logits)
    assert not status.any()


@pytest.mark.parametrize("name, value", [
    ("bias_ids", -2), ("bias_ids", 40), ("bias_ids", 2**31 - 1), ("repetition", 0.0), ("repetition", -1.0), ("repetition", NAN), ("repetition", INF),
    ("presence", NAN), ("presence", -INF), ("frequency", INF), ("banned_ids", -7), ("banned_ids", 40), ("stop_ids", 40), ("stop_ids", -2**31)])
def test_bad_options_are_ignored_and_flagged(device, name, value):
    """In their row alone."""
    logits, options, (lens, status) = randn(0, R, 40, device=device), neutral(40, device), rows(device)
    getattr(options, name).view(R, -1)[1, 0] = value
    assert_same(room.adjust(logits, options, lens, status), logits)
    its = torch.zeros_like(status)
    twin.adjust(logits, options, lens, its)
    assert status.tolist() == its.tolist() == [0, room.BAD_OPTION, 0]


def test_a_bias_that_is_nan_is_flagged(device):
    logits, options, (lens, status) = randn(0, R, 40, device=device), neutral(40, device), rows(device)
    options.bias_ids[2, 1] = 3
    assert_same(room.adjust(logits, options, lens, status), logits)
    assert status.tolist() == [0, 0, room.BAD_OPTION]


def test_each_option_by_hand(device):
    logits, options, (lens, status) = torch.full((R, 8), 2.0, device=device), neutral(8, device), rows(device)
    options.counts.zero_()
    options.prompt.zero_()
    logits[:, 7] = -2.0
    options.counts[0, 6], options.prompt[0, 0] = 2, 1 << 7
    options.repetition[0], options.presence[0], options.frequency[0] = 4.0, 0.25, 0.5
    options.bias_ids[1], options.bias[1] = torch.tensor([1, 1, 2, -1]), torch.tensor([1.0, 2.0, -5.0, NAN])
    options.allowed[2], options.banned_ids[2, 1], options.min_tokens[2] = 0b01111111, 6, 4
    want = torch.tensor([[2, 2, 2, 2, 2, 2, 0.5 - 1.25, -8], [2, 5, -3, 2, 2, 2, 2, -2], [2, 2, 2, 2, 2, -INF, -INF, -INF]], device=device)
    assert_same(room.adjust(logits, options, lens, status), want)


@pytest.mark.parametrize("slots, lines", [([1, 0, 1], (1, 0, 1)), ([2, 1, -1], (None, 1, None)), ([2**31 - 1, -2**31, 0], (None, None, 0))])
def test_allowed_follows_slots(device, slots, lines):
    """A row whose slot has no line may draw every token, wherever the address would lie, and is not flagged."""
    logits, (lens, status) = randn(0, R, 40, device=device), rows(device)
    table = torch.tensor([[0b101, 1 << 7], [-2**31, 0]], dtype=torch.int32, device=device)
    tokens = {None: [*range(40)], 0: [0, 2, 39], 1: [31]}
    options = room.Adjustments(allowed=table, slots=torch.tensor(slots, dtype=torch.int32, device=device))
    want = torch.full_like(logits, -INF)
    for row, line in enumerate(lines):
        want[row, tokens[line]] = logits[row, tokens[line]]
    assert_same(room.adjust(logits, options, lens, status), want)
    assert_same(twin.adjust(logits, options, lens, status), want)
    assert not status.any()


@pytest.mark.parametrize("name", room.TABLES)
def test_a_table_without_lines_says_nothing(device, name):
    logits, options, (lens, status) = randn(0, R, 40, device=device), neutral(40, device), rows(device)
    options = replace(options, slots=torch.arange(R, dtype=torch.int32, device=device), **{name: getattr(options, name)[:0]})
    assert_same(room.adjust(logits, options, lens, status), logits)
    assert_same(twin.adjust(logits, options, lens, status), logits)


def test_no_rows_and_no_options(device):
    empty = torch.ones(0, 8, device=device)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    assert room.adjust(empty, room.Adjustments(), none, none).shape == (0, 8)


@pytest.mark.parametrize("change, error, words", [
    (dict(bias=None), ValueError, "adjust: bias_ids, bias: got only bias_ids, expected all of them or none"),
    (dict(bias=torch.zeros(R, 3)), ValueError, r"adjust: bias: got \[3, 3\], expected the shape of bias_ids"),
    (dict(allowed=torch.zeros(R, 1, dtype=torch.int32)), ValueError, r"adjust: allowed: got shape \[3, 1\], expected \[3, 2\]"),
    (dict(allowed=torch.zeros(R + 1, 2, dtype=torch.int32)), ValueError, r"adjust: allowed: got shape \[4, 2\], expected \[3, 2\]"),
    (dict(allowed=torch.zeros(9, 3, dtype=torch.int32), slots=torch.zeros(R, dtype=torch.int32)), ValueError,
     r"adjust: allowed: got shape \[9, 3\], expected \[any, 2\]"),
    (dict(allowed=torch.zeros(R, 2, dtype=torch.int64)), TypeError, "adjust: allowed: got torch.int64, expected torch.int32"),
    (dict(counts=torch.zeros(R, 40)), TypeError, "adjust: counts: got torch.float32, expected torch.int32"),
    (dict(stop_ids=torch.zeros(R, 2)), TypeError, "adjust: stop_ids"),
    (dict(repetition=torch.zeros(R + 1)), ValueError, r"adjust: repetition: got shape \[4\], expected \[3\]"),
])
def test_misuse_is_named(device, change, error, words):
    lens, status = rows(device)
    change = {k: v if v is None else v.to(device) for k, v in change.items()}
    with pytest.raises(error, match=words):
        room.adjust(randn(0, R, 40, device=device), replace(neutral(40, device), **change), lens, status)


@pytest.mark.parametrize("change, words", [
    (dict(bias={100: 1.0}), "adjust: bias: got token 100, expected token ids from 0 to 99"), (dict(bias={1: NAN}), r"adjust: bias\[1\]: got nan"),
    (dict(repetition=0), "adjust: repetition: got 0, expected a positive number"), (dict(repetition=INF), "repetition: got inf"),
    (dict(presence=NAN), "presence: got nan"), (dict(frequency=INF), "frequency: got inf"), (dict(banned_ids=(-1,)), "banned_ids: got token -1"),
    (dict(min_tokens=-1), "min_tokens: got -1"), (dict(min_tokens=1.5), "min_tokens: got 1.5"),
])
def test_options_of_a_request_are_checked(change, words):
    room.check_adjustments(100, {0: 1.0, 99: -100}, 1.3, -2.0, 2, (0, 99), 5)
    with pytest.raises(ValueError, match=words):
        room.check_adjustments(**dict(vocab_size=100) | change)
