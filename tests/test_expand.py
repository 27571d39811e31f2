"""expand against its twin, and what it must not read."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.expand as twin
from gkernels.kernels import expand as room
from tests.close import assert_same
from tests.strategies import seeds


def draw(seed, R, K, device):
    """Drafts of all lengths, with unused rows and numbers that make no sense among them."""
    random = torch.Generator().manual_seed(seed)
    ints = lambda low, high, *shape: torch.randint(low, high, shape, generator=random).to(torch.int32).to(device)
    lens = ints(0, 40, R) * ints(0, 2, R) - ints(0, 2, R) * 2
    return ints(0, 99, R), lens, ints(0, 99, R, K), ints(-1, K + 3, R), ints(-1, K + 2, R)


def check_equals_reference(expand, arguments):
    got, want = expand(*arguments), twin.expand(*arguments)
    for (name, t), values in zip(vars(got).items(), want, strict=True):
        assert t.tolist() == values, f"{name}: {t.tolist()}, expected {values}"


@given(seeds, st.sampled_from([1, 2, 7, 16, 33]), st.integers(1, 6))
def test_equals_reference(device, seed, R, K):
    check_equals_reference(room.expand, draw(seed, R, K, device))


def test_a_limit_left_out_is_caught(device):
    with pytest.raises(AssertionError, match="token_ids"):
        check_equals_reference(lambda *a: room.expand(*a[:4], a[4] * 0 + 99), draw(0, 16, 4, device))


@given(seeds)
def test_drafts_past_their_length_change_nothing(device, seed):
    ids, lens, draft, draft_len, limits = draw(seed, 7, 4, device)
    want = room.expand(ids, lens, draft, draft_len, limits)
    taken = torch.minimum(draft_len, limits).clamp(0, 4) * (lens > 0)
    draft[torch.arange(4, device=device) >= taken[:, None]] = -2**31
    for got, other in zip(vars(room.expand(ids, lens, draft, draft_len, limits)).values(), vars(want).values(), strict=True):
        assert_same(got, other)


@pytest.mark.parametrize("change, error, words", [
    (dict(token_ids=torch.zeros(4, dtype=torch.int32)), ValueError, r"expand: out.token_ids: got shape \[4\], expected \[35\]"),
    (dict(seq_lens=torch.zeros(7)), TypeError, "expand: out.seq_lens: got torch.float32, expected torch.int32"),
])
def test_misuse_is_named(device, change, error, words):
    arguments = draw(0, 7, 4, device)
    with pytest.raises(error, match=words):
        room.expand_out(*arguments, replace(room.Rows.allocate(7, 4, device), **{name: t.to(device) for name, t in change.items()}))
    with pytest.raises(ValueError, match=r"expand: limits: got shape \[3\], expected \[7\]"):
        room.expand(*arguments[:4], arguments[4][:3])
