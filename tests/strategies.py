"""What hypothesis draws: shapes, dtypes, strides and junk. Tensor contents come from a drawn seed, so that shrinking stays quick."""

import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POISON = [float("nan"), float("inf"), float("-inf"), 6e4]

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(DTYPES)
poisons = st.sampled_from(POISON)


def randn(seed, *shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def strided(t, pad=16):
    """The same values with rows `pad` elements further apart than they need be (pad keeps fp16 rows 16-byte aligned at 16)."""
    roomy = torch.full((*t.shape[:-1], t.shape[-1] + pad), float("nan"), dtype=t.dtype, device=t.device)
    roomy[..., :t.shape[-1]] = t
    return roomy[..., :t.shape[-1]]


def far(t, dim):
    """The same values, but so far apart along `dim` that the last begin past element 2^31, in memory of which the rest is never touched."""
    strides = [*t.stride()]
    strides[dim] = 2**31 // (t.shape[dim] - 1) // 16 * 16 + 16
    memory = torch.UntypedStorage((2**31 + 2**16) * t.itemsize, device=t.device)       # one size for all, so that a GPU's allocator reuses it
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(memory, 0, t.shape, strides).copy_(t)


def counter(n, device):
    return torch.tensor([n], dtype=torch.int32, device=device)


@st.composite
def batches(draw, max_requests=4, max_query=9, max_context=40, page_sizes=(1, 3, 4, 16), empty=True):
    """A well-formed paged batch: prefill chunks, decodes, short verify rows and unused requests, with junk wherever nothing may look."""
    page_size = draw(st.sampled_from(page_sizes))
    query_lens = draw(st.lists(st.one_of(st.just(1), st.integers(0 if empty else 1, max_query)), min_size=1, max_size=max_requests))
    contexts = [draw(st.integers(0, max_context)) if n else 0 for n in query_lens]
    pads = draw(st.integers(0, 5))
    spare_requests = draw(st.integers(0, 2))
    spare_pages = draw(st.integers(0, 3))
    return Batch(query_lens, contexts, page_size, pads, spare_requests, spare_pages, draw(seeds))


class Batch:
    """Host lists and device tensors of one batch. Pages are handed out in a random order; junk fills the unused table entries."""

    def __init__(self, query_lens, contexts, page_size, pads=0, spare_requests=0, spare_pages=0, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.query_lens, self.page_size, self.seed = query_lens + [0] * spare_requests, page_size, seed
        self.contexts = contexts + [0] * spare_requests
        self.lens = [q + c for q, c in zip(self.query_lens, self.contexts, strict=True)]
        self.R, self.num_tokens = len(self.lens), sum(self.query_lens)
        self.T = self.num_tokens + pads
        pages = [-(-n // page_size) for n in self.lens]
        self.N = sum(pages) + 1 + spare_pages
        self.W = max(max(pages), 1) + spare_pages
        order = (torch.randperm(self.N - 1, generator=random) + 1).tolist()
        self.pages = [[order.pop() for _ in range(n)] for n in pages]
        junk = torch.randint(-2**31, 2**31 - 1, (self.R, self.W), generator=random, dtype=torch.int64).to(torch.int32).tolist()
        self.table = [own + rest[len(own):] for own, rest in zip(self.pages, junk, strict=True)]

    def __repr__(self):
        return (f"Batch({self.query_lens}, {self.contexts}, page_size={self.page_size}, pads={self.T - self.num_tokens}, seed={self.seed})")

    def metadata(self, device):
        """query_start_loc, seq_lens, block_table on the device."""
        starts = [sum(self.query_lens[:i]) for i in range(self.R + 1)]
        return tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, self.lens, self.table))

    def caches(self, K, D, dtype, device, poison=0.0):
        """k_cache, v_cache [N, P, K, D]: random in live slots, `poison` in all others."""
        caches = []
        for i in range(2):
            cache = torch.full((self.N, self.page_size, K, D), poison, dtype=dtype)
            for r, pages in enumerate(self.pages):
                rows = randn(self.seed + 17 * r + i + 1, max(self.lens[r], 1), K, D, dtype=dtype)
                for at in range(self.lens[r]):
                    cache[pages[at // self.page_size], at % self.page_size] = rows[at]
            caches.append(cache.to(device))
        return caches

    def rearranged(self, order=None, pads=None, spare_requests=0, seed=None):
        """The same requests in another order, with other pads, spare rows and pages."""
        order = list(range(self.R)) if order is None else order
        pads = self.T - self.num_tokens if pads is None else pads
        other = Batch([self.query_lens[i] for i in order], [self.contexts[i] for i in order], self.page_size, pads, spare_requests,
                      2, self.seed if seed is None else seed)
        return other
