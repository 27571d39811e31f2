"""kv_write against its twin on whole buffers, so that an element written anywhere else shows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.kv_cache as twin
from gkernels.kernels import kv_cache as room
from tests.close import assert_same
from tests.strategies import dtypes, poisons, randn, seeds

LAYOUTS = ["NHD", "HND", "split", "interleaved"]
sizes = st.sampled_from([(1, 8), (2, 16), (3, 80), (8, 128), (5, 96)])   # (K, D)


def build(layout, N, P, K, D, DV, dtype, device, fill):
    """k_cache and v_cache as engines lay them out, and the buffers beneath them."""
    new = lambda *shape: torch.full(shape, fill, dtype=dtype, device=device)
    if layout == "split":                                  # one [N, K, P, 2D] tensor, halves of each row
        both = new(N, K, P, D + DV)
        return both[..., :D].transpose(1, 2), both[..., D:].transpose(1, 2), [both]
    if layout == "interleaved":                            # pages of keys and of values in turns
        both = new(N, 2, P, K, D)
        return both[:, 0], both[:, 1], [both]
    k, v = (new(N, P, K, D), new(N, P, K, DV)) if layout == "NHD" else (new(N, K, P, D), new(N, K, P, DV))
    return (k, v, [k, v]) if layout == "NHD" else (k.transpose(1, 2), v.transpose(1, 2), [k, v])


def slots(seed, T, N, P):
    """Distinct slots; about a third of them -1 or out of range on either side."""
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(N * P, generator=random)[:T]
    bad = torch.tensor([-1, -2, -2**40, N * P, N * P + 7, 2**31 * P])[torch.randint(6, (T,), generator=random)]
    return torch.where(torch.rand(T, generator=random) < 0.35, bad, chosen)


def check_equals_reference(write, device, seed, dtype, cache_dtype, T, P, size, layout, fill):
    (K, D), N = size, 3 + T // P
    DV = D if layout == "interleaved" else D // 2 if seed % 2 and D % 16 == 0 else D
    k, v = randn(seed, T, K, D, dtype=dtype, device=device), randn(seed + 1, T, K, DV, dtype=dtype, device=device)
    slot_mapping = slots(seed, T, N, P).to(device)
    k[slot_mapping < 0] = fill
    packed = torch.cat([k.flatten(1), v.flatten(1)], 1)
    k, v = packed[:, :K * D].view(T, K, D), packed[:, K * D:].view(T, K, DV)
    k_cache, v_cache, got = build(layout, N, P, K, D, DV, cache_dtype, device, fill)
    write(k, v, k_cache, v_cache, slot_mapping)
    k_cache, v_cache, want = build(layout, N, P, K, D, DV, cache_dtype, device, fill)
    twin.kv_write(k, v, k_cache, v_cache, slot_mapping)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)


@given(seeds, dtypes, dtypes, st.integers(0, 7), st.sampled_from([1, 3, 16]), sizes, st.sampled_from(LAYOUTS), poisons)
def test_equals_reference(device, seed, dtype, cache_dtype, T, P, size, layout, fill):
    check_equals_reference(room.kv_write, device, seed, dtype, cache_dtype, T, P, size, layout, fill)


@pytest.mark.parametrize("broken", [
    lambda k, v, k_cache, v_cache, slots: room.kv_write(k, v, k_cache, v_cache, slots.clamp(min=0)),
    lambda k, v, k_cache, v_cache, slots: room.kv_write(k, v, k_cache, v_cache, slots % (k_cache.shape[0] * k_cache.shape[1])),
    lambda k, v, k_cache, v_cache, slots: room.kv_write(k.flip(1), v, k_cache, v_cache, slots),
], ids=["pads write to slot 0", "bad slots wrap", "heads exchanged"])
def test_broken_writes_are_caught(device, broken):
    with pytest.raises(AssertionError):
        check_equals_reference(broken, device, 3, torch.float32, torch.float32, 7, 3, (2, 16), "NHD", 6e4)


def check_rows_keep_their_bits(write, device, seed, order):
    """Rows in any order write what they write one by one."""
    k, v, slot_mapping = randn(seed, 5, 2, 16, device=device), randn(seed + 1, 5, 2, 16, device=device), slots(seed, 5, 4, 3).to(device)
    caches = []
    for calls in ([[t] for t in range(5)], [order]):
        k_cache, v_cache, buffers = build("split", 4, 3, 2, 16, 16, torch.float32, device, 0.0)
        for rows in calls:
            write(k[rows], v[rows], k_cache, v_cache, slot_mapping[rows])
        caches.append(buffers[0])
    assert_same(*caches)


@given(seeds, st.permutations(range(5)))
def test_rows_keep_their_bits(device, seed, order):
    check_rows_keep_their_bits(room.kv_write, device, seed, order)


@pytest.mark.parametrize("broken", [
    lambda k, v, k_cache, v_cache, slots: room.kv_write(k, v, k_cache, v_cache, slots.sort().values),
    lambda k, v, k_cache, v_cache, slots: room.kv_write(k + 1e-6 * k.mean(), v, k_cache, v_cache, slots),
], ids=["slots in order of their number", "keys that see the batch"])
def test_a_write_that_sees_the_batch_is_caught(device, broken):
    check_rows_keep_their_bits(room.kv_write, device, 0, [3, 0, 4, 1, 2])
    with pytest.raises(AssertionError, match="elements differ"):
        check_rows_keep_their_bits(broken, device, 0, [3, 0, 4, 1, 2])


def test_many_heads_take_several_tiles(device):
    check_equals_reference(room.kv_write, device, 0, torch.float16, torch.float16, 2, 16, (70, 128), "NHD", 0.0)
    assert room.config(70, 128, 128).BLOCK_K < 70


def test_offsets_pass_32_bits(device):
    N, P, K, D = 2**17 + 1, 16, 8, 128                    # 2^32 elements and a page more; only two pages are ever touched
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        both = torch.empty(N, K, P, 2 * D, dtype=torch.float16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    both[0], both[-1] = 0, 0
    k, v = randn(0, 2, K, D, dtype=torch.float16, device=device), randn(1, 2, K, D, dtype=torch.float16, device=device)
    room.kv_write(k, v, both[..., :D].transpose(1, 2), both[..., D:].transpose(1, 2), torch.tensor([N * P - 1, N * P], device=device))
    want = torch.zeros_like(both[-1])
    want[:, -1] = torch.cat([k[0], v[0]], -1)
    assert_same(both[-1], want)
    assert_same(both[0], torch.zeros_like(want))


def test_empty(device):
    empty, slot = torch.empty(0, 2, 8, device=device), torch.empty(0, dtype=torch.int64, device=device)
    cache = torch.zeros(2, 4, 2, 8, device=device)
    room.kv_write(empty, empty, cache, cache.clone(), slot)
    room.kv_write(empty.new_zeros(1, 2, 8), empty.new_zeros(1, 2, 8), cache[:0], cache[:0].clone(), slot.new_zeros(1))
    assert_same(cache, torch.zeros_like(cache))


@pytest.mark.parametrize("change, error, words", [
    (dict(k=torch.ones(3, 16)), ValueError, r"kv_write: k: got shape \[3, 16\], expected \[any, any, any\]"),
    (dict(v=torch.ones(4, 2, 8)), ValueError, r"kv_write: v: got shape \[4, 2, 8\], expected \[3, 2, any\]"),
    (dict(k_cache=torch.ones(4, 16, 3, 8)), ValueError, r"k_cache: got shape \[4, 16, 3, 8\], expected \[any, any, 2, 8\]"),
    (dict(v_cache=torch.ones(5, 16, 2, 8)), ValueError, r"v_cache: got shape \[5, 16, 2, 8\], expected \[4, 16, 2, 8\]"),
    (dict(v_cache=torch.ones(4, 16, 8, 2).mT), ValueError, r"v_cache: got strides .* call .contiguous\(\)"),
    (dict(k_cache=torch.ones(4, 16, 2, 8, dtype=torch.int32)), TypeError, "k_cache: got torch.int32, expected torch.float16"),
    (dict(slot_mapping=torch.zeros(3, dtype=torch.int32)), TypeError, "slot_mapping: got torch.int32, expected torch.int64"),
    (dict(k=torch.ones(3, 2, 2048)), ValueError, "k: got a last dimension of 2048, expected 1 to 1024"),
    (dict(k_cache=torch.ones(4, 0, 2, 8), v_cache=torch.ones(4, 0, 2, 8)), ValueError, "k_cache: got a page size of 0"),
])
def test_misuse_is_named(device, change, error, words):
    arguments = dict(k=torch.ones(3, 2, 8), v=torch.ones(3, 2, 8), k_cache=torch.ones(4, 16, 2, 8), v_cache=torch.ones(4, 16, 2, 8),
                     slot_mapping=torch.zeros(3, dtype=torch.int64)) | change
    with pytest.raises(error, match=words):
        room.kv_write(**{name: t.to(device) for name, t in arguments.items()})
