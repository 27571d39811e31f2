"""The host's half of a step: whatever batches came before, the static buffers hold the one staged last, as buffers that are new would."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkernels.graph import StaticBuffers
from gkernels.model.cache import PagedCache
from gkernels.model.config import LlamaConfig
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights
from gkernels.model.sampling import NUMBERS, Sampling
from gkernels.model.step import Row, Step
from tests.close import assert_same
from tests.strategies_model import tiny_config

PAGE, MAX_LEN, TOKENS, REQUESTS = 4, 32, 12, 3
OPTIONS = [Sampling(), Sampling(5, 0.5, 3, 0.5, 0.5, 7), Sampling(banned_token_ids=(4, 5)), Sampling(logit_bias={3: 1.0, 9: -1.0}),
           Sampling(presence_penalty=1.0)]


@pytest.fixture(autouse=True, scope="module")
def two_blocks():
    """So that every second batch is compared with what its block holds of an earlier one."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(StaticBuffers, "BLOCKS", 2)
        yield


@lru_cache(None)
def model(device):
    config = LlamaConfig.from_dict(tiny_config(num_hidden_layers=1))
    return Llama.build(config, random_weights(config, device, torch.float32), MAX_LEN)


def made(kind, device):
    config = model(device).config
    cache = PagedCache.allocate(config.num_layers, 4, PAGE, config.num_kv_heads, config.head_dim, torch.float32, device)
    return kind(model(device), cache, TOKENS, REQUESTS, MAX_LEN)


def expected(step, rows, turns):
    """New buffers, each field of which is staged by its definition."""
    buffers = StaticBuffers(step.buffers.fields, step.device)
    starts = [sum(len(row.token_ids) for row in rows[:i]) for i in range(len(rows) + 1)]
    columns = {"token_ids": [t for row in rows for t in row.token_ids], "query_start_loc": starts, "running": [len(rows)], "turns": [turns],
               "block_table": [row.pages for row in rows], "stop_ids": [row.ends for row in rows], "max_lens": [row.max_len for row in rows],
               **{name: [getattr(row, name[:-1]) for row in rows] for name in ("seq_lens", "slots")},
               **{name: [getattr(row, name) for row in rows] for name in ("emits", "generated")},
               **{name: [getattr(row.sampling, name) for row in rows] for name in NUMBERS},
               "banned_ids": [row.sampling.banned_token_ids for row in rows], "bias_ids": [[*row.sampling.logit_bias] for row in rows],
               "bias": [[*row.sampling.logit_bias.values()] for row in rows]}
    for name, values in columns.items():
        buffers.stage(name, values)
    buffers.upload()
    return buffers


def check_batches(kind, device, batches):
    """Stages batches one after the other, as an engine that has one step: each is (changes, rows, turns). `changes` writes to a request's pages in
    place, as (request, at, page) or, with page 0 behind them, adds one; `rows` names requests with their options and lengths."""
    step, pages = made(kind, device), [[1 + 8 * i] for i in range(4)]
    for changes, chosen, turns in batches:
        for request, at, page in changes:
            own = pages[request]
            own[at:at + 1] = [page] if at < len(own) or len(own) < MAX_LEN // PAGE else []
        rows = []
        for request, option, n, is_tuple in chosen:
            own = tuple(pages[request]) if is_tuple else pages[request]
            seq_len = min(n + option, len(own) * PAGE)
            ids = np.full(n, 20 + request, np.int32) if option % 2 else [20 + request] * n
            rows.append(Row(ids, seq_len, own, OPTIONS[option], n == 1, option, MAX_LEN, (2, 3)[:option], request % REQUESTS))
        if any(0 in row.pages for row in rows):
            for _ in range(2):
                with pytest.raises(ValueError, match=r"Step: rows\[\d\]: got . tokens, .* none of them page 0"):
                    step.stage(rows, turns)
            continue
        assert step.stage(rows, turns) == sum(len(row.token_ids) for row in rows)
        want = expected(step, rows, turns)
        for name in step.buffers.fields:
            assert_same(step.buffers[name].cpu(), want[name].cpu())
            step.buffers[name].fill_(99)                                # as the device changes what it was given


chosen = st.permutations(range(4)).flatmap(lambda order: st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.booleans()), max_size=3).map(
    lambda drawn: [(request, *options) for request, options in zip(order, drawn, strict=False)]))
changes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7), st.sampled_from([0, 1, 2, 3, 50, 51, 52])), max_size=3)


@given(st.lists(st.tuples(changes, chosen, st.integers(0, 3)), min_size=2, max_size=8))
@settings(max_examples=60)
def test_what_is_staged_is_the_batch(device, batches):
    check_batches(Step, device, batches)


class ByList(Step):
    """Takes a list of pages for what it was when it was seen first."""

    def stage(self, rows, turns=1):
        seen = vars(self).setdefault("seen", {})
        return super().stage([row._replace(pages=seen.setdefault(id(row.pages), (tuple(row.pages), row.pages))[0]) for row in rows], turns)


class ByNumber(Step):
    """Takes as many requests as before for the same ones with the same options."""

    def stage(self, rows, turns=1):
        self._options = [row.sampling.columns for row in rows] if len(rows) == len(self._options) else []
        return super().stage(rows, turns)


class Sound(Step):
    """Looks at no row's pages twice."""

    def stage(self, rows, turns=1):
        self._tables = tuple(tuple(row.pages) for row in rows)
        return super().stage([row._replace(pages=own) for row, own in zip(rows, self._tables, strict=True)], turns)


@pytest.mark.parametrize("ids", [[5], [5, 6]])
def test_a_token_of_more_than_32_bits_raises(device, ids):
    """Cut to 32 it would be another token."""
    step = made(Step, device)
    with pytest.raises(OverflowError):
        step.stage([Row([*ids[1:], 2**32 + 5], len(ids), (1,))])


@pytest.mark.parametrize("kind, changes, row", [(ByList, [(0, 1, 5)], (0, 0, 4, False)), (ByList, [(0, 0, 5)], (0, 0, 4, False)),
                                                (ByNumber, [], (0, 1, 2, False)), (Sound, [(0, 0, 0)], (0, 0, 1, True))])
def test_stale_rows_are_caught(device, kind, changes, row):
    batches = [([], [(0, 0, 1, False)], 1)] * 2 + [(changes, [row], 1)]
    check_batches(Step, device, batches)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_batches(kind, device, batches)
