"""Which drafts stand and the token after them, one request at a time in plain Python. Twin of gkernels/kernels/verify.py."""

import torch

from reference.sampling import noise, philox

NO_TOKEN, BAD_LENGTH = 4, 1


def verify(draft, sampled, query_start_loc, status, K, probs=None):
    """tokens int32 [R, K + 1], -1 beyond num_accepted + 1, and num_accepted int32 [R]; ors flags into status in place, as the kernel does."""
    R = len(status)
    tokens, num_accepted = status.new_full((R, K + 1), -1), status.new_full((R,), -1)
    for r, (start, end) in enumerate(zip(query_start_loc.tolist()[:-1], query_start_loc.tolist()[1:], strict=True)):
        if start == end:
            continue
        if not (0 <= start < end <= len(draft) and end - start - 1 <= K):
            status[r] |= BAD_LENGTH
            continue
        drafts, own = draft[start:end - 1].tolist(), sampled[start:end].tolist()
        emitted = alike(drafts, own) if probs is None or probs.is_drawn[r] != 1 else drawn(drafts, own[-1], probs, r, start)
        if emitted[-1] < 0:
            status[r] |= NO_TOKEN
            continue
        tokens[r, :len(emitted)] = torch.tensor(emitted, dtype=torch.int32, device=tokens.device)
        num_accepted[r] = len(emitted) - 1
    return tokens, num_accepted


def alike(drafts, own):
    """The drafts that equal the target's own tokens, and its next one."""
    n = next((i for i, token in enumerate(drafts) if token < 0 or token != own[i]), len(drafts))
    return drafts[:n] + [own[n]]


def drawn(drafts, own, probs, request, start):
    """Rejection sampling: the drafts that stand, then a token of the residual, or the target's own after all of them. -1 where data is bad."""
    seed = probs.seed[request:request + 1]
    for i, x in enumerate(drafts):
        p, q, position = probs.target[start + i].double(), probs.draft[start + i].double(), probs.position[start + i:start + i + 1]
        if not 0 <= x < len(p):
            return drafts[:i] + [-1]
        uniform, own_seed = random(seed, position)
        if not (q[x] >= 0 and p[x] < torch.inf and uniform * q[x] < p[x]):
            return drafts[:i] + [residual(p, q, x, noise(own_seed, position, len(p))[0])]
    return drafts + [own]


def residual(p, q, fallen, gumbel):
    """The draw from max(p - q, 0), the fallen draft where nothing is left of that, -1 where p or q is no distribution."""
    good = (p >= 0) & (p < torch.inf) & (q >= 0) & (q < torch.inf)
    if not good.all():
        return -1
    if not (p > q).any():
        return fallen if p[fallen] > 0 else -1
    return int(((p - q).clamp(min=0).log() + gumbel).argmax())


def random(seed, position):
    """A uniform of 64 bits in [0, 1), and a seed for noise, int64; both [R]."""
    a, b, c, d = philox(seed, position, torch.ones_like(position))
    return (a.double() * 2.0**-32 + b.double() * 2.0**-64).clamp(max=1 - 2.0**-53), c << 32 | d
