"""Batch metadata in plain Python. Twin of gkernels/kernels/schedule.py; its work list is a list of (request, token, rows, position)."""

from types import SimpleNamespace

import torch

BAD_LENGTH, BAD_PAGE = 1, 2


def schedule(query_start_loc, seq_lens, block_table, page_size, num_pages, T, block_q):
    starts, lens, table = query_start_loc.tolist(), seq_lens.tolist(), block_table.tolist()
    positions, slots, requests = [0] * T, [-1] * T, [-1] * T
    last, status, tiles = [], [], []
    edge = 0
    for r, length in enumerate(lens):
        start, end = edge, max(edge, min(max(starts[r + 1], 0), T))
        edge, count = end, end - start
        straight = (starts[r], starts[r + 1]) == (start, end)
        fits = straight and count <= length <= len(table[r]) * page_size
        good = length != 0 and fits
        live_pages = table[r][:-(-length // page_size)] if good else []
        bad_page = any(not 0 <= page < num_pages for page in live_pages)
        status.append((BAD_LENGTH if length != 0 and not fits else 0) | (BAD_PAGE if bad_page else 0))
        last.append(end - 1 if length != 0 and count else -1)
        for i in range(count):
            requests[start + i] = r if length != 0 else -1
            if good:
                position = length - count + i
                page = table[r][position // page_size]
                positions[start + i] = position
                slots[start + i] = page * page_size + position % page_size if 0 <= page < num_pages else -1
        mine = [(r if length != 0 else -1, start + i, min(count - i, block_q), length - count + i if good else -1)
                for i in range(0, count, block_q)]
        tiles.append((-length, r, mine[::-1]))
    items = [item for _, _, mine in sorted(tiles) for item in mine]
    items += [(-1, token, min(T - token, block_q), 0) for token in range(edge, T, block_q)]
    make = lambda values, dtype=torch.int32: torch.tensor(values, dtype=dtype, device=seq_lens.device)
    return SimpleNamespace(
        positions=make(positions), slot_mapping=make(slots, torch.int64), token_to_request=make(requests), last_token=make(last),
        num_tokens=make([edge]), items=items, num_items=make([len(items)]), status=make(status))
