"""The host half of gkernels.graph, which needs no GPU: buckets, static buffers and the runner's eager path."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkernels.graph import Buckets, Field, GraphRunner, StaticBuffers
from tests.close import assert_same

sizes = st.lists(st.integers(1, 600), min_size=1, max_size=8)
DTYPES = {torch.int32: st.integers(-2**31, 2**31 - 1), torch.int64: st.integers(-2**63, 2**63 - 1),
          torch.float32: st.floats(width=32, allow_nan=False)}


def check_buckets(kind, chosen):
    buckets = kind(chosen)
    assert list(buckets) == sorted(set(chosen)) and len(buckets) == len(set(chosen)) and repr(buckets) == f"Buckets({list(buckets)})"
    for n in range(1, max(chosen) + 1):
        assert buckets.covers(n) and buckets.pad(n) == min(size for size in chosen if size >= n)
    for n in (-1, 0, max(chosen) + 1):
        assert not buckets.covers(n)
        with pytest.raises(ValueError, match=rf"pad: got {n} tokens, expected 1 to {max(chosen)}; ask covers\(\) first"):
            buckets.pad(n)


@given(sizes)
def test_pad_is_the_least_bucket(chosen):
    check_buckets(Buckets, chosen)


def test_a_bucket_too_large_is_caught():
    class Roomy(Buckets):
        def pad(self, n):
            return max(size for size in self.sizes if size // 2 < super(Roomy, self).pad(n))

    with pytest.raises(AssertionError):
        check_buckets(Roomy, [1, 2, 4, 6])


@given(st.integers(1, 5000))
def test_up_to_covers_all_with_little_padding(most):
    buckets = Buckets.up_to(most)
    assert buckets.sizes[-1] == most and len(buckets) <= 8 + 4 * most.bit_length()
    for n in range(1, most + 1):
        padding = buckets.pad(n) - n
        assert padding < 8 if n <= 32 else padding < buckets.pad(n) / 5


@pytest.mark.parametrize("make, got", [(lambda: Buckets([]), r"\[\]"), (lambda: Buckets([4, 0]), r"\[0, 4\]"), (lambda: Buckets.up_to(0), r"\[0\]")])
def test_bad_sizes_are_named(make, got):
    with pytest.raises(ValueError, match=f"Buckets: sizes: got {got}, expected at least one size"):
        make()


@st.composite
def layouts(draw):
    """Fields of one and two dimensions with a pad each, and three batches of values that fit them, long and short."""
    fields, batches = {}, [{}, {}, {}]
    for i in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(list(DTYPES)))
        rows, columns = draw(st.integers(1, 9)), draw(st.sampled_from([None, 1, 5]))
        pad = draw(DTYPES[dtype] if columns else st.one_of(st.just("last"), DTYPES[dtype]))
        fields[f"f{i}"] = Field((rows, columns) if columns else (rows,), dtype, pad)
        value = st.lists(DTYPES[dtype], max_size=columns) if columns else DTYPES[dtype]
        for batch in batches:
            batch[f"f{i}"] = draw(st.lists(value, max_size=rows))
    return fields, batches


def padded(field, values):
    """What a field holds after stage(values), by its definition."""
    if len(field.shape) == 2:
        lines = [*values, *[[]] * (field.shape[0] - len(values))]
        return torch.tensor([[*line, *[field.pad] * (field.shape[1] - len(line))] for line in lines], dtype=field.dtype)
    pad = (values[-1] if values else 0) if field.pad == "last" else field.pad
    return torch.tensor([*values, *[pad] * (field.shape[0] - len(values))], dtype=field.dtype)


def check_buffers(kind, device, layout):
    fields, batches = layout
    buffers = kind(fields, device)
    addresses = {name: buffers[name].data_ptr() for name in fields}
    for batch in [dict.fromkeys(fields, ()), *batches, batches[0]]:
        for name, values in batch.items():
            buffers.wait()
            buffers.stage(name, values)
        buffers.upload()
        for name, values in batch.items():
            assert_same(buffers[name].cpu(), padded(fields[name], values))
            assert buffers[name].data_ptr() == addresses[name] and buffers[name].data_ptr() % 64 == 0 and buffers[name].is_contiguous()
            assert buffers[name].device.type == device.type
    buffers.check_addresses()


@given(layouts())
def test_stage_pads_and_leaves_no_stale_tail(device, layout):
    check_buffers(StaticBuffers, device, layout)


class StaleTail(StaticBuffers):
    """Forgets to pad behind a shorter batch."""

    def stage(self, name, values):
        host = self._host[name]
        if host.ndim == 1 and len(values):
            host[:len(values)] = values
        else:
            super().stage(name, values)


class StaleRow(StaticBuffers):
    """Forgets to pad behind a shorter row."""

    def stage(self, name, values):
        before = self._host[name].copy()
        super().stage(name, values)
        for row, old, line in zip(self._host[name], before, values, strict=False) if before.ndim == 2 else ():
            row[len(line):] = old[len(line):]


@pytest.mark.parametrize("broken, shape, batches", [(StaleTail, (3,), ([1, 2, 3], [4])), (StaleRow, (2, 3), ([[1, 2, 3]], [[4]]))])
def test_a_stale_tail_is_caught(device, broken, shape, batches):
    layout = {"x": Field(shape)}, [{"x": values} for values in batches]
    check_buffers(StaticBuffers, device, layout)
    with pytest.raises(AssertionError):
        check_buffers(broken, device, layout)


def test_new_buffers_hold_their_pads(device):
    buffers = StaticBuffers({"slot": Field((3,), torch.int64, -1), "p": Field((2,), torch.float32, 1.0), "starts": Field((2,), pad="last"),
                             "table": Field((2, 2), pad=7)}, device)
    assert [buffers[name].tolist() for name in ("slot", "p", "starts", "table")] == [[-1, -1, -1], [1.0, 1.0], [0, 0], [[7, 7], [7, 7]]]


def test_nothing_reaches_the_device_before_upload(device):
    buffers = StaticBuffers({"x": Field((2,))}, device)
    buffers.stage("x", [5])
    assert buffers["x"].tolist() == [0, 0]
    buffers.upload()
    assert buffers["x"].tolist() == [5, 0]


def test_arrays_stage_like_lists(device):
    buffers = StaticBuffers({"starts": Field((5,), pad="last"), "table": Field((3, 4))}, device)
    buffers.stage("starts", np.cumsum([0, 2, 3]))
    buffers.stage("table", np.arange(1, 7).reshape(2, 3))
    buffers.upload()
    assert buffers["starts"].tolist() == [0, 2, 5, 5, 5]
    assert buffers["table"].tolist() == [[1, 2, 3, 0], [4, 5, 6, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("name, values, words", [
    ("x", [1, 2, 3], "StaticBuffers: x: got 3 rows, expected at most 2"),
    ("table", [[1], [2], [3]], "StaticBuffers: table: got 3 rows, expected at most 2"),
    ("table", [[1, 2, 3, 4]], "StaticBuffers: table: got a row of 4, expected at most 3"),
])
def test_what_does_not_fit_is_named(device, name, values, words):
    buffers = StaticBuffers({"x": Field((2,)), "table": Field((2, 3))}, device)
    with pytest.raises(ValueError, match=words):
        buffers.stage(name, values)
    buffers.stage(name, values[:1] if name == "x" else [[9]])           # the next batch does not see the failed one
    buffers.upload()
    assert buffers[name].tolist() in ([1, 0], [[9, 0, 0], [0, 0, 0]])


def test_pad_last_is_for_one_dimension(device):
    with pytest.raises(ValueError, match=r"StaticBuffers: x: got pad 'last' for shape \(2, 3\), expected it for one dimension"):
        StaticBuffers({"x": Field((2, 3), pad="last")}, device)


def test_a_moved_buffer_is_named(device):
    buffers = StaticBuffers({"x": Field((2,)), "y": Field((2,))}, device)
    buffers["y"].fill_(3)
    buffers.check_addresses()
    buffers._views["y"] = buffers["y"].clone()
    with pytest.raises(RuntimeError, match=r"StaticBuffers: y moved from 0x[0-9a-f]+ to 0x[0-9a-f]+; write into the tensor"):
        buffers.check_addresses()


class Recorder:
    """A step that notes its buckets, and raises at those named."""

    def __init__(self, bad=()):
        self.seen, self.bad = [], bad

    def __call__(self, bucket):
        self.seen.append(bucket)
        if bucket in self.bad:
            raise KeyError(bucket)
        return f"out {bucket}"


@given(sizes, st.lists(st.integers(1, 700), max_size=6))
def test_run_without_graphs_pads_to_the_bucket(chosen, ns):
    step, buckets = Recorder(), Buckets(chosen)
    runner = GraphRunner(step, buckets, "cpu")
    want = [buckets.pad(n) if buckets.covers(n) else n for n in ns]
    assert [runner.run(n) for n in ns] == [f"out {n}" for n in want]
    assert step.seen == want and (runner.eager_steps, runner.replays) == (len(ns), 0)
    assert not any(runner.covers(n) for n in ns)


def test_capture_on_the_cpu_makes_no_graph():
    step = Recorder()
    runner = GraphRunner(step, Buckets([1, 4]), "cpu")
    runner.capture()
    assert not step.seen and not runner.graphs and not runner.covers(1)
    assert runner.path == "eager on the CPU interpreter" and runner.report() == "no graphs: eager on the CPU interpreter"
    assert GraphRunner(step, Buckets([1]), "cuda").path == "eager on CUDA"


def test_an_exception_leaves_the_runner_usable():
    step = Recorder(bad={4})
    runner = GraphRunner(step, Buckets([1, 4, 8]), "cpu")
    with pytest.raises(KeyError):
        runner.run(3)
    assert runner.run(1) == "out 1" and runner.run(5) == "out 8" and step.seen == [4, 1, 8]
