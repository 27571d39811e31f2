"""Buckets: the token capacities for which a graph exists."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Usage:
    """What a trace of steps made of the buckets. Its text is the table."""

    rows: tuple[tuple[int, int, int], ...]     # (bucket, its steps, their live tokens)
    missed: int                                # steps that no bucket covers

    @property
    def hit_rate(self) -> float:
        """Share of the steps that a bucket covers; 0 for an empty trace."""
        steps = sum(row[1] for row in self.rows)
        return steps / (steps + self.missed) if steps else 0.0

    @property
    def waste(self) -> float:
        """Share of pads among the rows that the covered steps compute; 0 without such a step."""
        computed = sum(bucket * steps for bucket, steps, _ in self.rows)
        return 1 - sum(row[2] for row in self.rows) / computed if computed else 0.0

    def __str__(self):
        lines = [f"{'tokens':>8} {'steps':>9} {'live':>11} {'pads':>11} {'waste':>6}"]
        for bucket, steps, live in self.rows:
            pads = bucket * steps - live
            lines.append(f"{bucket:>8} {steps:>9} {live:>11} {pads:>11} {pads / max(bucket * steps, 1):>6.1%}")
        return "\n".join([*lines, f"{self.hit_rate:.1%} of the steps in a bucket, {self.missed} in none; {self.waste:.1%} of their rows are pads"])


class Buckets:
    """A sorted set of capacities. Ask `covers(n)` before `pad(n)`: what no bucket covers runs eagerly, it does not crash."""

    FREE_PADS = 7   # as many never count as too many: below 28 tokens a step's time hardly depends on them

    def __init__(self, sizes: Iterable[int]):
        self.sizes = tuple(sorted(set(sizes)))
        if not self.sizes or self.sizes[0] < 1:
            raise ValueError(f"gkernels.graph.Buckets: sizes: got {list(self.sizes)}, expected at least one size, all of them at least 1")

    @classmethod
    def up_to(cls, most: int) -> Buckets:
        """1, 2, 4, then steps of 8 to 32 (at most 7 pads), then of an eighth to a quarter of the size: less than a fifth of a step is pads."""
        sizes, n = [1, 2, 4], 8
        while n < most:
            sizes.append(n)
            n += max(8, 1 << (n.bit_length() - 3))
        return cls([s for s in sizes if s < most] + [most])

    @classmethod
    def from_histogram(cls, counts: Mapping[int, int], most: int, max_padding: float = 0.25, limit: int = 32) -> Buckets:
        """The at most `limit` buckets up to `most` that compute the fewest pads over a histogram, `counts[tokens]` = steps; the fewest such.

        Every n up to `most`, seen or not, is padded by at most `max_padding` of itself or by FREE_PADS tokens. Tokens above `most` are left
        out: such steps run eagerly. Exact, by dynamic programming: 0.3 s up to 2048 tokens. ValueError where `limit` buckets are too few."""
        if most < 1 or limit < 1 or not max_padding >= 0 or any(n < 1 or steps < 0 for n, steps in counts.items()):
            raise ValueError(f"gkernels.graph.Buckets: from_histogram: got most = {most}, limit = {limit}, max_padding = {max_padding} and counts of "
                             f"{min(counts, default=1)} tokens and more, expected at least 1, 1, 0 and 1, and no negative number of steps")
        size = np.arange(most + 1)
        steps = np.zeros(most + 1)
        for n, seen in counts.items():
            if n <= most:
                steps[n] = seen
        at_most, live = steps.cumsum(), (steps * size).cumsum()               # steps of at most n tokens, and their tokens
        widest = size + np.maximum(cls.FREE_PADS, np.floor(max_padding * size + 1e-9)).astype(int)   # the largest bucket that may hold n
        first = np.searchsorted(widest[1:], size)                             # the least bucket that may come right before this one, or none: 0
        waste, before = np.full(most + 1, np.inf), []                         # pads of the steps up to n with a last bucket of n
        waste[0], best, chosen = 0.0, np.inf, 0
        for number in range(1, min(limit, most) + 1):
            # A bucket of n after one of m computes n * (at_most[n] - at_most[m]) rows for live[n] - live[m] tokens
            reached, came = np.full(most + 1, np.inf), np.zeros(most + 1, int)
            for n in range(1, most + 1):
                m = slice(first[n], n)
                totals = waste[m] + live[m] - n * at_most[m]
                came[n] = m.start + totals.argmin()
                reached[n] = totals[came[n] - m.start] + n * at_most[n] - live[n]
            waste = reached
            before.append(came)
            if waste[most] < best:
                best, chosen = waste[most], number
        if not chosen:
            raise ValueError(f"gkernels.graph.Buckets: from_histogram: got limit = {limit}, expected more: so few buckets up to {most} pad some step "
                             f"by more than {max_padding:.0%}; raise limit or max_padding")
        sizes = [most]
        for came in reversed(before[1:chosen]):
            sizes.append(int(came[sizes[-1]]))
        return cls(sizes)

    def report(self, trace: Iterable[int]) -> Usage:
        """How the buckets would serve a trace: the number of live tokens of each step."""
        seen, steps, live = Counter(trace), Counter[int](), Counter[int]()
        missed = sum(times for n, times in seen.items() if not self.covers(n))
        for n, times in seen.items():
            if self.covers(n):
                steps[self.pad(n)] += times
                live[self.pad(n)] += times * n
        return Usage(tuple((size, steps[size], live[size]) for size in self.sizes), missed)

    def covers(self, n: int) -> bool:
        return 1 <= n <= self.sizes[-1]

    def pad(self, n: int) -> int:
        """The least capacity that holds n tokens."""
        if not self.covers(n):
            raise ValueError(f"gkernels.graph.Buckets: pad: got {n} tokens, expected 1 to {self.sizes[-1]}; ask covers() first and run the "
                             "step eagerly")
        return self.sizes[bisect_left(self.sizes, n)]

    def __iter__(self):
        return iter(self.sizes)

    def __len__(self):
        return len(self.sizes)

    def __repr__(self):
        return f"Buckets({list(self.sizes)})"
