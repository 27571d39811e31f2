"""Rotary tables, rotary and rotary_kv_write against their twins, and what rotations promise beyond them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.rotary as twin
from gkernels.kernels import kv_cache
from gkernels.kernels import rotary as room
from tests.close import assert_close, assert_same
from tests.strategies import counter, dtypes, far, poisons, randn, seeds

SCALINGS = {
    "none": None,
    "default": dict(rope_type="default", rope_theta=5e5),
    "linear": dict(type="linear", factor=4.0),
    "dynamic": dict(rope_type="dynamic", factor=2.0, original_max_position_embeddings=2048),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
                   rope_theta=5e5),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768, rope_theta=1e6),
    "yarn, as DeepSeek": dict(type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=0.707,
                              mscale_all_dim=1.0),
    "yarn, as gpt-oss": dict(rope_type="yarn", factor=32.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0,
                             truncate=False),
    "yarn, given factor": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512, attention_factor=1.25),
}
shapes = st.sampled_from([(4, 1, 16), (2, 2, 16), (3, 1, 80), (6, 2, 96), (8, 2, 128), (2, 1, 256)])   # (H, K, D)
L = 40


def draw(seed, shape, T, dtype, device, part=1.0):
    """q, k, v as slices of one packed qkv, positions of which about one in seven is outside the table, and a table of angles."""
    H, K, D = shape
    rotary_dim = max(int(D * part) // 2 * 2, 2)
    packed = randn(seed, T, (H + 2 * K) * D, dtype=dtype, device=device)
    q, k, v = packed.view(T, H + 2 * K, D).split([H, K, K], 1)
    random = torch.Generator().manual_seed(seed)
    positions = torch.randint(L, (T,), generator=random)
    bad = torch.tensor([-1, L, 2**31 - 1])[torch.randint(3, (T,), generator=random)]
    positions = torch.where(torch.rand(T, generator=random) < 0.15, bad, positions).to(device, torch.int32)
    return q, k, v, positions, twin.cos_sin_table(rotary_dim, L).float().to(device)


def check_frequencies(frequencies, rotary_dim, scaling, max_len):
    """Each frequency in units of the unscaled one, so that the slow ones count as much as the fast."""
    got, got_factor = frequencies(rotary_dim, max_len, 10000.0, scaling)
    want, want_factor = twin.inverse_frequencies(rotary_dim, max_len, 10000.0, scaling)
    theta, exponents = (scaling or {}).get("rope_theta", 1e4), torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    unit, plain = theta ** -exponents, 1 / theta ** exponents.float()
    assert_close((got / unit).float(), want / unit, want / unit * (plain / unit))
    assert_same(torch.tensor(got_factor), torch.tensor(want_factor))


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("rotary_dim", [16, 80, 128])
@pytest.mark.parametrize("max_len", [512, 2**17])
def test_frequencies_equal_reference(scaling, rotary_dim, max_len):
    check_frequencies(room.inverse_frequencies, rotary_dim, scaling, max_len)


@pytest.mark.parametrize("name, changed", [
    ("llama3", dict(high_freq_factor=8.0)), ("yarn", dict(truncate=False)), ("dynamic", dict(factor=2.1)), ("linear", dict(factor=4.001)),
    ("yarn, as DeepSeek", dict(mscale=None)), ("default", dict(rope_theta=1e6))])
def test_wrong_frequencies_are_caught(name, changed):
    with pytest.raises(AssertionError):
        check_frequencies(lambda *call: room.inverse_frequencies(*call[:3], call[3] | changed), 128, SCALINGS[name], 2**17)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_table_holds_the_angles_of_float32(scaling, device):
    rows = [0, 1, 2, 1000, 2**16 + 1, 2**17]
    frequencies, factor = room.inverse_frequencies(16, 2**17 + 1, 10000.0, scaling)
    angles = (torch.tensor(rows).double()[:, None] * frequencies.double()).float()
    table = lambda angles: factor * torch.cat([angles.cos(), angles.sin()], 1)
    got = room.cos_sin_table(16, 2**17 + 1, scaling=scaling, device=device)
    assert got.shape == (2**17 + 1, 16) and got.device.type == device.type
    assert_close(got.cpu()[rows], table(angles.double()), table(angles))


def test_dynamic_depends_on_capacity_only():
    scaling = SCALINGS["dynamic"]
    assert_same(room.cos_sin_table(16, 2048, scaling=scaling), room.cos_sin_table(16, 2048))
    longer = room.cos_sin_table(16, 4096, scaling=scaling)
    assert not torch.equal(longer[:2048], room.cos_sin_table(16, 2048, scaling=scaling))
    assert_same(longer, room.cos_sin_table(16, 4096, theta=10000.0 * 3 ** (16 / 14)))


def check_rotary(rotary, device, seed, dtype, shape, T, part, interleaved):
    q, k, _, positions, cos_sin = draw(seed, shape, T, dtype, device, part)
    got = rotary(q, k, positions, cos_sin, interleaved)
    want = twin.rotary(q.double(), k.double(), positions, cos_sin.double(), interleaved)
    plain = twin.rotary(q, k, positions, cos_sin, interleaved)
    for i in range(2):
        assert_close(got[i], want[i], plain[i])


@given(seeds, dtypes, shapes, st.integers(0, 5), st.sampled_from([1.0, 0.5, 0.3]), st.booleans())
def test_equals_reference(device, seed, dtype, shape, T, part, interleaved):
    check_rotary(room.rotary, device, seed, dtype, shape, T, part, interleaved)


@pytest.mark.parametrize("broken", [
    lambda q, k, positions, cos_sin, interleaved: room.rotary(q, k, positions, cos_sin, not interleaved),
    lambda q, k, positions, cos_sin, interleaved: room.rotary(q, k, positions, cos_sin.roll(cos_sin.shape[1] // 2, 1), interleaved),
    lambda q, k, positions, cos_sin, interleaved: room.rotary(q, k, positions + 1, cos_sin, interleaved),
    lambda q, k, positions, cos_sin, interleaved: room.rotary(q, k, positions.clamp(0, L - 1), cos_sin, interleaved),
], ids=["other pairs", "cos and sin exchanged", "off by one", "positions clamped"])
def test_broken_rotations_are_caught(device, broken):
    with pytest.raises(AssertionError):
        check_rotary(broken, device, 3, torch.float32, (4, 1, 16), 5, 0.5, False)


def test_group_of_several_tiles(device):
    for shape in ((40, 1, 64), (71, 1, 32)):
        assert room.config(shape[0], shape[2], shape[2]).TILES > 1
        check_rotary(room.rotary, device, 0, torch.float32, shape, 2, 1.0, False)
        for normed in ("", "qk"):
            check_fused(room.rotary_kv_write, device, 0, torch.float32, shape, 2, 1.0, False, normed)


def check_in_place(rotary_out, device, seed, dtype, shape, part, interleaved):
    q, k, v, positions, cos_sin = draw(seed, shape, 3, dtype, device, part)
    want_q, want_k, v_before = *room.rotary(q, k, positions, cos_sin, interleaved), v.clone()
    rotary_out(q, k, positions, cos_sin, interleaved, q, k)
    assert_same(q, want_q)
    assert_same(k, want_k)
    assert_same(v, v_before)


@given(seeds, dtypes, shapes, st.sampled_from([1.0, 0.5]), st.booleans())
def test_in_place(device, seed, dtype, shape, part, interleaved):
    check_in_place(room.rotary_out, device, seed, dtype, shape, part, interleaved)


def check_position_zero(rotary, device, seed, dtype, shape, interleaved):
    q, k, _, positions, cos_sin = draw(seed, shape, 3, dtype, device, 0.5)
    got = rotary(q, k, torch.zeros_like(positions), cos_sin, interleaved)
    assert_same(got[0], q)
    assert_same(got[1], k)


@given(seeds, dtypes, shapes, st.booleans())
def test_position_zero_is_identity(device, seed, dtype, shape, interleaved):
    check_position_zero(room.rotary, device, seed, dtype, shape, interleaved)


def check_norms(rotary, device, seed, shape, position, interleaved):
    q, k, _, positions, cos_sin = draw(seed, shape, 3, torch.float32, device)
    got = rotary(q, k, positions.fill_(position), cos_sin, interleaved)
    for before, after in zip((q, k), got, strict=True):
        assert_close(after.double().norm(dim=-1).float(), before.double().norm(dim=-1), before.norm(dim=-1))


@given(seeds, shapes, st.integers(0, L - 1), st.booleans())
def test_norms_are_kept(device, seed, shape, position, interleaved):
    check_norms(room.rotary, device, seed, shape, position, interleaved)


def check_distance(rotary, device, seed, at, to, shift, interleaved):
    q, k, _, _, cos_sin = draw(seed, (8, 2, 64), 1, torch.float32, device)

    def scores(rotary, at, to):                            # [8, 2]
        positions = [torch.tensor([p], dtype=torch.int32, device=device) for p in (at, to)]
        turned_q, turned_k = (rotary(q, k, position, cos_sin, interleaved)[i][0] for i, position in enumerate(positions))
        return turned_q.double() @ turned_k.double().T

    plain = scores(twin.rotary, at + shift, to + shift)
    assert_close(scores(rotary, at + shift, to + shift).float(), scores(rotary, at, to), plain)


@given(seeds, st.integers(0, 9), st.integers(0, 9), st.integers(1, 30), st.booleans())
def test_scores_depend_on_distance_only(device, seed, at, to, shift, interleaved):
    check_distance(room.rotary, device, seed, at, to, shift, interleaved)


def twice_in_place(q, k, positions, cos_sin, interleaved, q_out, k_out):
    for _ in range(2):                                     # reads what it wrote
        room.rotary_out(q, k, positions, cos_sin, interleaved, q_out, k_out)


def one_further(q, k, positions, cos_sin, interleaved):
    return room.rotary(q, k, positions + 1, cos_sin, interleaved)


def stretched(q, k, positions, cos_sin, interleaved):
    return room.rotary(q, k, positions, cos_sin * 1.001, interleaved)


def keys_as_they_are(q, k, positions, cos_sin, interleaved):
    return room.rotary(q, k, positions, cos_sin, interleaved)[0], k


def test_broken_properties_are_caught(device):
    for check in (lambda: check_in_place(twice_in_place, device, 0, torch.float32, (4, 2, 16), 1.0, False),
                  lambda: check_position_zero(one_further, device, 0, torch.float32, (4, 2, 16), False),
                  lambda: check_norms(stretched, device, 0, (4, 2, 16), 3, False),
                  lambda: check_distance(keys_as_they_are, device, 0, 2, 5, 7, False),
                  lambda: check_rotary_pads(lambda *call: room.rotary(*call[:5]), device, 0, torch.float32, (4, 2, 16), 2, 2, False, 6e4)):
        with pytest.raises(AssertionError):
            check()


def test_far_positions(device):
    cos_sin, far = randn(0, 2**17 + 1, 16, device=device), [2**17, 2**17 + 1, 2**17 - 1, 0]
    q, k = randn(1, 4, 2, 16, device=device), randn(2, 4, 1, 16, device=device)
    positions = torch.tensor(far, dtype=torch.int32, device=device)
    got, plain = room.rotary(q, k, positions, cos_sin), twin.rotary(q, k, positions, cos_sin)
    want = twin.rotary(q.double(), k.double(), positions, cos_sin.double())
    for i in range(2):
        assert_close(got[i], want[i], plain[i])
    assert got[0][1].isnan().all() and not got[0][[0, 2, 3]].isnan().any()


def caches(shape, dtype, device, fill=0.0):
    return [torch.full((3, 4, shape[1], shape[2]), fill, dtype=dtype, device=device) for _ in range(2)]


def slots(seed, T, device):
    """Distinct slots of the 12, a few of them missing or out of range."""
    random = torch.Generator().manual_seed(seed)
    chosen, bad = torch.randperm(12, generator=random)[:T], torch.tensor([-1, 12, 2**40])[torch.randint(3, (T,), generator=random)]
    return torch.where(torch.rand(T, generator=random) < 0.25, bad, chosen).to(device)


def check_fused(fused, device, seed, dtype, shape, T, part, interleaved, normed):
    q, k, v, positions, cos_sin = draw(seed, shape, T, dtype, device, part)
    norms = [1 + randn(seed + i, shape[2], dtype=dtype, device=device) / 4 if name in normed else None for i, name in enumerate("qk")]
    slot_mapping, q_out, (k_cache, v_cache) = slots(seed, T, device), q.new_empty(q.shape), caches(shape, dtype, device)
    fused(q, k, v, positions, cos_sin, slot_mapping, k_cache, v_cache, q_out, interleaved, *norms)
    if dtype == torch.float32 and not normed:              # the ops one by one give the same bits
        want_q, want_k = room.rotary(q, k, positions, cos_sin, interleaved)
        want_caches = caches(shape, dtype, device)
        kv_cache.kv_write(want_k, v, *want_caches, slot_mapping)
        for got, want in zip((q_out, k_cache, v_cache), (want_q, *want_caches), strict=True):
            assert_same(got, want)
    results = []
    for kind in (torch.float64, dtype):
        out, wide_caches = torch.empty_like(q_out, dtype=kind), caches(shape, kind, device)
        wide = [x if x is None else x.to(kind) for x in (q, k, v, *norms)]
        twin.rotary_kv_write(*wide[:3], positions, cos_sin.double() if kind == torch.float64 else cos_sin, slot_mapping, *wide_caches, out,
                             interleaved, *wide[3:])
        results.append((out, *wide_caches))
    for got, want, plain in zip((q_out, k_cache, v_cache), *results, strict=True):
        assert_close(got, want, plain)


@given(seeds, dtypes, shapes, st.integers(0, 4), st.sampled_from([1.0, 0.5, 0.3]), st.booleans(), st.sampled_from(["", "q", "k", "qk"]))
def test_fused_equals_the_chain(device, seed, dtype, shape, T, part, interleaved, normed):
    check_fused(room.rotary_kv_write, device, seed, dtype, shape, T, part, interleaved, normed)


def without_norm(*call):
    room.rotary_kv_write(*call[:10])


def norms_exchanged(*call):
    room.rotary_kv_write(*call[:10], call[11], call[10])


def slots_clamped(*call):
    room.rotary_kv_write(*call[:5], call[5].clamp(0, 11), *call[6:])


@pytest.mark.parametrize("broken", [without_norm, norms_exchanged, slots_clamped])
def test_broken_fusions_are_caught(device, broken):
    with pytest.raises(AssertionError):
        check_fused(broken, device, 2, torch.float32, (4, 2, 16), 4, 1.0, False, "qk")


def check_pads(fused, device, seed, dtype, shape, live, pads, interleaved, poison):
    """Pads with junk in every field, and live slots in their slot mapping: neither q_out nor the caches may show it."""
    q, k, v, positions, cos_sin = draw(seed, shape, live + pads, dtype, device, 0.5)
    weight, slot_mapping = randn(seed, shape[2], dtype=dtype, device=device), torch.arange(live + pads, device=device)
    want_q, want_caches = q.new_empty(q[:live].shape), caches(shape, dtype, device, poison)
    room.rotary_kv_write(q[:live], k[:live], v[:live], positions[:live], cos_sin, slot_mapping[:live], *want_caches, want_q, interleaved,
                         weight, weight)
    for x in (q, k, v):
        x[live:] = poison
    positions[live:] = 2**31 - 1
    q_out, got_caches = q.new_empty(q.shape), caches(shape, dtype, device, poison)
    fused(q, k, v, positions, cos_sin, slot_mapping, *got_caches, q_out, interleaved, weight, weight, num_tokens=counter(live, device))
    assert_same(q_out[:live], want_q)
    assert_same(q_out[live:], torch.zeros_like(q_out[live:]))
    for got, want in zip(got_caches, want_caches, strict=True):
        assert_same(got, want)


@given(seeds, dtypes, shapes, st.integers(0, 3), st.integers(0, 3), st.booleans(), poisons)
def test_pads_are_zero_and_write_nothing(device, seed, dtype, shape, live, pads, interleaved, poison):
    check_pads(room.rotary_kv_write, device, seed, dtype, shape, live, pads, interleaved, poison)


def test_ignored_pads_are_caught(device):
    with pytest.raises(AssertionError):
        check_pads(lambda *call, num_tokens: room.rotary_kv_write(*call), device, 0, torch.float32, (4, 2, 16), 2, 2, False, float("nan"))


def check_rotary_pads(rotary, device, seed, dtype, shape, live, pads, interleaved, poison):
    q, k, _, positions, cos_sin = draw(seed, shape, live + pads, dtype, device, 0.5)
    want = room.rotary(q[:live], k[:live], positions[:live], cos_sin, interleaved)
    q[live:], k[live:], positions[live:] = poison, poison, -7
    for got, expected in zip(rotary(q, k, positions, cos_sin, interleaved, counter(live, device)), want, strict=True):
        assert_same(got[:live], expected)
        assert_same(got[live:], torch.zeros_like(got[live:]))


@given(seeds, dtypes, shapes, st.integers(1, 3), st.integers(0, 3), st.booleans(), poisons)
def test_rotary_pads_are_zero_and_leak_nothing(device, seed, dtype, shape, live, pads, interleaved, poison):
    check_rotary_pads(room.rotary, device, seed, dtype, shape, live, pads, interleaved, poison)


def check_rows_keep_their_bits(fused, device, seed, dtype, shape, order):
    """Rows in any order give what they give one by one."""
    q, k, v, positions, cos_sin = draw(seed, shape, 4, dtype, device)
    weight, slot_mapping = randn(seed, shape[2], dtype=dtype, device=device), slots(seed, 4, device)
    results = []
    for calls in ([[t] for t in range(4)], [order]):
        q_out, (k_cache, v_cache) = q.new_empty(q.shape), caches(shape, dtype, device)
        for rows in calls:
            mine = q.new_empty(q[rows].shape)
            fused(q[rows], k[rows], v[rows], positions[rows], cos_sin, slot_mapping[rows], k_cache, v_cache, mine, False, weight, weight)
            q_out[rows] = mine
        results.append((q_out, k_cache, v_cache))
    for got, want in zip(*results, strict=True):
        assert_same(got, want)


@given(seeds, dtypes, shapes, st.permutations(range(4)))
def test_rows_keep_their_bits(device, seed, dtype, shape, order):
    check_rows_keep_their_bits(room.rotary_kv_write, device, seed, dtype, shape, order)


@pytest.mark.parametrize("broken", [
    lambda q, *call: room.rotary_kv_write(q + 1e-6 * q.mean(), *call),
    lambda q, k, v, *call: room.rotary_kv_write(q, k, v + 1e-6 * v.mean(), *call),
    lambda q, k, v, positions, *call: room.rotary_kv_write(q, k, v, positions.sort().values, *call),
], ids=["queries that see the batch", "values that see the batch", "positions in order"])
def test_a_fusion_that_sees_the_batch_is_caught(device, broken):
    with pytest.raises(AssertionError, match="elements differ"):
        check_rows_keep_their_bits(broken, device, 1, torch.float32, (4, 2, 16), [3, 0, 2, 1])


FAR_DIMS = [("q", 0), ("q", 1), ("k", 0), ("k", 1), ("v", 0), ("v", 1), ("q_out", 0), ("q_out", 1),
            ("k_cache", 0), ("k_cache", 1), ("k_cache", 2), ("v_cache", 0), ("v_cache", 1), ("v_cache", 2)]


def check_far(fused, device, name, dim):
    """The same bits where the last token, head, page or slot of one tensor lies past element 2^31."""
    q, k, v, _, cos_sin = draw(0, (6, 3, 16), 3, torch.float16, device)
    near = {key: t.contiguous() for key, t in zip("qkv", (q, k, v), strict=True)} | dict(q_out=torch.zeros(3, 6, 16, dtype=q.dtype, device=device))
    near["k_cache"], near["v_cache"] = caches((6, 3, 16), q.dtype, device)
    distant = {key: far(t, dim) if key == name else t.clone() for key, t in near.items()}
    rest = dict(positions=torch.tensor([2, 0, 39], dtype=torch.int32, device=device), cos_sin=cos_sin,
                slot_mapping=torch.tensor([0, 6, 11], device=device))
    room.rotary_kv_write(**near, **rest)
    fused(**distant, **rest)
    for key in ("q_out", "k_cache", "v_cache"):
        assert_same(distant[key], near[key])


@pytest.mark.parametrize("name, dim", FAR_DIMS)
def test_strides_pass_32_bits(device, name, dim):
    check_far(room.rotary_kv_write, device, name, dim)


@pytest.mark.parametrize("name, dim", FAR_DIMS)
def test_another_place_past_32_bits_is_caught(device, name, dim):
    def broken(**arguments):
        wrap = lambda: arguments[name].select(dim, -1).copy_(arguments[name].select(dim, 0))
        wrap()
        room.rotary_kv_write(**arguments)
        wrap()

    with pytest.raises(AssertionError, match="elements differ"):
        check_far(broken, device, name, dim)


def test_fused_in_place_and_any_cache(device):
    """q_out is q; head-major caches of another dtype, halves of one tensor; values narrower than keys."""
    q, k, v, positions, cos_sin = draw(5, (6, 2, 32), 3, torch.float32, device)
    v, slot_mapping = v[..., :16], torch.tensor([3, -1, 9], device=device)
    want_q, buffers = q.new_empty(q.shape), [torch.full((3, 2, 4, 48), 6e4, dtype=torch.float16, device=device) for _ in range(2)]
    halves = [(both[..., :32].transpose(1, 2), both[..., 32:].transpose(1, 2)) for both in buffers]
    turned = room.rotary(q, k, positions, cos_sin)
    kv_cache.kv_write(turned[1], v, *halves[0], slot_mapping)
    room.rotary_kv_write(q, k, v, positions, cos_sin, slot_mapping, *halves[1], want_q)
    assert_same(want_q, turned[0])
    assert_same(buffers[1], buffers[0])
    room.rotary_kv_write(q, k, v, positions, cos_sin, slot_mapping, *halves[1], q)
    assert_same(q, want_q)
    assert_same(buffers[1], buffers[0])


@pytest.mark.parametrize("scaling, words", [
    (dict(rope_type="longrope"), r"scaling\['rope_type'\]: got 'longrope', expected 'default' or 'linear' or"),
    (dict(rope_type="linear"), r"scaling\['factor'\]: got None, expected a number of at least 1"),
    (dict(rope_type="linear", factor=float("nan")), r"scaling\['factor'\]: got nan"),
    (dict(rope_type="linear", factor="4"), r"scaling\['factor'\]: got '4'"),
    (dict(rope_type="dynamic", factor=2.0), r"scaling\['original_max_position_embeddings'\]: got None"),
    (SCALINGS["llama3"] | dict(low_freq_factor=4.0), r"scaling\['low_freq_factor'\]: got 4.0, expected less than high_freq_factor = 4.0"),
    (SCALINGS["llama3"] | dict(high_freq_factor=None), r"scaling\['high_freq_factor'\]: got None"),
    (SCALINGS["yarn"] | dict(beta_slow=64), r"scaling\['beta_slow'\]: got 64, expected at most beta_fast = 32"),
    (SCALINGS["yarn"] | dict(attention_factor=-1.0), r"scaling\['attention_factor'\]: got -1.0"),
    (dict(rope_theta=1), "theta: got 1, expected a number above 1"),
])
def test_scaling_misuse_is_named(scaling, words):
    with pytest.raises(ValueError, match="cos_sin_table: " + words):
        room.cos_sin_table(16, 64, scaling=scaling)


@pytest.mark.parametrize("call, words", [
    (dict(rotary_dim=15, max_len=8), "rotary_dim: got 15, expected an even number"),
    (dict(rotary_dim=16, max_len=0), "max_len: got 0"),
    (dict(rotary_dim=16, max_len=2**24 + 1), "max_len: got 16777217"),
    (dict(rotary_dim=2, max_len=8, scaling=SCALINGS["dynamic"]), "rotary_dim: got 2, expected 4 or more"),
])
def test_table_misuse_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        room.cos_sin_table(**call)


@pytest.mark.parametrize("change, error, words", [
    (dict(q=torch.ones(3, 32)), ValueError, r"q: got shape \[3, 32\], expected \[any, any, any\]"),
    (dict(q=torch.ones(3, 3, 16), q_out=torch.ones(3, 3, 16)), ValueError, "q: got 3 heads over 2 of k, expected a multiple"),
    (dict(k=torch.ones(3, 2, 16, dtype=torch.float16)), TypeError, "k: got torch.float16, expected torch.float32"),
    (dict(positions=torch.zeros(3, dtype=torch.int64)), TypeError, "positions: got torch.int64, expected torch.int32"),
    (dict(cos_sin=torch.ones(9, 18)), ValueError, "cos_sin: got 18 columns, expected an even number, 2 to D = 16"),
    (dict(cos_sin=torch.ones(16, 9).T), ValueError, "cos_sin: got strides"),
    (dict(q_out=torch.ones(3, 4, 8)), ValueError, r"q_out: got shape \[3, 4, 8\], expected \[3, 4, 16\]"),
    (dict(num_tokens=torch.ones(1)), TypeError, "num_tokens: got torch.float32"),
])
def test_misuse_is_named(device, change, error, words):
    shared = dict(q=torch.ones(3, 4, 16), k=torch.ones(3, 2, 16), positions=torch.zeros(3, dtype=torch.int32), cos_sin=torch.ones(9, 16),
                  q_out=torch.ones(3, 4, 16)) | change
    cache = torch.ones(3, 4, 2, 16)
    fused = dict(v=torch.ones(3, 2, 16), slot_mapping=torch.zeros(3, dtype=torch.int64), k_cache=cache, v_cache=cache.clone())
    on_device = lambda arguments: {name: t.to(device) for name, t in arguments.items()}
    with pytest.raises(error, match="rotary: " + words):
        room.rotary_out(**on_device(shared), interleaved=False, k_out=torch.ones(3, 2, 16, dtype=shared["k"].dtype, device=device))
    with pytest.raises(error, match="rotary_kv_write: " + words):
        room.rotary_kv_write(**on_device(shared | fused))


def test_norm_misuse_is_named(device):
    x, cache = torch.ones(3, 2, 16, device=device), torch.ones(3, 4, 2, 16, device=device)
    call = (x, x, x, torch.zeros(3, dtype=torch.int32, device=device), torch.ones(9, 16, device=device),
            torch.zeros(3, dtype=torch.int64, device=device), cache, cache.clone(), torch.empty_like(x))
    with pytest.raises(ValueError, match=r"rotary_kv_write: k_norm: got shape \[8\], expected \[16\]"):
        room.rotary_kv_write(*call, k_norm=torch.ones(8, device=device))
