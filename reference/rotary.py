"""Rotary embedding in plain PyTorch. Twin of gkernels/kernels/rotary.py; its tables are computed in float64."""

import math

import torch
from einops import rearrange

from .kv_cache import kv_write
from .rmsnorm import rmsnorm, zero_pads


def inverse_frequencies(rotary_dim, max_len, theta=10000.0, scaling=None):
    """Pair by pair, from the papers' statements: the wavelength decides how much of the interpolated frequency is taken."""
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta, factor = scaling.get("rope_theta", theta), scaling.get("factor", 1.0)
    original = scaling.get("original_max_position_embeddings")
    if kind == "dynamic":
        longest = max(max_len, original)
        theta, factor = theta * (1 + factor * (longest / original - 1)) ** (rotary_dim / (rotary_dim - 2)), 1.0

    def turning_pair(turns):                              # the (fractional) pair that turns `turns` circles in the original context
        return rotary_dim / 2 * math.log(original / (2 * math.pi * turns), theta)

    frequencies = []
    for pair in range(rotary_dim // 2):
        plain = theta ** (-2 * pair / rotary_dim)
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            share = (original * plain / (2 * math.pi) - low) / (high - low)
        elif kind == "yarn":
            first, last = turning_pair(scaling.get("beta_fast") or 32), turning_pair(scaling.get("beta_slow") or 1)
            if scaling.get("truncate", True):
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, rotary_dim - 1)
            share = 1 - (pair - first) / (last - first if last > first else 0.001)
        else:
            share = 0.0
        share = min(max(share, 0.0), 1.0)
        frequencies.append(plain * share + plain / factor * (1 - share))
    attention = 1.0
    if kind == "yarn":
        magnitude = lambda weight: 0.1 * weight * math.log(factor) + 1
        m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = scaling.get("attention_factor") or (magnitude(m) / magnitude(m_all) if m and m_all else magnitude(1))
    return torch.tensor(frequencies, dtype=torch.float64), attention


def cos_sin_table(rotary_dim, max_len, theta=10000.0, scaling=None, device=None):
    frequencies, attention = inverse_frequencies(rotary_dim, max_len, theta, scaling)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float64), frequencies)
    return (attention * torch.cat([angles.cos(), angles.sin()], 1)).to(device)


def rotary(q, k, positions, cos_sin, interleaved=False, num_tokens=None):
    known = (positions >= 0) & (positions < cos_sin.shape[0])
    rows = torch.where(known[:, None], cos_sin[torch.where(known, positions, 0)], float("nan"))
    pairs = "t h (d two) -> t h d two" if interleaved else "t h (two d) -> t h d two"

    def turn(x):
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rows.to(wide)[:, None].chunk(2, -1)
        rotated, rest = x.to(wide).split([cos_sin.shape[1], x.shape[2] - cos_sin.shape[1]], -1)
        a, b = rearrange(rotated, pairs, two=2).unbind(-1)
        rotated = rearrange(torch.stack([a * cos - b * sin, b * cos + a * sin], -1), " -> ".join(reversed(pairs.split(" -> "))))
        y = torch.cat([rotated, torch.where(known[:, None, None], rest, float("nan"))], -1).to(x.dtype)
        return y if num_tokens is None else zero_pads(y, num_tokens)

    return turn(q), turn(k)


def rotary_kv_write(q, k, v, positions, cos_sin, slot_mapping, k_cache, v_cache, q_out, interleaved=False, q_norm=None, k_norm=None,
                    eps=1e-6, num_tokens=None):
    wide = torch.promote_types(q.dtype, torch.float32)
    q_wide, k_wide = (x.to(wide) if w is None else rmsnorm(x.to(wide), w, eps) for x, w in ((q, q_norm), (k, k_norm)))
    q_turned, k_turned = rotary(q_wide, k_wide, positions, cos_sin, interleaved, num_tokens)
    q_out.copy_(q_turned)
    if num_tokens is not None:
        slot_mapping = torch.where(torch.arange(q.shape[0], device=q.device) < num_tokens, slot_mapping, -1)
    kv_write(k_turned, v, k_cache, v_cache, slot_mapping)
