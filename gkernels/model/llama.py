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
    invariant: bool = False      # whether a token's bits are the same in steps of any capacity

    @classmethod
    def build(cls, config: LlamaConfig, weights: Weights, max_len: int, invariant: bool = False) -> Llama:
        """max_len: the longest sequence that will be served; rotary angles are tabulated that far. invariant: steps of every capacity take the nodes
        of a small one, so that a token's bits depend neither on the bucket nor on how a prompt is cut into chunks; large steps take longer."""
        table = ops.cos_sin_table(config.rotary_dim, max_len, config.rope_theta, config.rope_scaling, weights.embed.device)
        return cls(config, weights, table, invariant)

    def __post_init__(self):
        self.scratch = ops.ProductWorkspace.allocate(self.weights.embed.device)

    def __call__(self, token_ids: torch.Tensor, block_table: torch.Tensor, plan: ops.Schedule, workspace: ops.Workspace,
                 cache: PagedCache, every_row: bool = False) -> torch.Tensor:
        """token_ids int32 [T], block_table int32 [R, W] -> logits float32 [R, V]; rows of unused requests are zeros. With `every_row` the logits of
        all rows, [T, V]. Steps of one model follow each other in one stream: they share its scratch."""
        w, n = self.weights, plan.num_tokens
        residual = ops.embedding(token_ids, w.embed, n)
        x = self.enter(residual, w.layers[0].input_norm, n)
        next_norms = [layer.input_norm for layer in w.layers[1:]] + [w.norm]
        for i, (layer, next_norm) in enumerate(zip(w.layers, next_norms, strict=True)):
            x = self.attend(x, residual, layer, block_table, plan, workspace, *cache.layer(i))
            x = self.feed_forward(x, residual, layer, next_norm, n)
        return self.head(x, None if every_row else plan.last_token)

    def is_fused(self, residual: torch.Tensor) -> bool:
        """Whether a step of this capacity takes five nodes a layer instead of nine: each norm is shared by the node before and the node after it."""
        return (self.invariant or residual.shape[0] <= ops.MOST_TOKENS) and self.config.head_dim <= ops.MOST_HEAD_DIM

    def scaled(self, residual: torch.Tensor) -> ops.Scaled:
        """Room for what the fused nodes hand on."""
        T, K = residual.shape
        return ops.Scaled.empty(T, K, residual.dtype, residual.device, splits=True)

    def enter(self, residual: torch.Tensor, norm: torch.Tensor, n: torch.Tensor) -> torch.Tensor | ops.Scaled:
        """The first layer's input."""
        if not self.is_fused(residual):
            return ops.rmsnorm(residual, norm, self.config.rms_norm_eps, n)
        scaled = self.scaled(residual)
        ops.scale(residual, norm, scaled, n)
        return scaled

    def attend(self, x: torch.Tensor | ops.Scaled, residual: torch.Tensor, layer: LayerWeights, block_table: torch.Tensor, plan: ops.Schedule,
               workspace: ops.Workspace, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor | ops.Scaled:
        """Adds attention to the residual and returns the input of the MLP."""
        c, T, n = self.config, residual.shape[0], plan.num_tokens
        H, K, D, eps = c.num_heads, c.num_kv_heads, c.head_dim, c.rms_norm_eps
        rotated = torch.empty(T, H, D, dtype=residual.dtype, device=residual.device)
        if isinstance(x, ops.Scaled):
            ops.norm_qkv(x, layer.qkv, eps, plan.positions, self.cos_sin, plan.slot_mapping, k_cache, v_cache, rotated,
                         layer.qkv_bias, layer.q_norm, layer.k_norm, n, self.scratch)
        else:
            q, k, v = self.product(x, layer.qkv, layer.qkv_bias, n).view(T, H + 2 * K, D).split([H, K, K], dim=1)
            ops.rotary_kv_write(q, k, v, plan.positions, self.cos_sin, plan.slot_mapping, k_cache, v_cache, rotated,
                                q_norm=layer.q_norm, k_norm=layer.k_norm, eps=eps, num_tokens=n)
        attended = torch.empty_like(rotated)
        ops.attention_out(rotated, k_cache, v_cache, block_table, plan.work, workspace, attended, ready=True)
        return self.add(attended.view(T, H * D), layer.o, layer.o_bias, residual, layer.post_norm, n)

    def feed_forward(self, x: torch.Tensor | ops.Scaled, residual: torch.Tensor, layer: LayerWeights, next_norm: torch.Tensor,
                     n: torch.Tensor) -> torch.Tensor | ops.Scaled:
        """Adds the MLP to the residual and returns the input of the next layer."""
        if isinstance(x, ops.Scaled):
            gated = ops.norm_gate_up(x, layer.gate_up, self.config.rms_norm_eps, layer.gate_up_bias, n)
        else:
            gated = ops.silu_and_mul(self.product(x, layer.gate_up, layer.gate_up_bias, n), n)
        return self.add(gated, layer.down, layer.down_bias, residual, next_norm, n)

    def add(self, x: torch.Tensor, weight: torch.Tensor | ops.Quantized, bias: torch.Tensor | None, residual: torch.Tensor, norm: torch.Tensor,
            n: torch.Tensor) -> torch.Tensor | ops.Scaled:
        """residual += x @ weight.T + bias; returns what the next node reads."""
        if not self.is_fused(residual):
            return ops.add_rmsnorm(self.product(x, weight, bias, n), residual, norm, self.config.rms_norm_eps, n)
        scaled = self.scaled(residual)
        ops.linear_residual(x, weight, residual, bias, n, self.scratch, norm, scaled)
        return scaled

    def product(self, x: torch.Tensor, weight: torch.Tensor | ops.Quantized, bias: torch.Tensor | None, n: torch.Tensor) -> torch.Tensor:
        return product(x, weight, bias, n, self.invariant)

    def head(self, x: torch.Tensor | ops.Scaled, index: torch.Tensor | None) -> torch.Tensor:
        """The logits of the rows of `index`, zeros for those of -1; None: of all rows."""
        rows, w = (x.x if isinstance(x, ops.Scaled) else x) if index is None else index, self.weights
        logits = torch.empty(rows.shape[0], self.config.vocab_size, dtype=torch.float32, device=rows.device)
        if isinstance(x, ops.Scaled):
            ops.norm_linear_out(x, w.lm_head, self.config.rms_norm_eps, logits, index=index)
        else:
            ops.linear_out(x if index is None else ops.embedding(index, x, padding_index=-1), w.lm_head, logits, invariant=self.invariant)
        return logits
