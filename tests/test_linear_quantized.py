"""linear_fp8 and linear_int4 against their twins, the properties that the twins do not show, and checkpoints brought into int4's layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference.linear_quantized as twin
from gkernels.kernels import linear_quantized as room
from tests import weights
from tests.close import assert_close, assert_same
from tests.strategies import counter, dtypes, poisons, randn, seeds, strided
from tests.weights import FORMATS, FP8, formats

rows = st.sampled_from([1, 2, 5, 16, 17, 33, 70])
shapes = st.sampled_from([(8, 256), (24, 512), (136, 768), (40, 1024)])                           # N, K: K has groups of 32, 128 and 256
odd = st.sampled_from([("fp8 row", (1, 1)), ("fp8 block", (3, 5)), ("fp8 row", (70, 300)), ("fp8 block", (150, 300)), ("int4 all", (8, 8)),
                       ("int4 32", (16, 96)), ("int4 64", (24, 320)), ("int4 128", (72, 384)), ("int4 all", (8, 264))])


class Weight:
    """A weight of one format: `arguments` of the op, and `values` float64 [N, K]."""

    def __init__(self, seed, kind, N, K, device, integers=False):
        drawn = weights.draw(seed, kind, N, K, torch.float32, device, 6.5 if kind.startswith("int4") else 1.0, integers)
        self.name, self.arguments, self.values = kind.partition(" ")[0], drawn.given, drawn.values

    def product(self, x, *rest, **options):
        return getattr(room, f"linear_{self.name}")(x, *self.arguments, *rest, **options)

    def twin(self, x, *rest, **options):
        return getattr(twin, f"linear_{self.name}")(x, *self.arguments, *rest, **options)


def check_equals_reference(product, weight, x, bias, dtype):
    got, wide = product(x, bias, dtype=dtype), None if bias is None else bias.double()
    assert got.dtype == dtype
    chain = dict(chain_terms=x.shape[1]) if x.dtype == torch.float32 else dict(tensor_core_terms=x.shape[1]) if dtype == torch.float32 else {}
    assert_close(got, weight.twin(x.double(), wide), weight.twin(x, bias, dtype=dtype), **chain)


def inputs(seed, T, N, K, dtype, device):
    return randn(seed, T, K, dtype=dtype, device=device), randn(seed + 1, N, dtype=dtype, device=device)


@given(seeds, dtypes, rows, st.tuples(formats, shapes) | odd, st.booleans(), st.booleans(), st.booleans())
def test_equals_reference(device, seed, dtype, T, case, has_bias, is_wide, is_strided):
    kind, (N, K) = case
    weight, (x, bias) = Weight(seed, kind, N, K, device), inputs(seed, T, N, K, dtype, device)
    out_dtype = torch.float32 if is_wide else dtype
    check_equals_reference(weight.product, weight, strided(x) if is_strided and K % 8 == 0 else x, bias if has_bias else None, out_dtype)


@pytest.mark.parametrize("kind, change", [("fp8 row", lambda w, s: (w, s.roll(1))), ("fp8 block", lambda w, s: (w, s.roll(1, 1))),
                                          ("int4 128", lambda w, s: (w, s.roll(1, 0))), ("int4 128", lambda w, s: (w, s ^ 1)),
                                          ("int4 128", lambda w, s: (w.roll(1, 1), s))],
                         ids=["another row's scale", "another block's scale", "another group's", "zero points off by one", "words moved"])
def test_control_other_constants_are_caught(device, kind, change):
    weight, (x, bias) = Weight(0, kind, 24, 512, device), inputs(0, 3, 24, 512, torch.float16, device)
    broken = lambda *args, **options: getattr(room, f"linear_{weight.name}")(args[0], *change(*weight.arguments), *args[1:], **options)
    check_equals_reference(weight.product, weight, x, bias, torch.float16)
    with pytest.raises(AssertionError, match=r"relative RMS error|greatest error"):
        check_equals_reference(broken, weight, x, bias, torch.float16)


@given(seeds, dtypes, rows, formats, shapes)
def test_integers_are_exact(device, seed, dtype, T, kind, shape):
    weight = Weight(seed, kind, *shape, device, integers=True)
    x, bias = (t.mul(2).round().clamp(-4, 4) for t in inputs(seed, T, *shape, dtype, device))
    got = weight.product(x, bias, dtype=torch.float32)
    assert_same(got, (x.double() @ weight.values.T + bias.double()).float() + 0.0)


def check_rows_keep_their_bits(product, seed, dtype, T, K, order):
    """Each row alone, in a batch of T among other rows and under every row tile equals the row in the smallest batch."""
    x = randn(seed, T, K, dtype=dtype, device=order.device)
    want = torch.cat([product(row[None].clone()) for row in x[:4]])
    place = order[order < T]
    assert_same(product(x[place])[place.argsort()][:4], want)


@given(seeds, dtypes, st.sampled_from([4, 20, 64, 100]), formats, st.sampled_from([(16, 512), (136, 768)]))
def test_rows_keep_their_bits(device, seed, dtype, T, kind, shape):
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed)).to(device)
    check_rows_keep_their_bits(Weight(seed, kind, *shape, device).product, seed, dtype, T, shape[1], order)


@pytest.mark.parametrize("kind", ["fp8 row", "int4 128"])
def test_control_a_split_that_looks_at_the_batch_is_caught(device, kind):
    halves = [Weight(i, kind, 16, 512, device) for i in range(2)]
    whole = Weight(0, kind, 16, 1024, device)
    whole.arguments = torch.cat([half.arguments[0] for half in halves], 1), halves[0].arguments[1]
    if kind != "fp8 row":
        whole.arguments = whole.arguments[0], torch.cat([half.arguments[1] for half in halves])
    else:
        halves[1].arguments = halves[1].arguments[0], halves[0].arguments[1]

    def split(x):
        if len(x) <= 16:
            return whole.product(x)
        return sum(half.product(part.contiguous()) for half, part in zip(halves, x.split(512, 1), strict=True))

    with pytest.raises(AssertionError, match="elements differ"):
        check_rows_keep_their_bits(split, 0, torch.float32, 40, 1024, torch.arange(200, device=device))


def check_pads(product, seed, dtype, live, pads, shape, poison, device):
    x, bias = inputs(seed, live + pads, *shape, dtype, device)
    x[live:] = 0
    want = product(x, bias, counter(live, device))
    x[live:] = poison
    got = product(x, bias, counter(live, device))
    assert_same(got, want)
    assert_same(got[live:], torch.zeros_like(got[live:]))
    assert_same(got[:live], product(x[:live], bias))


@given(seeds, dtypes, st.integers(0, 20), st.sampled_from([0, 1, 7, 70]), formats, shapes, poisons)
def test_pads_are_zero_and_leak_nothing(device, seed, dtype, live, pads, kind, shape, poison):
    check_pads(Weight(seed, kind, *shape, device).product, seed, dtype, live, pads, shape, poison, device)


@pytest.mark.parametrize("kind", FORMATS)
def test_control_a_product_that_reads_pads_is_caught(device, kind):
    weight = Weight(0, kind, 24, 512, device)
    with pytest.raises(AssertionError, match="elements differ"):
        check_pads(lambda x, bias, num_tokens=None: weight.product(x, bias), 0, torch.float16, 3, 2, (24, 512), float("nan"), device)


@given(seeds, dtypes, st.sampled_from([-1, 0, 2, 50]), formats)
def test_a_bad_counter_is_clamped(device, seed, dtype, count, kind):
    weight, (x, bias) = Weight(seed, kind, 8, 256, device), inputs(seed, 5, 8, 256, dtype, device)
    assert_same(weight.product(x, bias, counter(count, device)), weight.product(x, bias, counter(min(max(count, 0), 5), device)))


@given(seeds, dtypes, formats)
def test_a_strided_out_keeps_what_lies_between_its_rows(device, seed, dtype, kind):
    weight, (x, bias) = Weight(seed, kind, 24, 256, device), inputs(seed, 5, 24, 256, dtype, device)
    roomy = torch.full((5, 40), 7.0, dtype=dtype, device=device)
    getattr(room, f"linear_{weight.name}_out")(x, *weight.arguments, roomy[:, :24], bias, counter(3, device))
    assert_same(roomy[:, :24].contiguous(), weight.product(x, bias, counter(3, device)))
    assert_same(roomy[:, 24:].contiguous(), torch.full((5, 16), 7.0, dtype=dtype, device=device))


@pytest.mark.parametrize("kind", ["fp8 row", "int4 128"])
def test_no_rows(device, kind):
    assert Weight(0, kind, 8, 256, device).product(torch.ones(0, 256, device=device)).shape == (0, 8)


@pytest.mark.gpu
@given(seeds, st.sampled_from([torch.float16, torch.bfloat16]), st.sampled_from([1, 16, 17, 40, 64, 200]), st.sampled_from(FORMATS[:4]))
def test_rows_keep_their_bits_at_model_shapes(device, seed, dtype, T, kind):
    order = torch.randperm(256, generator=torch.Generator().manual_seed(seed)).to(device)
    for N, K in ((2048, 2048), (3072, 2048), (16384, 2048), (2048, 8192)):
        check_rows_keep_their_bits(Weight(seed, kind, N, K, device).product, seed, dtype, T, K, order)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS[:4])
@pytest.mark.parametrize("T", [1, 17, 64, 300])
def test_equals_reference_at_model_shapes(device, dtype, kind, T):
    for N, K in ((3072, 2048), (16384, 2048), (2048, 8192), (4096, 14336)):
        weight, x = Weight(T, kind, N, K, device), randn(T, T, K, dtype=dtype, device=device)
        assert_close(weight.product(x), weight.twin(x.double()), weight.twin(x))


class Checkpoint:
    """Known integers with their group's zero points and scales, and the tensors in which GPTQ and AWQ store them, in plain Python."""

    def __init__(self, seed, K, N, G, dtype=torch.float16):
        generator = torch.Generator().manual_seed(seed)
        self.q, self.zeros = (torch.randint(low, low + 16, (n, N), generator=generator).tolist() for low, n in ((0, K), (1, K // G)))
        self.scales, self.G = torch.randn(K // G, N, generator=generator).to(dtype), G

    def values(self):
        """float64 [N, K]"""
        scales, N, group = self.scales.tolist(), len(self.q[0]), lambda k: k // self.G
        return torch.tensor([[(row[n] - self.zeros[group(k)][n]) * scales[group(k)][n] for k, row in enumerate(self.q)] for n in range(N)],
                            dtype=torch.float64)

    def gptq(self):
        down = [list(column) for column in zip(*self.q, strict=True)]
        return dict(qweight=packed(down, range(8)).T.contiguous(), qzeros=packed([[zero - 1 for zero in line] for line in self.zeros], range(8)),
                    scales=self.scales)

    def awq(self):
        """A zero point of 16 has no place there: all are one less."""
        self.zeros, order = [[zero - 1 for zero in line] for line in self.zeros], (0, 2, 4, 6, 1, 3, 5, 7)
        return dict(qweight=packed(self.q, order), qzeros=packed(self.zeros, order), scales=self.scales)


def packed(lines, order):
    """Eight numbers of a line in an int32: number order[i] of the eight in bits 4 i to 4 i + 3."""
    words = [[sum(line[c + order[i]] << 4 * i for i in range(8)) for c in range(0, len(line), 8)] for line in lines]
    return torch.tensor([[word - (word >> 31 << 32) for word in line] for line in words], dtype=torch.int32)


PACKS = {"gptq": room.pack_gptq, "awq": room.pack_awq}
layers = st.sampled_from([(8, 8, 8), (96, 24, 32), (128, 8, 64), (384, 16, 128), (512, 8, 256), (264, 8, 264)])          # K, N, G


def check_checkpoint(pack, device, kind, seed, K, N, G, dtype):
    """Every value of the checkpoint, read back from the layout and as the product with each unit vector."""
    checkpoint = Checkpoint(seed, K, N, G, dtype)
    arguments = pack(**{name: t.to(device) for name, t in getattr(checkpoint, kind)().items()})
    want = checkpoint.values().to(device)
    assert torch.equal(twin.int4_values(*arguments, K), want), "the layout holds other values"
    assert torch.equal(room.linear_int4(torch.eye(K, device=device), *arguments).T.double(), want), "the kernel reads other values"


@given(st.sampled_from([*PACKS]), seeds, layers, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_checkpoints_are_packed_exactly(device, kind, seed, layer, dtype):
    if dtype == torch.float32:
        with pytest.raises(ValueError, match="scales: got more digits than fp16 or bf16 hold"):
            PACKS[kind](**getattr(Checkpoint(seed, *layer, dtype), kind)())
    else:
        check_checkpoint(PACKS[kind], device, kind, seed, *layer, dtype)


@pytest.mark.parametrize("kind, broken", [
    ("gptq", lambda qweight, qzeros, scales: room.pack_gptq(qweight, qzeros - 0x11111111, scales)),
    ("gptq", lambda qweight, qzeros, scales: room.pack_gptq(qweight.roll(1, 0), qzeros, scales)),
    ("gptq", lambda qweight, qzeros, scales: room.pack_gptq(qweight, qzeros, scales.flip(0))),
    ("awq", lambda qweight, qzeros, scales: room.pack_awq(qweight << 4, qzeros, scales)),
    ("awq", lambda qweight, qzeros, scales: room.pack_awq(qweight, qzeros.roll(1, 1), scales)),
], ids=["zero points without their one", "rows moved", "groups exchanged", "nibbles moved", "zero points of other columns"])
def test_control_a_checkpoint_packed_otherwise_is_caught(device, kind, broken):
    with pytest.raises(AssertionError, match="the layout holds other values"):
        check_checkpoint(broken, device, kind, 0, 256, 16, 128, torch.float16)


def test_the_order_of_awq_is_not_that_of_columns():
    """Eight columns whose integers are their numbers, as a checkpoint stores them."""
    weight, _ = room.pack_awq(torch.tensor([[0x75316420]], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8).half())
    assert (weight[:, 0] & 15).tolist() == [*range(8)]


GPTQ, AWQ = Checkpoint(0, 256, 16, 128).gptq(), Checkpoint(0, 256, 16, 128).awq()


@pytest.mark.parametrize("kind, change, error, words", [
    ("gptq", dict(qweight=GPTQ["qweight"].long()), TypeError, "pack_gptq: qweight: got torch.int64, expected torch.int32"),
    ("gptq", dict(qweight=GPTQ["qweight"][None]), ValueError, "qweight: got 3 dimensions, expected 2"),
    ("gptq", dict(qweight=GPTQ["qweight"][:0]), ValueError, r"qweight: got shape \[0, 16\], expected at least one row"),
    ("gptq", dict(qzeros=GPTQ["qzeros"][:1]), ValueError, r"qzeros: got shape \[1, 2\], expected \[2, 2\]"),
    ("gptq", dict(scales=None), TypeError, "scales: got None, expected a tensor of the checkpoint"),
    ("gptq", dict(scales=GPTQ["scales"][:, :8]), ValueError, r"scales: got shape \[2, 8\], expected \[2, 16\]"),
    ("gptq", dict(scales=GPTQ["scales"].int()), TypeError, "scales: got torch.int32, expected torch.float16 or"),
    ("gptq", dict(scales=GPTQ["scales"] / 0), ValueError, "scales: got NaN or infinity, expected finite numbers"),
    ("gptq", dict(scales=torch.ones(3, 16)), ValueError, "scales: got 3 groups for 256 columns, expected a number of groups that divides"),
    ("gptq", dict(scales=torch.ones(16, 16)), ValueError, "scales: got groups of 16 columns, expected 32, 64, 128, a multiple of 256, or all 256"),
    ("gptq", dict(g_idx=torch.arange(256).flip(0) // 128), ValueError, "g_idx: got columns in another order .* desc_act=False"),
    ("gptq", dict(g_idx=torch.zeros(8)), ValueError, r"g_idx: got shape \[8\], expected \[256\]"),
    ("awq", dict(qweight=AWQ["qweight"].float()), TypeError, "pack_awq: qweight: got torch.float32, expected torch.int32"),
    ("awq", dict(qzeros=AWQ["qzeros"][:, :1]), ValueError, r"qzeros: got shape \[2, 1\], expected \[2, 2\]"),
    ("awq", dict(scales=AWQ["scales"] * float("nan")), ValueError, "scales: got NaN or infinity"),
])
def test_bad_checkpoints_are_named(kind, change, error, words):
    good = {"gptq": GPTQ | dict(g_idx=torch.arange(256, dtype=torch.int32) // 128), "awq": AWQ}[kind]
    PACKS[kind](**good)
    with pytest.raises(error, match=words):
        PACKS[kind](**good | change)


@pytest.mark.parametrize("change, error, words", [
    (dict(scale=torch.ones(200)), ValueError, r"linear_fp8: scale: got shape \[200\], expected \[150\]"),
    (dict(scale=torch.ones(2, 2)), ValueError, r"scale: got shape \[2, 2\], expected \[2, 3\]"),
    (dict(scale=torch.ones(150).double()), TypeError, "scale: got torch.float64, expected torch.float32"),
    (dict(scale=None), ValueError, r"scale: got None, expected float32 \[150\] or \[2, 3\]"),
    (dict(scale=torch.ones(150) / 0), ValueError, "scale: got NaN or infinity, expected finite numbers"),
    (dict(weight=torch.full((150, 300), float("nan")).to(FP8)), ValueError, "weight: got NaN, expected finite numbers"),
    (dict(weight=torch.ones(150, 300)), TypeError, "weight: got torch.float32, expected torch.float8_e4m3fn"),
    (dict(weight=torch.ones(300, 150).to(FP8).T), ValueError, r"weight: got strides \[1, 150\]"),
    (dict(weight=torch.ones(150 * 300 + 1).to(FP8)[1:].view(150, 300)), ValueError, "weight: got an address that is not a multiple of 16"),
])
def test_bad_fp8_weights_are_named(device, change, error, words):
    good = dict(weight=torch.ones(150, 300).to(FP8), scale=torch.ones(2, 3))
    on_device = lambda t: t if t is None else torch.empty(0, dtype=t.dtype, device=device).set_(
        t.to(device).untyped_storage(), t.storage_offset(), t.shape, t.stride())
    room.check_fp8(**{name: on_device(t) for name, t in good.items()})
    with pytest.raises(error, match=words):
        room.check_fp8(**{name: on_device(t) for name, t in (good | change).items()})


@pytest.mark.parametrize("kind, change, error, words", [
    ("fp8", dict(x=torch.ones(8)), ValueError, r"linear_fp8: x: got shape \[8\], expected \[any, any\]"),
    ("fp8", dict(weight=torch.ones(4, 9).to(FP8)), ValueError, r"weight: got shape \[4, 9\], expected \[any, 256\]"),
    ("fp8", dict(weight=torch.ones(4, 256)), TypeError, "weight: got torch.float32, expected torch.float8_e4m3fn"),
    ("fp8", dict(weight=torch.ones(0, 256).to(FP8)), ValueError, r"weight: got shape \[0, 256\], expected at least one row"),
    ("fp8", dict(scale=torch.ones(3)), ValueError, r"scale: got shape \[3\], expected \[4\]"),
    ("fp8", dict(scale=torch.ones(2, 2)), ValueError, r"scale: got shape \[2, 2\], expected \[1, 2\]"),
    ("fp8", dict(bias=torch.ones(5)), ValueError, r"bias: got shape \[5\], expected \[4\]"),
    ("fp8", dict(num_tokens=torch.ones(1)), TypeError, "num_tokens: got torch.float32"),
    ("fp8", dict(dtype=torch.float16), TypeError, "out: got torch.float16, expected torch.float32"),
    ("int4", dict(x=torch.ones(2, 257)), ValueError, r"linear_int4: weight: got shape \[4, 32\], expected \[any, 64\]"),
    ("int4", dict(weight=torch.ones(4, 32)), TypeError, "weight: got torch.float32, expected torch.int32"),
    ("int4", dict(scales=torch.ones(2, 4)), TypeError, "scales: got torch.float32, expected torch.int32"),
    ("int4", dict(scales=torch.ones(2, 5, dtype=torch.int32)), ValueError, r"scales: got shape \[2, 5\], expected \[any, 4\]"),
    ("int4", dict(scales=torch.ones(3, 4, dtype=torch.int32)), ValueError, "scales: got 3 groups for 256 columns"),
    ("int4", dict(bias=torch.ones(4).half()), TypeError, "bias: got torch.float16, expected torch.float32"),
])
def test_misuse_is_named(device, kind, change, error, words):
    weights = dict(weight=torch.ones(4, 256).to(FP8), scale=torch.ones(4)) if kind == "fp8" else dict(
        weight=torch.ones(4, 32, dtype=torch.int32), scales=torch.ones(2, 4, dtype=torch.int32))
    arguments = dict(x=torch.ones(2, 256), **weights, bias=None, num_tokens=None, dtype=None) | change
    with pytest.raises(error, match=words):
        getattr(room, f"linear_{kind}")(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
