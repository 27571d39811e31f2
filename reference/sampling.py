"""Sampling in plain PyTorch, by a stable sort in float64. Twin of gkernels/kernels/sampling.py."""

import torch

NO_TOKEN, BAD_OPTION = 4, 8


def sample(logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status):
    """One token a row, int32 [R]; ors flags into status in place, as the kernel does."""
    good = options_are_good(temperature, top_k, top_p, min_p)
    live = seq_lens > 0
    x = clean(logits)
    top, greedy = first_max(x)
    none = top == -torch.inf
    _, drawn = first_max(scores(logits, temperature, top_k, top_p, min_p, seed, position))
    token = torch.where((temperature > 0) & (temperature < torch.inf) & top.isfinite(), drawn, greedy)
    flags = torch.where(none, NO_TOKEN, 0) | torch.where(good, 0, BAD_OPTION)
    status |= torch.where(live, flags, 0).to(status.dtype)
    return torch.where(live & ~none, token, -1).to(torch.int32)


def scores(logits, temperature, top_k, top_p, min_p, seed, position):
    """logit / temperature + noise of the kept tokens, -inf elsewhere; meaningless in rows that are greedy."""
    z = scaled(clean(logits), temperature)
    return torch.where(keep(logits, temperature, top_k, top_p, min_p), z + noise(seed, position, logits.shape[-1]), -torch.inf)


def keep(logits, temperature, top_k, top_p, min_p):
    """bool [R, V]: the tokens that the options keep, by a stable sort."""
    V = logits.shape[-1]
    ordered, order = clean(logits).sort(dim=-1, descending=True, stable=True)
    z = scaled(ordered, temperature)
    kept = torch.arange(V, device=z.device) < torch.where((top_k > 0) & (top_k < V), top_k, V)[:, None]
    mass = torch.where(kept, (z.exp() * 2.0**32 + 0.5).floor(), 0.0).long()
    p = torch.where((top_p > 0) & (top_p <= 1), top_p, 1.0).double()[:, None]
    need = (p * mass.sum(-1, keepdim=True).double()).ceil().long()
    kept &= (p == 1) | (mass.cumsum(-1) - mass < need)
    kept &= z.exp() >= torch.where((min_p >= 0) & (min_p <= 1), min_p, 0.0).double()[:, None]
    return torch.zeros_like(kept).scatter(-1, order, kept & (ordered > -torch.inf))


def noise(seed, position, V):
    """float64 [R, V] of Gumbel noise from (seed, position, token id): -log(E), E = -log(1 - v), v = (bits + 1/2) / 2^64."""
    high, low = philox(seed[:, None], torch.arange(V, device=seed.device)[None], position[:, None])
    v = (high.double() + (low.double() + 0.5) * 2.0**-32) * 2.0**-32
    w = ((2**32 - 1 - high).double() + ((2**32 - 1 - low).double() + 0.5) * 2.0**-32) * 2.0**-32     # 1 - v, without its rounding
    return -torch.where(v < 0.5, -torch.log1p(-v), -w.log()).log()


def philox(seed, c0, c1):
    """The first two words of Philox-4x32-10 (Salmon et al. 2011) at counter (c0, c1, 0, 0), as int64."""
    word = 2**32 - 1
    k0, k1 = seed & word, seed >> 32 & word
    c0, c1 = torch.broadcast_tensors(c0.long() & word, c1.long() & word)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = multiply(0xD2511F53, c0), multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return c0, c1


def multiply(a, b):
    """High and low words of a 32 x 32 bit product, in int64 halves that do not overflow."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def options_are_good(temperature, top_k, top_p, min_p):
    """bool [R]; NaN compares as bad."""
    return (temperature >= 0) & (temperature < torch.inf) & (top_k >= 0) & (top_p > 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)


def clean(logits):
    x = logits.double()
    return torch.where(x.isnan(), -torch.inf, x)


def scaled(x, temperature):
    """(x - max) / temperature; rows without a finite maximum or a temperature are left at 0."""
    top = x.amax(-1, keepdim=True)
    warm = ((temperature > 0) & (temperature < torch.inf))[:, None] & top.isfinite()
    return torch.where(warm, (x - torch.where(warm, top, 0.0)) / torch.where(warm, temperature.double()[:, None], 1.0), 0.0)


def first_max(x):
    """The greatest value of each row and the lowest id that has it."""
    top = x.amax(-1, keepdim=True)
    return top[:, 0], (x == top).int().argmax(-1)
