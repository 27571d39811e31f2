"""Launches depend on shapes and options only, and no int32 or int64 that stands in memory leads a kernel outside its arguments."""

import json
from contextlib import nullcontext
from dataclasses import make_dataclass, replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import serialize_specialization_data

from gkernels.graph import interpreter
from gkernels.graph.launches import record
from gkernels.graph.memory import fill_with_junk, tensors_in
from gkernels.model.cache import PagedCache
from gkernels.model.config import LlamaConfig
from gkernels.model.llama import Llama
from gkernels.model.load import random_weights
from gkernels.model.sampling import Sampling
from gkernels.model.step import Row, Step
from tests.calls import ROOMS
from tests.close import assert_same
from tests.strategies import counter, dtypes, randn, seeds
from tests.strategies_model import tiny_config

CUDA = torch.cuda.is_available()
CONTENTS = 50   # random contents for each call function, and for a step
CALLS = [pytest.param(room, i, id=f"{room} {case}") for room, calls in ROOMS.items() for i, (case, *_) in enumerate(calls("cpu", torch.float32))]


def calls_of(room, device, dtype):
    """The room's calls, in float32 where it has none in this dtype."""
    return list(ROOMS[room](device, dtype)) or list(ROOMS[room](device, torch.float32))


def same_record(function, arguments, contents, seed=0):
    """The record of a call, which must be the same for each of `contents` random contents of its tensors."""
    generator = torch.Generator().manual_seed(seed)
    with record() as first:
        function(*arguments)
    assert first, f"{function.__name__} launched nothing"
    for _ in range(contents):
        fill_with_junk(tensors_in(arguments), generator)
        with record() as again:
            function(*arguments)
        assert again == first, f"{function.__name__}: the launches depend on what the tensors contain"
    return first


def check_hooks(launches):
    """What Triton does before it calls a hook of its cache: every constant is written as JSON."""
    for launch in launches:
        constants = {(i,): value for i, value in enumerate(launch.scalars.values())}
        told = json.loads(serialize_specialization_data(launch.kernel, {}, constants, {}, SimpleNamespace(), "key"))
        assert len(told["constant_vals"]) == len(launch.scalars)


def test_a_constant_that_hooks_cannot_be_told_is_caught(device):
    _, function, arguments = calls_of("rmsnorm", device, torch.float32)[0]
    launches = same_record(function, arguments, contents=0)
    constant = make_dataclass("Constant", [("K", int)])(1)
    with pytest.raises(TypeError, match="Constant is not JSON serializable"):
        check_hooks([replace(launches[0], scalars=launches[0].scalars | {"C": constant})])


@pytest.mark.parametrize("room", ROOMS)
def test_contents_change_no_launch(device, room):
    """50 contents for each function, on the smallest of its calls; two for each of the others."""
    by_function = {}
    for _, function, arguments in calls_of(room, device, torch.float16):
        by_function.setdefault(function, []).append(arguments)
    for function, calls in by_function.items():
        size = lambda arguments: sum(t.numel() for t in tensors_in(arguments))
        for i, arguments in enumerate(sorted(calls, key=size)):
            launches = same_record(function, arguments, contents=2 if i else CONTENTS)
            assert all(type(entry) is int and entry > 0 for launch in launches for entry in launch.grid)
            check_hooks(launches)


@pytest.mark.parametrize("room, i", CALLS)
@settings(max_examples=3)
@given(dtypes, seeds)
def test_junk_stays_inside_the_arguments(device, room, i, dtype, seed):
    _, function, arguments = calls_of(room, device, dtype)[i]
    fill_with_junk((t for t in tensors_in(arguments) if t.dtype in (torch.int32, torch.int64)), torch.Generator().manual_seed(seed))
    with nullcontext() if CUDA else interpreter.sanitize():
        function(*arguments)
    if CUDA:
        torch.cuda.synchronize()


T, R, PAGE, PAGES, MAX_LEN, VOCAB = 16, 4, 4, 40, 48, 96


def tiny_step(kind, device):
    config = LlamaConfig.from_dict(tiny_config("Qwen3ForCausalLM", num_hidden_layers=1))
    cache = PagedCache.allocate(config.num_layers, PAGES, PAGE, config.num_kv_heads, config.head_dim, torch.float32, device)
    return kind(Llama.build(config, random_weights(config, device, torch.float32), MAX_LEN), cache, T, R, MAX_LEN)


def random_rows(seed):
    """Prefill chunks and decodes, greedy and sampled, in pages of random order."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))
    rows, pages = [], (torch.randperm(PAGES - 1, generator=g) + 1).tolist()
    for _ in range(draw(1, R)):
        n = draw(1, T // R)
        seq_len = n + draw(0, 9 * PAGE - n)
        row = Row([draw(0, VOCAB - 1) for _ in range(n)], seq_len, [pages.pop() for _ in range(-(-seq_len // PAGE))])
        if draw(0, 1):
            row = row._replace(sampling=Sampling(draw(0, 9), draw(1, 20) / 10, draw(0, VOCAB), draw(1, 10) / 10, draw(0, 10) / 10, draw(-9, 9)))
        rows.append(row)
    return rows


class TorchOperations(TorchDispatchMode):
    """What torch is asked in between, with the results' shapes and strides. New tensors stay alive, so that each has an address of its own."""

    def __init__(self):
        super().__init__()
        self.seen, self.made, self.kept = [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, storage = function(*args, **(kwargs or {})), lambda t: t.untyped_storage().data_ptr()
        results, known = list(tensors_in(result)), {storage(t) for t in tensors_in((args, kwargs or {}))}
        self.seen.append((str(function), [(t.shape, t.stride(), t.dtype) for t in results]))
        self.made += [(storage(t), t.untyped_storage().nbytes()) for t in results if storage(t) not in known]
        self.kept.append(result)
        return result

    def name(self, address):
        """An address inside a tensor made on the way as (which of them, bytes from its start): the allocator decides where it lies."""
        return next(((i, address - start) for i, (start, size) in enumerate(self.made) if start <= address < start + size), address)


def step_record(step, bucket):
    """Everything that a graph of this step would hold."""
    with TorchOperations() as operations, record() as launches:
        step(bucket)
    return [replace(launch, pointers={k: operations.name(p) for k, p in launch.pointers.items()}) for launch in launches], operations.seen


def same_step_record(step, bucket, batches):
    first = None
    step.stage(random_rows(0))
    step(bucket)                                                                            # makes the bucket's plan, as a warm-up does
    for seed in range(batches):
        step.stage(random_rows(seed))
        launches, operations = step_record(step, bucket)
        first = first or (launches, operations)
        assert launches == first[0], "the step's launches depend on its batch"
        assert operations == first[1], "the step's torch operations depend on its batch"
    return first


def test_batches_change_nothing_in_a_step(device):
    step = tiny_step(Step, device)
    launches, operations = same_step_record(step, T, CONTENTS)
    assert {"_schedule_kernel", "_attention_kernel"} <= {launch.kernel for launch in launches} and len(launches) > 10
    assert not [name for name, _ in operations if "_local_scalar_dense" in name or "nonzero" in name], "the step reads a tensor on the host"
    buffers = [t for name, t in step.buffers._views.items() if name != "turns"]              # which only a Loop around the step reads
    static = {t.data_ptr() for t in (step.results, step.cache.keys, step.cache.values, step.plan(T).positions, *buffers)}
    used = {address for launch in launches for address in launch.pointers.values()}
    assert static <= used, "a static tensor goes by another name than its address"


class CutTable(Step):
    """Cuts the block table to the longest row of the batch."""

    def stage(self, rows):
        self.width = max(len(row.pages) for row in rows)
        return super().stage(rows)

    def __call__(self, bucket):
        with patch.dict(self.buffers._views, block_table=self.buffers["block_table"][:, :self.width]):
            return super().__call__(bucket)


class LiveTokens(Step):
    """Computes the batch's own number of tokens."""

    def stage(self, rows):
        self.live = super().stage(rows)
        return self.live

    def __call__(self, bucket):
        return super().__call__(self.live)


class MovedLengths(Step):
    """Puts the lengths of every batch into a new tensor."""

    def stage(self, rows):
        tokens = super().stage(rows)
        self.buffers._views["seq_lens"] = self.buffers["seq_lens"].clone()
        return tokens


class GreedyShortcut(Step):
    """Draws nothing where no row wants it."""

    def stage(self, rows):
        self.greedy = not any(row.sampling.temperature for row in rows)
        return super().stage(rows)

    def __call__(self, bucket):
        with patch("gkernels.ops.sample_out") if self.greedy else nullcontext():
            return super().__call__(bucket)


@pytest.mark.parametrize("kind", [CutTable, LiveTokens, MovedLengths, GreedyShortcut])
def test_a_step_that_looks_at_its_batch_is_caught(device, kind):
    with pytest.raises(AssertionError, match="the step's launches depend on its batch"):
        same_step_record(tiny_step(kind, device), T, 20)


class HalvesOnTheHost(Step):
    """Lets torch do what depends on the batch."""

    def __call__(self, bucket):
        logits = super().__call__(bucket)
        return logits[:int(self.buffers["query_start_loc"][-1])] * 0.5


def test_a_step_whose_torch_operations_look_at_its_batch_is_caught(device):
    with pytest.raises(AssertionError, match="the step's torch operations depend on its batch"):
        same_step_record(tiny_step(HalvesOnTheHost, device), T, 20)


@pytest.mark.skipif(CUDA, reason="looks at the CPU interpreter")
@pytest.mark.parametrize("room", ROOMS)
def test_programs_neither_race_nor_mind_their_order(device, room):
    for i, (_, function, arguments) in enumerate(calls_of(room, device, torch.float16)):
        tensors = list(tensors_in(arguments))
        for t in tensors:
            if t.is_floating_point():
                t.copy_(randn(i, *t.shape))
        before = [t.clone() for t in tensors]
        with interpreter.accesses():
            function(*arguments)
        after = [t.clone() for t in tensors]
        for t, content in zip(tensors, before, strict=True):
            t.copy_(content)
        with interpreter.shuffled(i):
            function(*arguments)
        for t, content in zip(tensors, after, strict=True):
            assert_same(t, content)


@triton.jit
def _fill_kernel(out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, 1.0, offs < n)


@triton.jit
def _trusting_kernel(ids_ptr, table_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, tl.load(table_ptr + tl.load(ids_ptr + i).to(tl.int64)))


def grid_from_contents(length, out):
    _fill_kernel[(min(max(length.item(), 1), 4),)](out, 8, BLOCK=8)


def scalar_from_contents(length, out):
    _fill_kernel[(2,)](out, length.item() % 8, BLOCK=8)


def constexpr_from_contents(length, out):
    _fill_kernel[(2,)](out, 8, BLOCK=8 if length.item() % 2 else 16)


def address_from_contents(length, out):
    _fill_kernel[(2,)](out[length.item() % 2:], 4, BLOCK=8)


@pytest.mark.parametrize("bad", [grid_from_contents, scalar_from_contents, constexpr_from_contents, address_from_contents])
def test_a_launch_that_reads_contents_is_caught(device, bad):
    with pytest.raises(AssertionError, match="the launches depend on what the tensors contain"):
        same_record(bad, (counter(3, device), torch.zeros(32, device=device)), contents=20)


@pytest.mark.skipif(CUDA, reason="an illegal address ends the CUDA context")
def test_a_kernel_that_trusts_an_index_is_caught(device):
    arguments = torch.zeros(2, dtype=torch.int32), torch.zeros(4), torch.zeros(2)
    fill_with_junk(arguments[:1], torch.Generator().manual_seed(1))
    with interpreter.sanitize(), pytest.raises(AssertionError, match=r"_trusting_kernel: load .* is outside every argument"):
        _trusting_kernel[(2,)](*arguments)


def test_record_names_everything_that_a_graph_bakes_in(device):
    out = torch.zeros(8, device=device)
    with record() as launches:
        _fill_kernel[lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)](out, 8, BLOCK=4, num_warps=2)
    launch, = launches
    assert (launch.kernel, launch.grid) == ("_fill_kernel", (2,))
    assert launch.scalars == dict(n=8, BLOCK=4, num_warps=2) and launch.pointers == dict(out_ptr=out.data_ptr())
    with record() as launches:
        pass
    assert launches == [] and out.tolist() == [1.0] * 8
