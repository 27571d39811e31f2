"""One step of a batch, from metadata to sampled tokens, over static tensors: the callable that a graph captures.

The host stages the batch, uploads it in one copy, runs the step for a bucket and reads tokens and status in one copy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from .. import ops
from ..graph import Field, StaticBuffers
from .cache import NULL_PAGE, PagedCache
from .llama import Llama


@dataclass(frozen=True)
class Row:
    """One request's share of a step: the tokens to compute, all of its length afterwards, its pages, and how to draw the next token."""

    token_ids: list[int]
    seq_len: int
    pages: list[int]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


class Step:
    """Static state for at most `max_tokens` tokens of at most `max_requests` requests a step. `step(bucket)` launches the kernels."""

    def __init__(self, model: Llama, cache: PagedCache, max_tokens: int, max_requests: int, max_len: int):
        device = model.weights.embed.device
        self.model, self.cache, self.device = model, cache, device
        self.max_tokens, self.max_requests = max_tokens, max_requests
        self.table_width = -(-max_len // cache.page_size)
        R = max_requests
        self.buffers = StaticBuffers({
            "token_ids": Field((max_tokens,)), "query_start_loc": Field((R + 1,), pad="last"), "seq_lens": Field((R,)),
            "block_table": Field((R, self.table_width)), "temperature": Field((R,), torch.float32), "top_k": Field((R,)),
            "top_p": Field((R,), torch.float32, 1.0), "min_p": Field((R,), torch.float32), "seed": Field((R,), torch.int64)}, device)
        self.results = torch.zeros(2, -(-R // 4) * 4, dtype=torch.int32, device=device)       # tokens, status; rows 16-byte aligned
        self._results_host = torch.zeros(self.results.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._plans: dict[int, ops.Schedule] = {}
        tilings = [self.tiling(bucket) for bucket in (max_requests, max_tokens)]               # each bucket's is as large as one of these
        self._states = torch.empty(max(tiling.states for tiling in tilings), device=device)
        self._counters = torch.zeros(max(tiling.counters for tiling in tilings), dtype=torch.int32, device=device)
        self._sampling = ops.SamplingWorkspace.allocate(R, model.config.vocab_size, device)

    def stage(self, rows: list[Row]) -> int:
        """Puts a batch into the static buffers and returns its number of tokens. ValueError, and nothing staged, for a batch that does not fit
        the capacities, and for a row without tokens or without pages of its own for all of them."""
        lens = [len(row.token_ids) for row in rows]
        tokens = sum(lens)
        if tokens > self.max_tokens or len(rows) > self.max_requests:
            raise ValueError(f"gkernels.Step: rows: got {tokens} tokens in {len(rows)} requests, expected at most {self.max_tokens} in "
                             f"{self.max_requests}; split the batch")
        for i, row in enumerate(rows):
            if not row.token_ids or NULL_PAGE in row.pages or not len(row.token_ids) <= row.seq_len <= len(row.pages) * self.cache.page_size:
                raise ValueError(f"gkernels.Step: rows[{i}]: got {len(row.token_ids)} tokens, seq_len {row.seq_len} and {len(row.pages)} pages, "
                                 f"expected 1 to seq_len tokens and pages of {self.cache.page_size} for all of seq_len, none of them page 0")
        stage = self.buffers.stage
        stage("token_ids", [t for row in rows for t in row.token_ids])
        stage("query_start_loc", np.cumsum([0, *lens]))
        stage("block_table", [row.pages for row in rows])
        stage("seq_lens", [row.seq_len for row in rows])
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            stage(name, [getattr(row, name) for row in rows])
        self.buffers.upload()
        return tokens

    def requests(self, bucket: int) -> int:
        """Request capacity of a bucket: every request brings at least one token."""
        return min(self.max_requests, bucket)

    def tiling(self, bucket: int) -> ops.Tiling:
        """How attention wants the bucket's requests cut."""
        c = self.model.config
        return ops.attention_tiling(bucket, self.requests(bucket), c.num_heads, c.num_kv_heads, c.head_dim, c.head_dim,
                                    self.model.weights.embed.dtype, self.device)

    def plan(self, bucket: int) -> ops.Schedule:
        """The bucket's schedule; its status is the front of the results, so that one copy reads both."""
        if bucket not in self._plans:
            R = self.requests(bucket)
            self._plans[bucket] = replace(ops.Schedule.allocate(bucket, R, self.tiling(bucket), self.device), status=self.results[1, :R])
        return self._plans[bucket]

    def workspace(self, tiling: ops.Tiling) -> ops.Workspace:
        """Attention's scratch: the front of one for all buckets, whose steps follow each other."""
        return ops.Workspace(self._states[:tiling.states], self._counters[:tiling.counters])

    def __call__(self, bucket: int) -> torch.Tensor:
        """Launches schedule, model and sampling for a capacity of `bucket` tokens. Tokens and status land in `results`; returns the logits."""
        R, b, tiling, plan = self.requests(bucket), self.buffers, self.tiling(bucket), self.plan(bucket)
        seq_lens, block_table = b["seq_lens"][:R], b["block_table"][:R]
        ops.schedule_out(b["query_start_loc"][:R + 1], seq_lens, block_table, self.cache.page_size, self.cache.num_pages, tiling, plan)
        logits = self.model(b["token_ids"][:bucket], block_table, plan, self.workspace(tiling), self.cache)
        options = [b[name][:R] for name in ("temperature", "top_k", "top_p", "min_p", "seed")]
        # the drawn token stands at position seq_len
        ops.sample_out(logits, *options, seq_lens, seq_lens, plan.status, self._sampling, self.results[0, :R])
        return logits

    def read(self, num_requests: int) -> tuple[list[int], list[int]]:
        """Waits for the step and returns tokens and status of its requests."""
        self._results_host.copy_(self.results, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        tokens, status = self._results_host[:, :num_requests].tolist()
        return tokens, status
