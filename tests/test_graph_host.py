"""The host half of gkernels.graph, which needs no GPU: buckets, static buffers and the runner's eager path."""

import itertools
import time
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gkernels.graph import Buckets, Field, GraphRunner, StaticBuffers
from gkernels.graph.buffers import LONGEST_NAP
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


def waste(sizes, counts):
    """Pads of the steps that the sizes cover, by the definition."""
    return sum(steps * (min(size for size in sizes if size >= n) - n) for n, steps in counts.items() if n <= max(sizes))


def is_dense(sizes, max_padding, free):
    return all(min(size for size in sizes if size >= n) - n <= max(free, max_padding * n) for n in range(1, max(sizes) + 1))


def best_by_trial(counts, most, max_padding, limit, free):
    """(pads, number of buckets) of the best of all sets of buckets; None where no set is dense enough."""
    others = [list(combination) for k in range(min(limit, most)) for combination in itertools.combinations(range(1, most), k)]
    return min(((waste([*some, most], counts), len(some) + 1) for some in others if is_dense([*some, most], max_padding, free)), default=None)


def check_from_histogram(kind, counts, most, max_padding, limit):
    best = best_by_trial(counts, most, max_padding, limit, kind.FREE_PADS)
    if best is None:
        with pytest.raises(ValueError, match=f"from_histogram: got limit = {limit}, expected more: .* pad some step by more than"):
            kind.from_histogram(counts, most, max_padding, limit)
        return
    buckets = kind.from_histogram(counts, most, max_padding, limit)
    assert is_dense(buckets.sizes, max_padding, kind.FREE_PADS) and buckets.sizes[-1] == most
    assert (waste(buckets.sizes, counts), len(buckets)) == best, "not the best"


class Strict(Buckets):
    FREE_PADS = 1


@given(st.sampled_from([Buckets, Strict]), st.dictionaries(st.integers(1, 12), st.integers(0, 9), max_size=6), st.integers(1, 11),
       st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(1, 6))
def test_from_histogram_is_the_best_of_all_sets(kind, counts, most, max_padding, limit):
    check_from_histogram(kind, counts, most, max_padding, limit)


@pytest.mark.parametrize("kind, sizes, options, words", [
    (Buckets, [5, 9], ({2: 5, 9: 1}, 9, 1.0, 2), "not the best"),               # at equal distances, where [2, 9] has no pads
    (Buckets, [2, 5, 9], ({2: 5, 9: 1}, 9, 1.0, 4), "not the best"),            # more than serve
    (Strict, [1, 10], ({1: 1}, 10, 0.25, 9), "assert"),                         # 2 would be padded by 8
])
def test_control_worse_buckets_are_seen(kind, sizes, options, words):
    class Broken(kind):
        from_histogram = classmethod(lambda cls, *args: cls(sizes))

    with pytest.raises(AssertionError, match=words):
        check_from_histogram(Broken, *options)


@given(st.dictionaries(st.integers(1, 3000), st.integers(1, 10**6), max_size=40), st.integers(1, 700))
@settings(max_examples=5)
def test_from_histogram_pads_little_and_beats_the_fixed_sizes(counts, most):
    buckets, fixed = Buckets.from_histogram(counts, most), Buckets.up_to(most)
    assert is_dense(buckets.sizes, 0.25, 7) and len(buckets) <= 32
    assert waste(buckets.sizes, counts) <= waste(fixed.sizes, counts) or len(fixed) > 32


@pytest.mark.parametrize("counts, options", [({}, {"most": 0}), ({}, {"limit": 0}), ({}, {"max_padding": -0.1}), ({}, {"max_padding": float("nan")}),
                                             ({0: 1}, {}), ({4: -1}, {})])
def test_bad_histograms_are_named(counts, options):
    with pytest.raises(ValueError, match=r"Buckets: from_histogram: got most = .* expected at least 1, 1, 0 and 1, and no negative number of steps"):
        Buckets.from_histogram(counts, **{"most": 8} | options)


@given(sizes, st.lists(st.integers(1, 700), max_size=30))
def test_report_counts_hits_and_pads(chosen, trace):
    buckets = Buckets(chosen)
    usage, covered = buckets.report(trace), [n for n in trace if n <= max(chosen)]
    computed = sum(buckets.pad(n) for n in covered)
    assert usage.rows == tuple((size, sum(buckets.pad(n) == size for n in covered), sum(n for n in covered if buckets.pad(n) == size))
                               for size in buckets)
    assert usage.missed == len(trace) - len(covered)
    assert round(usage.hit_rate * len(trace)) == len(covered) and round(usage.waste * computed) == computed - sum(covered)


def test_report_reads_as_a_table():
    assert str(Buckets([4, 16, 32]).report([3, 4, 9, 99])) == """\
  tokens     steps        live        pads  waste
       4         2           7           1  12.5%
      16         1           9           7  43.8%
      32         0           0           0   0.0%
75.0% of the steps in a bucket, 1 in none; 33.3% of their rows are pads"""
    empty = Buckets([4]).report([])
    assert (empty.hit_rate, empty.waste) == (0, 0)


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


class TwoBlocks(StaticBuffers):
    """Comes back to a block soon."""

    BLOCKS = 2


@pytest.mark.parametrize("kind", [StaticBuffers, TwoBlocks])
@given(layout=layouts())
def test_stage_pads_and_leaves_no_stale_tail(device, kind, layout):
    check_buffers(kind, device, layout)


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


def check_is_refused(buffers):
    with pytest.raises(RuntimeError, match="upload: got a stream that is captured, expected one between launches"):
        buffers.upload()


@pytest.mark.gpu
def test_a_captured_step_cannot_upload():
    """And nothing is lost by the attempt: not what was staged, nor the capture."""
    buffers, graph = StaticBuffers({"x": Field((2,))}, "cuda"), torch.cuda.CUDAGraph()
    buffers.stage("x", [5])
    with torch.cuda.graph(graph):
        buffers["x"].add_(1)
        check_is_refused(buffers)
    buffers.upload()
    graph.replay()
    assert buffers["x"].tolist() == [6, 1]


def test_a_refused_upload_changes_nothing(monkeypatch):
    buffers = StaticBuffers({"x": Field((2,))}, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        buffers.upload()                               # where no graph uploads no stream is asked
        patch.setattr(buffers._copies, "graphs", {1: None})
        patch.setattr(buffers, "wait", lambda: pytest.fail("asks the stream"))
        check_is_refused(buffers)
    buffers.stage("x", [5])
    buffers.upload()
    assert buffers["x"].tolist() == [5, 0]


def test_an_upload_that_fails_loses_nothing(device, monkeypatch):
    buffers = StaticBuffers({"x": Field((2,)), "y": Field((1,))}, device)
    buffers.stage("x", [5])
    with monkeypatch.context() as patch:
        patch.setattr(buffers._copies, "run", Mock(side_effect=RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            buffers.upload()
    buffers.stage("y", [7])
    buffers.upload()
    assert buffers["x"].tolist() == [5, 0] and buffers["y"].tolist() == [7]
    buffers.upload()
    assert buffers["x"].tolist() == [5, 0]


def check_rest(kind, device, names, rounds):
    """A field that is not staged between two uploads holds what it held."""
    buffers, known = kind({name: Field((2,)) for name in names}, device), {name: [0, 0] for name in names}
    for staged in rounds:
        for name, values in staged.items():
            buffers.stage(name, values)
            known[name] = values
        buffers.upload()
        assert {name: buffers[name].tolist() for name in names} == known


@pytest.mark.parametrize("kind", [StaticBuffers, TwoBlocks])
@given(rounds=st.lists(st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(1, 99), min_size=2, max_size=2)), min_size=1, max_size=6))
def test_what_is_not_staged_stays(device, kind, rounds):
    check_rest(kind, device, "abc", rounds)


def test_a_block_that_forgets_the_other_is_caught(device):
    class Forgets(StaticBuffers):
        def upload(self):
            self._staged.update(self.fields)
            super().upload()

    with pytest.raises(AssertionError):
        check_rest(Forgets, device, "ab", [{"a": [1, 2]}, {"b": [3, 4]}])


def check_steady(kind, device, rounds):
    """Steady values are what is staged, whatever came before, in this block and in the other, and whatever the device has made of them."""
    fields = {"x": Field((3,), pad=-1), "starts": Field((3,), pad="last"), "table": Field((2, 3), pad=-1)}
    buffers, want = kind(fields, device), {name: padded(field, ()) for name, field in fields.items()}
    for staged in rounds:
        for name, (values, steady) in staged.items():
            if len(values) > len(want[name]):
                with pytest.raises(ValueError, match=f"{name}: got 4 rows, expected at most"):
                    buffers.stage(name, values, steady)
                continue
            buffers.stage(name, values, steady)
            want[name] = padded(fields[name], values)
        for name in fields:
            buffers[name].fill_(99)
        buffers.upload()
        for name in fields:
            assert_same(buffers[name].cpu(), want[name])


few = st.integers(0, 1)                                # so that values come again
numbers, lines = (st.lists(item, max_size=4).map(tuple) for item in (few, st.lists(few, max_size=3).map(tuple)))
rows_of = {"x": numbers, "starts": numbers, "table": lines.filter(lambda rows: len(rows) != 3)}
again = [{"x": (values, steady), "table": ((values,), steady)} for values, steady in (((0,), True), ((1,), False), ((0,), True)) for _ in range(2)]


class AtOnce(StaticBuffers):
    def stage(self, name, values, steady=False):
        if steady:
            self.stage_steady({name: values})
        else:
            super().stage(name, values)


@pytest.mark.parametrize("kind", [StaticBuffers, TwoBlocks, AtOnce])
@given(rounds=st.lists(st.fixed_dictionaries({}, optional={name: st.tuples(values, st.booleans()) for name, values in rows_of.items()}), max_size=8))
@settings(max_examples=100)
@example(again)
def test_steady_values_are_what_is_staged(device, kind, rounds):
    check_steady(kind, device, rounds)


class Grows(StaticBuffers):
    """Believes that a row which grew begins with what it had."""

    def stage(self, name, values, steady=False):
        known = self._known[(self._turn + self._is_sent) % self.BLOCKS]
        if self.fields[name].pad == -1 and known[name] and len(self.fields[name].shape) == 2:
            known[name] = tuple(new[:len(old)] for new, old in zip(values, known[name], strict=False))
        super().stage(name, values, steady)


class Ends(StaticBuffers):
    """Forgets that rows behind the last one held something."""

    def stage(self, name, values, steady=False):
        known = self._known[(self._turn + self._is_sent) % self.BLOCKS]
        known[name] = known[name] and known[name][:len(values)]
        super().stage(name, values, steady)


@pytest.mark.parametrize("kind, first, then", [(Grows, ((0,),), ((1, 1),)), (Ends, ((1,), (1, 0)), ((1,),))])
def test_rows_that_are_not_compared_are_caught(device, kind, first, then):
    rounds = [{"table": (values, True)} for values in (*[first] * StaticBuffers.BLOCKS, then)]
    check_steady(StaticBuffers, device, rounds)
    with pytest.raises(AssertionError):
        check_steady(kind, device, rounds)


@pytest.mark.parametrize("name, old, bad", [("x", (1, 2), (3, "bad")), ("table", ((1,), (2,)), ((3,), ("bad",)))])
def test_a_write_that_fails_is_made_good(device, name, old, bad):
    buffers = StaticBuffers({"x": Field((2,)), "table": Field((2, 1))}, device)
    for values in (*[old] * StaticBuffers.BLOCKS, bad, old):
        with pytest.raises(ValueError, match="bad") if values is bad else nullcontext():
            buffers.stage(name, values, steady=True)
        if values is not bad:
            buffers.upload()
    assert buffers[name].flatten().tolist() == [1, 2]


@pytest.mark.parametrize("name, old, new", [("x", 1, 2), ("table", [1], [2])])
def test_steady_lists_may_be_changed_in_place(device, name, old, new):
    """They are no tuples, and cost a copy or a write, but what is compared is never what the caller can change."""
    buffers, values = StaticBuffers({"x": Field((2,)), "table": Field((2, 2))}, device), [old, old]
    for _ in range(StaticBuffers.BLOCKS + 1):
        buffers.stage(name, values, steady=True)
        buffers.upload()
    if name == "table":
        values[1][0] = 2
    else:
        values[:] = [new, new]
    buffers.stage(name, values, steady=True)
    buffers.upload()
    assert buffers[name].flatten().tolist() == ([2, 2] if name == "x" else [2, 0, 2, 0])


def test_steady_values_of_another_block_are_caught(device):
    class OneMemory(StaticBuffers):
        def __init__(self, fields, device):
            super().__init__(fields, device)
            self._known[1] = self._known[0]

    rounds = [{"x": ((1,), True), "table": ((), True)}] * StaticBuffers.BLOCKS
    check_steady(StaticBuffers, device, rounds)
    with pytest.raises(AssertionError):
        check_steady(OneMemory, device, rounds)


def test_a_row_that_is_too_long_changes_nothing(device):
    buffers = StaticBuffers({"table": Field((2, 2))}, device)
    buffers.stage("table", [[1, 2], [3]])
    with pytest.raises(ValueError, match="table: got a row of 3, expected at most 2"):
        buffers.stage("table", [[4], [5, 6, 7]])
    buffers.upload()
    assert buffers["table"].tolist() == [[1, 2], [3, 0]]


class OneBlock(StaticBuffers):
    """Writes where an upload may still read."""

    BLOCKS = 1

    def wait(self):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("kind, seen", [(StaticBuffers, range(2, 9)), (OneBlock, [8] * 7)])
def test_batches_are_staged_while_the_device_is_busy(kind, seen):
    """As many as there are blocks but one, which holds what was uploaded first."""
    buffers = kind({"x": Field((1,))}, "cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    got = []
    for value in range(2, 9):
        buffers.stage("x", [value])
        buffers.upload()
        got.append(buffers["x"].clone())
    assert not torch.cuda.current_stream().query(), "staging waited for the device"
    assert [x.item() for x in got] == [*seen]


@pytest.mark.gpu
def test_staging_waits_for_a_block(monkeypatch):
    """Far more batches than blocks behind a busy device: each arrives as it was staged, and the host sleeps meanwhile."""
    buffers, slept, sleep = StaticBuffers({"x": Field((1,))}, "cuda"), [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds) or sleep(seconds))
    torch.cuda.synchronize()
    got = []
    for value in range(40):
        torch.cuda._sleep(4_000_000)
        buffers.stage("x", [value])
        buffers.upload()
        got.append(buffers["x"].clone())
    assert [x.item() for x in got] == [*range(40)] and slept and max(slept) <= LONGEST_NAP


class Device:
    """What takes uploads in turn, one when its step before has ended, by a clock that only sleeps and stages move."""

    def __init__(self, monkeypatch, buffers):
        self.clock, self.free, self.idle, self.arrived, self.naps, self.asked = 0.0, 0.0, 0.0, [], 0, 0
        self.buffers = buffers
        monkeypatch.setattr("gkernels.graph.buffers.time", SimpleNamespace(sleep=self.sleep, monotonic=lambda: self.clock))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(query=self.query))
        buffers._arrivals, buffers._waited, buffers._sent = self, (0.0, 0), 0

    def __getitem__(self, i):
        return sum(at <= self.clock for at in self.arrived)

    def sleep(self, seconds):
        self.clock, self.naps = self.clock + seconds + 6e-5, self.naps + 1

    def query(self):
        self.asked += 1
        if self.asked > 3:
            raise RuntimeError("the device has failed")

    def step(self, seconds):
        self.clock += 1e-4                                                 # the host's own
        self.buffers.stage("x", [1])
        assert self[0] >= self.buffers._serials[self.buffers._turn][0], "a block is written that is still to be read"
        self.buffers.upload()
        self.idle += max(self.clock - self.free, 0)
        self.arrived.append(max(self.clock, self.free))
        self.free = self.arrived[-1] + seconds


@pytest.mark.parametrize("seconds, naps", [([1e-3] * 300, 0.8), ([7e-3] * 300, 2.5), ([1e-3, 7e-3, 1e-3] * 100, 1.5), ([2e-4] * 300, 0.4),
                                           (([7e-3] * 50 + [1e-3] * 50) * 3, 2.0)], ids=["decode", "prefill", "mixed", "short", "phases"])
def test_a_host_that_is_ahead_naps_seldom_and_keeps_its_device_busy(monkeypatch, seconds, naps):
    device = Device(monkeypatch, StaticBuffers({"x": Field((1,))}, "cpu"))
    for step in seconds:
        device.step(step)
    assert device.naps <= naps * len(seconds) and not device.asked
    assert device.idle < 0.01 * sum(seconds)


def test_a_device_that_has_failed_is_told(monkeypatch):
    device = Device(monkeypatch, StaticBuffers({"x": Field((1,))}, "cpu"))
    device.step(float("inf"))
    with pytest.raises(RuntimeError, match="the device has failed"):
        for _ in range(StaticBuffers.BLOCKS + 1):
            device.step(1.0)


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
