"""LlamaConfig: what the model takes from a Hugging Face config.json and generation_config.json, checked before anything is allocated.

Reads the layouts of transformers v4 (torch_dtype, rope_theta, rope_scaling) and v5 (dtype, rope_parameters) of the ARCHITECTURES below.
What it does not know (sliding windows, other quantisations, activations or rope types) is a ValueError naming the file, the key, what came
and what was expected; nothing is guessed except where transformers has a default.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from .quantized import Scheme

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROPE_FACTORS = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",),
                "dynamic": ("factor",)}
YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class LlamaConfig:
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None      # {"rope_type": ..., its parameters}; None for the default type
    rotary_dim: int                # even, at most head_dim
    max_position_embeddings: int
    attention_bias: bool           # of q, k and v
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: torch.dtype
    quantization: Scheme | None = None      # of the layers' projections

    @classmethod
    def from_dir(cls, path: str | Path) -> LlamaConfig:
        """Reads config.json and, where it is there, generation_config.json of a checkpoint folder."""
        folder = Path(path)
        generation = folder / "generation_config.json"
        return cls.from_dict(read_json(folder / "config.json"), read_json(generation) if generation.is_file() else None)

    @classmethod
    def from_dict(cls, config: dict, generation_config: dict | None = None) -> LlamaConfig:
        """Checks the two parsed files; messages call them config.json and generation_config.json."""
        c = _Keys("config.json", config)
        named = config.get("architectures")
        architecture = named[0] if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str) else ""
        c.require(architecture in ARCHITECTURES, "architectures", named, f"a list of one of {', '.join(ARCHITECTURES)}")
        llama, qwen2, qwen3 = (architecture == f"{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3"))
        c.require(config.get("hidden_act", "silu") == "silu", "hidden_act", config.get("hidden_act"), "'silu'")
        quantized = config.get("quantization_config")
        quantization = None if quantized is None else Scheme.from_keys(_Keys("config.json: quantization_config", quantized))
        hidden, heads = c.integer("hidden_size", 1, 16384), c.integer("num_attention_heads", 1, 1024)
        kv_heads = c.integer("num_key_value_heads", 1, 1024, default=heads)
        c.require(heads % kv_heads == 0 and heads <= 16 * kv_heads, "num_key_value_heads", kv_heads,
                  f"a divisor of num_attention_heads = {heads}, and no less than a 16th of it")
        if config.get("head_dim") is None:
            c.require(not qwen3, "head_dim", None, "an integer from 1 to 256, because Qwen3 does not derive it from hidden_size")
            c.require(hidden % heads == 0, "num_attention_heads", heads, f"a divisor of hidden_size = {hidden}, because head_dim is absent")
        head_dim = c.integer("head_dim", 1, 256, default=hidden // heads)
        positions = c.integer("max_position_embeddings", 1, 2**24)
        window = config.get("sliding_window", 4096 if architecture == "MistralForCausalLM" else None)   # transformers' defaults
        if architecture == "MistralForCausalLM" and window is not None:
            c.require(isinstance(window, int) and window >= positions, "sliding_window", window,
                      f"null or at least max_position_embeddings = {positions}: sliding-window attention is not supported")
        c.require(not c.boolean("use_sliding_window", False), "use_sliding_window", True,
                  "false: sliding-window attention is not supported")
        layer_types = config.get("layer_types") or []
        c.require(isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types), "layer_types", layer_types,
                  "full_attention in every layer")
        theta, scaling, rotary_dim = _rope(c, head_dim, positions)
        vocab = c.integer("vocab_size", 1, 2**18)
        g = _Keys("generation_config.json", generation_config or {})
        bias = c.boolean("attention_bias", False) and (llama or qwen3)
        dtype = config.get("dtype", config.get("torch_dtype")) or "float32"
        c.require(isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
        return cls(
            architecture=architecture, vocab_size=vocab, hidden_size=hidden, intermediate_size=c.integer("intermediate_size", 1, 2**20),
            num_layers=c.integer("num_hidden_layers", 1, 1000), num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
            rms_norm_eps=c.number("rms_norm_eps", 1e-12, 1e-1), rope_theta=theta, rope_scaling=scaling, rotary_dim=rotary_dim,
            max_position_embeddings=positions, attention_bias=bias or qwen2, attention_out_bias=bias,
            mlp_bias=c.boolean("mlp_bias", False) and llama, qk_norm=qwen3, tie_word_embeddings=c.boolean("tie_word_embeddings", False),
            eos_token_ids=tuple(dict.fromkeys(g.ids("eos_token_id", vocab) + c.ids("eos_token_id", vocab))),
            bos_token_id=next(iter(g.ids("bos_token_id", vocab) + c.ids("bos_token_id", vocab)), None),
            dtype=DTYPES[dtype.removeprefix("torch.")], quantization=quantization)


class _Keys:
    """Checked reads of a parsed JSON object."""

    def __init__(self, file, values):
        if not isinstance(values, dict):
            raise ValueError(f"gkernels.model: {file}: got {type(values).__name__}, expected a JSON object")
        self.file, self.values = file, values

    def require(self, good, key, got, expected):
        if not good:
            raise ValueError(f"gkernels.model: {self.file}: {key}: got {repr(got)[:200]}, expected {expected}")

    def get(self, key, default, expected):
        got = self.values.get(key)
        if got is None and default is None:
            raise ValueError(f"gkernels.model: {self.file}: {key}: got nothing, expected {expected}; add the key")
        return default if got is None else got

    def integer(self, key, low, high, default=None):
        expected = f"an integer from {low} to {high}"
        got = self.get(key, default, expected)
        self.require(isinstance(got, int) and not isinstance(got, bool) and low <= got <= high, key, got, expected)
        return got

    def number(self, key, low, high, default=None):
        expected = f"a number from {low} to {high}"
        got = self.get(key, default, expected)
        self.require(isinstance(got, (int, float)) and not isinstance(got, bool) and low <= got <= high, key, got, expected)
        return float(got)

    def boolean(self, key, default):
        got = self.get(key, default, "true or false")
        self.require(isinstance(got, bool), key, got, "true or false")
        return got

    def ids(self, key, vocab):
        got = self.values.get(key)
        ids = [] if got is None else got if isinstance(got, list) else [got]
        self.require(all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab for i in ids), key, got,
                     f"a token id below vocab_size = {vocab}, or a list of them")
        return ids


def _rope(c, head_dim, positions):
    """(theta, scaling or None, rotary_dim) from v5's rope_parameters, or v4's rope_scaling and top-level keys."""
    name = "rope_parameters" if c.values.get("rope_parameters") is not None else "rope_scaling"
    given = c.values.get(name)
    c.require(given is None or isinstance(given, dict), name, given, "an object or null")
    r = _Keys(f"{c.file}: {name}", given or {})
    for key, value in r.values.items():
        r.require(not isinstance(value, (dict, list)), key, value, "a plain value: one set of parameters serves all layers")
    theta = (r if "rope_theta" in r.values else c).number("rope_theta", 1.0, 1e12, default=10000.0)
    partial = (r if "partial_rotary_factor" in r.values else c).number("partial_rotary_factor", 0.0, 1.0, default=1.0)
    rotary_dim = int(head_dim * partial)
    c.require(rotary_dim >= 2 and rotary_dim % 2 == 0, "partial_rotary_factor", partial, f"an even rotary width; head_dim is {head_dim}")
    kind = r.values.get("rope_type") or r.values.get("type") or "default"
    r.require(isinstance(kind, str) and kind in ROPE_FACTORS, "rope_type", kind, f"one of {', '.join(ROPE_FACTORS)}")
    if kind == "default":
        return theta, None, rotary_dim
    scaling = {"rope_type": kind} | {key: r.number(key, 1e-3, 1e6) for key in ROPE_FACTORS[kind]}
    r.require(scaling["factor"] >= 1, "factor", scaling["factor"], "a number from 1")
    if kind == "llama3":
        r.require(scaling["low_freq_factor"] < scaling["high_freq_factor"], "high_freq_factor", scaling["high_freq_factor"],
                  f"more than low_freq_factor = {scaling['low_freq_factor']}")
    if kind == "yarn":
        scaling |= {key: r.number(key, 0.0, 1e6) for key in YARN_OPTIONS if r.values.get(key) is not None}
        scaling["truncate"] = r.boolean("truncate", True)
    if kind != "linear":
        scaling["original_max_position_embeddings"] = r.integer("original_max_position_embeddings", 1, 2**24,
                                                                None if kind == "llama3" else positions)
    return theta, scaling, rotary_dim


def read_json(path: Path) -> dict:
    """The JSON object in a file; ValueError naming the file when it is missing, damaged or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"gkernels.model: {path}: no such file; expected the folder of a Hugging Face checkpoint") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"gkernels.model: {path}: not readable as JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"gkernels.model: {path}: got {type(values).__name__}, expected a JSON object")
    return values


def _llama3(hidden, intermediate, layers, head_dim, factor, tied):
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": hidden,
            "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": head_dim, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": rope, "max_position_embeddings": 131072,
            "hidden_act": "silu", "tie_word_embeddings": tied, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
            "torch_dtype": "bfloat16"}


PRESETS = {"llama-3.2-1b": _llama3(2048, 8192, 16, 64, 32.0, True), "llama-3.1-8b": _llama3(4096, 14336, 32, 128, 8.0, False)}
