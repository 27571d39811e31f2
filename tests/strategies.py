"""What hypothesis draws: shapes, dtypes, strides and junk. Tensor contents come from a drawn seed, so that shrinking stays quick."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from gkernels.kernels._product import Scaled

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POISON = [float("nan"), float("inf"), float("-inf"), 6e4]

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(DTYPES)
poisons = st.sampled_from(POISON)


def binaries(values, most=2):
    """Values that each make a kernel of their own: on a GPU, where a kernel takes seconds to compile, only the first `most`."""
    return st.sampled_from(values[:most] if torch.cuda.is_available() else values)


def randn(seed, *shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def scaled(scale, x, norm, parts=3):
    """(x * norm, sums of squares) by the kernel's or the twin's `scale`, in so many parts."""
    squares = torch.full((x.shape[0], parts), float("nan"), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    halves = Scaled(torch.empty_like(x), squares)
    scale(x, norm, halves)
    return halves


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
def batches(draw, max_requests=4, max_query=9, max_context=40, page_sizes=(1, 3, 4, 16), empty=True, min_requests=1, crossed=False):
    """A well-formed paged batch: prefill chunks, decodes, short verify rows and unused requests, with junk wherever nothing may look.
    `crossed`: a request may have fewer keys than query rows, or none."""
    page_size = draw(st.sampled_from(page_sizes))
    query_lens = draw(st.lists(st.one_of(st.just(1), st.integers(0 if empty else 1, max_query)), min_size=min_requests, max_size=max_requests))
    contexts = [draw(st.integers(-n if crossed else 0, max_context)) if n else 0 for n in query_lens]
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

    def caches(self, K, D, dtype, device, poison=0.0, DV=None):
        """k_cache [N, P, K, D], v_cache [N, P, K, DV]: random in live slots, `poison` in all others."""
        caches = []
        for i, width in enumerate((D, D if DV is None else DV)):
            cache = torch.full((self.N, self.page_size, K, width), poison, dtype=dtype)
            for r, pages in enumerate(self.pages):
                rows = randn(self.seed + 17 * r + i + 1, max(self.lens[r], 1), K, width, dtype=dtype)
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


@dataclass(frozen=True)
class Features:
    """Which of attention's options are in use; `options` makes them for a batch."""

    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    tree: bool = False
    softcap: float = 0.0
    sinks: bool = False
    alibi: int = 0               # dimensions of the slopes
    scales: int = 0              # of an fp8 cache: 1 for all heads, 2 a head
    DV: int | None = None

    def options(self, batch, H, K, device, poison=0.0):
        """Keyword arguments of attention. `poison` stands in the slopes of unused requests, and other junk then in the tree bits of pads."""
        options, random = dict(causal=self.causal, window=self.window, softcap=self.softcap), torch.Generator().manual_seed(batch.seed)
        if self.tree:
            mask = torch.randint(-2**63, 2**63 - 1, (batch.T,), generator=random)
            mask[batch.num_tokens:] = 0 if poison == 0.0 else -2**62 + 5
            options["tree_mask"] = mask.to(device)
        if self.sinks:
            options["sinks"] = torch.randn(H, generator=random).to(device)
        if self.alibi:
            slopes = torch.rand((batch.R, H)[2 - self.alibi:], generator=random) / 4
            if self.alibi == 2:
                slopes[torch.tensor(batch.lens) == 0] = poison
            options["alibi_slopes"] = slopes.to(device)
        if self.scales:
            options["k_scale"], options["v_scale"] = (torch.rand(2, (1, K)[self.scales - 1], generator=random) + 0.5).to(device)
        return options


MASKS = [dict(), dict(window=(5, -1)), dict(tree=True), dict(causal=False), dict(window=(9, -1), tree=True), dict(causal=False, window=(7, 3)),
         dict(window=(0, 4)), dict(causal=False, window=(-1, 2)), dict(causal=False, window=(12, -1)), dict(tree=True)]


COMBINED = [Features(), Features(window=(5, -1), sinks=True), Features(tree=True, DV=24), Features(causal=False, window=(7, 3), alibi=2),
            Features(scales=2), Features(window=(9, -1), tree=True, softcap=1.5, sinks=True, alibi=1, scales=1)]


def features():
    """Plain first, since hypothesis begins with the first of everything, then any mask with any other options; on a GPU some combinations."""
    if torch.cuda.is_available():
        return st.sampled_from(COMBINED)
    return st.builds(lambda mask, **others: Features(**mask, **others), st.sampled_from(MASKS), alibi=st.sampled_from([0, 2, 1]),
                     scales=st.sampled_from([0, 2, 1]), softcap=st.sampled_from([0.0, 1.5]), sinks=st.booleans(), DV=st.sampled_from([None, 24]))
