"""Buckets: the token capacities for which a graph exists."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class Buckets:
    """A sorted set of capacities. Ask `covers(n)` before `pad(n)`: what no bucket covers runs eagerly, it does not crash."""

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
