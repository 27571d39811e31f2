"""A whole Llama-style forward pass with dense causal attention in plain PyTorch, for one sequence.

weights: as gkernels.model.load.Weights. config: as gkernels.model.config.LlamaConfig. cos_sin [max_len, rotary_dim]: cosines in the
first half of the columns, sines in the second. Products run in the weights' dtype; norms, rotation and softmax in float32, or float64
for float64 weights.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from .rmsnorm import rmsnorm


def forward(weights, config, token_ids, cos_sin):
    """token_ids [T] -> logits [T, V]."""
    return F.linear(hidden_states(weights, config, token_ids, cos_sin), weights.lm_head)


def generate(weights, config, cos_sin, prompt_ids, max_tokens, eos_token_ids=()):
    """Greedy: up to max_tokens ids after the prompt, an end token included. Recomputes the whole sequence at each step."""
    ids = list(prompt_ids)
    while len(ids) - len(prompt_ids) < max_tokens and (len(ids) == len(prompt_ids) or ids[-1] not in eos_token_ids):
        last = hidden_states(weights, config, torch.tensor(ids, device=weights.embed.device), cos_sin)[-1]
        ids.append(int(F.linear(last, weights.lm_head).argmax()))
    return ids[len(prompt_ids):]


def hidden_states(weights, config, token_ids, cos_sin):
    """token_ids [T] -> normed hidden states [T, hidden]."""
    H, K, D, eps = config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps
    x = weights.embed[token_ids]
    for layer in weights.layers:
        qkv = F.linear(rmsnorm(x, layer.input_norm, eps), layer.qkv, layer.qkv_bias)
        q, k, v = rearrange(qkv, "t (h d) -> t h d", d=D).split([H, K, K], 1)
        if layer.q_norm is not None:
            q, k = rmsnorm(q, layer.q_norm, eps), rmsnorm(k, layer.k_norm, eps)
        attended = attention(rotate(q, cos_sin), rotate(k, cos_sin), v)
        x = x + F.linear(rearrange(attended, "t h d -> t (h d)"), layer.o, layer.o_bias)
        gate, up = F.linear(rmsnorm(x, layer.post_norm, eps), layer.gate_up, layer.gate_up_bias).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, layer.down, layer.down_bias)
    return rmsnorm(x, weights.norm, eps)


def rotate(x, cos_sin):
    """Rotates the first rotary_dim columns of x [T, H, D], row t by position t."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos_sin[:x.shape[0], None].to(x.device, wide).chunk(2, -1)
    a, b, rest = x.to(wide).split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).to(x.dtype)


def attention(q, k, v):
    """Causal attention of q [T, H, D] over k, v [T, K, D]."""
    T, H, D = q.shape
    k, v = (repeat(x, "t k d -> t (k g) d", g=H // x.shape[1]) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k).to(torch.promote_types(q.dtype, torch.float32)) * D**-0.5
    scores.masked_fill_(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return torch.einsum("hts,shd->thd", scores.softmax(-1).to(v.dtype), v)
