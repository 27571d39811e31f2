"""Every op against its twin at the shapes of real models, on a GPU: the tiles and paths that small shapes never take."""

import pytest
import torch

import reference.activation
import reference.attention
import reference.embedding
import reference.linear
import reference.llama
import reference.rmsnorm
import reference.rotary
from gkernels import ops
from gkernels.model.cache import PagedCache
from gkernels.model.config import PRESETS, LlamaConfig
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights
from gkernels.model.step import Row, Step
from tests.close import assert_close
from tests.strategies import Batch, Features, counter, randn

pytestmark = pytest.mark.gpu
TOKENS = [1, 3, 8, 17, 64, 200, 300]
PRODUCTS = [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (6144, 4096), (28672, 4096), (4096, 14336)]
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("N, K", PRODUCTS)
def test_linear(device, N, K, T, dtype):
    x, weight = randn(T, T, K, dtype=dtype, device=device), randn(N, N, K, dtype=dtype, device=device)
    for got, wide in ((ops.linear(x, weight), False), (ops.linear(x, weight, num_tokens=counter(T, device), dtype=torch.float32), True)):
        plain = torch.mm(x, weight.T, out_dtype=torch.float32) if wide else reference.linear.linear(x, weight)
        assert_close(got, reference.linear.linear(x.double(), weight.double()), plain, tensor_core_terms=K if wide else 0)


@pytest.mark.parametrize("T", [1, 8, 200])
def test_logits(device, T):
    x, weight = randn(T, T, 2048, dtype=torch.bfloat16, device=device), randn(1, 128256, 2048, dtype=torch.bfloat16, device=device)
    want = torch.cat([x.double() @ part.double().T for part in weight.split(16384)], 1)
    assert_close(ops.linear(x, weight, dtype=torch.float32), want, torch.mm(x, weight.T, out_dtype=torch.float32),
                 tensor_core_terms=2048)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("D", [2048, 4096, 8192])
def test_rows(device, D, dtype):
    x, weight = randn(D, 300, 2 * D, dtype=dtype, device=device), randn(1, D, dtype=dtype, device=device)
    assert_close(ops.rmsnorm(x[:, :D], weight), reference.rmsnorm.rmsnorm(x[:, :D].double(), weight.double()),
                 reference.rmsnorm.rmsnorm(x[:, :D], weight))
    assert_close(ops.silu_and_mul(x), reference.activation.silu_and_mul(x.double()), reference.activation.silu_and_mul(x))
    ids = torch.randint(0, 300, (50,), generator=torch.Generator().manual_seed(0)).to(device, torch.int32)
    assert torch.equal(ops.embedding(ids, x[:, :D]), x[ids.long(), :D])


def check_attention(device, H, K, D, dtype, drawn=Features()):
    batch = Batch([1, 70, 300, 1], [1000, 500, 0, 3000], 16, pads=12)
    n, q = batch.num_tokens, randn(1, batch.T, H, D, dtype=dtype, device=device)
    caches, metadata, options = batch.caches(K, D, dtype, device, float("nan"), drawn.DV), batch.metadata(device), drawn.options(batch, H, K, device)
    if drawn.scales:
        caches = [cache.to(torch.float8_e4m3fn) for cache in caches]
    results = ops.attention(q, *caches, *metadata, **options)
    wide = reference.attention.attention(q.double(), *(c.double() for c in caches), *metadata, **options)
    plain = reference.attention.attention(q, *caches, *metadata, **options)
    for got, want, simple, terms in zip(results, wide, plain, (0, D), strict=True):        # lse is float32 of sums of D terms on tensor cores
        assert_close(got[:n], want[:n], simple[:n], tensor_core_terms=terms)
    return q


@pytest.mark.parametrize("H, K, D, drawn", [
    (64, 8, 64, Features(window=(127, -1), sinks=True)), (16, 8, 256, Features(window=(1023, -1), softcap=50.0)), (16, 16, 192, Features(DV=128)),
    (32, 32, 128, Features(alibi=1)), (32, 8, 128, Features(scales=2)), (32, 8, 128, Features(tree=True)), (16, 16, 80, Features(causal=False))],
    ids=["gpt-oss", "gemma-2", "deepseek", "bloom", "fp8", "tree", "encoder"])
def test_attention_of_other_models(device, H, K, D, drawn):
    check_attention(device, H, K, D, torch.bfloat16, drawn)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("D", [64, 128])
def test_rotary_and_attention(device, D, dtype):
    q, K = check_attention(device, 32, 8, D, dtype), 8
    cos_sin = ops.cos_sin_table(D, 4096, 5e5, device=device)
    positions = torch.arange(len(q), dtype=torch.int32, device=device) * 9
    turned = ops.rotary(q, q[:, :K], positions, cos_sin)
    wide = reference.rotary.rotary(q.double(), q[:, :K].double(), positions, cos_sin.double())
    for got, want, plain in zip(turned, wide, reference.rotary.rotary(q, q[:, :K], positions, cos_sin), strict=True):
        assert_close(got, want, plain)


@pytest.mark.parametrize("lengths, bucket, invariant", [((1, 40, 200), 256, False), ((1, 20, 40), 64, False), ((1, 40, 200), 256, True)],
                         ids=["single ops", "fused nodes", "fused nodes of a large step"])
def test_llama_1b_logits(device, lengths, bucket, invariant):
    """A mixed step of the whole model: relative error against float32 PyTorch no more than twice that of bfloat16 PyTorch."""
    config = LlamaConfig.from_dict(PRESETS["llama-3.2-1b"])
    weights = random_weights(config, device, torch.bfloat16, seed=2)
    model = Llama.build(config, weights, 512, invariant)
    cache = PagedCache.allocate(config.num_layers, 64, 16, config.num_kv_heads, config.head_dim, torch.bfloat16, device)
    step = Step(model, cache, bucket, 8, 512)
    prompts = [torch.randint(0, 128000, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    n = step.stage([Row(p, len(p), list(range(1 + 16 * i, 17 + 16 * i))) for i, p in enumerate(prompts)])
    logits = step(n)
    wide = random_weights(config, device, torch.bfloat16, seed=2)
    for holder in (wide, *wide.layers):
        for name, value in vars(holder).items():
            if isinstance(value, torch.Tensor):
                setattr(holder, name, value.float())
    for i, prompt in enumerate(prompts):
        ids = torch.tensor(prompt, device=device)
        with torch.no_grad():
            low, high = (reference.llama.forward(w, config, ids, model.cos_sin)[-1].double() for w in (weights, wide))
        assert (logits[i].double() - high).norm() <= 2 * (low - high).norm(), f"row {i}: {logits[i].norm()} against {high.norm()}"
