"""Checkpoints in and out, what a damaged one does, and the reference model that reads the weights."""

import importlib.util
import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import gkernels
from gkernels.model import load
from gkernels.model.config import ARCHITECTURES, PRESETS, LlamaConfig
from reference import llama
from tests.close import assert_close, assert_same
from tests.strategies import dtypes, seeds
from tests.strategies_model import ROPES, tiny_config, tiny_configs

SHIPPED = Path(gkernels.__file__).parent / "model" / "assets" / "shakespeare"


@pytest.fixture
def folder(tmp_path):
    """A maker of empty folders, so that each example of a property has its own."""
    return lambda: Path(tempfile.mkdtemp(dir=tmp_path))


def make(path, seed=0, device="cpu", **changes):
    """Writes a tiny checkpoint; returns its configuration and weights."""
    config = LlamaConfig.from_dict(tiny_config(**changes))
    weights = load.random_weights(config, device, seed=seed)
    load.save_checkpoint(path, tiny_config(**changes), weights)
    return config, weights


def rewrite(path, change):
    """Applies `change` to the dict of tensors in the checkpoint."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def shard(path, count):
    """Splits model.safetensors into `count` shards with an index, as transformers does; returns the index."""
    tensors = load_file(path / "model.safetensors")
    where = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, path / file)
    (path / "model.safetensors").unlink()
    write_index(path, where)
    return where


def write_index(path, where):
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def assert_same_weights(got, want, config):
    got, want = load.views(got, config), load.views(want, config)
    assert got.keys() == want.keys()
    for name in want:
        assert_same(got[name], want[name])


def plain_cos_sin(config, T):
    exponents = torch.arange(0, config.rotary_dim, 2).double() / config.rotary_dim
    angle = torch.outer(torch.arange(T).double(), config.rope_theta ** -exponents)
    return torch.cat((angle.cos(), angle.sin()), -1)


@given(seeds, tiny_configs(), st.integers(0, 3))
def test_a_saved_checkpoint_loads_bit_for_bit(device, folder, seed, changes, shards):
    path, config = folder(), LlamaConfig.from_dict(changes)
    weights = load.random_weights(config, device, seed=seed)
    load.save_checkpoint(path, changes, weights)
    assert LlamaConfig.from_dir(path) == config
    if shards:
        shard(path, shards)
    got = load.load_weights(path, config, device)
    assert_same_weights(got, weights, config)
    assert (got.lm_head is got.embed) == config.tie_word_embeddings
    assert all(view.device.type == device.type and view.is_contiguous() for view in load.views(got, config).values())


def check_fusion(path, config, device):
    """The fused tensors against the file's own, by names written out here."""
    tensors, got = load_file(path / "model.safetensors"), load.load_weights(path, config, device)
    for i, layer in enumerate(got.layers):
        def of(*names, i=i):
            return torch.cat([tensors[f"model.layers.{i}.{name}"] for name in names]).to(device)
        assert_same(layer.qkv, of("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"))
        assert_same(layer.qkv_bias, of("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"))
        assert_same(layer.gate_up, of("mlp.gate_proj.weight", "mlp.up_proj.weight"))
        assert_same(layer.o_bias, of("self_attn.o_proj.bias"))
        assert_same(layer.down, of("mlp.down_proj.weight"))
        assert_same(layer.input_norm, of("input_layernorm.weight"))
        assert_same(layer.post_norm, of("post_attention_layernorm.weight"))
        assert_same(layer.q_norm, of("self_attn.q_norm.weight"))
        assert_same(layer.k_norm, of("self_attn.k_norm.weight"))
    assert_same(got.embed, tensors["model.embed_tokens.weight"].to(device))
    assert_same(got.lm_head, tensors["lm_head.weight"].to(device))


def test_fused_rows_are_the_named_tensors(device, tmp_path):
    config, _ = make(tmp_path, architecture="Qwen3ForCausalLM", attention_bias=True)
    check_fusion(tmp_path, config, device)


def test_the_fusion_check_catches_swapped_rows(device, tmp_path, monkeypatch):
    config, _ = make(tmp_path, architecture="Qwen3ForCausalLM", attention_bias=True)
    right = load._layer_parts

    def swapped(config):
        parts = right(config)
        return parts | {"gate_up": dict(reversed(parts["gate_up"].items()))}
    monkeypatch.setattr(load, "_layer_parts", swapped)
    with pytest.raises(AssertionError, match="elements differ"):
        check_fusion(tmp_path, config, device)


@given(seeds, dtypes, dtypes)
def test_dtype_is_the_config_s_or_the_caller_s(device, folder, seed, stored, wanted):
    path = folder()
    config, weights = make(path, seed, torch_dtype=str(stored)[6:])
    assert load.load_weights(path, config, device).embed.dtype == stored
    got = load.load_weights(path, config, device, wanted)
    assert_same(got.layers[0].qkv.cpu(), weights.layers[0].qkv.to(wanted))


def test_lm_head_is_tied_when_the_config_says_so(device, tmp_path):
    config, _ = make(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing 1 \(lm_head.weight\), unexpected none; a checkpoint .* says tie_word_embeddings: true"):
        load.load_weights(tmp_path, config, device)
    tied, _ = make(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    got = load.load_weights(tmp_path, tied, device)
    assert got.lm_head is got.embed
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(2, 3)}))
    with pytest.raises(ValueError, match=r"lm_head.weight: got shape \[2, 3\], expected \[96, 48\]"):
        load.load_weights(tmp_path, tied, device)


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path):
    config, weights = make(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert_same_weights(load.load_weights(tmp_path, config, "cpu"), weights, config)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(Q), rf"missing 1 \({Q}\), unexpected none"),
    (lambda t: t.update(extra=torch.ones(1)), r"missing none, unexpected 1 \(extra\)"),
    (lambda t: [t.pop(k) for k in list(t) if "mlp" in k] and None, r"missing 6 \(model.layers.0.mlp.down_proj.weight, "),
    (lambda t: t.update({Q: t[Q][:-1].clone()}), rf"{Q}: got shape \[63, 48\], expected \[64, 48\] from config.json"),
    (lambda t: t.update({Q: t[Q].view(-1)}), r"got shape \[3072\], expected \[64, 48\]"),
    (lambda t: t.update({Q: t[Q].int()}), rf"{Q}: got dtype I32, expected one of F16"),
    (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), "got dtype F8_E4M3"),
    (lambda t: t[Q].view(-1)[7].fill_(float("nan")), rf"model.safetensors: {Q}: got NaN or infinity"),
    (lambda t: t["model.norm.weight"][0].fill_(float("inf")), "model.norm.weight: got NaN or infinity"),
])
def test_misfits_are_named(device, tmp_path, change, words):
    config, _ = make(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=words):
        load.load_weights(tmp_path, config, device)


def test_a_value_that_overflows_the_wanted_dtype_is_refused(device, tmp_path):
    config, _ = make(tmp_path)
    rewrite(tmp_path, lambda t: t[Q][0, 0].fill_(1e6))
    load.load_weights(tmp_path, config, device)
    with pytest.raises(ValueError, match=r"expected values that are finite in torch.float16"):
        load.load_weights(tmp_path, config, device, torch.float16)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "..safetensors",
                                  "model.bin", "x.safetensors\n", "", 3, None, "\0.safetensors"])
def test_index_may_name_plain_safetensors_files_only(tmp_path, name):
    config, _ = make(tmp_path)
    write_index(tmp_path, shard(tmp_path, 2) | {Q: name})
    with pytest.raises(ValueError, match=r"index.json: weight_map: got file .*, expected the plain name of a .safetensors file"):
        load.load_weights(tmp_path, config, "cpu")


def test_index_misfits(tmp_path):
    config, _ = make(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    where = shard(tmp_path, 2)
    write_index(tmp_path, where | {Q: "gone.safetensors"})
    with pytest.raises(ValueError, match=r"gone.safetensors: not readable as safetensors"):
        load.load_weights(tmp_path, config, "cpu")
    save_file({Q: whole[Q]}, tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match=f"{Q}: stands in .* too, expected each tensor once"):
        load.load_weights(tmp_path, config, "cpu")
    for text in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"model.safetensors.index.json: "):
            load.load_weights(tmp_path, config, "cpu")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl"])
def test_pickles_are_refused(tmp_path, name):
    config = LlamaConfig.from_dict(tiny_config())
    with pytest.raises(ValueError, match=r"found neither model.safetensors nor model.safetensors.index.json"):
        load.load_weights(tmp_path, config, "cpu")
    (tmp_path / name).write_bytes(b"never opened")
    with pytest.raises(ValueError, match=f"got {name}, expected model.safetensors: a pickle can run any code.*save_pretrained"):
        load.load_weights(tmp_path, config, "cpu")


@st.composite
def damages(draw):
    """A function from the bytes of a checkpoint to other bytes: cut, flipped, or with an edited header."""
    kind = draw(st.sampled_from(["cut", "flip head", "flip", "length", "edit"]))
    place, byte = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 255))
    field, value = draw(st.sampled_from([
        ("dtype", "F16"), ("dtype", "I8"), ("dtype", "BF16"), ("shape", [1]), ("shape", []), ("shape", [2**40, 2**40]), ("shape", [-1, 48]),
        ("data_offsets", [0, 4]), ("data_offsets", [2**63, 2**64]), ("name", "x"), ("name", "")]))

    def damage(data):
        size = 8 + struct.unpack("<Q", data[:8])[0]
        if kind == "cut":
            return data[:int(place * len(data))]
        if kind == "length":
            return struct.pack("<Q", int(place * 2**64)) + data[8:]
        if kind.startswith("flip"):
            at = int(place * (size if kind == "flip head" else len(data)))
            return data[:at] + bytes([data[at] ^ byte]) + data[at + 1:]
        header = json.loads(data[8:size])
        name = sorted(key for key in header if key != "__metadata__")[int(place * (len(header) - 1))]
        if field == "name":
            header[value] = header.pop(name)
        else:
            header[name][field] = value
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[size:]
    return damage


def check_damage(path, config, damage):
    file = path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    try:
        got = load.load_weights(path, config, "cpu")
    except ValueError as error:
        assert "gkernels.model: " in str(error) and str(path) in str(error)
    else:
        expected = load.shapes(config, got.lm_head is got.embed)
        assert {name: tuple(view.shape) for name, view in load.views(got, config).items()} == expected
        assert all(view.isfinite().all() for view in load.views(got, config).values())


@given(seeds, damages())
def test_damaged_files_are_refused_or_harmless(folder, seed, damage):
    path = folder()
    check_damage(path, make(path, seed % 4)[0], damage)


def test_the_damage_property_catches_a_loader_without_the_finite_check(tmp_path, monkeypatch):
    config, _ = make(tmp_path)
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda t: torch.ones((), dtype=torch.bool))
    load_weights = load.load_weights

    def unchecked(*args):
        got = load_weights(*args)
        monkeypatch.undo()
        return got
    monkeypatch.setattr(load, "load_weights", unchecked)
    with pytest.raises(AssertionError):
        check_damage(tmp_path, config, lambda data: data[:-4] + struct.pack("<f", float("nan")))


def test_random_weights_follow_the_seed_and_keep_activations_near_one(device):
    config = LlamaConfig.from_dict(tiny_config("Qwen3ForCausalLM", attention_bias=True, num_hidden_layers=3))
    a, b, c = (load.random_weights(config, device, seed=seed) for seed in (1, 1, 2))
    assert_same_weights(a, b, config)
    assert not torch.equal(a.embed, c.embed)
    logits = llama.forward(a, config, torch.arange(20, device=device), plain_cos_sin(config, 20))
    assert logits.isfinite().all() and 0.3 < logits.std() < 3


@pytest.mark.parametrize("preset, parameters", [("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248)])
def test_presets_have_the_published_number_of_parameters(preset, parameters):
    config = LlamaConfig.from_dict(PRESETS[preset])
    weights = load.empty_weights(config, "meta", config.dtype, config.tie_word_embeddings)
    assert sum(view.numel() for view in load.views(weights, config).values()) == parameters


@given(seeds, st.sampled_from(ARCHITECTURES), st.integers(2, 8), st.data())
def test_reference_is_causal(device, seed, architecture, T, data):
    config = LlamaConfig.from_dict(tiny_config(architecture, attention_bias=True, mlp_bias=True, partial_rotary_factor=0.5))
    weights, cos_sin = load.random_weights(config, device, torch.float64, seed % 8), plain_cos_sin(config, T)
    ids = torch.randint(96, (T,), generator=torch.Generator().manual_seed(seed)).to(device)
    cut = data.draw(st.integers(1, T - 1))
    other = torch.cat((ids[:cut], (ids[cut:] + 1) % 96))
    got, changed = (llama.forward(weights, config, x, cos_sin).float() for x in (ids, other))
    assert_close(changed[:cut], got[:cut].double(), got[:cut])
    with pytest.raises(AssertionError):
        assert_close(changed, got.double(), got)


def test_reference_generates_the_argmax_and_stops_at_the_end_token(device):
    config = LlamaConfig.from_dict(tiny_config())
    weights, cos_sin = load.random_weights(config, device, seed=3), plain_cos_sin(config, 32)
    got = llama.generate(weights, config, cos_sin, [1, 5], 6)
    ids = torch.tensor([1, 5, *got], device=device)
    assert got == llama.forward(weights, config, ids, cos_sin)[1:-1].argmax(-1).tolist()
    assert llama.generate(weights, config, cos_sin, [1, 5], 6, {got[2]}) == got[:got.index(got[2]) + 1]
    assert llama.generate(weights, config, cos_sin, [1, 5], 0) == []
    assert len(llama.generate(weights, config, cos_sin, [1, got[0]], 1, {got[0]})) == 1, "an end token in the prompt ends nothing"


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the package transformers")
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: str(rope and rope.get("rope_type", rope.get("type"))))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reference_equals_transformers(tmp_path, architecture, rope):
    from transformers import AutoModelForCausalLM
    config, weights = make(tmp_path, architecture=architecture, attention_bias=architecture != "MistralForCausalLM", mlp_bias=True,
                           rope_scaling=rope and {"rope_type": rope.get("type")} | rope)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert LlamaConfig.from_dir(tmp_path / "theirs") == config
    assert_same_weights(load.load_weights(tmp_path / "theirs", config, "cpu"), weights, config)
    ids = torch.arange(40) * 7 % 96
    rotary = model.model.rotary_emb
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1, dtype=torch.float64), torch.arange(40)[None])
        cos_sin = torch.cat((cos[0, :, :config.rotary_dim // 2], sin[0, :, :config.rotary_dim // 2]), -1)
        plain, want = model(ids[None]).logits[0], model.double()(ids[None]).logits[0]
    wide = load.load_weights(tmp_path, config, "cpu", torch.float64)
    assert_close(llama.forward(wide, config, ids, cos_sin).float(), want, plain)


def test_the_shipped_checkpoint_loads_and_is_small(device):
    config = LlamaConfig.from_dir(SHIPPED)
    weights = load.load_weights(SHIPPED, config, device)
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 10e6
    assert config.eos_token_ids == (0,) and weights.embed.dtype == torch.bfloat16
    training = json.loads((SHIPPED / "training.json").read_text())
    assert 0 < training["held_out_bits_per_byte"] < 8


def test_the_training_script_writes_a_checkpoint(tmp_path, capsys):
    script = Path(__file__).parents[1] / "examples" / "train_shakespeare.py"
    spec = importlib.util.spec_from_file_location("train_shakespeare", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "text").write_text("\n\n".join(f"Speaker {i % 7}:\nLine {i * i} of a small play.\nAnd {i} more." for i in range(300)))
    module.main([str(tmp_path / "text"), str(tmp_path / "out"), "--steps", "3", "--batch", "1", "--seconds", "60"])
    assert "held out" in capsys.readouterr().out
    config = LlamaConfig.from_dir(tmp_path / "out")
    load.load_weights(tmp_path / "out", config, "cpu")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"}
    assert json.loads((tmp_path / "out" / "training.json").read_text())["steps"] == 3
