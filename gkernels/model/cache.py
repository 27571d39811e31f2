"""The paged KV cache: its tensors on the device, and the host's book of which page belongs to whom.

Page 0 is the null page: never handed out, always zero, and what unused block-table entries point to. A page is one id for all layers.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

import torch

NULL_PAGE = 0


class OutOfPages(RuntimeError):
    """Fewer pages are free than were asked for; nothing was handed out."""


class PagePool:
    """Pages 1 to num_pages - 1, handed out first in, first out: lowest first from a new pool, then in the order they came back.

    A page that was freed is thus reused as late as possible. Every call takes effect as a whole or not at all.
    """

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"gkernels.PagePool: num_pages: got {num_pages}, expected at least 1, the null page")
        self.num_pages = num_pages
        self._free = deque(range(NULL_PAGE + 1, num_pages))
        self._held: set[int] = set()

    @property
    def available(self) -> int:
        return len(self._free)

    @property
    def held(self) -> int:
        return len(self._held)

    def allocate(self, n: int) -> list[int]:
        """n pages, or OutOfPages and no change."""
        if n < 0:
            raise ValueError(f"gkernels.PagePool.allocate: n: got {n}, expected 0 or more")
        if n > len(self._free):
            raise OutOfPages(f"gkernels.PagePool.allocate: got a request for {n} pages, but {len(self._free)} of {self.num_pages - 1} "
                             "are free; free or preempt a request, or make the pool larger")
        pages = [self._free.popleft() for _ in range(n)]
        self._held.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        """Takes the pages back in the order given, or raises ValueError and takes none: each must be held, and named once."""
        pages = list(pages)
        wrong = sorted(set(pages) - self._held) or sorted(page for page, times in Counter(pages).items() if times > 1)
        if wrong:
            why = ("the null page, which is never handed out" if NULL_PAGE in wrong else
                   "named twice" if set(wrong) <= self._held else "not held: freed before, or never handed out")
            raise ValueError(f"gkernels.PagePool.free: pages: got {wrong[:8]}, {why}; expected held pages, each once")
        self._held.difference_update(pages)
        self._free.extend(pages)


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of all layers: one tensor each, so that a page of every layer is reached by one id."""

    keys: torch.Tensor     # [L, N, P, K, D]
    values: torch.Tensor   # [L, N, P, K, D]

    @classmethod
    def allocate(cls, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int,
                 dtype: torch.dtype, device: torch.device | str) -> PagedCache:
        """Zeroed once: the null page stays zero, and what stands in a page that was reused is never read."""
        shape = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def layer(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of layer i, each [N, P, K, D]."""
        return self.keys[i], self.values[i]

    @property
    def num_pages(self) -> int:
        return self.keys.shape[1]

    @property
    def page_size(self) -> int:
        return self.keys.shape[2]


def bytes_per_page(num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Device memory that one page takes, keys and values of all layers together."""
    return 2 * num_layers * page_size * num_kv_heads * head_dim * dtype.itemsize
