"""Quantised checkpoints as Hugging Face stores them: loaded, served token for token as their exact values are, and refused by name where damaged."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gkernels.model import load
from gkernels.model.config import LlamaConfig
from gkernels.model.engine import Engine
from gkernels.model.llama import Llama
from gkernels.model.sampling import Sampling
from gkernels.ops import Quantized
from reference import linear_quantized as twin
from reference import llama
from tests.strategies_model import tiny_config

SHAPES = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
WHOLE_BLOCKS = dict(hidden_size=128, num_attention_heads=8, num_key_value_heads=8)     # projections of 128 rows
KINDS = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8 rows": {"quant_method": "fp8"},
    "fp8 blocks": {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
    "gptq whole": {"quant_method": "gptq", "bits": 4, "group_size": -1},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)       # the column of eight that a word's i-th nibble holds


def nibbles(values, dim, order=range(8)):
    """int32 words of eight neighbours of 0 to 15 along a dimension, the i-th nibble of neighbour order[i]."""
    parts = values.unflatten(dim, (-1, 8)).unbind(dim + 1)
    words = sum(parts[k].long() << 4 * i for i, k in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def quantised(kind, weight):
    """({last word of the name: tensor of the checkpoint}, the values [N, K] that they stand for, float64)."""
    N, K = weight.shape
    if kind.startswith("fp8"):
        shape = {"fp8": (1,), "fp8 rows": (N, 1), "fp8 blocks": (-(-N // 128), -(-K // 128))}[kind]
        scale = torch.rand(shape) / 1000 + 1e-3
        wide = scale.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K] if "blocks" in kind else scale.expand(N, 1)
        stored = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": stored, "weight_scale_inv" if "blocks" in kind else "weight_scale": scale}, stored.double() * wide.double()
    G = K if "whole" in kind else 32
    groups = weight.T.unflatten(0, (K // G, G))                                    # [K / G, G, N]
    scale = ((groups.amax(1) - groups.amin(1)).clamp(min=1e-3) / 15).half()
    zero = (-groups.amin(1) / scale.float()).round().clamp(1, 15).int()
    q = (groups / scale[:, None].float() + zero[:, None]).round().clamp(0, 15).int()
    values = ((q - zero[:, None]).double() * scale[:, None].double()).flatten(0, 1).T
    q = q.flatten(0, 1)
    if kind == "awq":
        return {"qweight": nibbles(q, 1, AWQ_ORDER), "qzeros": nibbles(zero, 1, AWQ_ORDER), "scales": scale}, values
    return {"qweight": nibbles(q, 0), "qzeros": nibbles(zero - 1, 1), "scales": scale, "g_idx": torch.arange(K, dtype=torch.int32) // G}, values


def make(path, kind, **changes):
    """Writes a quantised tiny checkpoint; returns the weights that it stands for, in float32."""
    torch.manual_seed(0)
    plain = tiny_config(**SHAPES | (WHOLE_BLOCKS if "blocks" in kind else {}) | changes)
    config = LlamaConfig.from_dict(plain)
    weights = load.random_weights(config, "cpu")
    load.save_checkpoint(path, plain, weights)
    tensors = load_file(path / "model.safetensors")
    for name, view in load.views(weights, config).items():
        if name.endswith("_proj.weight"):
            parts, values = quantised(kind, tensors.pop(name))
            view.copy_(values)
            tensors |= {name.removesuffix("weight") + word: part for word, part in parts.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(plain | {"quantization_config": KINDS[kind]}))
    return weights


def changed(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def loaded(path, device="cpu"):
    config = LlamaConfig.from_dir(path)
    return config, load.load_weights(path, config, device)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_checkpoint_stands_for_its_exact_values(tmp_path, device, kind):
    want = make(tmp_path, kind)
    config, weights = loaded(tmp_path, device)
    for layer, wanted in zip(weights.layers, want.layers, strict=True):
        for field in ("qkv", "o", "gate_up", "down"):
            got, K = getattr(layer, field), getattr(wanted, field).shape[1]
            assert isinstance(got, Quantized)
            exact = twin.fp8_values(*got) if kind.startswith("fp8") else twin.int4_values(*got, K)
            assert torch.equal(exact.float().cpu(), getattr(wanted, field)), field
        assert torch.equal(layer.input_norm.cpu(), wanted.input_norm)
    assert not any(isinstance(view, Quantized) for view in load.views(weights, config).values())


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_exact_values(tmp_path, device, kind):
    """In float32, beside the plain PyTorch model of the values that the checkpoint stands for."""
    want = make(tmp_path, kind, attention_bias=True, mlp_bias=True)
    config, weights = loaded(tmp_path, device)
    engine = Engine(Llama.build(config, weights, 32), max_tokens=16, max_requests=2, max_len=32, capture=device.type == "cuda")
    prompts = [[5, 9, 30, 61, 2, 7], [44]]
    plain = Llama.build(replace(config, quantization=None), want, 32)
    expected = [llama.generate(plain.weights, plain.config, plain.cos_sin, prompt, 5) for prompt in prompts]
    assert engine.generate(prompts, Sampling(temperature=0, max_tokens=5, ignore_eos=True)) == expected


def test_parts_may_lie_in_any_shards(tmp_path):
    make(tmp_path, "gptq")
    _, whole = loaded(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    where = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    _, sharded = loaded(tmp_path)
    for got, want in zip(sharded.layers, whole.layers, strict=True):
        assert torch.equal(got.qkv.weight, want.qkv.weight) and torch.equal(got.down.scale, want.down.scale)


def test_scales_of_activations_are_left_unread(tmp_path, device):
    make(tmp_path, "fp8")
    changed(tmp_path, lambda t: t.update({"model.layers.0.self_attn.q_proj.input_scale": torch.ones(1),
                                          "model.layers.1.self_attn.k_proj.k_scale": torch.ones(1)}))
    assert loaded(tmp_path, device)[1].layers[0].qkv.weight.dtype == torch.float8_e4m3fn


Q = "model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize("kind, change, words", [
    ("gptq", lambda t: t.pop(Q + "scales"), r"missing 1 \(model.layers.1.self_attn.q_proj.scales\)"),
    ("gptq", lambda t: t.update({Q + "weight": torch.zeros(64, 64)}), r"unexpected 1 \(model.layers.1.self_attn.q_proj.weight\)"),
    ("gptq", lambda t: t.update({Q + "qweight": torch.zeros(8, 8, dtype=torch.int32)}), r"q_proj.qweight: got shape \[8, 8\], expected \[8, 64\]"),
    ("gptq", lambda t: t.update({Q + "qweight": torch.zeros(8, 64)}), "q_proj.qweight: got dtype F32, expected one of I32"),
    ("gptq", lambda t: t.update({Q + "scales": t[Q + "scales"] * float("nan")}), "q_proj.scales.*pack_gptq: scales: got NaN or infinity"),
    ("gptq", lambda t: t.update({Q + "g_idx": t[Q + "g_idx"].flip(0)}), "q_proj.g_idx.*another order than their groups.*desc_act=False"),
    ("awq", lambda t: t.update({Q + "scales": t[Q + "scales"] / 0}), "q_proj.scales.*pack_awq: scales: got NaN or infinity"),
    ("fp8", lambda t: t.update({Q + "weight_scale": torch.ones(3)}), "q_proj.weight_scale.*got 3 numbers, expected 1 or 64"),
    ("fp8", lambda t: t.update({Q + "weight_scale": torch.full((1,), float("inf"))}), "q_proj.weight_scale.*scale: got NaN or infinity"),
    ("fp8", lambda t: t.update({Q + "weight": torch.zeros(64, 64)}), "q_proj.weight: got dtype F32, expected one of F8_E4M3"),
    ("fp8 blocks", lambda t: t.update({Q + "weight_scale_inv": torch.ones(2, 1)}), r"weight_scale_inv: got shape \[2, 1\], expected \[1, 1\]"),
])
def test_damage_is_named(tmp_path, device, kind, change, words):
    make(tmp_path, kind)
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=words):
        loaded(tmp_path, device)


def test_blocks_that_straddle_projections_are_refused(tmp_path):
    make(tmp_path, "fp8 blocks", **SHAPES)
    with pytest.raises(ValueError, match="got 64 rows before others that are fused with them, expected a multiple of 128"):
        loaded(tmp_path)


def test_groups_that_do_not_divide_the_columns_are_refused(tmp_path):
    make(tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["group_size"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="group_size: got 48, expected a divisor of the 64 columns"):
        loaded(tmp_path)
