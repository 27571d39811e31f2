"""One step of a batch, from metadata to sampled tokens, over static tensors: the callable that a graph captures.

The host stages the batch, uploads it in one copy, runs the step for a bucket and reads tokens and status, which one copy brings. The step also
advances the state of rows that emit, on the device: where every row decodes one token, the same callable is the next step, and the one after that.
What many steps in a row bring is noted on the device and read in one copy too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain, repeat
from typing import NamedTuple

import numpy as np
import torch

from .. import ops
from ..graph import Field, StaticBuffers
from .cache import NULL_PAGE, PagedCache
from .llama import Llama
from .sampling import COLUMNS, MAX_BANNED_IDS, MAX_BIAS, MAX_STOP_IDS, NUMBERS, Sampling


class Row(NamedTuple):        # so that 32 of them become columns in 2 us; read one by one they took 10
    """One request's share of a step: the tokens to compute, all of its length afterwards, its pages, and how to draw the next token. Where it
    `emits`, its tokens complete what is known of the sequence, so that the token drawn is the next; `slot` is then its line in the tables."""

    token_ids: Sequence[int] | np.ndarray       # of many, best an array of int32: a list takes 60 ns a token
    seq_len: int
    pages: Sequence[int]                # a tuple is looked at again only where another takes its place
    sampling: Sampling = Sampling()
    emits: bool = False
    generated: int = 0                  # tokens so far
    max_len: int = 0                    # of the sequence
    ends: tuple[int, ...] = ()          # tokens that end it
    slot: int = 0


ADJUSTED = {"bias_ids": "bias_ids", "bias": "bias", "repetition": "repetition_penalty", "presence": "presence_penalty",
            "frequency": "frequency_penalty", "banned_ids": "banned_ids", "stop_ids": "stop_ids", "min_tokens": "min_tokens",
            "generated": "generated", "slots": "slots"}
ADVANCED = ("emits", "stop_ids", "max_tokens", "max_lens", "token_ids", "seq_lens", "generated", "ended", "slots")


class Step:
    """Static state for at most `max_tokens` tokens of at most `max_requests` requests a step. `step(bucket)` launches the kernels. `depth` is how
    many tokens a request may bring before `read_ring`; without `adjusts` logits are drawn from as they are, and Sampling's penalties, biases, bans
    and masks do nothing; `has_history` keeps all tokens of a sequence on the device, for drafts."""

    def __init__(self, model: Llama, cache: PagedCache, max_tokens: int, max_requests: int, max_len: int, depth: int = 1, adjusts: bool = True,
                 has_history: bool = False):
        device, V = model.weights.embed.device, model.config.vocab_size
        self.model, self.cache, self.device = model, cache, device
        self.max_tokens, self.max_requests, self.depth, self.adjusts = max_tokens, max_requests, depth, adjusts
        self.table_width = -(-max_len // cache.page_size)
        R, real = max_requests, torch.float32
        self.buffers = StaticBuffers({
            "token_ids": Field((max_tokens,)), "query_start_loc": Field((R + 1,), pad="last"), "seq_lens": Field((R,)),
            "block_table": Field((R, self.table_width)), **{name: Field((R,), dtype, pad) for name, (dtype, pad) in NUMBERS.items()},
            "stop_ids": Field((R, MAX_STOP_IDS), pad=-1), "banned_ids": Field((R, MAX_BANNED_IDS), pad=-1), "bias_ids": Field((R, MAX_BIAS), pad=-1),
            "bias": Field((R, MAX_BIAS), real), "emits": Field((R,)), "generated": Field((R,)), "max_lens": Field((R,)), "slots": Field((R,)),
            "ended": Field((R,)), "running": Field((1,)), "turns": Field((1,))}, device)
        self.results = torch.zeros(2, -(-R // 4) * 4, dtype=torch.int32, device=device)       # tokens, status; rows 16-byte aligned
        self._results_host = torch.zeros(self.results.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._news = torch.zeros(1 + R + depth * R, dtype=torch.int32, device=device)         # steps since the batch was staged, flags, the ring
        self._fresh = self._news[:1 + R]                                                      # which staging sets to 0
        self._news_host = torch.zeros(self._news.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._news_read = torch.cuda.Event(blocking=True) if device.type == "cuda" else None  # whose wait leaves the processor to others
        lines = R if adjusts else 0
        self.counts, self.prompt = (torch.zeros(lines, width, dtype=torch.int32, device=device) for width in (V, -(-V // 32)))
        self.allowed = torch.full_like(self.prompt, -1)
        self.history = torch.zeros(R if has_history else 0, max_len, dtype=torch.int32, device=device)
        self._tables: tuple[tuple[int, ...], ...] = ()                                        # the pages of the batch before, none of them page 0
        self._options: list[tuple] = []                                                       # its sampling options, by row
        self._drawn: dict[str, tuple] = dict.fromkeys(COLUMNS, ())                            # and by field
        self._plans: dict[int, ops.Schedule] = {}
        # each bucket's tiling is as large as one of these: of decodes alone, and of mixed steps with one launch of attention and with two
        tiling, *others = map(self.tiling, (max_requests, min(max_requests + 1, max_tokens), max_tokens))
        self._workspace = ops.Workspace.allocate(tiling, device, *others)
        self._sampling = ops.SamplingWorkspace.allocate(R, V, device)

    def stage(self, rows: list[Row], turns: int = 1) -> int:
        """Puts a batch into the static buffers and returns its number of tokens. `turns` is how many steps a Loop may take of it, 0 where
        `read_ring` will not be asked for the news. ValueError, and nothing staged, for a batch that does not fit the capacities, and for a row
        without tokens or without pages of its own for all of them."""
        columns = zip(*rows, strict=True) if rows else [()] * len(Row._fields)
        token_ids, seq_lens, pages, samplings, emits, generated, max_lens, ends, slots = columns
        lens, tables, page_size = [*map(len, token_ids)], tuple(map(tuple, pages)), self.cache.page_size
        tokens = sum(lens)
        if tokens > self.max_tokens or len(rows) > self.max_requests:
            raise ValueError(f"gkernels.Step: rows: got {tokens} tokens in {len(rows)} requests, expected at most {self.max_tokens} in "
                             f"{self.max_requests}; split the batch")
        for i, (n, seq_len, own, before) in enumerate(zip(lens, seq_lens, tables, chain(self._tables, repeat(())), strict=False)):
            if not 1 <= n <= seq_len <= len(own) * page_size or (own is not before and NULL_PAGE in own):
                raise ValueError(f"gkernels.Step: rows[{i}]: got {n} tokens, seq_len {seq_len} and {len(own)} pages, "
                                 f"expected 1 to seq_len tokens and pages of {page_size} for all of seq_len, none of them page 0")
        options = [sampling.columns for sampling in samplings]
        if options != self._options:
            drawn = zip(*options, strict=True) if rows else [()] * len(COLUMNS)
            self._options, self._drawn = options, dict(zip(COLUMNS, drawn, strict=True))
        self._tables = tables
        steady = dict(query_start_loc=tuple(accumulate(lens, initial=0)), block_table=tables,
                      seq_lens=seq_lens, generated=generated, running=(len(rows),), turns=(turns,), emits=emits, slots=slots, max_lens=max_lens,
                      stop_ids=ends, **self._drawn)
        if tokens == len(rows):
            steady["token_ids"] = tuple(chain.from_iterable(token_ids))
        else:
            self.buffers.stage("token_ids", np.concatenate([np.asarray(ids, np.int32) for ids in token_ids]))      # a list with more bits raises
        self.buffers.stage_steady(steady)
        self.buffers.upload()
        if turns:                                      # a single step is read without the ring; and behind a busy device a memset costs 50 us
            self._fresh.zero_()
        return tokens

    def requests(self, bucket: int) -> int:
        """Request capacity of a bucket: every request brings at least one token."""
        return min(self.max_requests, bucket)

    def tiling(self, bucket: int) -> ops.Tiling:
        """How attention wants the bucket's requests cut."""
        c = self.model.config
        return ops.attention_tiling(bucket, self.requests(bucket), c.num_heads, c.num_kv_heads, c.head_dim, c.head_dim,
                                    self.model.weights.embed.dtype, self.device, page_size=self.cache.page_size)

    def plan(self, bucket: int) -> ops.Schedule:
        """The bucket's schedule; its status is the front of the results, so that one copy reads both."""
        if bucket not in self._plans:
            R = self.requests(bucket)
            self._plans[bucket] = replace(ops.Schedule.allocate(bucket, R, self.tiling(bucket), self.device), status=self.results[1, :R])
        return self._plans[bucket]

    def workspace(self, tiling: ops.Tiling) -> ops.Workspace:
        """Attention's scratch: the front of one for all buckets, whose steps follow each other."""
        return self._workspace.of(tiling)

    def enter(self, slot: int, prompt: list[int], output: list[int]) -> None:
        """Fills a slot's line of the tables: what penalties and drafts have to know of a request that begins, or begins again."""
        if len(self.history):
            self.history[slot, :len(prompt) + len(output)] = torch.tensor(prompt + output, dtype=torch.int32).to(self.device)
        if not self.adjusts:
            return
        V = self.model.config.vocab_size
        bits = np.zeros(self.prompt.shape[1] * 32, dtype=np.uint8)
        bits[prompt] = 1
        self.prompt[slot] = torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32)).to(self.device)
        self.counts[slot] = torch.from_numpy(np.bincount(output, minlength=V).astype(np.int32)).to(self.device)

    def allow(self, slots: list[int], masks: list[np.ndarray]) -> None:
        """Uploads which tokens the next step may draw for the requests in `slots`, each an int32 mask of [ceil(V / 32)] words as in
        Sampling.allowed_tokens. It stands until the next, or `leave`. Without waiting for the device. Raises ValueError, and uploads nothing, for
        slots or masks that do not fit."""
        if not all(0 <= slot < len(self.allowed) for slot in slots):
            raise ValueError(f"gkernels.Step.allow: slots: got {slots}, expected 0 to {len(self.allowed) - 1}" if self.adjusts else
                             "gkernels.Step.allow: slots: got a step without adjusts, expected one that adjusts; make it with adjusts=True")
        words = self.allowed.shape[1]
        if len(masks) != len(slots) or any(mask.dtype != np.int32 or mask.shape != (words,) for mask in masks):
            raise ValueError(f"gkernels.Step.allow: masks: got {[f'{mask.dtype} {[*mask.shape]}' for mask in masks]}, expected int32 [{words}] for "
                             f"each of {len(slots)} slots")
        lines = torch.from_numpy(np.array(masks, dtype=np.int32).reshape(len(masks), words))
        lines = lines.pin_memory() if self.device.type == "cuda" else lines
        for slot, line in zip(slots, lines, strict=True):
            self.allowed[slot].copy_(line, non_blocking=True)              # torch keeps pinned memory until copies from it have ended

    def leave(self, slot: int) -> None:
        """Allows all tokens again in a slot whose request gives it back."""
        self.allowed[slot].fill_(-1)

    def adjustments(self, R: int) -> ops.Adjustments:
        tables = {name: getattr(self, name) for name in ("counts", "prompt", "allowed")}
        return ops.Adjustments(**{name: self.buffers[source][:R] for name, source in ADJUSTED.items()}, **tables)

    def state(self, R: int) -> ops.State:
        b, (step, flags, ring) = self.buffers, self.news(self._news, R)
        return ops.State(**{name: b[name][:R] for name in ADVANCED}, flags=flags, ring=ring, step=step, running=b["running"],
                         counts=self.counts if self.adjusts else None, history=self.history if len(self.history) else None)

    def news(self, values, R: int) -> tuple:
        """Views of `_news`, or of its copy on the host, for a capacity of R requests: step [1], flags [R], ring [depth, R]."""
        return values[:1], values[1:1 + R], values[1 + R:1 + R + self.depth * R].reshape(self.depth, R)

    def __call__(self, bucket: int) -> torch.Tensor:
        """Launches schedule, model, sampling and advance for a capacity of `bucket` tokens. Tokens and status land in `results`; returns logits."""
        R, b, tiling, plan = self.requests(bucket), self.buffers, self.tiling(bucket), self.plan(bucket)
        seq_lens, block_table, tokens = b["seq_lens"][:R], b["block_table"][:R], self.results[0, :R]
        ops.schedule_out(b["query_start_loc"][:R + 1], seq_lens, block_table, self.cache.page_size, self.cache.num_pages, tiling, plan)
        logits = self.model(b["token_ids"][:bucket], block_table, plan, self.workspace(tiling), self.cache)
        if self.adjusts:
            ops.adjust_(logits, self.adjustments(R), seq_lens, plan.status)
        drawn = {name: b[name][:R] for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")}
        ops.sample_out(logits, **drawn, position=seq_lens, seq_lens=seq_lens, status=plan.status, workspace=self._sampling, out=tokens)
        ops.advance(tokens, plan.status, self.state(R), self.model.config.vocab_size)
        return logits

    def single(self, bucket: int) -> torch.Tensor:
        """A step that also brings its results to the host, where `read` finds them: of one graph they cost the host no call of their own, which
        takes 20 us behind a busy device."""
        logits = self(bucket)
        self._results_host.copy_(self.results, non_blocking=True)
        return logits

    def read(self, num_requests: int) -> tuple[list[int], list[int]]:
        """Waits for a `single` step and returns tokens and status of its requests."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        tokens, status = self._results_host.numpy()[:, :num_requests].tolist()                 # whose views cost a tenth of a tensor's
        return tokens, status

    def read_ring(self, bucket: int, num_requests: int) -> tuple[list[list[int]], list[int]]:
        """Waits for the steps since the batch was staged and returns their tokens, a list for each time that the state was advanced, with -1 for rows
        that brought none, and the status of rows that ended with an error. What came behind the last token is left out, but for the first list.
        One copy, one wait, however many steps."""
        self._news_host.copy_(self._news, non_blocking=True)
        if self._news_read is not None:
            self._news_read.record()
            self._news_read.synchronize()
        step, flags, ring = self.news(self._news_host.numpy(), self.requests(bucket))
        lines = ring[:step[0], :num_requests].tolist()
        while len(lines) > 1 and max(lines[-1]) < 0:
            lines.pop()
        return lines, flags[:num_requests].tolist()
