"""Log probabilities and ranks by a stable sort, in float64. Twin of gkernels/kernels/logprobs.py."""

import torch


def logprobs(logits, seq_lens, token, n):
    """logsumexp, logprob, rank, top_ids, top_logprobs of live rows; zeros, and -1 as top_ids, in the others."""
    V, live = logits.shape[1], seq_lens > 0
    x = torch.where(logits.isnan(), -torch.inf, logits).to(torch.promote_types(logits.dtype, torch.float32))
    ordered, order = x.sort(dim=-1, descending=True, stable=True)
    top = ordered[:, :1]
    log_total = below(x, top).exp().where(x > -torch.inf, 0.0).sum(-1, keepdim=True).clamp(min=1).log()
    all_logprobs = (below(ordered, top) - log_total).where(ordered > -torch.inf, -torch.inf)
    is_token, chosen = (token >= 0) & (token < V), order == token[:, None]
    logprob = torch.where(is_token, all_logprobs.where(chosen, 0.0).sum(-1), torch.nan)
    rank = torch.where(is_token, chosen.int().argmax(-1) + 1, 0)
    top_ids = order[:, :n].where(ordered[:, :n] > -torch.inf, -1)
    pad = lambda t, value: torch.nn.functional.pad(t, (0, max(n - V, 0)), value=value)
    clear = lambda t, value=0: torch.where(live.view(-1, *[1] * (t.dim() - 1)), t, value)
    return (clear((top + log_total)[:, 0]), clear(logprob), clear(rank).int(), clear(pad(top_ids, -1), -1).int(),
            clear(pad(all_logprobs[:, :n], -torch.inf)))


def below(x, top):
    """x - top, also where both are infinite."""
    return torch.where(x == top, 0.0, x) - torch.where(x == top, 0.0, top)
