"""A Llama-style decoder over a paged cache. Reads top down; all state is passed in.

T tokens of any mix of requests, back to back, come in with their `Schedule`; the logits of each request's last token come out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from .. import ops
from .cache import PagedCache
from .config import LlamaConfig
from .load import LayerWeights, Weights
from .quantized import Quantized, product


@dataclass
class Llama:
    config: LlamaConfig
    weights: Weights
    cos_sin: torch.Tensor        # [max_len, rotary_dim] float32
    fused: bool = False          # steps of few tokens take five nodes a layer instead of nine, which are not the faster ones yet: bench/NOTES.md

    @classmethod
    def build(cls, config: LlamaConfig, weights: Weights, max_len: int, fused: bool = False) -> Llama:
        """max_len: the longest sequence that will be served; rotary angles are tabulated that far."""
        table = ops.cos_sin_table(config.rotary_dim, max_len, config.rope_theta, config.rope_scaling, weights.embed.device)
        return cls(config, weights, table, fused)

    def __post_init__(self):
        self.scratch = ops.ProductWorkspace.allocate(self.weights.embed.device) if self.fused else None

    def __call__(self, token_ids: torch.Tensor, block_table: torch.Tensor, plan: ops.Schedule, workspace: ops.Workspace,
                 cache: PagedCache, every_row: bool = False) -> torch.Tensor:
        """token_ids int32 [T], block_table int32 [R, W] -> logits float32 [R, V]; rows of unused requests are zeros. With `every_row` the logits of
        all rows, [T, V]. Steps of one model follow each other in one stream: they share its scratch."""
        w, eps, n = self.weights, self.config.rms_norm_eps, plan.num_tokens
        residual = ops.embedding(token_ids, w.embed, n)
        x = residual if self.is_fused(residual) else ops.rmsnorm(residual, w.layers[0].input_norm, eps, n)
        next_norms = [layer.input_norm for layer in w.layers[1:]] + [w.norm]
        for i, (layer, next_norm) in enumerate(zip(w.layers, next_norms, strict=True)):
            x = self.attend(x, residual, layer, block_table, plan, workspace, *cache.layer(i))
            x = self.feed_forward(x, residual, layer, next_norm, n)
        last = x if every_row else ops.embedding(plan.last_token, x, padding_index=-1)
        logits = torch.empty(last.shape[0], self.config.vocab_size, dtype=torch.float32, device=last.device)
        if self.is_fused(residual):
            ops.norm_linear_out(last, w.norm, w.lm_head, eps, logits)
        else:
            ops.linear_out(last, w.lm_head, logits)
        return logits

    def is_fused(self, residual: torch.Tensor) -> bool:
        """Whether a step of this capacity takes the fused nodes, whose input is the residual stream itself; the others' is normed already. Quantised
        weights have none yet."""
        fits = residual.shape[0] <= ops.MOST_TOKENS and self.config.head_dim <= ops.MOST_HEAD_DIM
        return self.fused and fits and self.config.quantization is None

    def attend(self, x: torch.Tensor, residual: torch.Tensor, layer: LayerWeights, block_table: torch.Tensor, plan: ops.Schedule,
               workspace: ops.Workspace, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        """Adds attention to the residual and returns the input of the MLP."""
        c, T, n = self.config, x.shape[0], plan.num_tokens
        H, K, D, eps = c.num_heads, c.num_kv_heads, c.head_dim, c.rms_norm_eps
        rotated = torch.empty(T, H, D, dtype=x.dtype, device=x.device)
        if self.is_fused(residual):
            ops.norm_qkv(x, layer.input_norm, cast(torch.Tensor, layer.qkv), eps, plan.positions, self.cos_sin, plan.slot_mapping, k_cache, v_cache,
                         rotated, layer.qkv_bias, layer.q_norm, layer.k_norm, n, self.scratch)
        else:
            q, k, v = product(x, layer.qkv, layer.qkv_bias, n).view(T, H + 2 * K, D).split([H, K, K], dim=1)
            ops.rotary_kv_write(q, k, v, plan.positions, self.cos_sin, plan.slot_mapping, k_cache, v_cache, rotated,
                                q_norm=layer.q_norm, k_norm=layer.k_norm, eps=eps, num_tokens=n)
        attended = torch.empty_like(rotated)
        ops.attention_out(rotated, k_cache, v_cache, block_table, plan.work, workspace, attended)
        return self.add(attended.view(T, H * D), layer.o, layer.o_bias, residual, layer.post_norm, n)

    def feed_forward(self, x: torch.Tensor, residual: torch.Tensor, layer: LayerWeights, next_norm: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """Adds the MLP to the residual and returns the input of the next layer."""
        if self.is_fused(residual):
            gated = ops.norm_gate_up(x, layer.post_norm, layer.gate_up, self.config.rms_norm_eps, layer.gate_up_bias, n)
        else:
            gated = ops.silu_and_mul(product(x, layer.gate_up, layer.gate_up_bias, n), n)
        return self.add(gated, layer.down, layer.down_bias, residual, next_norm, n)

    def add(self, x: torch.Tensor, weight: torch.Tensor | Quantized, bias: torch.Tensor | None, residual: torch.Tensor, norm: torch.Tensor,
            n: torch.Tensor) -> torch.Tensor:
        """residual += x @ weight.T + bias; returns what the next node reads."""
        if self.is_fused(residual):
            ops.linear_residual(x, cast(torch.Tensor, weight), residual, bias, n, self.scratch)
            return residual
        return ops.add_rmsnorm(product(x, weight, bias, n), residual, norm, self.config.rms_norm_eps, n)
