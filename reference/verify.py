"""Which drafts stand, and the token after them, in plain PyTorch and float64. Twin of gkernels/kernels/verify.py."""

import torch

from reference.sampling import first_max, noise, philox

NO_TOKEN, BAD_LENGTH = 4, 1


def verify(draft, sampled, query_start_loc, status, K, probs=None):
    """tokens int32 [R, K + 1], -1 beyond num_accepted + 1, and num_accepted int32 [R]; ors flags into status in place, as the kernel does."""
    start, end = query_start_loc[:-1].long(), query_start_loc[1:].long()
    good = (start >= 0) & (start < end) & (end <= len(draft)) & (end - start <= K + 1)
    num_drafts, places = torch.where(good, end - start - 1, 0), torch.arange(K + 1, device=draft.device)
    rows = torch.where(good, start, 0)[:, None] + places                           # [R, K + 1]; a row past the end is a row of nothing
    rows = torch.where(good[:, None] & (places <= num_drafts[:, None]), rows, len(draft))
    at = lambda t, nothing=-1: torch.cat([t, t.new_full((1, *t.shape[1:]), nothing)])[rows]
    own, drafts = at(sampled), torch.where(places < num_drafts[:, None], at(draft), -1)
    stands, is_drawn = (drafts == own) & (drafts >= 0), torch.zeros_like(good)
    if probs is not None:
        is_drawn = probs.is_drawn == 1
        uniform, own_seed = random(probs.seed[:, None], at(probs.position))
        is_token = (drafts >= 0) & (drafts < probs.target.shape[1])
        of_draft = lambda p: at(p, 0.0).double().gather(2, torch.where(is_token, drafts, 0)[..., None].long())[..., 0]
        p, q = of_draft(probs.target), of_draft(probs.draft)
        stands = torch.where(is_drawn[:, None], is_token & (q >= 0) & (p < torch.inf) & (uniform * q < p), stands)
    accepted = stands.int().cumprod(1).sum(1, keepdim=True)                        # [R, 1]
    here = lambda t: t.gather(1, accepted)[:, 0]
    token = here(own)
    if probs is not None:
        row, falls = here(rows).clamp(max=len(draft) - 1), is_drawn & (accepted[:, 0] < num_drafts)
        gumbel = noise(here(own_seed), here(at(probs.position)), probs.target.shape[1])
        rest = residual(probs.target[row].double(), probs.draft[row].double(), torch.where(here(p) > 0, here(drafts), -1), gumbel)
        token = torch.where(falls, torch.where(here(is_token), rest, -1), token)
    has_token = token >= 0
    tokens = torch.where(places < accepted, drafts, torch.where(places == accepted, token[:, None], -1))
    status |= torch.where(good, torch.where(has_token, 0, NO_TOKEN), torch.where(start == end, 0, BAD_LENGTH)).to(status.dtype)
    return torch.where(has_token[:, None], tokens, -1).int(), torch.where(has_token, accepted[:, 0], -1).int()


def residual(p, q, fallen, gumbel):
    """The draws from max(p - q, 0), all [R, V]: the fallen drafts where nothing is left of that, -1 where p or q is no probability."""
    good = ((p >= 0) & (p < torch.inf) & (q >= 0) & (q < torch.inf)).all(1)
    left, token = first_max(torch.where(p > q, torch.where(p > q, p - q, 1.0).log() + gumbel, -torch.inf))
    return torch.where(good, torch.where(left > -torch.inf, token, fallen), -1)


def random(seed, position):
    """A uniform of 64 bits in [0, 1), and a seed for noise, int64."""
    a, b, c, d = philox(seed, position, torch.ones_like(position))
    return (a.double() * 2.0**-32 + b.double() * 2.0**-64).clamp(max=1 - 2.0**-53), c << 32 | d
