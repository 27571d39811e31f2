"""What an engine knows of a request, and what it tells of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .sampling import Sampling


@dataclass(eq=False)
class Request:
    id: int
    prompt: list[int]
    sampling: Sampling
    ends: tuple[int, ...]                  # tokens that end it
    limit: int                             # of tokens that it may bring
    output: list[int] = field(default_factory=list)
    pages: tuple[int, ...] = ()            # no list, of which a step would have to look at every page to see that it is the same
    computed: int = 0                      # tokens whose keys and values are in the cache
    slot: int = -1                         # its line in the step's tables while it runs
    finish_reason: str | None = None       # "stop", "length", "cancelled" or "error: ..."
    error: Exception | None = None         # what its allowed_tokens raised

    def __post_init__(self):
        self._prompt = np.array(self.prompt, dtype=np.int32)      # of which a step takes a part in 0.2 us, and of a list in 60 ns a token

    def next_tokens(self, n: int) -> list[int] | np.ndarray:
        """The n tokens after those that are computed."""
        start = self.computed - len(self.prompt)
        if start >= 0:                     # as of all that decode
            return self.output[start:start + n]
        ids = self._prompt[self.computed:self.computed + n]
        return ids if start + n <= 0 else np.append(ids, self.output[:start + n])

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)


class Event(NamedTuple):
    """One request's news after a step: a token, or its end, or both. token is None where a request ended without one."""

    request_id: int
    token: int | None
    finish_reason: str | None = None
