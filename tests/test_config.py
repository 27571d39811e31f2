"""LlamaConfig: both layouts of transformers, what is refused and how, and that no JSON at all gets past the bounds."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkernels.model import config as module
from gkernels.model.config import PRESETS, LlamaConfig
from tests.strategies_model import ROPES, tiny_config, tiny_configs

words = st.text(max_size=8) | st.sampled_from(["yarn", "llama3", "silu"])
keys = st.sampled_from(["factor", "rope_type", "type", "x"])
junk = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | words,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6)


def as_v5(config):
    """The same configuration as transformers v5 writes it."""
    v5 = {key: value for key, value in config.items() if key not in ("torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor")}
    scaling = dict(config.get("rope_scaling") or {})
    scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type", "default")
    partial = {"partial_rotary_factor": config["partial_rotary_factor"]} if "partial_rotary_factor" in config else {}
    return v5 | {"dtype": config["torch_dtype"], "rope_parameters": scaling | {"rope_theta": config["rope_theta"]} | partial}


@given(tiny_configs(), st.sampled_from([1.0, 0.5]))
def test_both_layouts_are_one_configuration(config, partial):
    config |= {"partial_rotary_factor": partial, "head_dim": 16}
    got = LlamaConfig.from_dict(config)
    assert got == LlamaConfig.from_dict(as_v5(config))
    assert got.rotary_dim == 16 * partial and got.dtype == getattr(torch, config["torch_dtype"])
    assert_sane(got)


@pytest.mark.parametrize("architecture, qkv_bias, out_bias, mlp_bias, qk_norm", [
    ("LlamaForCausalLM", True, True, True, False), ("MistralForCausalLM", False, False, False, False),
    ("Qwen2ForCausalLM", True, False, False, False), ("Qwen3ForCausalLM", True, True, False, True)])
def test_biases_and_norms_of_each_architecture(architecture, qkv_bias, out_bias, mlp_bias, qk_norm):
    got = LlamaConfig.from_dict(tiny_config(architecture, attention_bias=True, mlp_bias=True))
    assert (got.attention_bias, got.attention_out_bias, got.mlp_bias, got.qk_norm) == (qkv_bias, out_bias, mlp_bias, qk_norm)
    plain = LlamaConfig.from_dict(tiny_config(architecture))
    assert plain.attention_bias == (architecture == "Qwen2ForCausalLM") and not plain.attention_out_bias and not plain.mlp_bias


def test_defaults_are_those_of_transformers():
    bare = tiny_config()
    for key in ("head_dim", "num_key_value_heads", "rope_theta", "hidden_act", "tie_word_embeddings", "bos_token_id", "eos_token_id",
                "torch_dtype"):
        del bare[key]
    got = LlamaConfig.from_dict(bare)
    assert (got.head_dim, got.num_kv_heads, got.rope_theta, got.rope_scaling, got.tie_word_embeddings) == (12, 4, 10000.0, None, False)
    assert (got.bos_token_id, got.eos_token_ids, got.dtype) == (None, (), torch.float32)


def test_rope_scaling_is_normalised():
    linear, dynamic, llama3, yarn = (LlamaConfig.from_dict(tiny_config(rope_scaling=rope)).rope_scaling for rope in ROPES[1:])
    assert linear == {"rope_type": "linear", "factor": 4.0}
    assert dynamic == {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
    assert llama3 == ROPES[3]
    assert yarn == ROPES[4] | {"truncate": True}
    assert LlamaConfig.from_dict(tiny_config(rope_scaling={"rope_type": "default"})).rope_scaling is None


@pytest.mark.parametrize("generation, config, want", [
    (None, 7, (7,)), (5, 7, (5, 7)), ([5, 7], 7, (5, 7)), ([9, 8], [8, 3], (9, 8, 3)), (4, None, (4,)), (None, None, ())])
def test_eos_is_the_union_with_generation_config_first(generation, config, want):
    assert LlamaConfig.from_dict(tiny_config(eos_token_id=config), {"eos_token_id": generation}).eos_token_ids == want


def test_presets_are_the_public_shapes():
    small, large = (LlamaConfig.from_dict(PRESETS[name]) for name in ("llama-3.2-1b", "llama-3.1-8b"))
    for got, want in ((small, (2048, 8192, 16, 64, True, 32.0)), (large, (4096, 14336, 32, 128, False, 8.0))):
        assert want == (got.hidden_size, got.intermediate_size, got.num_layers, got.head_dim, got.tie_word_embeddings,
                        got.rope_scaling["factor"])
        assert got.eos_token_ids == (128001, 128008, 128009) and got.dtype == torch.bfloat16


@pytest.mark.parametrize("changes, words", [
    (dict(architectures=["GPT2LMHeadModel"]), r"config.json: architectures: got \['GPT2LMHeadModel'\], expected a list of one of Llama"),
    (dict(architectures=None), "architectures: got None"),
    (dict(vocab_size=None), "config.json: vocab_size: got nothing, expected an integer from 1 to 262144; add the key"),
    (dict(vocab_size=2**18 + 1), "vocab_size: got 262145, expected an integer from 1 to 262144"),
    (dict(hidden_size=16400), "hidden_size: got 16400, expected an integer from 1 to 16384"),
    (dict(num_attention_heads=34, num_key_value_heads=2), "num_key_value_heads: got 2, expected a divisor of num_attention_heads = 34, and no less"),
    (dict(hidden_size=0), "hidden_size: got 0"),
    (dict(hidden_size=48.0), "hidden_size: got 48.0"),
    (dict(num_hidden_layers=True), "num_hidden_layers: got True"),
    (dict(num_hidden_layers=1001), "num_hidden_layers: got 1001"),
    (dict(head_dim=257), "head_dim: got 257, expected an integer from 1 to 256"),
    (dict(head_dim=None, num_attention_heads=5, num_key_value_heads=5), "heads: got 5, expected a divisor of hidden_size = 48"),
    (dict(num_key_value_heads=3), "num_key_value_heads: got 3, expected a divisor of num_attention_heads = 4"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps: got nan"),
    (dict(hidden_act="gelu"), "hidden_act: got 'gelu', expected 'silu'"),
    (dict(torch_dtype="float8_e4m3fn"), "dtype: got 'float8_e4m3fn', expected one of float32"),
    (dict(quantization_config={"bits": 4}), r"quantization_config: quant_method: got None, expected 'fp8', 'gptq' or 'awq'; convert the checkpoint"),
    (dict(quantization_config=4), "quantization_config: got int, expected a JSON object"),
    (dict(quantization_config={"quant_method": "gptq", "bits": 8, "group_size": 128}), "bits: got 8, expected 4"),
    (dict(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 0}), "group_size: got 0, expected -1 or a number of columns"),
    (dict(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "x"}), "checkpoint_format: got 'x'"),
    (dict(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}), "version: got 'gemv', expected 'gemm'"),
    (dict(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}), r"weight_block_size: got \[64, 64\]"),
    (dict(quantization_config={"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0"]}), "modules_to_not_convert"),
    (dict(layer_types=["sliding_attention", "full_attention"]), "layer_types: got"),
    (dict(use_sliding_window=True), "sliding-window attention is not supported"),
    (dict(eos_token_id=96), "eos_token_id: got 96, expected a token id below vocab_size = 96"),
    (dict(tie_word_embeddings="yes"), "tie_word_embeddings: got 'yes', expected true or false"),
    (dict(partial_rotary_factor=0.2), "partial_rotary_factor: got 0.2, expected an even rotary width; head_dim is 16"),
    (dict(rope_scaling={"rope_type": "longrope"}), "rope_scaling: rope_type: got 'longrope', expected one of default, linear, llama3"),
    (dict(rope_scaling={"rope_type": "linear"}), "rope_scaling: factor: got nothing"),
    (dict(rope_scaling=ROPES[3] | {"high_freq_factor": 1.0}), "high_freq_factor: got 1.0, expected more than low_freq_factor = 1.0"),
    (dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}), "one set of parameters serves all layers"),
])
def test_misfits_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        LlamaConfig.from_dict(tiny_config(**changes))


@pytest.mark.parametrize("window, good", [(None, True), (64, True), (63, False), ("absent", False)])
def test_mistral_windows(window, good):
    config = tiny_config("MistralForCausalLM", sliding_window=window, max_position_embeddings=64 if window != "absent" else 8192)
    if window == "absent":
        del config["sliding_window"]
    if good:
        assert LlamaConfig.from_dict(config).max_position_embeddings
    else:
        with pytest.raises(ValueError, match=r"sliding_window: got (63|4096), expected null or at least max_position_embeddings"):
            LlamaConfig.from_dict(config)


def test_qwen3_needs_its_head_dim():
    with pytest.raises(ValueError, match="head_dim: got None"):
        LlamaConfig.from_dict(tiny_config("Qwen3ForCausalLM", head_dim=None))


@pytest.mark.parametrize("text, words", [
    ("", "not readable as JSON"), ("[1]", "got list, expected a JSON object"), ("[" * 99999, "not readable as JSON"),
    ('{"a": 1', "not readable as JSON"), ("\udcff", "not readable as JSON")], ids=["empty", "list", "deep", "cut", "not UTF-8"])
def test_damaged_files_are_named(tmp_path, text, words):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"config.json: .*{words}"):
        LlamaConfig.from_dir(tmp_path)


def test_from_dir_reads_both_files(tmp_path):
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        LlamaConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert LlamaConfig.from_dir(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5]}')
    assert LlamaConfig.from_dir(tmp_path).eos_token_ids == (5, 2)


def assert_sane(got):
    """What the allocations and kernels downstream take for granted."""
    assert 1 <= got.vocab_size <= 2**20 and 1 <= got.hidden_size <= 2**17 and 1 <= got.intermediate_size <= 2**20, got
    assert 1 <= got.num_layers <= 1000 and 1 <= got.head_dim <= 256 and 1 <= got.num_heads <= 1024, got
    assert got.num_kv_heads >= 1 and got.num_heads % got.num_kv_heads == 0, got
    assert 2 <= got.rotary_dim <= got.head_dim and got.rotary_dim % 2 == 0, got
    assert 1 <= got.max_position_embeddings <= 2**24 and 0 < got.rms_norm_eps < 1 and 1 <= got.rope_theta < float("inf"), got
    assert all(0 <= i < got.vocab_size for i in got.eos_token_ids) and isinstance(got.dtype, torch.dtype), got
    assert got.rope_scaling is None or all(isinstance(v, (str, bool, int)) or v < float("inf") for v in got.rope_scaling.values()), got


def check_junk(config, key, value):
    try:
        got = LlamaConfig.from_dict(config | {key: value}, {key: value})
    except ValueError as error:
        assert "config.json: " in str(error)
    else:
        assert_sane(got)


OPTIONAL = ["rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types", "dtype"]


@given(tiny_configs(), st.sampled_from([*tiny_config(), *OPTIONAL]), junk)
def test_junk_is_refused_or_harmless(config, key, value):
    check_junk(config, key, value)


def test_the_junk_property_catches_a_reader_without_bounds(monkeypatch):
    monkeypatch.setattr(module._Keys, "integer", lambda self, key, low, high, default=None: self.values.get(key, default))
    with pytest.raises(AssertionError):
        check_junk(tiny_config(), "vocab_size", 2**40)
