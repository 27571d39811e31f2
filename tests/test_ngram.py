"""ngram against its twin, on sequences that repeat themselves, and on what lies around them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.ngram as twin
from gkernels.kernels import ngram as room
from tests.close import assert_same
from tests.strategies import far, seeds

BAD_LENGTHS = [0, -1, -2**31, 2**31 - 1]
capacities = st.sampled_from([1, 2, 7, 64, 300])
sizes = st.sampled_from([(1, 1), (1, 3), (2, 2), (2, 5), (3, 9)])
drafts = st.sampled_from([1, 3, 8])


def ints(values, device="cpu"):
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def batch(seed, R, L, K, alphabet, device, has_slots=False):
    """Histories of few different tokens, which repeat themselves; lengths, limits and slots out of range among the others."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=random)
    lengths, limits, slots = draw(0, L + 1, R), draw(-1, K + 3, R), torch.randperm(R + 2, generator=random)[:R]
    is_bad = draw(0, 5, R) == 0
    lengths = torch.where(is_bad, torch.tensor(BAD_LENGTHS)[draw(0, 4, R)], lengths)
    slots = torch.where(draw(0, 5, R) == 0, torch.tensor([-1, R + 2, 2**31 - 1, -2**31])[draw(0, 4, R)], slots)
    history = draw(0, alphabet, R + 2, L)
    history[draw(0, 40, R + 2, L) == 0] = -7
    return dict(history=ints(history, device), lengths=ints(lengths, device), max_draft=ints(limits, device)) | (
        dict(slots=ints(slots, device)) if has_slots else {})


def check_equals_reference(ngram, arguments, min_n, max_n, K):
    got, want = (op(**arguments, min_n=min_n, max_n=max_n, K=K) for op in (ngram, twin.ngram))
    for mine, its in zip(got, want, strict=True):
        assert_same(mine, its)
    return want


@given(seeds, st.integers(1, 5), capacities, sizes, drafts, st.sampled_from([1, 2, 3, 30]), st.booleans(), st.sampled_from([128, 512]))
def test_equals_reference(device, monkeypatch, seed, R, L, n, K, alphabet, has_slots, block):
    monkeypatch.setattr(room, "config", lambda L: room.Config(block, 1))
    check_equals_reference(room.ngram, batch(seed, R, L, K, alphabet, device, has_slots), *n, K)


@pytest.mark.parametrize("broken", [
    lambda max_n, **arguments: room.ngram(max_n=max_n - 1, **arguments),
    lambda min_n, **arguments: room.ngram(min_n=min_n - 1, **arguments),
    lambda lengths, **arguments: room.ngram(lengths=lengths - 1, **arguments),
    lambda max_draft, **arguments: room.ngram(max_draft=max_draft + 1, **arguments),
    lambda history, **arguments: room.ngram(history=history % 2, **arguments)],
    ids=["a shorter suffix", "too short a suffix", "the last token left out", "one token more", "another's tokens"])
def test_a_wrong_search_is_caught(device, broken):
    with pytest.raises(AssertionError, match="elements differ"):
        for seed in range(8):
            check_equals_reference(broken, batch(seed, 5, 64, 8, 3, device), 2, 5, 8)


@pytest.mark.parametrize("tokens, max_n, expected", [
    ([1, 2, 3, 9, 8, 1, 2, 3], 3, [9, 8, 1, 2]),                     # what followed, up to the present
    ([1, 2, 3, 7, 6, 5, 2, 3, 8, 9, 9, 9, 1, 2, 3], 3, [7, 6, 5, 2]),   # a longer suffix before a later place
    ([1, 2, 3, 7, 6, 5, 2, 3, 8, 9, 9, 9, 1, 2, 3], 2, [8, 9, 9, 9]),   # a later place before an earlier one
    ([4, 5, 5, 5, 5, 5, 5, 5], 3, [5, 5, 5, 5]),                     # but for the tokens that follow it
    ([0, 1, 2, 0, 1, 2, 0, 1, 2], 2, [0, 1, 2, 0]),
    ([3, 4, 0, 3, 4], 2, [0, 3, 4]),                                 # where fewer follow, the draft is shorter
    ([1, 2, 1, -1, 2, 1], 1, [2, 1]),                                # a negative id ends it
    ([1, 2, 3, 4], 3, []), ([5], 3, []), ([5, 5], 3, [5]),
])
def test_known_sequences(device, tokens, max_n, expected):
    draft, draft_len = room.ngram(ints([tokens], device), ints([len(tokens)], device), ints([4], device), 1, max_n, 4)
    assert draft[0].tolist() == expected + [-1] * (4 - len(expected)) and draft_len.tolist() == [len(expected)]


def check_a_place_far_back(ngram, device):
    """The one occurrence of the last tokens, in another program's block: 20 programs of 1024 places, or 128 on a GPU."""
    L = 20_000 if device.type == "cpu" else 131_072
    for place in (3, 1023, 1024, L // 2, L - 20):
        history = torch.arange(L, dtype=torch.int32, device=device)[None]
        history[0, -3:] = history[0, place - 3:place].clone()
        draft, _ = ngram(history, ints([L], device), ints([8], device), 3, 3, 8)
        assert draft[0].tolist() == list(range(place, place + 8)), f"a wrong draft for place {place}"


def test_long_histories(device):
    check_a_place_far_back(room.ngram, device)


def test_a_block_left_out_is_caught(device):
    def broken(history, *rest):
        history[:, 1024:2048] = -1
        return room.ngram(history, *rest)

    with pytest.raises(AssertionError, match="a wrong draft for place 1023"):
        check_a_place_far_back(broken, device)


def check_junk(ngram, device, seed, junk):
    """What stands past a length, in other rows and in unused ones reaches no draft, nor does the order of rows."""
    arguments = batch(seed, 4, 64, 8, 2, device)
    want = ngram(**arguments, min_n=1, max_n=4, K=8)
    history, lengths = arguments["history"].clone(), arguments["lengths"]
    for row, length in enumerate(lengths.tolist()):
        history[row, max(length, 0):] = junk
    order = [2, 0, 3, 1]
    moved = dict(history=history[order + [4, 5]], lengths=lengths[order], max_draft=arguments["max_draft"][order])
    for got, expected in zip(ngram(**moved, min_n=1, max_n=4, K=8), want, strict=True):
        assert_same(got, expected[order])


@given(seeds, st.sampled_from([-1, 0, 2**31 - 1, -2**31]))
def test_junk_and_row_order_change_nothing(device, seed, junk):
    check_junk(room.ngram, device, seed, junk)


@pytest.mark.parametrize("broken", [
    lambda lengths, **arguments: room.ngram(lengths=torch.where(lengths > 0, 64, 0).int(), **arguments),
    lambda history, **arguments: room.ngram(history=history.roll(1, 0), **arguments)], ids=["lengths ignored", "the row above"])
def test_a_search_past_its_row_is_caught(device, broken):
    with pytest.raises(AssertionError, match="elements differ"):
        for seed in range(8):
            check_junk(broken, device, seed, 0)


def check_launches_in_a_row(device, workspace, spoil):
    """Two launches that share a workspace, with `spoil(workspace)` between them."""
    first, second = (batch(seed, 4, 300, 8, 2, device) for seed in (1, 2))
    draft, draft_len = torch.empty(4, 8, dtype=torch.int32, device=device), torch.empty(4, dtype=torch.int32, device=device)
    room.ngram_out(**first, min_n=1, max_n=4, workspace=workspace, draft=draft, draft_len=draft_len)
    spoil(workspace)
    room.ngram_out(**second, min_n=1, max_n=4, workspace=workspace, draft=draft, draft_len=draft_len)
    want = room.ngram(**second, min_n=1, max_n=4, K=8)
    assert_same(draft, want[0])
    assert_same(draft_len, want[1])
    assert not workspace.keys.any() and not workspace.counts.any()


def test_a_workspace_serves_many_launches(device):
    check_launches_in_a_row(device, room.Workspace.allocate(6, device), lambda workspace: None)


@pytest.mark.parametrize("spoil", [lambda workspace: workspace.keys.fill_((9 << 48) + (8 << 32)), lambda workspace: workspace.counts.fill_(1)])
def test_a_workspace_left_dirty_is_caught(device, spoil):
    with pytest.raises(AssertionError):
        check_launches_in_a_row(device, room.Workspace.allocate(6, device), spoil)


def check_far(ngram, device):
    arguments = batch(3, 1, 64, 4, 2, device) | dict(lengths=ints([64, 64, 64], device), max_draft=ints([4, 4, 4], device))
    near, distant = (ngram(**arguments | dict(history=history), min_n=1, max_n=4, K=4) for history in (arguments["history"],
                                                                                                 far(arguments["history"], 0)))
    for got, want in zip(distant, near, strict=True):
        assert_same(got, want)


def test_offsets_pass_32_bits(device):
    """Three rows, of which the last begins past element 2^31."""
    check_far(room.ngram, device)


def test_another_row_past_32_bits_is_caught(device):
    def broken(history, **arguments):
        if history.stride(0) > 64:
            history[-1] = history[0].clone()
        return room.ngram(history, **arguments)

    with pytest.raises(AssertionError, match="elements differ"):
        check_far(broken, device)


def test_no_rows(device):
    draft, draft_len = room.ngram(**batch(0, 0, 8, 3, 2, device), min_n=1, max_n=2, K=3)
    assert draft.shape == (0, 3) and draft_len.shape == (0,)


@pytest.mark.parametrize("change, error, words", [
    (dict(history=torch.zeros(2, 8, dtype=torch.int64)), TypeError, "ngram: history: got torch.int64, expected torch.int32; convert"),
    (dict(history=torch.zeros(1, 8, dtype=torch.int32)), ValueError, "ngram: history: got 1 lines, expected one for each of 2 rows, or slots"),
    (dict(max_draft=torch.zeros(3, dtype=torch.int32)), ValueError, r"ngram: max_draft: got shape \[3\], expected \[2\]"),
    (dict(min_n=0), ValueError, "ngram: min_n, max_n: got 0, 3, expected 1 <= min_n <= max_n <= 64"),
    (dict(max_n=65), ValueError, "ngram: min_n, max_n: got 1, 65"),
    (dict(min_n=4), ValueError, "ngram: min_n, max_n: got 4, 3"),
    (dict(K=0), ValueError, "ngram: draft: got K = 0, expected 1 to 1024"),
])
def test_misuse_is_named(device, change, error, words):
    arguments = batch(0, 2, 8, 3, 2, device) | dict(min_n=1, max_n=3, K=4) | change
    with pytest.raises(error, match=words):
        room.ngram(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})


def test_a_small_workspace_is_named(device):
    arguments, out = batch(0, 2, 8, 3, 2, device), torch.empty(2, 4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"ngram: workspace\.keys: got 1 rows, expected at least 2"):
        room.ngram_out(**arguments, min_n=1, max_n=3, workspace=room.Workspace.allocate(1, device), draft=out, draft_len=out[:, 0].contiguous())
