"""Adjusted logits in plain PyTorch, an option at a time. Twin of gkernels/kernels/adjust.py."""

import torch

BAD_OPTION = 8


def adjust(logits, adjustments, seq_lens, status):
    """float64 for float64 logits, else float32 [R, V]; ors flags into status in place, as the kernel does. Unused rows are zeros."""
    a, (R, V), live = adjustments, logits.shape, seq_lens > 0
    x = logits if logits.dtype == torch.float64 else logits.float()
    bad = torch.zeros(R, dtype=torch.bool, device=x.device)
    slots = torch.arange(R, device=x.device) if a.slots is None else a.slots.long()
    if a.bias is not None:
        good = a.bias.isfinite()
        bad |= wrong(a.bias_ids, V) | ((a.bias_ids >= 0) & ~good).any(-1)
        x = x.scatter_add(-1, *pairs(a.bias_ids, torch.where(good, a.bias, 0.0).to(x.dtype), V))
    if a.repetition is not None:
        good = [value.isfinite() for value in (a.repetition, a.presence, a.frequency)]
        bad |= ~(good[0] & (a.repetition > 0) & good[1] & good[2])
        repetition = torch.where(good[0] & (a.repetition > 0), a.repetition, 1.0).to(x.dtype)[:, None]
        presence, frequency = (torch.where(ok, t, 0.0).to(x.dtype)[:, None] for ok, t in zip(good[1:], (a.presence, a.frequency), strict=True))
        slot = torch.where(slots < min(len(a.counts), len(a.prompt)), slots, -1)
        count = lines(a.counts, slot, 0).clamp(min=0)
        seen = (count > 0) | unpacked(lines(a.prompt, slot, 0), V)
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x) - frequency * count - torch.where(count > 0, presence, 0.0)
    if a.allowed is not None:
        x = x.masked_fill(~unpacked(lines(a.allowed, slots, -1), V), -torch.inf)
    if a.banned_ids is not None:
        bad |= wrong(a.banned_ids, V)
        x = x.masked_fill(members(a.banned_ids, V), -torch.inf)
    if a.stop_ids is not None:
        bad |= wrong(a.stop_ids, V)
        x = x.masked_fill(members(a.stop_ids, V) & (a.generated < a.min_tokens)[:, None], -torch.inf)
    status |= torch.where(live & bad, BAD_OPTION, 0).to(status.dtype)
    return torch.where(live[:, None], x, 0.0)


def lines(table, slots, outside):
    """[R, width]: each slot's line of a table, and `outside` all along where there is none."""
    known = (slots >= 0) & (slots < len(table))
    return torch.cat([table, table.new_full((1, table.shape[1]), outside)])[torch.where(known, slots, -1)]


def wrong(ids, V):
    """bool [R]: whether a row has an id that is neither a token nor -1."""
    return ((ids < -1) | (ids >= V)).any(-1)


def pairs(ids, values, V):
    """Ids and values for a scatter, where what is no token adds 0 to token 0."""
    good = (ids >= 0) & (ids < V)
    return torch.where(good, ids, 0).long(), torch.where(good, values, 0.0)


def members(ids, V):
    """bool [R, V]: which tokens are among a row's ids."""
    return (ids[:, :, None] == torch.arange(V, device=ids.device)).any(1)


def unpacked(words, V):
    """bool [R, V] from 32 tokens a word."""
    ids = torch.arange(V, device=words.device)
    return (words.long()[:, ids // 32] >> ids % 32 & 1) != 0
