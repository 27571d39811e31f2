"""The page pool against a naive model of its owners, and the cache's tensors."""

import pytest
import torch
from hypothesis import settings
from hypothesis import stateful as machine
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, consumes, initialize, invariant, precondition, rule

from gkernels.model.cache import NULL_PAGE, OutOfPages, PagedCache, PagePool, bytes_per_page


class Engine(machine.RuleBasedStateMachine):
    """Requests come, grow, are preempted and leave; `owned` is what each should own, `waiting` the lengths of the preempted."""

    Pool = PagePool
    requests = Bundle("requests")

    @initialize(num_pages=st.integers(1, 24))
    def start(self, num_pages):
        self.pool, self.everything = self.Pool(num_pages), set(range(1, num_pages))
        self.owned, self.waiting, self.next_id = {}, {}, 0

    def take(self, n):
        """n pages as a model would expect them: n fresh ones, or OutOfPages and no change."""
        before = self.pool.available, self.pool.held
        try:
            pages = self.pool.allocate(n)
        except OutOfPages:
            assert n > before[0] and (self.pool.available, self.pool.held) == before
            return None
        assert len(pages) == n <= before[0]
        return pages

    @rule(target=requests, n=st.integers(0, 8))
    def admit(self, n):
        self.next_id += 1
        self.owned[self.next_id] = self.take(n) or []
        return self.next_id

    @rule(request=requests, n=st.integers(1, 3))
    def extend(self, request, n):
        if request in self.owned:
            self.owned[request] += self.take(n) or []

    @rule(request=consumes(requests))
    def finish(self, request):
        self.pool.free(self.owned.pop(request, []))
        self.waiting.pop(request, None)

    @rule(request=requests)
    def preempt(self, request):
        if request in self.owned:
            self.waiting[request] = len(self.owned[request])
            self.pool.free(self.owned.pop(request))

    @rule(request=requests)
    def resume(self, request):
        if request in self.waiting:
            pages = self.take(self.waiting[request])
            if pages is not None:
                del self.waiting[request]
                self.owned[request] = pages

    @rule(request=consumes(requests))
    def cancel_during_admission(self, request):
        """A request that is cancelled while it asks for more pages than there are gives back what it has."""
        with pytest.raises(OutOfPages):
            self.pool.allocate(self.pool.available + 1)
        self.finish(request)

    @precondition(lambda self: any(self.owned.values()))
    @rule(data=st.data())
    def misuse_frees_nothing(self, data):
        pages = data.draw(st.sampled_from([pages for pages in self.owned.values() if pages]))
        stranger = data.draw(st.sampled_from(sorted({NULL_PAGE, -1, len(self.everything) + 1} | self.everything - self.all_owned())))
        for wrong in (pages + [stranger], [stranger], pages + pages[:1]):
            before = self.pool.available, self.pool.held
            with pytest.raises(ValueError, match=r"PagePool.free: pages: got \["):
                self.pool.free(wrong)
            assert (self.pool.available, self.pool.held) == before

    def all_owned(self):
        return {page for pages in self.owned.values() for page in pages}

    @invariant()
    def nothing_leaks_and_nothing_is_shared(self):
        if not hasattr(self, "pool"):
            return
        owned, free = self.all_owned(), list(self.pool._free)
        assert len(owned) == sum(map(len, self.owned.values())), "a page has two owners"
        assert len(free) == len(set(free)) == self.pool.available, "a page is free twice"
        assert owned == self.pool._held and len(owned) == self.pool.held, "the pool and the owners disagree"
        assert not owned & set(free) and owned | set(free) == self.everything, "a page was lost, or is owned and free"


class LeakyPool(PagePool):
    """Forgets the last page when more than two come back together."""

    def free(self, pages):
        super().free(pages)
        if len(pages) > 2:
            self._free.pop()


class SharingPool(PagePool):
    """Hands out its first page again once the pool is half empty."""

    def allocate(self, n):
        pages = super().allocate(n)
        if n and self.held > self.available:
            self._free.append(pages[0])
        return pages


class PartialPool(PagePool):
    """Takes what there is before it finds that there is too little."""

    def allocate(self, n):
        if n > self.available:
            self._held.update(super().allocate(self.available))
        return super().allocate(n)


LONG = settings(max_examples=100, stateful_step_count=40)


def test_pool_keeps_its_books():
    machine.run_state_machine_as_test(Engine, settings=LONG)


@pytest.mark.parametrize("pool", [LeakyPool, SharingPool, PartialPool])
def test_broken_pools_are_caught(pool):
    with pytest.raises(AssertionError):
        broken = type("BrokenEngine", (Engine,), {"Pool": pool})
        machine.run_state_machine_as_test(broken, settings=settings(LONG, report_multiple_bugs=False))


def test_order_is_first_in_first_out():
    pool = PagePool(6)
    assert pool.allocate(3) == [1, 2, 3]
    pool.free([2, 1])
    assert pool.allocate(4) == [4, 5, 2, 1]


@pytest.mark.parametrize("use, words", [
    (lambda: PagePool(0), "PagePool: num_pages: got 0, expected at least 1"),
    (lambda: PagePool(4).allocate(-1), "PagePool.allocate: n: got -1, expected 0 or more"),
    (lambda: PagePool(4).free([1]), r"PagePool.free: pages: got \[1\], not held"),
    (lambda: PagePool(4).free([0]), r"PagePool.free: pages: got \[0\], the null page"),
])
def test_misuse_is_named(use, words):
    with pytest.raises(ValueError, match=words):
        use()


def test_exhaustion_says_what_to_do():
    with pytest.raises(OutOfPages, match="request for 4 pages, but 3 of 3 are free; free or preempt"):
        PagePool(4).allocate(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cache_layers_are_views_of_one_tensor(device, dtype):
    cache = PagedCache.allocate(3, 5, 16, 2, 64, dtype, device)
    k, v = cache.layer(1)
    assert k.shape == v.shape == (5, 16, 2, 64) and k.is_contiguous() and v.is_contiguous() and k.device.type == device.type
    assert k.data_ptr() - cache.keys.data_ptr() == v.data_ptr() - cache.values.data_ptr() == k.numel() * dtype.itemsize
    k[2] = 1
    assert cache.keys[1, 2].eq(1).all() and not cache.keys[0].any() and not cache.values.any()
    assert (cache.num_pages, cache.page_size) == (5, 16)
    assert bytes_per_page(3, 16, 2, 64, dtype) * 5 == (cache.keys.numel() + cache.values.numel()) * dtype.itemsize
