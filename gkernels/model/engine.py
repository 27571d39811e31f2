"""Continuous batching over a paged cache: add, step, cancel, stream.

Each step takes one token of every decoding request and fills the rest of its token budget with chunks of waiting prompts, so most steps mix
prefill and decode rows; the whole step, from metadata to sampled tokens, is one replay of one graph. When pages run out, the youngest
request gives its pages back and waits to be computed again. Where every request decodes and none waits, many steps are one launch: the state
advances on the device, which stops when all have ended, and the host reads their tokens together. A token depends on its own request alone, bit
for bit, in steps of up to 64 tokens; in larger ones torch multiplies, and rounding may differ with the step's size.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from .. import ops
from ..graph import Buckets, GraphRunner
from .ahead import Ahead
from .cache import PagedCache, PagePool, bytes_per_page
from .config import LlamaConfig
from .llama import Llama
from .load import load_weights
from .request import Event, Request
from .sampling import Sampling
from .speculation import Speculation, SpeculativeStep
from .step import Row, Step

STATUS = {ops.BAD_LENGTH: "bad lengths", ops.BAD_PAGE: "a page outside the cache", ops.NO_TOKEN: "no finite logit",
          ops.BAD_OPTION: "a bad sampling option"}


class Engine:
    """Serves one model. `max_tokens` and `max_requests` bound a step, `max_len` a sequence, `num_pages` the cache;
    a sequence ends too where it alone would fill the cache.

    With `capture` the step is captured for `buckets` (default: `Buckets.up_to(max_tokens)`) at construction on a CUDA device.

    Where every request decodes and none waits, up to `loop` steps are one launch, as many as there are pages for, and their tokens come together.
    So a request that arrives meanwhile waits for that many steps: `loop` weighs its delay against the host's work a token. Where it is 1, or no
    graph can hold a loop (`why` says why), launches of exactly `burst` steps take its place; 1: none.

    With `speculation` the steps of such launches are speculative, where no request of the batch has penalties, biases, bans or min_tokens; the
    tokens stay the same. Where a request of the batch has `allowed_tokens`, the host is asked before each token, so every launch is a single step.
    Without `adjusts`, no request can have any of those, and a step is a launch shorter.

    `modes` counts steps by how they ran: "single", "loop" or "burst", and the latter two with "speculative" before."""

    def __init__(self, model: Llama, max_tokens: int = 512, max_requests: int = 32, max_len: int | None = None, page_size: int = 16,
                 num_pages: int | None = None, buckets: Buckets | None = None, capture: bool = True, progress: bool = False,
                 loop: int = 64, burst: int = 8, adjusts: bool = True, speculation: Speculation | None = None):
        c, weights = model.config, model.weights
        self.max_len = min(model.cos_sin.shape[0] if max_len is None else max_len, model.cos_sin.shape[0])
        if not 1 <= page_size <= 256:
            raise ValueError(f"gkernels.Engine: page_size: got {page_size}, expected 1 to 256")
        pages_a_request = -(-self.max_len // page_size)
        num_pages = max_requests * pages_a_request + 1 if num_pages is None else num_pages
        bounds = (("max_tokens", max_tokens, 1), ("max_requests", max_requests, 1), ("max_len", self.max_len, 2), ("num_pages", num_pages, 2),
                  ("loop", loop, 1), ("burst", burst, 1))
        for name, value, least in bounds:
            if value < least:
                raise ValueError(f"gkernels.Engine: {name}: got {value}, expected at least {least}")
        if max_requests > ops.MAX_R:
            raise ValueError(f"gkernels.Engine: max_requests: got {max_requests}, expected at most {ops.MAX_R}, which one schedule covers")
        row_bytes = c.head_dim * weights.embed.element_size()
        if any(heads * row_bytes % 16 for heads in (c.num_heads, c.num_kv_heads)):
            raise ValueError(f"gkernels.Engine: model: got head_dim {c.head_dim} in {weights.embed.dtype}, expected the heads of q and of k to fill "
                             "a multiple of 16 bytes, which keeps their rows aligned; serve it in float32")
        if max_tokens < max_requests:
            raise ValueError(f"gkernels.Engine: max_tokens: got {max_tokens}, expected at least max_requests = {max_requests}, so that every "
                             "request can decode in one step")
        if buckets and buckets.sizes[-1] > max_tokens:
            raise ValueError(f"gkernels.Engine: buckets: got {buckets}, expected none above max_tokens = {max_tokens}")
        self.max_len = min(self.max_len, (num_pages - 1) * page_size + 1)          # the last token needs no slot
        self.model, self.page_size, self.pool = model, page_size, PagePool(num_pages)
        device, dtype = weights.embed.device, weights.embed.dtype
        self.check_memory(num_pages * bytes_per_page(c.num_layers, page_size, c.num_kv_heads, c.head_dim, dtype), device)
        self.cache = PagedCache.allocate(c.num_layers, num_pages, page_size, c.num_kv_heads, c.head_dim, dtype, device)
        width = speculation.drafts + 1 if speculation else 1
        s = self.step_fn = Step(model, self.cache, max_tokens, max_requests, self.max_len, max(loop, burst) + width - 1, adjusts,
                                speculation is not None)
        self.runner = GraphRunner(s.single, buckets or Buckets.up_to(max_tokens), device, (s.buffers.check_addresses,))
        self.ahead = Ahead.build(s, s, loop, burst)
        self.guesses = Ahead.build(SpeculativeStep(s, speculation), s, loop, burst, width) if speculation else None
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.requests: dict[int, Request] = {}
        self.modes: Counter[str] = Counter()
        self.preemptions = 0
        self._slots = list(range(max_requests))
        self._ids = itertools.count()
        if capture:
            self.capture(progress)

    def capture(self, progress: bool = False) -> None:
        """Captures every graph, and those that there are once more; nothing without CUDA."""
        for runner in self.runners:
            runner.capture(progress)

    @property
    def runners(self) -> list[GraphRunner]:
        """Of single steps and of those that launches of many take."""
        return [self.runner, *(ahead.runner for ahead in (self.ahead, self.guesses) if ahead and ahead.choices(ahead.most))]

    @property
    def why(self) -> str:
        """Why there are bursts where a loop was asked for, and the mend; "" where it is not so."""
        return self.ahead.why

    @property
    def steps(self) -> int:
        return sum(self.modes.values())

    @classmethod
    def from_dir(cls, path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None, max_len: int | None = None,
                 invariant: bool = False, **options) -> Engine:
        """Loads a Hugging Face checkpoint folder and serves it; `invariant` is that of `Llama.build`, `options` are those of the constructor."""
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config = LlamaConfig.from_dir(path)
        max_len = min(config.max_position_embeddings if max_len is None else max_len, config.max_position_embeddings)
        return cls(Llama.build(config, load_weights(path, config, device, dtype), max_len, invariant), max_len=max_len, **options)

    @staticmethod
    def check_memory(needed: int, device: torch.device) -> None:
        if device.type == "cuda" and needed > (free := torch.cuda.mem_get_info(device)[0]):
            raise ValueError(f"gkernels.Engine: num_pages: the cache needs {needed / 2**30:.1f} GiB, got {free / 2**30:.1f} GiB free; ask for fewer "
                             "pages or a shorter max_len")

    def add(self, prompt: Iterable[int], sampling: Sampling = Sampling()) -> int:
        """Queues a request and returns its id. Raises ValueError, and queues nothing, for a prompt or options that cannot be served."""
        prompt, vocab = list(prompt), self.model.config.vocab_size
        if not prompt:
            raise ValueError("gkernels.Engine.add: prompt: got no tokens, expected at least one; begin with the tokenizer's BOS token")
        bad = [t for t in prompt if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < vocab]
        if bad:
            raise ValueError(f"gkernels.Engine.add: prompt: got {bad[:4]}, expected Python integers from 0 to {vocab - 1}")
        if len(prompt) >= self.max_len:
            raise ValueError(f"gkernels.Engine.add: prompt: got {len(prompt)} tokens, expected at most {self.max_len - 1}, what the cache holds "
                             "beside one generated token; shorten it, or raise max_len and num_pages")
        sampling.check(vocab, self.model.config.eos_token_ids, "gkernels.Engine.add")
        if sampling.adjusts and not self.step_fn.adjusts:
            raise ValueError("gkernels.Engine.add: sampling: got penalties, biases, bans, min_tokens or allowed_tokens, expected none of them in an "
                             "engine made with adjusts=False; make it with adjusts=True")
        limit = min(sampling.max_tokens, self.max_len - len(prompt))
        request = Request(next(self._ids), prompt, sampling, sampling.ends(self.model.config.eos_token_ids), limit)
        self.requests[request.id] = request
        self.waiting.append(request)
        return request.id

    def cancel(self, request_id: int) -> None:
        """Ends a request and returns its pages; its tokens so far stay readable in `requests`. Unknown or ended ids raise ValueError."""
        request = self.requests.get(request_id)
        if request is None or request.finish_reason:
            raise ValueError(f"gkernels.Engine.cancel: request_id: got {request_id}, expected the id of a request that has not ended")
        self._finish(request, "cancelled")

    def take(self, request_id: int) -> Request:
        """Removes an ended request from the books and returns it, so that a server that runs for long does not fill them."""
        if request_id not in self.requests or not self.requests[request_id].finish_reason:
            raise ValueError(f"gkernels.Engine.take: request_id: got {request_id}, expected the id of a request that has ended")
        return self.requests.pop(request_id)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Event]:
        """Computes one batch, or as many steps of it as one launch takes, and returns what it brought. With nothing to do, returns [] at once."""
        batch, events = self._guide(self._schedule())
        if not batch:
            return events
        ahead = self.guesses if self.guesses and not any(r.sampling.adjusts for r, _ in batch) else self.ahead
        turns = self._reserve_turns(batch, ahead)
        rows = [self._row(request, n) for request, n in batch]
        num_tokens = self.step_fn.stage(rows, turns)
        if turns:
            ahead.runner.run(num_tokens)
            lines, status = self.step_fn.read_ring(ahead.runner.capacity(num_tokens), len(batch))
            self.modes[ahead.mode] += -(-len(lines) // ahead.width)
        else:
            self.runner.run(num_tokens)
            tokens, status = self.step_fn.read(len(batch))
            lines = [[token if row.emits and not flags else -1 for row, token, flags in zip(rows, tokens, status, strict=True)]]
            self.modes["single"] += 1
        for tokens in lines:
            for (request, n), token, flags in zip(batch, tokens, status, strict=True):
                if not request.finish_reason and (token >= 0 or not (flags or turns)):
                    request.computed += n
                    if token >= 0:
                        events.append(self._append(request, token))
        for (request, _), row, flags in zip(batch, rows, status, strict=True):
            is_stuck = row.emits and len(request.output) == row.generated
            if not request.finish_reason and (flags or is_stuck):               # of many turns, those before the error have counted
                words = ", ".join(words for bit, words in STATUS.items() if flags & bit) or "no token"
                if flags & ops.NO_TOKEN and request.sampling.allowed_tokens is not None:
                    words += " among the tokens that allowed_tokens, bans and min_tokens leave"
                events.append(self._finish(request, f"error: {words}"))
        return events

    def _guide(self, batch):
        """Asks for the tokens that are allowed next, where the step draws one that counts. Returns the batch without the requests that ended over it,
        and their events."""
        masks, failed, vocab = [], [], self.model.config.vocab_size
        for request, n in batch:
            if request.sampling.allowed_tokens is not None and request.computed + n == request.length:
                try:
                    masks.append((request, request.sampling.mask(request.output, vocab)))
                except Exception as error:
                    request.error = error
                    failed.append(request)
        events = [self._finish(request, f"error: allowed_tokens: {type(request.error).__name__}: {request.error}") for request in failed
                  if not request.finish_reason]                                 # what is called may have cancelled requests
        masks = [(request.slot, mask) for request, mask in masks if not request.finish_reason]
        if masks:
            self.step_fn.allow(*map(list, zip(*masks, strict=True)))
        return [(request, n) for request, n in batch if not request.finish_reason], events

    def _row(self, request, n):
        computed, s = request.computed + n, request.sampling
        return Row(request.next_tokens(n), computed, request.pages, s, computed == request.length, len(request.output), self.max_len,
                   request.ends, request.slot)

    def _reserve_turns(self, batch, ahead):
        """How many turns the batch takes by itself: as many as it needs and there are pages for, where every request decodes without asking the
        host, and none waits; else 0. The pages for what each request may bring are then its own."""
        # The youngest first: it is the one that may be amid its prompt
        goes_alone = lambda r, n: n == 1 and r.computed + 1 == r.length and r.sampling.allowed_tokens is None
        if self.waiting or len(batch) < len(self.running) or not ahead.choices(ahead.most) or not all(goes_alone(r, n) for r, n in reversed(batch)):
            return 0
        left = [r.limit - len(r.output) for r, _ in batch]
        wanted = lambda turns: [(r, min(turns * ahead.width, most)) for (r, _), most in zip(batch, left, strict=True)]
        choices = ahead.choices(max(left))
        fits = bisect_right(choices, self.pool.available, key=lambda turns: sum(self._missing(*w) for w in wanted(turns)))
        if not fits:
            return 0
        for request, tokens in wanted(choices[fits - 1]):
            self._reserve(request, tokens)
        return choices[fits - 1]

    def _append(self, request, token):
        request.output.append(token)
        if token in request.ends:
            return self._finish(request, "stop", token)
        if len(request.output) >= request.limit:
            return self._finish(request, "length", token)
        return Event(request.id, token)

    def _finish(self, request, reason, token=None):
        request.finish_reason = reason
        self._release(request)
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        return Event(request.id, token, reason)

    def _release(self, request):
        self.pool.free(request.pages)
        if request.slot >= 0:
            self._slots.append(request.slot)
            if request.sampling.allowed_tokens is not None:
                self.step_fn.leave(request.slot)
        request.pages, request.computed, request.slot = (), 0, -1

    def _schedule(self) -> list[tuple[Request, int]]:
        """The step's requests and how many tokens of each: first one token of every request that decodes, then prompt chunks."""
        budget = self.step_fn.max_tokens
        batch: list[tuple[Request, int]] = []
        for request in list(self.running):                 # oldest first; only the youngest can be amid its prompt
            n = min(request.length - request.computed, budget)
            while request.slot >= 0 and not self._reserve(request, n):
                self._preempt(self.running[-1])            # the youngest yields its pages, and at last the request itself
            if request.slot >= 0:                          # it runs still
                batch.append((request, n))
                budget -= n
        while self.waiting and budget and len(self.running) < self.step_fn.max_requests:
            request = self.waiting[0]
            n = min(request.length, budget)
            if not self._reserve(request, n):
                break                                      # it waits; nobody is preempted for a newcomer
            self.running.append(self.waiting.popleft())
            request.slot = self._slots.pop()
            if request.sampling.has_penalties or self.guesses:
                self.step_fn.enter(request.slot, request.prompt, request.output)
            batch.append((request, n))
            budget -= n
        return batch

    def _reserve(self, request, n):
        """Gives a request the pages for n more tokens; False, and none given, where too few are free."""
        missing = self._missing(request, n)
        if missing > self.pool.available:
            return False
        if missing:                                        # a decoding request's once in page_size steps
            request.pages += tuple(self.pool.allocate(missing))
        return True

    def _missing(self, request, n):
        return max(-(-(request.computed + n) // self.page_size) - len(request.pages), 0)

    def _preempt(self, request):
        self._release(request)
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.preemptions += 1

    def stream(self) -> Iterator[Event]:
        """Steps until every request has ended, yielding events as they come."""
        while self.busy:
            yield from self.step()

    def generate(self, prompts: Iterable[Iterable[int]], sampling: Sampling | Iterable[Sampling] = Sampling()) -> list[list[int]]:
        """Runs all prompts to their end and returns their tokens. All prompts are checked before any is queued; where a request ended with an
        error, RuntimeError names it once all have ended."""
        prompts = [list(p) for p in prompts]
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        ids: list[int] = []
        try:
            for prompt, options in zip(prompts, samplings, strict=True):
                ids.append(self.add(prompt, options))
            for _ in self.stream():
                pass
        except BaseException:
            for i in ids:
                if not self.requests[i].finish_reason:
                    self.cancel(i)
                self.take(i)
            raise
        ended = [self.take(i) for i in ids]
        failed = [f"prompt {n}: {request.finish_reason}" for n, request in enumerate(ended) if str(request.finish_reason).startswith("error")]
        if failed:
            raise RuntimeError(f"gkernels.Engine.generate: {'; '.join(failed)}; use add() and stream() to keep what the others brought"
                               ) from next((request.error for request in ended if request.error), None)
        return [request.output for request in ended]
