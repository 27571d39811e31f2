"""The state of requests after a step, one row at a time in plain Python. Twin of gkernels/kernels/advance.py."""

STOP, LENGTH, ERROR = 1, 2, 4


def advance(tokens, status, state, vocab_size):
    """Advances `state` in place, as the kernel does."""
    s, running = state, 0
    line = max(int(s.step), 0) % s.ring.shape[0]
    lines = min((len(table) for table in (s.counts, s.history) if table is not None), default=0)
    s.ring[line] = -1
    for r, (token, flags) in enumerate(zip(tokens.tolist(), status.tolist(), strict=True)):
        length = int(s.seq_lens[r])
        if length <= 0:
            continue
        emits = int(s.emits[r]) == 1
        if flags or (emits and not 0 <= token < vocab_size):
            s.ended[r], s.flags[r], s.seq_lens[r] = ERROR, int(s.flags[r]) | flags, 0
            continue
        if emits:
            s.ring[line, r] = token
            s.generated[r] += 1
            slot = r if s.slots is None else int(s.slots[r])
            is_slot = 0 <= slot < lines
            if s.counts is not None and is_slot:
                s.counts[slot, token] += 1
            if s.history is not None and is_slot and length < s.history.shape[1]:
                s.history[slot, length] = token
            is_stop = token in s.stop_ids[r].tolist()
            if is_stop or s.generated[r] >= s.max_tokens[r] or length + 1 >= s.max_lens[r]:
                s.ended[r], s.seq_lens[r] = STOP if is_stop else LENGTH, 0
                continue
            s.token_ids[r], s.seq_lens[r] = token, length + 1
        running += 1
    s.step.add_(1)
    s.running[0] = running
