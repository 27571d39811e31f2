"""Sampling in plain PyTorch, by a stable sort in float64. Twin of gkernels/kernels/sampling.py."""

import torch

NO_TOKEN, BAD_OPTION = 4, 8


def sample(logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status, typical_p=None):
    """One token a row, int32 [R]; ors flags into status in place, as the kernel does."""
    good = options_are_good(temperature, top_k, top_p, min_p, typical_p)
    live = seq_lens > 0
    x = clean(logits)
    top, greedy = first_max(x)
    none = top == -torch.inf
    _, drawn = first_max(scores(logits, temperature, top_k, top_p, min_p, seed, position, typical_p))
    token = torch.where((temperature > 0) & (temperature < torch.inf) & top.isfinite(), drawn, greedy)
    flags = torch.where(none, NO_TOKEN, 0) | torch.where(good, 0, BAD_OPTION)
    status |= torch.where(live, flags, 0).to(status.dtype)
    return torch.where(live & ~none, token, -1).to(torch.int32)


def scores(logits, temperature, top_k, top_p, min_p, seed, position, typical_p=None):
    """logit / temperature + noise of the kept tokens, -inf elsewhere; meaningless in rows that are greedy."""
    z = scaled(clean(logits), temperature)
    return torch.where(keep(logits, temperature, top_k, top_p, min_p, typical_p), z + noise(seed, position, logits.shape[-1]), -torch.inf)


def probs(logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status, typical_p=None):
    """float64 [R, V]: what `sample` draws from, in whole units of 2^-32 of the greatest; 1 at a greedy token, zeros where there is no token."""
    token = sample(logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status.clone(), typical_p)
    is_drawn = ((temperature > 0) & (temperature < torch.inf) & clean(logits).amax(-1).isfinite() & (token >= 0))[:, None]
    mass = (scaled(clean(logits), temperature).exp() * 2.0**32 + 0.5).floor()
    mass = torch.where(keep(logits, temperature, top_k, top_p, min_p, typical_p), mass, 0.0)
    greedy = torch.arange(logits.shape[-1], device=logits.device) == token[:, None]
    return torch.where(is_drawn, mass / mass.sum(-1, keepdim=True).clamp(min=1), greedy.double())


def keep(logits, temperature, top_k, top_p, min_p, typical_p=None):
    """bool [R, V]: the tokens that the options keep, by stable sorts."""
    V = logits.shape[-1]
    ordered, order = clean(logits).sort(dim=-1, descending=True, stable=True)
    z = scaled(ordered, temperature)
    mass = (z.exp() * 2.0**32 + 0.5).floor().long()
    kept = torch.arange(V, device=z.device) < torch.where((top_k > 0) & (top_k < V), top_k, V)[:, None]
    kept &= shortest_prefix(torch.where(kept, mass, 0), top_p)
    kept &= z.exp() >= torch.where((min_p >= 0) & (min_p <= 1), min_p, 0.0).double()[:, None]
    kept = torch.zeros_like(kept).scatter(-1, order, kept & (ordered > -torch.inf))
    return kept if typical_p is None else kept & typical(kept, scaled(clean(logits), temperature), typical_p)


def shortest_prefix(mass, p):
    """bool [R, V]: the shortest prefix whose mass, in integers, reaches p of all; everything where p is 1 or out of range."""
    p = torch.where((p > 0) & (p <= 1), p, 1.0).double()[:, None]
    need = (p * mass.sum(-1, keepdim=True).double()).ceil().long()
    return (p == 1) | (mass.cumsum(-1) - mass < need)


def typical(kept, z, p):
    """bool [R, V]: the shortest prefix of the kept tokens that reaches p of their mass, by |log p + entropy| up, then by id. With Z the sum of
    exp(z), log p + entropy = z - log Z + log Z - mean of z."""
    mass = torch.where(kept, (z.exp() * 2.0**32 + 0.5).floor().long(), 0)
    mean = (mass * torch.where(mass > 0, z, 0.0)).sum(-1, keepdim=True) / mass.sum(-1, keepdim=True).clamp(min=1)
    order = torch.where(kept, (z - mean).abs(), torch.inf).sort(dim=-1, stable=True).indices
    return torch.zeros_like(kept).scatter(-1, order, shortest_prefix(mass.gather(-1, order), p))


def noise(seed, position, V):
    """float64 [R, V] of Gumbel noise from (seed, position, token id): -log(E), E = -log(1 - v). v takes 32 bits, and below 1/32 all 64."""
    high, low = random_bits(seed, position, V)
    v = (high.double() + (low.double() + 0.5) * 2.0**-32) * 2.0**-32
    w = ((2**32 - 1 - high).double() + 0.5) * 2.0**-32                                              # 1 - v
    return -torch.where(high < 2**27, -torch.log1p(-v), -w.log()).log()


def random_bits(seed, position, V):
    """Two words of 32 bits a token, int64 [R, V]: mixes of its id with the words of a key that is Philox of seed and position."""
    a, b, c, d = (word[:, None] for word in philox(seed, position, torch.zeros_like(position)))
    ids = torch.arange(V, device=seed.device)
    return mixed(ids, a, b), mixed(ids, c, d)


def mixed(ids, first, second):
    """32 bits from an id and two words: three products modulo 2^32 with shifts between, the second word added to the second product."""
    word = 2**32 - 1
    x = ids * 0x9E3779B1 + first & word
    x = (x ^ x >> 16) * 0x21F0AAAD + second & word
    x = multiply(0xD35A2D97, x ^ x >> 15)[1]
    return x ^ x >> 15


def philox(seed, c0, c1):
    """The four words of Philox-4x32-10 (Salmon et al. 2011) at counter (c0, c1, 0, 0), as int64."""
    word = 2**32 - 1
    k0, k1 = seed & word, seed >> 32 & word
    c0, c1 = torch.broadcast_tensors(c0.long() & word, c1.long() & word)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = multiply(0xD2511F53, c0), multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return c0, c1, c2, c3


def multiply(a, b):
    """High and low words of a 32 x 32 bit product, in int64 halves that do not overflow."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def options_are_good(temperature, top_k, top_p, min_p, typical_p=None):
    """bool [R]; NaN compares as bad."""
    good = (temperature >= 0) & (temperature < torch.inf) & (top_k >= 0) & (top_p > 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)
    return good if typical_p is None else good & (typical_p > 0) & (typical_p <= 1)


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
