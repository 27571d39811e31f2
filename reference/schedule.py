"""Batch metadata and attention's work list in plain Python. Twin of gkernels/kernels/schedule.py.

The work list is a namespace of lists, in the order of the kernel's sections:
  fills   (first token, rows, is bad), pads last
  short   (request, first token, query length, KV length, first segment, segments, ordinal, poisoned)
  runs    (index in short, ordinal) of each run's begin and, past the last ordinal, (None, number of ordinals): tiling.runs + 1 of them
  tall    (request, first token, query length, KV length, row, first span, end span, poisoned, pieces, first item)
and run_length, is_split, num_runs, and streams, the number of programs that begin with runs or that the launch of tall items leaves to them.
"""

from types import SimpleNamespace

import torch

BAD_LENGTH, BAD_PAGE = 1, 2
RUN_SPANS = 16


def schedule(query_start_loc, seq_lens, block_table, page_size, num_pages, T, tiling):
    starts, lens, table = query_start_loc.tolist(), seq_lens.tolist(), block_table.tolist()
    positions, slots, requests = [0] * T, [-1] * T, [-1] * T
    last, status, fills, works = [], [], [], []
    edge = 0
    for r, length in enumerate(lens):
        start, end = edge, max(edge, min(max(starts[r + 1], 0), T))
        edge, count = end, end - start
        straight = (starts[r], starts[r + 1]) == (start, end)
        fits = straight and (count if tiling.causal else 0) <= length <= len(table[r]) * page_size
        good = length != 0 and fits
        live_pages = table[r][:cdiv(length, page_size)] if good else []
        bad_page = any(not 0 <= page < num_pages for page in live_pages)
        status.append((BAD_LENGTH if length != 0 and not fits else 0) | (BAD_PAGE if bad_page else 0))
        last.append(end - 1 if length != 0 and count else -1)
        for i in range(count):
            requests[start + i] = r if length != 0 else -1
            position = length - count + i
            if good and position >= 0:
                page = table[r][position // page_size]
                positions[start + i] = position
                slots[start + i] = page * page_size + position % page_size if 0 <= page < num_pages else -1
        if good and count:
            works.append((r, start, count, length, int(bad_page)))
        elif count:
            fills.append((start, count, int(length != 0)))
    if edge < T:
        fills.append((edge, T - edge, 0))
    make = lambda values, dtype=torch.int32: torch.tensor(values, dtype=dtype, device=seq_lens.device)
    return SimpleNamespace(
        positions=make(positions), slot_mapping=make(slots, torch.int64), token_to_request=make(requests), last_token=make(last),
        num_tokens=make([edge]), status=make(status), work=SimpleNamespace(fills=fills, **cut(works, tiling)))


def cut(works, tiling):
    """Short requests, runs and tall items for `works`, the sound requests: (request, first token, query length, KV length, poisoned)."""
    short, total, tiled, slots, num_tiles, tall_segments = [], 0, [], 0, 0, 0
    is_many = sum(work[2] > tiling.short_rows for work in works) * tiling.kv_heads >= tiling.programs
    limit = tiling.short_rows if is_many else tiling.short_limit
    for *request, poisoned in works:
        _, _, query_len, kv_len = request
        first_key = max(kv_len - query_len - tiling.left, 0) if tiling.left >= 0 else 0
        first_segment, end_segment = first_key // tiling.segment, cdiv(kv_len, tiling.segment)
        if tiling.has_tall and query_len > limit:
            rows, spans = range(0, query_len, tiling.tall_rows), range(first_segment // tiling.span, cdiv(end_segment, tiling.span))
            tiled.append((request, poisoned, rows, spans))
            slots += len(rows) * len(spans) * tiling.kv_heads
            num_tiles += len(rows) * tiling.kv_heads
            tall_segments += len(rows) * (cdiv(max(kv_len - query_len // 2, 1), tiling.segment) - first_segment) * tiling.kv_heads
        else:
            short.append((*request, first_segment, end_segment - first_segment, total, poisoned))
            total += cdiv(query_len, tiling.short_rows) * (end_segment - first_segment) * tiling.kv_heads
    is_split, tall = slots <= tiling.tall_slots, []
    for request, poisoned, rows, spans in sorted(tiled, key=lambda tile: -tile[0][3]):
        pieces = [(span, span + 1) for span in spans] if is_split else [(spans.start, spans.stop)]
        for row in reversed(rows):
            first_item = len(tall)
            tall += [(*request, row, *piece, poisoned, len(pieces), first_item) for piece in pieces]
    streams, shares = 0, tiling.programs
    if tiling.tall_programs:
        tall_work, short_work = 12 * tall_segments + 8 * num_tiles, 9 * total
        if 3 * tall_work > 2 * short_work:
            streams = tiling.tall_programs - cdiv(tiling.tall_programs * tall_work, tall_work + short_work)
    elif tiling.has_tall:
        streams = total * tiling.programs // max(total + tall_segments, 1)
        rounds = 1 if total > tall_segments else tiling.runs // max(streams, 1)
        shares = rounds * max(streams, 1) if tall else tiling.programs
    exact = max(cdiv(total, shares), 1)
    run_length = max(rounded for unit in (1, 2, 4, 8, 16) if (rounded := cdiv(exact, unit) * unit) * 15 <= exact * 16)
    runs = [begin_of(run * run_length, short, total, run_length > tiling.span * (RUN_SPANS - 2)) for run in range(tiling.runs + 1)]
    return dict(short=short, runs=runs, tall=tall, run_length=run_length, is_split=is_split, num_runs=cdiv(total, run_length), streams=streams)


def begin_of(x, short, total, is_whole):
    """The short request that ordinal x is in, and where a run begins there: at x itself, or, if runs are whole, at x's KV head and tile of rows."""
    if x >= total:
        return None, total
    index = max(i for i, (*_, ordinal, _) in enumerate(short) if ordinal <= x)
    *_, segments, ordinal, _ = short[index]
    return index, x - (x - ordinal) % segments if is_whole else x


def cdiv(a, b):
    return -(-a // b)
