"""Weights of a Llama-style checkpoint: safetensors in, q/k/v and gate/up fused while loading, and back out again.

The fused tensors are allocated once; every tensor of the checkpoint is copied into its rows of them, shard by shard. Names, shapes and
dtypes of all shards are checked against the configuration before anything is allocated, and every value must be finite in the dtype it
is kept in. Quantised projections are fused as soon as their last part is read. Only safetensors are read: a pickle runs whatever code it holds.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..ops import Quantized
from ..progress import progress
from . import optional
from .config import LlamaConfig, read_json
from .quantized import Scheme, empty, fuse

FLOATS = ("F16", "BF16", "F32", "F64")
PICKLES = (".bin", ".pt", ".pth", ".pkl")
# A buffer that checkpoints of 2023 carry; scales of quantised activations and caches
IGNORED = re.compile(r"model\.layers\.\d+\.(self_attn\.rotary_emb\.inv_freq|.*\.(input_scale|k_scale|v_scale))")
SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")


@dataclass
class LayerWeights:
    input_norm: torch.Tensor                # [hidden]
    qkv: torch.Tensor | Quantized           # [(H + 2K) * D, hidden]: the rows of q, then k, then v
    o: torch.Tensor | Quantized             # [hidden, H * D]
    post_norm: torch.Tensor                 # [hidden], between attention and MLP
    gate_up: torch.Tensor | Quantized       # [2F, hidden]: the rows of gate, then up
    down: torch.Tensor | Quantized          # [hidden, F]
    qkv_bias: torch.Tensor | None = None    # [(H + 2K) * D]
    o_bias: torch.Tensor | None = None      # [hidden]
    gate_up_bias: torch.Tensor | None = None  # [2F]
    down_bias: torch.Tensor | None = None   # [hidden]
    q_norm: torch.Tensor | None = None      # [D]
    k_norm: torch.Tensor | None = None      # [D]


@dataclass
class Weights:
    embed: torch.Tensor                     # [V, hidden]
    layers: list[LayerWeights]
    norm: torch.Tensor                      # [hidden]
    lm_head: torch.Tensor                   # [V, hidden]; the tensor `embed` itself when tied


def _projections(c: LlamaConfig) -> dict[str, dict[str, tuple[int, int]]]:
    """Field of LayerWeights -> {name of a weight inside the layer: shape}, in the order of their rows in the fused tensor."""
    q, kv, F, hidden = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size, c.hidden_size
    return {"qkv": {f"self_attn.{x}_proj.weight": (rows, hidden) for x, rows in (("q", q), ("k", kv), ("v", kv))},
            "o": {"self_attn.o_proj.weight": (hidden, q)},
            "gate_up": {f"mlp.{x}_proj.weight": (F, hidden) for x in ("gate", "up")},
            "down": {"mlp.down_proj.weight": (hidden, F)}}


def _layer_parts(c: LlamaConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """The same for every field whose parts are copied: all but quantised projections."""
    has_bias = {"qkv": c.attention_bias, "o": c.attention_out_bias, "gate_up": c.mlp_bias, "down": c.mlp_bias}
    parts: dict[str, dict[str, tuple[int, ...]]] = {"input_norm": {"input_layernorm.weight": (c.hidden_size,)},
                                                    "post_norm": {"post_attention_layernorm.weight": (c.hidden_size,)}}
    for field, projections in _projections(c).items():
        if c.quantization is None:
            parts[field] = {**projections}
        if has_bias[field]:
            parts[f"{field}_bias"] = {f"{name.removesuffix('weight')}bias": shape[:1] for name, shape in projections.items()}
    if c.qk_norm:
        parts |= {f"{x}_norm": {f"self_attn.{x}_norm.weight": (c.head_dim,)} for x in "qk"}
    return parts


def shapes(config: LlamaConfig, tied: bool) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of every tensor that is copied."""
    table = (config.vocab_size, config.hidden_size)
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "model.norm.weight": (config.hidden_size,)}
    if not tied:
        names["lm_head.weight"] = table
    for part in _layer_parts(config).values():
        names |= {f"model.layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in part.items()}
    return names


def stored(config: LlamaConfig, tied: bool) -> dict[str, tuple[tuple[int, ...] | None, tuple[str, ...]]]:
    """Checkpoint name -> shape, None for any, and safetensors' dtypes of every tensor that stands for the model."""
    tensors: dict[str, tuple[tuple[int, ...] | None, tuple[str, ...]]] = {name: (shape, FLOATS) for name, shape in shapes(config, tied).items()}
    for parts in _quantized_parts(config).values():
        for part in parts:
            tensors |= part
    return tensors


def _quantized_parts(c: LlamaConfig) -> dict[tuple[int, str], list[dict[str, tuple]]]:
    """(layer, field) -> for each part of the fused weight what `Scheme.stored` says of it; empty where nothing is quantised."""
    if c.quantization is None:
        return {}
    return {(i, field): [c.quantization.stored(f"model.layers.{i}.{name}", shape) for name, shape in projections.items()]
            for i in range(c.num_layers) for field, projections in _projections(c).items()}


def empty_weights(config: LlamaConfig, device: torch.device | str, dtype: torch.dtype, tied: bool) -> Weights:
    def new(*shape):
        return torch.empty(shape, dtype=dtype, device=device)

    def layer():
        fields = dict.fromkeys(_projections(config))                               # quantised ones come whole, once they are read
        for field, part in _layer_parts(config).items():
            fields[field] = new(sum(shape[0] for shape in part.values()), *next(iter(part.values()))[1:])
        return LayerWeights(**fields)

    layers = [layer() for _ in range(config.num_layers)]
    embed = new(config.vocab_size, config.hidden_size)
    return Weights(embed, layers, new(config.hidden_size), embed if tied else new(config.vocab_size, config.hidden_size))


def empty_projections(weights: Weights, config: LlamaConfig) -> None:
    """Gives `empty_weights` room for quantised projections, which a checkpoint brings along: for those who want shapes alone."""
    if config.quantization is None:
        return
    for layer in weights.layers:
        for field, parts in _projections(config).items():
            N, K = sum(rows for rows, _ in parts.values()), next(iter(parts.values()))[1]
            setattr(layer, field, empty(config.quantization, N, K, weights.embed.device))


def views(weights: Weights, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Checkpoint name -> its rows of the fused tensor: one table for loading, saving and filling."""
    named = {"model.embed_tokens.weight": weights.embed, "model.norm.weight": weights.norm}
    if weights.lm_head is not weights.embed:
        named["lm_head.weight"] = weights.lm_head
    for i, layer in enumerate(weights.layers):
        for field, part in _layer_parts(config).items():
            rows = getattr(layer, field).split([shape[0] for shape in part.values()])
            named |= {f"model.layers.{i}.{name}": view for name, view in zip(part, rows, strict=True)}
    return named


def load_weights(path: str | Path, config: LlamaConfig, device: torch.device | str, dtype: torch.dtype | None = None) -> Weights:
    """Loads the folder's model.safetensors, or the shards of its index, in `dtype` (None: config.dtype). ValueError on any misfit."""
    folder, device, dtype = Path(path), torch.device(device), dtype or config.dtype
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    shards = _shards(folder)
    found = _scan(folder, shards)
    tied = config.tie_word_embeddings
    _check_names(folder, found, stored(config, tied=False), tied)
    weights = empty_weights(config, device, dtype, tied)
    targets, waiting, scheme = views(weights, config), _quantized_parts(config), config.quantization
    read: dict[str, torch.Tensor] = {}
    for shard in progress(shards, desc="load weights", unit="shard"):
        with _open(shard, device) as tensors:
            read |= {name: tensors.get_tensor(name) for parts in waiting.values() for part in parts for name in part.keys() & tensors.keys()}
            for (layer, field), parts in list(waiting.items()):
                if scheme and all(name in read for part in parts for name in part):
                    setattr(weights.layers[layer], field, _fused(folder, scheme, parts, read))
                    del waiting[layer, field]
            for name in sorted(targets.keys() & tensors.keys()):
                targets[name].copy_(tensors.get_tensor(name))
                if not targets[name].isfinite().all():
                    raise ValueError(f"gkernels.model: {shard}: {name}: got NaN or infinity, expected values that are finite in {dtype}")
    return weights


def _fused(folder: Path, scheme: Scheme, parts: list[dict[str, tuple]], read: dict[str, torch.Tensor]) -> Quantized:
    """One weight of its parts, which leave `read`."""
    names = [name for part in parts for name in part]
    tensors = [{name.rpartition(".")[2]: read.pop(name) for name in part} for part in parts]
    try:
        return fuse(scheme, tensors)
    except (ValueError, TypeError) as error:
        raise ValueError(f"gkernels.model: {folder}: {', '.join(names)}: {error}") from error


def _shards(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"gkernels.model: {index}: weight_map: got {repr(names)[:100]}, expected an object of tensor names and files")
        for name in names.values():
            if not isinstance(name, str) or not SHARD.fullmatch(name):
                raise ValueError(f"gkernels.model: {index}: weight_map: got file {name!r}, expected the plain name of a .safetensors file")
        return [folder / name for name in sorted(set(names.values()))]
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
    if pickles:
        raise ValueError(f"gkernels.model: {folder}: got {', '.join(pickles[:4])}, expected model.safetensors: a pickle can run any code, "
                         "so it is not opened. Convert it where you trust it: python -c \"from transformers import AutoModelForCausalLM "
                         "as M; M.from_pretrained('FOLDER').save_pretrained('NEW_FOLDER')\"")
    raise ValueError(f"gkernels.model: {folder}: found neither model.safetensors nor model.safetensors.index.json; expected the folder of "
                     "a Hugging Face checkpoint")


def _open(shard, device="cpu"):
    safe_open = optional("safetensors").safe_open
    try:
        return safe_open(shard, framework="pt", device=str(device))
    except Exception as error:   # SafetensorError derives from Exception only
        raise ValueError(f"gkernels.model: {shard}: not readable as safetensors ({error}); fetch the file again") from error


def _scan(folder, shards):
    """Name -> (shard, shape, dtype) of every tensor, from the headers alone."""
    found = {}
    for shard in shards:
        with _open(shard) as tensors:
            for name in tensors.keys():
                if name in found:
                    raise ValueError(f"gkernels.model: {shard}: {name}: stands in {found[name][0].name} too, expected each tensor once")
                header = tensors.get_slice(name)
                found[name] = shard, tuple(header.get_shape()), header.get_dtype()
    return found


def _check_names(folder, found, expected, tied):
    unexpected = sorted(name for name in found.keys() - expected.keys() if not IGNORED.fullmatch(name))
    missing = sorted(expected.keys() - found.keys() - ({"lm_head.weight"} if tied else set()))
    if missing or unexpected:
        def listed(names):
            return f"{len(names)} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else "none"
        raise ValueError(f"gkernels.model: {folder}: the tensors are not those of config.json: missing {listed(missing)}, "
                         f"unexpected {listed(unexpected)}" + ("; a checkpoint whose lm_head is its embedding says "
                                                               "tie_word_embeddings: true" if missing == ["lm_head.weight"] else ""))
    for name, (shape, dtypes) in expected.items():
        if name not in found:
            continue
        shard, got, dtype = found[name]
        if shape is not None and got != shape:
            raise ValueError(f"gkernels.model: {shard}: {name}: got shape {list(got)}, expected {list(shape)} from config.json")
        if dtype not in dtypes:
            raise ValueError(f"gkernels.model: {shard}: {name}: got dtype {dtype}, expected one of {', '.join(dtypes)}")


def random_weights(config: LlamaConfig, device: torch.device | str, dtype: torch.dtype | None = None, seed: int = 0) -> Weights:
    """Weights that keep activations near 1 at any size: matrices normal with deviation 1 / sqrt(fan in) (0.022 at hidden 2048), those
    that write to the residual stream divided by sqrt(2 layers); norm weights near 1. Nothing is quantised. A seed fixes the weights on one kind
    of device."""
    config = replace(config, quantization=None)
    weights = empty_weights(config, device, dtype or config.dtype, config.tie_word_embeddings)
    generator = torch.Generator(weights.embed.device).manual_seed(seed)
    for name, view in views(weights, config).items():
        if name.endswith("norm.weight"):
            view.normal_(1.0, 0.1, generator=generator)
        elif name.endswith(".bias"):
            view.normal_(0.0, 0.1, generator=generator)
        else:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            view.normal_(0.0, (view.shape[1] * (2 * config.num_layers if writes else 1)) ** -0.5, generator=generator)
    return weights


def save_checkpoint(path: str | Path, config_dict: dict, weights: Weights) -> None:
    """Writes config.json and model.safetensors as transformers does: unfused names, no lm_head when it is tied."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    named = {name: view.contiguous() for name, view in views(weights, LlamaConfig.from_dict(config_dict)).items()}
    optional("safetensors.torch").save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_dict, indent=2) + "\n", encoding="utf-8")
