"""Sampling:  token = argmax over the kept set of  logit / temperature + Gumbel noise,  or the plain argmax at temperature 0.

logits [R, V] with any row stride; temperature, top_p, min_p, typical_p float32 [R]; top_k, position, seq_lens, status int32 [R]; seed int64 [R]
-> out int32 [R] and, where asked for, probs float32 [R, V]. `position` is the place in the sequence of the token to be drawn.
In the order (logit down, id up) of a stable sort, the kept set is the prefix of top_k tokens, of it the shortest prefix whose mass reaches top_p,
of it the tokens of at least min_p times the greatest probability, of these the shortest prefix that reaches typical_p of their mass in the order
of |log p + entropy| (Meister et al. 2022, arXiv 2202.00666). 0, 1, 0 and 1 switch them off. Nothing is sorted; masses are sums of integers, in
units of 2^-32 of the greatest (where top_p alone keeps few tokens, the others' by groups of 32, in units of 2^-24 of a group's greatest), so that no
order of summation can move a prefix's end.
The noise of a token depends on (seed, position, token id) only: a request draws the same tokens in any row, batch and graph.
Graph-safe: three launches of fixed grids, a row shared by the programs of its chunks; rows that need less leave at once. A row with seq_lens 0 is
unused: token -1, status untouched. NaN logits count as -inf, +inf ones win. A row without a choice gets token -1 and status |= NO_TOKEN; options
out of range are switched off, status |= BAD_OPTION. Other rows never change.
Where more than CAPACITY tokens lie where a prefix may end (equal logits by the thousand, typical_p without another cut, top_p at temperatures that
leave all tokens alike), one program halves the whole row until few tokens are left, which is exact too, but slow: some 10 to 50 reads of the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from . import _check
from ._overlap import overlap
from ._sampling import BAD_OPTION as BAD_OPTION
from ._sampling import BINS, GROUP, STATE, draw_kernel, first_kernel, reach_kernel
from ._sampling import NO_TOKEN as NO_TOKEN
from ._sampling_probs import probs_kernel
from ._sampling_short import group_words
from ._tile import MULTIPROCESSORS

LEAST_CHUNK = 1024                                    # tokens
RANKED = 128                                          # lists up to this length are ranked, each token against each; longer ones are halved first
TWICE_FROM = 128                                      # rows, of which one in 200 turns two winners down at top_p 0.9; the next takes it 60 us or more
MAX_V = 262144                                        # masses of 2^32 each then sum below 2^53, exact in float64


@dataclass(frozen=True)
class Config:
    CHUNK: int               # tokens of a program, a power of two
    BLOCK: int               # of them it takes at a time
    CAPACITY: int            # tokens that a row's list holds
    num_warps: int

    def chunks(self, V: int) -> int:
        return triton.cdiv(V, self.CHUNK)

    @property
    def stream(self) -> int:
        """Tokens that a program takes at a time where it only looks for the greatest."""
        return min(self.CHUNK, 2 * self.BLOCK)


def config(R: int, V: int) -> Config:
    """A row has as many programs as give the device 2 a multiprocessor, and short ones where rows are few. At most 8 elements a thread, of which the
    draw keeps 9 words each."""
    enough = triton.next_power_of_2(triton.cdiv(V, triton.cdiv(2 * MULTIPROCESSORS, max(R, 1))))
    chunk = min(max(enough, LEAST_CHUNK), max(triton.next_power_of_2(V), 128))
    block = min(chunk, 2048)
    return Config(chunk, block, min(triton.next_power_of_2(V), 8192), max(block // 256, 4))


@dataclass(frozen=True)
class Workspace:
    """What the launches leave each other, for at most R rows; launches that follow each other in one stream may share it."""

    scores: torch.Tensor      # float64 [R, chunks, 2]
    partials: torch.Tensor    # int64 [R, chunks, 3]
    counts: torch.Tensor      # int32 [R, BINS + 4], zeros between launches
    state: torch.Tensor       # int32 [R, STATE]
    list_x: torch.Tensor      # float32 [R, CAPACITY + RANKED]
    list_ids: torch.Tensor    # int32 [R, CAPACITY + RANKED]
    groups: torch.Tensor      # int32 [R, group_words]

    @classmethod
    def allocate(cls, R: int, V: int, device: torch.device | str) -> Workspace:
        make = lambda shape, dtype: torch.zeros(R, *shape, dtype=dtype, device=device)
        return cls(*(make(*what) for what in cls.fields(V).values()))

    @staticmethod
    def fields(V: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of a row and dtype of each field: enough for any number of rows."""
        c = config(1, V)
        return dict(scores=((c.chunks(V), 2), torch.float64), partials=((c.chunks(V), 3), torch.int64), counts=((BINS + 4,), torch.int32),
                    state=((STATE,), torch.int32), list_x=((c.CAPACITY + RANKED,), torch.float32),
                    list_ids=((c.CAPACITY + RANKED,), torch.int32),
                    groups=((group_words(triton.cdiv(V, GROUP)),), torch.int32))


def check_options(temperature: float, top_k: int, top_p: float, min_p: float, vocab_size: int, typical_p: float = 1.0) -> None:
    """Raises ValueError on the options of one request, on the host, where the kernel would switch them off and flag the row."""
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for name, value, kinds, low, high, expected in (
            ("temperature", temperature, (int, float), 0, most, "a finite number, at least 0; 0 takes the likeliest token"),
            ("top_k", top_k, (int,), 0, vocab_size, f"an integer from 0 to the vocabulary's {vocab_size}; 0 keeps every token"),
            ("top_p", top_p, (int, float), least, 1, "a number above 0 and at most 1; 1 keeps every token"),
            ("min_p", min_p, (int, float), 0, 1, "a number from 0 to 1; 0 keeps every token"),
            ("typical_p", typical_p, (int, float), least, 1, "a number above 0 and at most 1; 1 keeps every token")):
        _check.require(isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high, "sample", name, value, expected)


def _check_logits(logits):
    _check.tensor("sample", "logits", logits, (None, None), _check.FLOATS)
    _check.require(1 <= logits.shape[1] <= MAX_V, "sample", "logits", f"V = {logits.shape[1]}", f"1 to {MAX_V}")
    return logits.shape


def sample_out(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
               seed: torch.Tensor, position: torch.Tensor, seq_lens: torch.Tensor, status: torch.Tensor, workspace: Workspace, out: torch.Tensor,
               typical_p: torch.Tensor | None = None, probs: torch.Tensor | None = None, keeps: torch.Tensor | None = None) -> None:
    """Writes one token a row to `out`, ors flags into `status`, and where `probs` is given writes to it what the tokens were drawn from: the kept
    tokens' probabilities, 1 at a greedy token, zeros where there is no token. Rows whose `keeps`, int32 [R], is 0 are left alone: `head` has drawn
    their tokens. Shapes: see the module. Raises ValueError or TypeError on a misfit."""
    op, (R, V) = "sample", _check_logits(logits)
    c, device = config(R, V), logits.device
    for name, t, dtype in (("temperature", temperature, torch.float32), ("top_k", top_k, torch.int32), ("top_p", top_p, torch.float32),
                           ("min_p", min_p, torch.float32), ("seed", seed, torch.int64),
                           ("position", position, torch.int32), ("seq_lens", seq_lens, torch.int32), ("status", status, torch.int32),
                           ("out", out, torch.int32)):
        _check.tensor(op, name, t, (R,), (dtype,), device, aligned=False)
    if typical_p is not None:
        _check.tensor(op, "typical_p", typical_p, (R,), (torch.float32,), device, aligned=False)
    if keeps is not None:
        _check.tensor(op, "keeps", keeps, (R,), (torch.int32,), device, aligned=False)
    _check.require(keeps is None or probs is None, op, "keeps", "probs too", "one of them: rows left alone have no probabilities here")
    for name, (shape, dtype) in Workspace.fields(V).items():
        t = getattr(workspace, name)
        _check.tensor(op, f"workspace.{name}", t, (None, *shape), (dtype,), device, dense=1 + len(shape))
        _check.require(t.shape[0] >= R, op, f"workspace.{name}", f"{t.shape[0]} rows", f"at least the {R} of logits")
    if probs is not None:
        _check.tensor(op, "probs", probs, (R, V), (torch.float32,), device, writes=True)
    if R == 0:
        return
    w, options, stride = workspace, (temperature, top_k, top_p, min_p, typical_p), logits.stride(0)
    chunks, groups = c.chunks(V), triton.cdiv(V, GROUP)
    cut = dict(V=V, CHUNKS=chunks, BLOCK=c.BLOCK, HAS_TYPICAL=typical_p is not None, num_warps=c.num_warps, **overlap())
    passes, merged, lists = cut | dict(CHUNK=c.CHUNK), dict(BLOCK_C=triton.next_power_of_2(chunks)), dict(CAPACITY=c.CAPACITY)
    room = dict(ROOM=c.CAPACITY + RANKED)
    first_kernel[(chunks * R,)](logits, *options, seed, position, seq_lens, keeps, status, out, w.scores, w.partials, w.counts, w.state, w.groups,
                                stride, STREAM=c.stream, GROUPS=groups, BLOCK_G=triton.next_power_of_2(groups), NEEDS_CUT=probs is not None, **passes,
                                **merged, **lists, **_check.registers(128))
    for is_second in (False, True) if R >= TWICE_FROM and probs is None else (False,):
        reach_kernel[(chunks * R,)](logits, *options, seed, position, out, w.scores, w.partials, w.counts, w.state, w.groups, w.list_x, w.list_ids,
                                    stride, GROUPS=groups, IS_SECOND=is_second, **passes, **merged, **lists, **room, **_check.registers(128))
    # At most 4 elements a thread where rows end: 128 registers hold them (sm_120 spilled 36 bytes), and two programs have room
    draw_kernel[(chunks * R,)](logits, *options, seed, position, out, w.scores, w.partials, w.counts, w.state, w.list_x, w.list_ids, stride,
                               BLOCK_S=min(c.BLOCK, 1024), RANKED=RANKED, **passes | dict(num_warps=8), **merged, **lists, **room,
                               **_check.registers(168 if _check.capability() == 120 else 128))
    if probs is not None:
        for is_second in (False, True):
            probs_kernel[(chunks * R,)](logits, *options, seq_lens, out, w.partials, w.state, probs, stride, probs.stride(0),
                                        IS_SECOND=is_second, **passes, **merged)


def sample(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
           seed: torch.Tensor, position: torch.Tensor, seq_lens: torch.Tensor, status: torch.Tensor,
           typical_p: torch.Tensor | None = None) -> torch.Tensor:
    """Returns one token a row, int32 [R], -1 where there is none, and ors flags into `status`."""
    R, V = _check_logits(logits)
    out, workspace = torch.empty(R, dtype=torch.int32, device=logits.device), Workspace.allocate(R, V, logits.device)
    sample_out(logits, temperature, top_k, top_p, min_p, seed, position, seq_lens, status, workspace, out, typical_p)
    return out
