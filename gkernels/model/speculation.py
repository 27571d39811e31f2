"""A speculative step: drafts by prompt lookup, judged by the model, all on the device.

For requests that decode. Each brings its last token and up to `drafts` more, which its own history foretells; the model computes all of them at once,
`sample` draws at every row what it would draw there without drafts, and the drafts that are those tokens stand. So the tokens are those of plain
steps, greedy or drawn, as far as the model's own bits do not depend on the number of rows. Rejected drafts leave keys and values behind that no later
step reads: a sequence is rolled back by its length alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .. import ops
from .step import Step


@dataclass(frozen=True)
class Speculation:
    """Drafts a step, and the sizes of the n-grams that are looked up, longest first."""

    drafts: int = 4
    min_n: int = 1
    max_n: int = 3


class SpeculativeStep:
    """A Step's callable for requests of one token each, captured for buckets of requests. A call brings up to drafts + 1 tokens a request, and
    advances the state that often: so many lines of the step's ring are its."""

    def __init__(self, step: Step, speculation: Speculation):
        R, K, V, device = step.max_requests, speculation.drafts, step.model.config.vocab_size, step.device
        if K < 1:
            raise ValueError(f"gkernels.SpeculativeStep: drafts: got {K}, expected at least 1")
        self.step, self.speculation = step, speculation
        self._ngram = ops.NgramWorkspace.allocate(R, device)
        self._sampling = ops.SamplingWorkspace.allocate(R * (K + 1), V, device)
        self._plans: dict[int, ops.Schedule] = {}
        self._workspace = ops.Workspace.allocate(self.tiling(R), device, self.tiling(1))                   # few rows are cut otherwise than many

    def tiling(self, R: int) -> ops.Tiling:
        c, T = self.step.model.config, R * (self.speculation.drafts + 1)
        return ops.attention_tiling(T, R, c.num_heads, c.num_kv_heads, c.head_dim, c.head_dim, self.step.model.weights.embed.dtype, self.step.device)

    def plan(self, R: int) -> ops.Schedule:
        if R not in self._plans:
            self._plans[R] = ops.Schedule.allocate(R * (self.speculation.drafts + 1), R, self.tiling(R), self.step.device)
        return self._plans[R]

    def __call__(self, bucket: int) -> torch.Tensor:
        """Launches a step for at most `bucket` requests and returns the logits of all rows, [bucket * (drafts + 1), V]."""
        s, K, V = self.step, self.speculation.drafts, self.step.model.config.vocab_size
        b = {name: s.buffers[name][:bucket] for name in s.buffers.fields if name not in ("running", "turns", "token_ids", "query_start_loc")}
        state = s.state(bucket)
        new = lambda *shape: torch.empty(shape, dtype=torch.int32, device=s.device)
        draft, draft_len, tokens, num_accepted = new(bucket, K), new(bucket), new(bucket, K + 1), new(bucket)
        limits = torch.minimum(b["max_tokens"] - b["generated"], b["max_lens"] - b["seq_lens"]) - 1        # what may follow this step's own token
        ops.ngram_out(s.history, b["seq_lens"], limits, self.speculation.min_n, self.speculation.max_n, self._ngram, draft, draft_len, b["slots"])
        rows = ops.Rows.allocate(bucket, K, s.device)
        ops.expand_out(state.token_ids, b["seq_lens"], draft, draft_len, limits, rows)
        tiling, plan = self.tiling(bucket), self.plan(bucket)
        ops.schedule_out(rows.query_start_loc, rows.seq_lens, b["block_table"], s.cache.page_size, s.cache.num_pages, tiling, plan)
        logits = s.model(rows.token_ids, b["block_table"], plan, self._workspace.of(tiling), s.cache, every_row=True)
        drawn = {name: b[name][rows.request.long()] for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")}
        sampled, status = new(bucket * (K + 1)), torch.zeros_like(rows.request)                            # options were checked at admission
        ops.sample_out(logits, **drawn, position=rows.position, seq_lens=rows.position, status=status, workspace=self._sampling, out=sampled)
        ops.verify_out(rows.draft, sampled, rows.query_start_loc, plan.status, tokens, num_accepted)
        columns = tokens.T.contiguous()
        for j in range(K + 1):
            emits = b["emits"] if j == 0 else b["emits"] * (num_accepted >= j)                             # a failed row ends at its first
            ops.advance(columns[j], plan.status, replace(state, emits=emits), V)
        return logits
