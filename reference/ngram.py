"""Drafts by prompt lookup, one place at a time in plain Python. Twin of gkernels/kernels/ngram.py."""

import torch


def ngram(history, lengths, max_draft, min_n, max_n, K, slots=None):
    """The tokens that followed each row's last ones before: draft int32 [R, K], -1 beyond draft_len int32 [R]."""
    lines = range(len(lengths)) if slots is None else slots.tolist()
    rows = [following(history[line, :max(length, 0)].tolist(), min(limit, K), min_n, max_n) if 0 <= line < len(history) else []
            for line, length, limit in zip(lines, lengths.tolist(), max_draft.tolist(), strict=True)]
    ints = lambda values: torch.tensor(values, dtype=torch.int32, device=history.device)
    return ints([row + [-1] * (K - len(row)) for row in rows]).view(-1, K), ints([len(row) for row in rows])


def following(tokens, limit, min_n, max_n):
    """Up to `limit` tokens after the occurrence of the longest suffix; of several the one that most follows, then the last."""
    for n in range(min(max_n, len(tokens) - 1), min_n - 1, -1):
        places = [i for i in range(n, len(tokens)) if tokens[i - n:i] == tokens[len(tokens) - n:]]
        if places and limit > 0:
            place = max(places, key=lambda i: (min(len(tokens) - i, limit), i))
            draft = tokens[place:place + limit]
            return draft[:next((i for i, token in enumerate(draft) if token < 0), limit)]
    return []
