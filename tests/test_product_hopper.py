import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkernels.kernels import _check, _tile, gate_up, linear, qkv
from gkernels.kernels._product import Scaled, Workspace
from gkernels.kernels._quantized import PLAIN, Kind
from tests import weights
from tests.conftest import CUDA
from tests.strategies import randn

STREAMS = CUDA and _check.HAS_GLUON and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(CUDA and not STREAMS, reason="streams weights on Hopper alone")
KINDS = Kind("fp8 row"), Kind("fp8 block"), Kind("int4", 128), Kind("int4", 256), Kind("int4", 4096)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(_check, "INTERPRETED", False)
    monkeypatch.setattr(_check, "capability", lambda: 90)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_its_cut_is_that_of_the_other_kernel(hopper, kind, dtype):
    for T in range(1, _tile.MOST_STREAMED_TOKENS + 1):
        for N in (2816, 4096, 28672):
            c, other = _tile.streamed(T, N, 4096, dtype, True, kind), _tile.tile(T, N, 4096, dtype, True, kind=kind)
            assert c.IS_STREAMED and all(getattr(c, name) == getattr(other, name) for name in ("BLOCK_K", "SPLITS", "STEPS", "KIND", "GROUP"))
            assert c.parts == other.parts == _tile.parts(N, dtype, True) and c.BLOCK_M >= T and c.TILES * c.BLOCK_N == N
            programs = 2 if c.grid(T)[0] > _tile.MULTIPROCESSORS else 1             # that a multiprocessor has room for
            assert 224 << 10 >= (programs * c.num_stages * (c.BLOCK_M * c.BLOCK_K * 2 + kind.bytes(c.BLOCK_N, c.BLOCK_K, dtype))) > 76 << 10
            assert ("maxnreg" in c.options()) == (programs == 2)


@pytest.mark.parametrize("change", [dict(T=0), dict(T=17), dict(N=4096 + 64), dict(N=8448, splits=False), dict(K=4096 + 64), dict(kind=PLAIN),
                                    dict(kind=Kind("int4", 64)), dict(dtype=torch.float32), dict(stride=4100)], ids=str)
def test_what_it_cannot_stream_goes_the_other_way(hopper, change):
    given = dict(T=3, N=4096, K=4096, dtype=torch.bfloat16, splits=True, kind=Kind("int4", 128), stride=4096)
    assert _tile.streamed(**given) is not None
    assert _tile.streamed(**given | change) is None


@pytest.mark.parametrize("arch, has_gluon", [(80, True), (100, True), (120, True), (0, True), (90, False)])
def test_other_gpus_and_versions_go_the_other_way(hopper, monkeypatch, arch, has_gluon):
    monkeypatch.setattr(_check, "capability", lambda: arch)
    monkeypatch.setattr(_check, "HAS_GLUON", has_gluon)
    assert _tile.streamed(3, 4096, 4096, torch.bfloat16, True, Kind("int4", 128)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("N, K, splits", [(4096, 4096, True), (4096, 14336, True), (28672, 4096, False), (17408, 5120, True)])
def test_a_plain_weight_is_cut_as_by_the_other_kernel(hopper, N, K, splits, dtype):
    for T in range(1, _tile.MOST_TOKENS + 1):
        other = _tile.tile(T, N, K, dtype, splits)
        c = _tile.plain_streamed(other, T, dtype, K)
        assert c.IS_STREAMED and c.STEPS * c.BLOCK_K == other.STEPS * other.BLOCK_K and c.BLOCK_K == 64 and c.LINES == 0
        assert all(getattr(c, name) == getattr(other, name) for name in ("TILES", "SPLITS", "BLOCK_N", "ROWS", "KIND"))
        assert c.parts == other.parts and c.BLOCK_M == (8 if T <= 8 else other.BLOCK_M) and c.num_warps == 4
        is_shared = c.grid(T)[0] > _tile.MULTIPROCESSORS
        assert ("maxnreg" in c.options()) == is_shared
        assert 54 << 10 <= c.num_stages * 128 * (c.BLOCK_M + 64) + 256 * c.BLOCK_M <= (112 if is_shared else 216) << 10


@pytest.mark.parametrize("change", [dict(T=0), dict(T=65), dict(N=4096 + 32), dict(K=4096 + 64), dict(K=1024), dict(N=2048, K=8192),
                                    dict(dtype=torch.float32), dict(stride=4100), dict(splits=False), dict(kind=Kind("fp8 row"))], ids=str)
def test_a_plain_weight_that_cannot_be_streamed_goes_the_other_way(hopper, change):
    def cut(T, N, K, dtype, splits, stride, kind=PLAIN):
        c = _tile.tile(T, N, K, dtype, splits, kind=kind)
        return _tile.plain_streamed(c, T, dtype, stride), c

    given = dict(T=3, N=4096, K=4096, dtype=torch.bfloat16, splits=True, stride=4096)
    streamed, other = cut(**given)
    assert streamed.IS_STREAMED and not other.IS_STREAMED
    streamed, other = cut(**given | change)
    assert streamed == other


def test_linear_alone_streams_what_is_ready(hopper):
    given = 3, 4096, 4096, torch.bfloat16, True
    assert linear.config(*given).IS_STREAMED and not linear.config(*given, streams=False).IS_STREAMED


def of_both(monkeypatch, launch):
    """What a launch leaves as it is, and without this kernel; launch() returns its outputs."""
    streams, options = [], _tile.Tile.options
    with monkeypatch.context() as patch:
        patch.setattr(_tile.Tile, "options", lambda c: streams.append(c.IS_STREAMED) or options(c))
        streamed = launch()
        patch.setattr(_check, "HAS_GLUON", False)
        other = launch()
    assert streams == [True, False], "a kernel is compared with itself"
    return streamed, other


def assert_same_bits(streamed, other):
    for i, (a, b) in enumerate(zip(streamed, other, strict=True)):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"output {i}: {(a != b).sum()} of {a.numel()} differ"


class Case:
    """Rows and what else the nodes take, drawn by a seed."""

    def __init__(self, seed, T, dtype, live, has_bias, device, K):
        self.seed, self.T, self.dtype, self.device, self.K, self.has_bias = seed, T, dtype, device, K, has_bias
        self.x = randn(seed, T, K).to(device, dtype) * 0.5
        self.scaled = Scaled(self.x, randn(seed + 1, T, K // 64).abs().to(device) * 64)
        self.num_tokens = None if live is None else torch.tensor([min(live, T)], dtype=torch.int32, device=device)
        self.live = T if live is None else min(live, T)
        self.workspace = Workspace.allocate(device)

    def bias(self, N):
        return randn(self.seed + 2, N).to(self.device, self.dtype) if self.has_bias else None

    def weight(self, kind, N):
        return weights.draw(self.seed + 3, kind, N, self.K, self.dtype, self.device, size=0.1).given

    def residual(self, kind, N):
        weight, before, norm = self.weight(kind, N), randn(self.seed + 4, self.T, N).to(self.device, self.dtype), randn(self.seed + 5, N)
        norm = norm.to(self.device, self.dtype)

        def launch():
            residual, left = before.clone(), Scaled.empty(self.T, N, self.dtype, self.device, True)
            linear.linear_residual(self.x, weight, residual, self.bias(N), self.num_tokens, self.workspace, norm, left)
            return residual, left.x, left.squares[:self.live]
        return launch

    def normed(self, kind, N, dtype):
        weight = self.weight(kind, N)
        return lambda: (linear.norm_linear(self.scaled, weight, 1e-5, self.bias(N), self.num_tokens, dtype, self.workspace),)

    def gate_up(self, kind, F):
        weight = self.weight(kind, 2 * F)
        return lambda: (gate_up.norm_gate_up(self.scaled, weight, 1e-5, self.bias(2 * F), self.num_tokens),)

    def alone(self, kind, N):
        weight = self.weight(kind, N)
        return lambda: (linear.linear(self.x, weight, self.bias(N), self.num_tokens, workspace=self.workspace, ready=True),)

    def qkv(self, kind, H, KV, D=128):
        weight, generator = self.weight(kind, (H + 2 * KV) * D), torch.Generator().manual_seed(self.seed)
        positions = torch.randint(-1, 40, (self.T,), generator=generator, dtype=torch.int32).to(self.device)       # of 33 that are known
        slots = (torch.randperm(80, generator=generator)[:self.T] - 4).to(self.device)                           # of 64
        angles = randn(self.seed + 6, 33, D).to(self.device)

        def launch():
            q, k_cache = (torch.full(shape, 9.0, device=self.device, dtype=self.dtype) for shape in ((self.T, H, D), (4, 16, KV, D)))
            v_cache = k_cache.clone()
            qkv.norm_qkv(self.scaled, weight, 1e-5, positions, angles, slots, k_cache, v_cache, q, self.bias((H + 2 * KV) * D), None, None,
                         self.num_tokens, self.workspace)
            return q, k_cache, v_cache
        return launch


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("K, dtype, has_bias", [(2048, torch.bfloat16, False), (8192, torch.float16, True)])
@pytest.mark.parametrize("kind, tokens", [*((kind, [1, 2, 8, 9, 16]) for kind in ("fp8 row", "fp8 block", "int4 128", "int4 256", "int4 all")),
                                          ("plain", [1, 2, 8]), ("plain", [9, 16, 17]), ("plain", [33, 64])], ids=str)
@given(data=st.data(), seed=st.integers(0, 999), live=st.sampled_from([0, 1, 5, 64]))
def test_every_node_leaves_the_bits_of_the_other_kernel(kind, tokens, K, dtype, has_bias, data, seed, live, device):
    case = Case(seed, data.draw(st.sampled_from(tokens)), dtype, live, has_bias, device, K)
    launches = [case.residual(kind, 4096), case.normed(kind, 4096, torch.float32), case.normed(kind, 4096, dtype), case.gate_up(kind, 5632),
                case.qkv(kind, 20, 2)]
    if kind == "plain":
        launches += case.normed(kind, 8512, dtype), case.alone(kind, 4096), case.qkv(kind, 44, 2, 64)
    with pytest.MonkeyPatch.context() as patch:
        for launch in launches:
            assert_same_bits(*of_both(patch, launch))
    assert not case.workspace.counters.any(), "counters are zeros between launches"


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("kind, T", [("fp8 row", 16), ("int4 128", 16), ("plain", 16), ("plain", 64)])
def test_rows_of_x_may_be_one_row(kind, T, device, monkeypatch):
    case = Case(3, T, torch.bfloat16, None, False, device, 4096)
    case.x = case.x[:1].expand(T, -1)
    assert_same_bits(*of_both(monkeypatch, case.residual(kind, 4096)))


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("kind, T", [("fp8 row", 1), ("fp8 row", 16), ("int4 128", 1), ("int4 128", 16), ("plain", 1), ("plain", 64)])
def test_many_replays_leave_one_bit_pattern(kind, T, device):
    """Each after another node, with which it overlaps; partial sums are poisoned between."""
    case = Case(7, T, torch.bfloat16, None, False, device, 4096)
    launches = case.residual(kind, 4096), case.gate_up(kind, 14336), case.qkv(kind, 32, 8)
    expected = [launch() for launch in launches]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [launch() for launch in launches for _ in range(2)]
    for i in range(500):
        if i % 50 == 0:
            case.workspace.partials.fill_(float("nan"))
        graph.replay()
        if i % 10 == 0:
            for j, got in enumerate(results):
                assert_same_bits(got, expected[j // 2])


@needs_hopper
@pytest.mark.gpu
def test_the_nodes_of_8b_are_streamed(device):
    for kind in (Kind("int4", 128), PLAIN):
        takes = torch.bfloat16, True, kind
        assert linear.config(1, 4096, 14336, *takes, True).IS_STREAMED and linear.config(16, 4096, 4096, *takes, True).IS_STREAMED
        assert qkv.config(1, 48, 128, 128, 4096, *takes).IS_STREAMED and gate_up.config(1, 14336, 4096, torch.bfloat16, kind).IS_STREAMED
