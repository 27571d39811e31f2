"""The only timer and the only printer of the benches.

A figure is the median over graph replays of one launch's time with cold caches: enough independent sets of buffers are launched one after
another in a single graph that the L2 has forgotten each by its next turn. What a figure holds besides the kernel is the gap between two
graph nodes, 0.7 to 1.2 us on an H200, the same for every provider.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parent.parent
# measured: a read-only stream, and a bf16 8192^3 matrix product
CEILINGS = {"h200": {"tbs": 4.44, "tflops": 792.0}, "h100-80gb-hbm3": {"tbs": 3.05, "tflops": 745.0}}
COLD_BYTES = 120_000_000                              # twice the L2 of an H200
MOST_CLOSURES = 64
LEAST_LAUNCHES = 16                                   # in a graph, so that its own start is under a tenth of a microsecond a launch
ENOUGH_US = 150_000                                   # of measured replays, of which there are at least LEAST_REPLAYS
LEAST_REPLAYS = 5
HOST_CYCLES = 2_000_000                               # 1 ms of the device's, in which the host makes the first launch
ROWS: list[dict] = []
ONLY = ""                                             # regular expression: cases that it is not found in are left out
PROVIDERS: tuple[str, ...] = ()                       # and providers that are not named; none named: all
TRACE = False                                         # whether decode_step tells where its time goes


def bench(room: str, case: str, provider: str, make: Callable[[int], Callable[[], None]], bytes: int = 0, flops: int = 0,
          cold: bool = True) -> float | None:
    """Times make(0), make(1), ... (each a closure with buffers of its own) in one graph, records a row and returns microseconds a launch; None
    for a row that is not `wanted`, of which nothing is made.

    `bytes` is what one launch must move, `flops` what it must compute. With `cold=False` one closure is launched over and over: for ops
    so small that no number of buffers fills the L2, and whose inputs were just written in a real step anyway.
    """
    if not wanted(case, provider):
        return None
    count = closures(bytes) if cold else 1
    calls = [make(i) for i in range(count)]
    calls *= -(-(LEAST_LAUNCHES if cold else MOST_CLOSURES) // count)

    def launch_all():
        for call in calls:
            call()

    us = timed_graph(launch_all) / len(calls)
    record(bench=room, case=case, provider=provider, us=round(us, 3), cold=cold and count * bytes > COLD_BYTES, **rates(us, bytes, flops))
    return us


def floor(room: str, case: str, bytes: int, flops: int = 0) -> float | None:
    """Records what the device's ceilings allow, a row like `bench`'s whose provider is "floor". None where no ceiling was measured."""
    if device() not in CEILINGS or not wanted(case, "floor"):
        return None
    us = least_us(bytes, flops)
    record(bench=room, case=case, provider="floor", us=round(us, 3), cold=True, **rates(us, bytes, flops))
    return us


def floor_us(bytes: int, flops: int = 0) -> dict[str, float]:
    """What a row may say of the time that the device's ceilings allow; nothing where they were not measured."""
    return {"floor_us": round(least_us(bytes, flops), 1)} if device() in CEILINGS else {}


def least_us(bytes: int, flops: int) -> float:
    """The greater of what moving and computing take at the device's ceilings, in microseconds."""
    ceilings = CEILINGS[device()]
    return max(bytes / ceilings["tbs"], flops / ceilings["tflops"]) / 1e6


def rates(us: float, bytes: int, flops: int) -> dict[str, float]:
    """TB/s and TFLOP/s, those that are known."""
    figures = {"tbs": round(bytes / us / 1e6, 4)} if bytes else {}
    return figures | ({"tflops": round(flops / us / 1e6, 2)} if flops else {})


def wanted(case: str, provider: str) -> bool:
    """Whether ONLY and PROVIDERS ask for this row."""
    return re.search(ONLY, case) is not None and (not PROVIDERS or provider in PROVIDERS)


def closures(bytes: int) -> int:
    """How many sets of buffers push each other out of the L2; 8 where the bytes are not known."""
    return min(COLD_BYTES // bytes + 1, MOST_CLOSURES) if bytes else 8


def timed_graph(fn: Callable[[], None], times: int = 20) -> float:
    """Captures fn, replays it `times` times, fewer where `replays` says so, and returns the median time of a replay in microseconds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    warm = timed_replays(graph, 3)
    return statistics.median(timed_replays(graph, replays(warm[-1], times)))


def timed_replays(graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
    """Microseconds of each of `times` replays, all in the queue before the first is waited for."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1000 for start, end in events]


def timed_launches(prepare: Callable[[], object], launch: Callable[[], object], read: Callable[[], object], count: int,
                   times: int = 5) -> tuple[float, float]:
    """Medians, in microseconds, of two things: what `count` launches, queued one behind the other, take on the device; and the processor time that
    this process spends where each is followed by `read`, which waits for it. `prepare` comes before either, and is not timed."""
    on_device, on_host = [], []
    for _ in range(times + 1):                            # the first is a warm-up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepare()
        torch.cuda.synchronize()
        torch.cuda._sleep(HOST_CYCLES)
        start.record()
        for _ in range(count):
            launch()
        end.record()
        torch.cuda.synchronize()
        on_device.append(start.elapsed_time(end) * 1000)
        prepare()
        torch.cuda.synchronize()
        before = time.process_time()
        for _ in range(count):
            launch()
            read()
        on_host.append((time.process_time() - before) * 1e6)
    return statistics.median(on_device[1:]), statistics.median(on_host[1:])


def replays(us: float, times: int) -> int:
    """`times`, or as many replays of `us` microseconds as ENOUGH_US holds, but LEAST_REPLAYS."""
    return min(times, max(int(ENOUGH_US / us), LEAST_REPLAYS))


def record(*, bench: str, case: str, provider: str, us: float, **figures) -> None:
    """Adds a row to what `save` writes, with the source it was measured on, and prints it as progress."""
    ROWS.append(dict(bench=bench, case=case, provider=provider, us=us, **figures, source=source(), date=datetime.date.today().isoformat()))
    host = f", {figures['host_us']:.2f} us of the host's" if "host_us" in figures else ""
    print(f"  {bench:<12} {case:<32} {provider:<14} {us:10.2f} us{host}", flush=True)


def source(root: Path = ROOT) -> str:
    """Names the code a figure belongs to: sha256 over each gkernels/**/*.py in the order of its path: path, NUL, bytes."""
    digest = hashlib.sha256()
    for path in sorted((root / "gkernels").rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def device() -> str:
    """The device's name in file names: "h200" for an NVIDIA H200."""
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
    return "h200" if "h200" in name else "-".join(name.split())


def results_file(name: str) -> Path:
    """Where a file of results is written: bench/results/, under $OUT where that is set."""
    return Path(os.environ.get("OUT") or ROOT, "bench", "results", name)


def save(rows: list[dict] | None = None, name: str | None = None) -> Path:
    """Merges rows (those recorded) into bench/results/<device>.json, under $OUT where that is set: a row takes the place of the one with
    its bench, case and provider; all else in the file stays."""
    rows, name = ROWS if rows is None else rows, name or device()
    path, kept = results_file(f"{name}.json"), ROOT / "bench" / "results" / f"{name}.json"
    old: dict = next((json.loads(p.read_text()) for p in (path, kept) if p.exists()), {})
    key = lambda row: (row["bench"], row["case"], row["provider"])
    merged = {key(row): row for row in old.get("rows", []) + rows}
    results = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "tests": old.get("tests", {}),
               "rows": list(merged.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def table(rows: list[dict], ceilings: dict[str, float] | None = None) -> None:
    """Prints the rows in aligned columns. A ceiling is in TB/s or TFLOP/s, and gives the share of it that a row reaches; of two rates the one
    nearer to its ceiling is shown."""
    ceilings = ceilings or {}
    lines = [("bench", "case", "provider", "us", "rate", "of ceiling")]
    for row in rows:
        unit = max((u for u in ("tbs", "tflops") if u in row), key=lambda u: row[u] / ceilings.get(u, math.inf), default="tbs")
        rate = f"{row[unit]:.2f} {'TB/s' if unit == 'tbs' else 'TFLOP/s'}" if unit in row else ""
        share = f"{100 * row[unit] / ceilings[unit]:.0f} %" if unit in row and unit in ceilings else ""
        lines.append((row["bench"], row["case"], row["provider"], f"{row['us']:.2f}", rate, share))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        words = [word.ljust(width) if i < 3 else word.rjust(width) for i, (word, width) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(words).rstrip())
