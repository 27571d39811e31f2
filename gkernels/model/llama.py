"""A Llama-style decoder over a paged cache. Reads top down; all state is passed in.

T tokens of any mix of requests, back to back, come in with their `Schedule`; the logits of each request's last token come out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import ops
from .cache import PagedCache
from .config import LlamaConfig
from .load import LayerWeights, Weights
from .quantized import product


@dataclass
class Llama:
    config: LlamaConfig
    weights: Weights
    cos_sin: torch.Tensor        # [max_len, rotary_dim] float32

    @classmethod
    def build(cls, config: LlamaConfig, weights: Weights, max_len: int) -> Llama:
        """max_len: the longest sequence that will be served; rotary angles are tabulated that far."""
        table = ops.cos_sin_table(config.rotary_dim, max_len, config.rope_theta, config.rope_scaling, weights.embed.device)
        return cls(config, weights, table)

    def __call__(self, token_ids: torch.Tensor, block_table: torch.Tensor, plan: ops.Schedule, workspace: ops.Workspace,
                 cache: PagedCache, every_row: bool = False) -> torch.Tensor:
        """token_ids int32 [T], block_table int32 [R, W] -> logits float32 [R, V]; rows of unused requests are zeros. With `every_row` the logits of
        all rows, [T, V]."""
        w, eps, n = self.weights, self.config.rms_norm_eps, plan.num_tokens
        residual = ops.embedding(token_ids, w.embed, n)
        x = ops.rmsnorm(residual, w.layers[0].input_norm, eps, n)
        next_norms = [layer.input_norm for layer in w.layers[1:]] + [w.norm]
        for i, (layer, next_norm) in enumerate(zip(w.layers, next_norms, strict=True)):
            x = self.attend(x, layer, block_table, plan, workspace, *cache.layer(i))
            x = ops.add_rmsnorm(x, residual, layer.post_norm, eps, n)
            x = self.feed_forward(x, layer, n)
            x = ops.add_rmsnorm(x, residual, next_norm, eps, n)
        last = x if every_row else ops.embedding(plan.last_token, x, padding_index=-1)
        logits = torch.empty(last.shape[0], self.config.vocab_size, dtype=torch.float32, device=last.device)
        ops.linear_out(last, w.lm_head, logits)
        return logits

    def attend(self, x: torch.Tensor, layer: LayerWeights, block_table: torch.Tensor, plan: ops.Schedule, workspace: ops.Workspace,
               k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        c, T = self.config, x.shape[0]
        H, K, D = c.num_heads, c.num_kv_heads, c.head_dim
        qkv = product(x, layer.qkv, layer.qkv_bias, plan.num_tokens).view(T, H + 2 * K, D)
        q, k, v = qkv.split([H, K, K], dim=1)
        rotated = torch.empty(T, H, D, dtype=x.dtype, device=x.device)
        ops.rotary_kv_write(q, k, v, plan.positions, self.cos_sin, plan.slot_mapping, k_cache, v_cache, rotated,
                            q_norm=layer.q_norm, k_norm=layer.k_norm, eps=c.rms_norm_eps, num_tokens=plan.num_tokens)
        attended = torch.empty_like(rotated)
        ops.attention_out(rotated, k_cache, v_cache, block_table, plan.work, workspace, attended)
        return product(attended.view(T, H * D), layer.o, layer.o_bias, plan.num_tokens)

    def feed_forward(self, x: torch.Tensor, layer: LayerWeights, num_tokens: torch.Tensor) -> torch.Tensor:
        gate_up = product(x, layer.gate_up, layer.gate_up_bias, num_tokens)
        return product(ops.silu_and_mul(gate_up, num_tokens), layer.down, layer.down_bias, num_tokens)
