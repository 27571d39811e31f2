"""How one request's tokens are drawn and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from .. import ops

# Those of Sampling that a step's buffers hold for each row: dtype, and what stands in a pad
NUMBERS = {"temperature": (torch.float32, 0), "top_k": (torch.int32, 0), "top_p": (torch.float32, 1), "min_p": (torch.float32, 0),
           "typical_p": (torch.float32, 1), "seed": (torch.int64, 0), "repetition_penalty": (torch.float32, 1),
           "presence_penalty": (torch.float32, 0), "frequency_penalty": (torch.float32, 0), "min_tokens": (torch.int32, 0),
           "max_tokens": (torch.int32, 0)}
COLUMNS = (*NUMBERS, "banned_ids", "bias_ids", "bias")
MAX_STOP_IDS, MAX_BANNED_IDS, MAX_BIAS = 16, 32, 32      # a request may have; a step's buffers hold as many for every row


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and typical_p 1 are off, as are penalties of 1, 0 and 0. `repetition_penalty` counts the
    prompt's tokens too, the others generated ones. `min_tokens` keeps stop tokens from being drawn before.

    `allowed_tokens` says which tokens a grammar lets follow. Before each token it is called with a copy of the output so far, and returns an int32
    tensor or array on the CPU, [ceil(V / 32)] or [1, ceil(V / 32)], as XGrammar fills it: token t may be drawn where bit t % 32 of word t // 32 is 1.
    It may return the same memory each time. One that keeps state serves one request. What it raises ends its request alone."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    banned_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    allowed_tokens: Callable[[list[int]], torch.Tensor | np.ndarray] | None = field(default=None, hash=False)

    @cached_property
    def columns(self) -> tuple:
        """What a step's buffers hold of it for each row, in the order of COLUMNS."""
        return (*(getattr(self, name) for name in NUMBERS), tuple(self.banned_token_ids), tuple(self.logit_bias), tuple(self.logit_bias.values()))

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def adjusts(self) -> bool:
        """Whether logits change before they are drawn from."""
        return bool(self.has_penalties or self.logit_bias or self.banned_token_ids or self.min_tokens or self.allowed_tokens is not None)

    def ends(self, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens that end the request."""
        return tuple(dict.fromkeys((*self.stop_token_ids, *(() if self.ignore_eos else eos_token_ids))))

    def check(self, vocab_size: int, eos_token_ids: tuple[int, ...], where: str) -> None:
        """Raises ValueError on what no step could obey."""
        bad = [t for t in self.stop_token_ids if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < vocab_size]
        if bad:
            raise ValueError(f"{where}: stop_token_ids: got {bad[:4]}, expected Python integers from 0 to {vocab_size - 1}")
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise ValueError(f"{where}: max_tokens: got {self.max_tokens}, expected at least 1")
        if not isinstance(self.seed, int) or not -2**63 <= self.seed < 2**63:
            raise ValueError(f"{where}: seed: got {self.seed}, expected a 64-bit integer")
        if self.allowed_tokens is not None and not callable(self.allowed_tokens):
            raise ValueError(f"{where}: allowed_tokens: got {type(self.allowed_tokens).__name__}, expected None or a callable that returns "
                             "the next token's mask, given the output so far")
        for name, values, most in (("stop_token_ids and end-of-sequence tokens", self.ends(eos_token_ids), MAX_STOP_IDS),
                                   ("logit_bias", self.logit_bias, MAX_BIAS), ("banned_token_ids", self.banned_token_ids, MAX_BANNED_IDS)):
            if len(values) > most:
                raise ValueError(f"{where}: {name}: got {len(values)} tokens, expected at most {most}")
        ops.check_options(self.temperature, self.top_k, self.top_p, self.min_p, vocab_size, self.typical_p)
        ops.check_adjustments(vocab_size, self.logit_bias, self.repetition_penalty, self.presence_penalty, self.frequency_penalty,
                              self.banned_token_ids, self.min_tokens)

    def mask(self, output: list[int], vocab_size: int) -> np.ndarray | None:
        """What `allowed_tokens` returns for an output, in memory of its own: int32 [ceil(V / 32)], or None where there is no such option. Raises what
        it raises, TypeError for what is no int32 tensor or array on the CPU, and ValueError for a wrong shape."""
        if self.allowed_tokens is None:
            return None
        where, mask, words = "gkernels.Sampling.allowed_tokens: mask", self.allowed_tokens([*output]), -(-vocab_size // 32)
        if not isinstance(mask, torch.Tensor | np.ndarray):
            raise TypeError(f"{where}: got {type(mask).__name__}, expected a torch.Tensor or numpy.ndarray of int32")
        if isinstance(mask, torch.Tensor) and mask.device.type != "cpu":
            raise TypeError(f"{where}: got one on {mask.device}, expected one on the CPU, where grammars fill it; move it with .cpu()")
        if mask.dtype not in (torch.int32, np.dtype(np.int32)):
            raise TypeError(f"{where}: got {mask.dtype}, expected int32, 32 tokens a word; pack bools with numpy.packbits(..., bitorder='little')")
        if tuple(mask.shape) not in ((words,), (1, words)):
            fault = "bitmask too short: " if mask.ndim and mask.shape[-1] < words else ""
            raise ValueError(f"{where}: {fault}got shape {list(mask.shape)}, expected [{words}] or [1, {words}], for {vocab_size} tokens; "
                             "make it for the model's vocabulary, which may hold more than the tokenizer's")
        return np.array(mask.numpy() if isinstance(mask, torch.Tensor) else mask).reshape(words)
