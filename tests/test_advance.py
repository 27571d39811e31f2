"""advance against its twin, over single steps and over many."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.advance as twin
from gkernels.kernels import advance as room
from tests.close import assert_same
from tests.strategies import seeds

V, L, S, DEPTH = 20, 12, 3, 4
tables = st.sampled_from([(), ("counts",), ("history",), ("slots", "counts", "history")])


def draw(seed, R, chosen, device):
    """A state in the middle of things: some rows unused, some ended, some amid their prompt."""
    random = torch.Generator().manual_seed(seed)
    ints = lambda low, high, *shape: torch.randint(low, high, shape, generator=random).to(torch.int32).to(device)
    state = dict(emits=ints(0, 2, R), stop_ids=ints(-1, V, R, S), max_tokens=ints(1, 9, R), max_lens=ints(2, L + 2, R), token_ids=ints(0, V, R),
                 seq_lens=ints(0, L + 2, R), generated=ints(0, 5, R), ended=ints(0, 3, R), flags=ints(0, 2, R), ring=ints(-1, V, DEPTH, R),
                 step=ints(0, 9, 1), running=ints(0, 9, 1))
    slots = torch.randperm(R + 4, generator=random)[:R].to(torch.int32).to(device) - 1                  # some of them no slots
    every = dict(slots=slots, counts=ints(0, 9, R + 2, V), history=ints(0, V, R + 2, L))
    return room.State(**state, **{name: every[name] for name in chosen})


def copy(state):
    return room.State(**{f.name: None if getattr(state, f.name) is None else getattr(state, f.name).clone() for f in fields(state)})


def drawn(seed, R, device, bad=True):
    """Tokens of a step, and its status; -1, ids past the vocabulary and flags among them."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (R,), generator=random)
    if bad:
        tokens[torch.rand(R, generator=random) < 0.2] = torch.tensor([-1, V, 2**31 - 1, -2**31])[seed % 4]
    status = torch.randint(1, 9, (R,), generator=random) * (torch.rand(R, generator=random) < 0.2 * bad)
    return tokens.to(torch.int32).to(device), status.to(torch.int32).to(device)


def check_equals_reference(advance, seed, R, chosen, steps, device):
    mine = draw(seed, R, chosen, device)
    its = copy(mine)
    for i in range(steps):
        step = drawn(seed + i, R, device, bad=i % 2 == 0)
        advance(*step, mine, V)
        twin.advance(*step, its, V)
        for field in fields(mine):
            got, want = getattr(mine, field.name), getattr(its, field.name)
            assert got is want is None or not (got != want).any(), f"{field.name} after step {i}: {got.tolist()}, expected {want.tolist()}"


@given(seeds, st.sampled_from([1, 2, 7, 16, 33]), tables, st.integers(1, 6))
def test_equals_reference(device, seed, R, chosen, steps):
    check_equals_reference(room.advance, seed, R, chosen, steps, device)


@pytest.mark.parametrize("broken", [
    lambda tokens, status, state, V: room.advance(tokens, status, replace(state, max_tokens=state.max_tokens + 1), V),
    lambda tokens, status, state, V: room.advance(tokens, status * 0, state, V),
    lambda tokens, status, state, V: room.advance(tokens, status, replace(state, stop_ids=state.stop_ids[:, :1].contiguous()), V)],
    ids=["one token more", "no status", "one stop id"])
def test_a_rule_left_out_is_caught(device, broken):
    with pytest.raises(AssertionError, match="after step"):
        check_equals_reference(broken, 3, 33, (), 6, device)


@given(seeds, tables)
def test_row_order_changes_nothing(device, seed, chosen):
    state, (tokens, status), order = draw(seed, 5, chosen, device), drawn(seed, 5, device), [3, 0, 4, 1, 2]
    if "slots" not in chosen:
        state = replace(state, counts=None, history=None)
    moved = copy(state)
    moved = replace(moved, ring=moved.ring[:, order].contiguous(), **{f.name: getattr(moved, f.name)[order].contiguous() for f in fields(moved)
                    if getattr(moved, f.name) is not None and f.name not in ("ring", "step", "running", "counts", "history")})
    room.advance(tokens, status, state, V)
    room.advance(tokens[order], status[order], moved, V)
    assert_same(moved.ring, state.ring[:, order])
    for name in ("token_ids", "seq_lens", "generated", "ended", "flags"):
        assert_same(getattr(moved, name), getattr(state, name)[order])
    for name in ("step", "running", "counts", "history"):
        assert getattr(state, name) is None or torch.equal(getattr(moved, name), getattr(state, name))


@pytest.mark.parametrize("change, error, words", [
    (dict(emits=torch.zeros(4, dtype=torch.int32)), ValueError, r"advance: state.emits: got shape \[4\], expected \[5\]"),
    (dict(ring=torch.zeros(0, 5, dtype=torch.int32)), ValueError, "advance: state.ring: got no lines"),
    (dict(seq_lens=torch.zeros(5)), TypeError, "advance: state.seq_lens: got torch.float32, expected torch.int32"),
    (dict(counts=torch.zeros(3, V, dtype=torch.int32)), ValueError, "advance: state.counts: got 3 lines, expected one for each of 5 rows, or slots"),
    (dict(history=torch.zeros(9, 5, dtype=torch.int32).T), ValueError, r"advance: state.history: got strides \[1, 5\]"),
])
def test_misuse_is_named(device, change, error, words):
    state = replace(draw(0, 5, (), device), **{name: t.to(device) for name, t in change.items()})
    with pytest.raises(error, match=words):
        room.advance(*drawn(0, 5, device), state, V)
    with pytest.raises(ValueError, match="advance: tokens: got R = 0"):
        room.advance(*drawn(0, 0, device), draw(0, 0, (), device), V)
