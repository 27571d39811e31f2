"""What an engine knows of a request, and what it tells of one."""

from __future__ import annotations

from dataclasses import dataclass, field

from .sampling import Sampling


@dataclass(eq=False)
class Request:
    id: int
    prompt: list[int]
    sampling: Sampling
    output: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0                      # tokens whose keys and values are in the cache
    slot: int = -1                         # its line in the step's tables while it runs
    finish_reason: str | None = None       # "stop", "length", "cancelled" or "error: ..."
    error: Exception | None = None         # what its allowed_tokens raised

    def next_tokens(self, n: int) -> list[int]:
        """The n tokens after those that are computed."""
        start, end, cut = self.computed, self.computed + n, len(self.prompt)
        return self.prompt[start:end] + self.output[max(start - cut, 0):max(end - cut, 0)]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)


@dataclass(frozen=True)
class Event:
    """One request's news after a step: a token, or its end, or both. token is None where a request ended without one."""

    request_id: int
    token: int | None
    finish_reason: str | None = None
