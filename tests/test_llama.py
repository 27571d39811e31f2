"""Which nodes a step takes, by capacity and heads; and that the fused ones compute the model's logits, whatever the kind of their weights."""

from dataclasses import replace

import pytest
import torch

import reference.llama
from gkernels import ops
from gkernels.graph.launches import record
from gkernels.model.cache import PagedCache
from gkernels.model.config import LlamaConfig
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights
from gkernels.model.step import Row, Step
from tests import weights
from tests.close import assert_no_worse, assert_same
from tests.strategies_model import tiny_config
from tests.weights import FORMATS

FUSED = {"_norm_qkv_kernel", "_norm_gate_up_kernel"}
SINGLE = {"_rmsnorm_kernel", "_rotary_kv_write_kernel", "_silu_and_mul_kernel"}
LAYERS = 2


def build(device, invariant=False, **changes):
    config = LlamaConfig.from_dict(tiny_config(num_hidden_layers=LAYERS, **changes))
    return config, Llama.build(config, random_weights(config, device, torch.float32), 48, invariant)


def run(device, config, model, bucket):
    """(logits, names of the kernels launched) of a step of a prefill chunk and a decoded token."""
    cache = PagedCache.allocate(config.num_layers, 20, 4, config.num_kv_heads, config.head_dim, torch.float32, device)
    cache.keys.fill_(0.5)
    cache.values.fill_(0.25)
    step = Step(model, cache, bucket, 4, 48)
    step.stage([Row([5, 6, 7], 3, [1]), Row([9], 6, [2, 3])])
    step(bucket)                                                                            # makes the bucket's plan
    with record() as launches:
        logits = step(bucket)
    return logits[:2], [launch.kernel for launch in launches]


@pytest.mark.parametrize("bucket, changes, fused", [
    (4, {}, True), (64, {}, True), (65, {}, False), (4, dict(head_dim=136), False), (4, dict(kind="fp8 block"), True),
    (4, dict(kind="int4 32"), True), (65, dict(invariant=True), True), (65, dict(invariant=True, head_dim=136), False),
    (65, dict(invariant=True, kind="int4 32"), True)],
    ids=["few tokens", "the most", "one more", "wide heads", "fp8", "int4", "invariant", "invariant, wide heads", "invariant, int4"])
def test_few_tokens_take_five_nodes_a_layer(device, bucket, changes, fused):
    kind = changes.get("kind")
    config, model = build(device, **{name: value for name, value in changes.items() if name != "kind"})
    _, names = run(device, config, next(quantised(config, model, kind)) if kind else model, bucket)
    assert FUSED <= {*names} and not SINGLE & {*names} if fused else SINGLE <= {*names} and not FUSED & {*names}
    if fused:
        layers = [name for name in names if name in FUSED | {"_linear_kernel", "_attention_kernel"}]
        node = ["_norm_qkv_kernel", "_attention_kernel", "_linear_kernel", "_norm_gate_up_kernel", "_linear_kernel"]
        assert layers == node * LAYERS + ["_linear_kernel"]


def forward(model, dtype):
    """The first row's logits in plain PyTorch, with everything in `dtype`."""
    cast = lambda holder: replace(holder, **{name: t.to(dtype) for name, t in vars(holder).items() if isinstance(t, torch.Tensor)})
    weights = replace(cast(model.weights), layers=[cast(layer) for layer in model.weights.layers])
    ids = torch.tensor([5, 6, 7], device=model.cos_sin.device)
    return reference.llama.forward(weights, model.config, ids, model.cos_sin.to(dtype))[-1]


def quantised(config, model, kind, **other_scales):
    """The model with projections of a kind, and with those of `other_scales` by another's; and the model of the numbers that they stand for."""
    def layers(i, layer):
        for j, name in enumerate(("qkv", "o", "gate_up", "down")):
            N, K = getattr(layer, name).shape
            weight = weights.draw(4 * i + j, kind, N, K, torch.float32, layer.qkv.device, (K * 2 * LAYERS if name in ("o", "down") else K) ** -0.5)
            yield name, weight.rolled() if name in other_scales else weight.given, weight.values

    drawn = [[*layers(i, layer)] for i, layer in enumerate(model.weights.layers)]
    for place in (1, 2):
        changed = [replace(layer, **{row[0]: row[place] for row in rows}) for layer, rows in zip(model.weights.layers, drawn, strict=True)]
        yield Llama(config, replace(model.weights, layers=changed), model.cos_sin, model.invariant)


def check_logits(device, config, model, told):
    """told: the model whose logits these should be."""
    assert_no_worse(run(device, config, model, 4)[0][0], forward(told, torch.float64), forward(told, torch.float32))


@pytest.mark.parametrize("changes", [
    {}, dict(architectures=["Qwen2ForCausalLM"]), dict(architectures=["Qwen3ForCausalLM"]), dict(attention_bias=True, mlp_bias=True, head_dim=20),
    dict(hidden_size=40, intermediate_size=56, tie_word_embeddings=True)], ids=["llama", "bias", "head norms", "biases", "odd shapes, tied"])
def test_fused_logits_equal_reference(device, changes):
    config, model = build(device, **changes)
    check_logits(device, config, model, model)


def test_control_another_norm_is_caught(device):
    config, model = build(device)
    other = Llama(config, random_weights(config, device, torch.float32), model.cos_sin)
    other.weights.layers[1].post_norm.mul_(1.001)
    with pytest.raises(AssertionError, match=r"RMS error|greatest error"):
        check_logits(device, config, model, other)


@pytest.mark.parametrize("kind", FORMATS[:4])
def test_quantised_logits_equal_reference(device, kind):
    """Of projections with several groups of columns and blocks of rows."""
    config, model = build(device, hidden_size=256, intermediate_size=384, attention_bias=True)
    check_logits(device, config, *quantised(config, model, kind))


@pytest.mark.parametrize("kind, name", [*zip(FORMATS, ["qkv", "o", "gate_up", "down"], strict=False)])
def test_control_another_scale_is_caught(device, kind, name):
    config, model = build(device, hidden_size=256, intermediate_size=384)
    with pytest.raises(AssertionError, match=r"RMS error|greatest error"):
        check_logits(device, config, *quantised(config, model, kind, **{name: True}))


def test_scratch_ends_clean(device):
    config, model = build(device)
    run(device, config, model, 16)
    assert not model.scratch.counters.any() and ops.MOST_TOKENS == 64


def check_one_arithmetic(device, changes, invariant, kind=None):
    """The last token's logits are the same bits in steps of a small and a large capacity, and with the prompt in one, two or three chunks."""
    config, model = build(device, invariant, **changes)
    model = next(quantised(config, model, kind)) if kind else model
    prompt, found = [5, 6, 7, 8, 9, 10, 11], []
    for bucket, cuts in ((8, (7,)), (8, (1, 4, 7)), (80, (3, 7))):
        cache = PagedCache.allocate(config.num_layers, 20, 4, config.num_kv_heads, config.head_dim, torch.float32, device)
        step, done = Step(model, cache, bucket, 4, 48), 0
        for end in cuts:
            step.stage([Row(prompt[done:end], end, [1, 2]), Row([9], 6, [3, 4])])
            logits, done = step(bucket), end
        found.append(logits[0].clone())
    for logits in found:
        assert_same(logits, found[0])


@pytest.mark.parametrize("changes, kind", [({}, None), (dict(head_dim=136), None), ({}, "fp8 block"), ({}, "int4 32")],
                         ids=["fused nodes", "single ops", "fp8", "int4"])
def test_an_invariant_model_has_one_arithmetic(device, changes, kind):
    check_one_arithmetic(device, changes, True, kind)


@pytest.mark.parametrize("changes", [{}, pytest.param(dict(head_dim=136), marks=pytest.mark.gpu)], ids=["fused nodes", "single ops"])
def test_control_two_arithmetics_are_caught(device, changes):
    with pytest.raises(AssertionError, match="elements differ"):
        check_one_arithmetic(device, changes, False)
