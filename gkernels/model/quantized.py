"""Quantised weights of Hugging Face checkpoints: what config.json says of them, the tensors that stand for a projection, and their fusion.

  fp8   weight float8_e4m3fn [N, K] with weight_scale_inv [ceil(N / 128), ceil(K / 128)], or weight_scale of one number or N; scales of
        activations are not read, since these stay in 16 bits
  gptq  qweight, qzeros, scales and g_idx of 4 bits, columns in the order of their groups
  awq   qweight, qzeros and scales of 4 bits, version "gemm"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .. import ops

SCALE_BLOCK = 128


class Keys(Protocol):
    """Checked reads of a parsed JSON object."""

    values: dict[str, Any]

    def require(self, good: bool, key: str, got: Any, expected: str) -> None: ...


@dataclass(frozen=True)
class Scheme:
    """quantization_config of a config.json."""

    method: str                # "fp8", "gptq" or "awq"
    group: int = 0             # columns that share a scale of int4; 0: all of them
    has_blocks: bool = False   # fp8: a scale a block of 128 x 128

    @classmethod
    def from_keys(cls, c: Keys) -> Scheme:
        """From the keys of the object. ValueError naming the key where the checkpoint is of another kind."""
        method: Any = c.values.get("quant_method")
        c.require(method in ("fp8", "gptq", "awq"), "quant_method", method, "'fp8', 'gptq' or 'awq'; convert the checkpoint to bfloat16")
        kept = c.values.get("modules_to_not_convert") or []
        c.require(isinstance(kept, list) and all(name == "lm_head" for name in kept), "modules_to_not_convert", kept, "lm_head alone, or nothing")
        if method == "fp8":
            block = c.values.get("weight_block_size")
            c.require(block in (None, [SCALE_BLOCK] * 2), "weight_block_size", block, f"[{SCALE_BLOCK}, {SCALE_BLOCK}] or null")
            return cls(method, has_blocks=block is not None)
        bits: Any = c.values.get("bits", c.values.get("w_bit"))
        group: Any = c.values.get("group_size", c.values.get("q_group_size"))
        c.require(bits == 4, "bits", bits, "4")
        c.require(isinstance(group, int) and (group == -1 or group > 0), "group_size", group, "-1 or a number of columns")
        if method == "gptq":
            c.require(c.values.get("checkpoint_format", "gptq") == "gptq", "checkpoint_format", c.values.get("checkpoint_format"), "'gptq'")
        else:
            c.require(str(c.values.get("version", "gemm")).lower() == "gemm", "version", c.values.get("version"), "'gemm'")
        return cls(method, max(group, 0))

    def stored(self, name: str, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...] | None, tuple[str, ...]]]:
        """The tensors of the checkpoint that stand for the weight `name` [N, K]: name -> (shape, None for any; safetensors' dtypes)."""
        module, (N, K), floats = name.removesuffix("weight"), shape, ("F16", "BF16", "F32")
        if self.method == "fp8":
            blocks = -(-N // SCALE_BLOCK), -(-K // SCALE_BLOCK)
            scale = {"weight_scale_inv": (blocks, ("F32",))} if self.has_blocks else {"weight_scale": (None, floats)}
            return {name: (shape, ("F8_E4M3",))} | {module + key: value for key, value in scale.items()}
        if self.group and K % self.group:
            raise ValueError(f"gkernels.model: config.json: quantization_config: group_size: got {self.group}, expected a divisor of the {K} columns "
                             f"of {name}")
        groups = K // (self.group or K)
        qweight = (K // 8, N) if self.method == "gptq" else (K, N // 8)
        tensors = {"qweight": (qweight, ("I32",)), "qzeros": ((groups, N // 8), ("I32",)), "scales": ((groups, N), floats)}
        return {module + key: value for key, value in tensors.items()} | ({module + "g_idx": ((K,), ("I32",))} if self.method == "gptq" else {})


def fuse(scheme: Scheme, parts: list[dict[str, torch.Tensor]]) -> ops.Quantized:
    """One weight of the parts' rows, each {last word of the name: tensor} of a projection. ValueError or TypeError on contents that do not serve."""
    if scheme.method != "fp8":
        pack = ops.pack_gptq if scheme.method == "gptq" else ops.pack_awq
        weights, scales = zip(*(pack(**part) for part in parts), strict=True)
        return ops.Quantized(torch.cat(weights), torch.cat(scales, 1))
    weight = torch.cat([part["weight"].view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    if scheme.has_blocks:
        for part in parts[:-1]:
            if len(part["weight"]) % SCALE_BLOCK:
                raise ValueError(f"gkernels.model: weight_scale_inv: got {len(part['weight'])} rows before others that are fused with them, expected "
                                 f"a multiple of {SCALE_BLOCK}; convert the checkpoint to bfloat16")
        scale = torch.cat([part["weight_scale_inv"] for part in parts])
    else:
        for part in parts:
            if part["weight_scale"].numel() not in (1, len(part["weight"])):
                raise ValueError(f"gkernels.model: weight_scale: got {part['weight_scale'].numel()} numbers, expected 1 or {len(part['weight'])}")
        scale = torch.cat([part["weight_scale"].float().flatten().expand(len(part["weight"])) for part in parts])
    ops.check_fp8(weight, scale)
    return ops.Quantized(weight, scale)


def empty(scheme: Scheme, N: int, K: int, device: torch.device | str) -> ops.Quantized:
    """Room for a weight [N, K] of a checkpoint, as `fuse` makes it."""
    if scheme.method == "fp8":
        shape = (-(-N // SCALE_BLOCK), -(-K // SCALE_BLOCK)) if scheme.has_blocks else (N,)
        return ops.Quantized(torch.empty(N, K, dtype=torch.float8_e4m3fn, device=device), torch.empty(shape, dtype=torch.float32, device=device))
    return ops.Quantized(torch.empty(N, -(-K // 256) * 32, dtype=torch.int32, device=device),
                         torch.empty(K // (scheme.group or K), N, dtype=torch.int32, device=device))


def product(x: torch.Tensor, weight: torch.Tensor | ops.Quantized, bias: torch.Tensor | None = None,
            num_tokens: torch.Tensor | None = None, invariant: bool = False) -> torch.Tensor:
    """x @ weight.T + bias for a weight of any kind; a quantised one's rows are always invariant."""
    if isinstance(weight, torch.Tensor):
        return ops.linear(x, weight, bias, num_tokens, invariant=invariant)
    return (ops.linear_int4 if weight.weight.dtype == torch.int32 else ops.linear_fp8)(x, *weight, bias, num_tokens)
