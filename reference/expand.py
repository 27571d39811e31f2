"""The rows of a speculative step in plain Python. Twin of gkernels/kernels/expand.py."""


def expand(token_ids, seq_lens, draft, draft_len, limits):
    """Lists: token_ids, draft, request, position (all with pads), query_start_loc, seq_lens."""
    R, K = draft.shape
    rows, starts, lens = [], [0], []
    for r in range(R):
        n = max(int(seq_lens[r]), 0)
        d = max(min(int(draft_len[r]), int(limits[r]), K), 0) if n else 0
        told = draft[r, :d].tolist()
        if n:
            tokens = [int(token_ids[r]), *told]
            rows += [(token, foretold, r, n + j) for j, (token, foretold) in enumerate(zip(tokens, [*told, -1], strict=True))]
        starts.append(len(rows))
        lens.append(n + d)
    rows += [(0, -1, 0, 0)] * (R * (K + 1) - len(rows))
    return [*(list(column) for column in zip(*rows, strict=True)), starts, lens]
