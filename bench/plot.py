"""Draws saved rows as SVG:  python -m bench.plot [bench/results/<device>.json].  The benches of attention and of graphs call it too.

Colours, greys and the empty background are chosen to be read on white and on black.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from bench import harness

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 64, 20, 46, 92       # pixels; the margins hold the title, the axes and the caption
GREY = "#808080"
STYLES = {"gkernels": ("#e8590c", "circle"), "fa3": ("#3b82d6", "square"), "flashinfer": ("#12a37a", "diamond"), "floor": (GREY, "")}
GRAPHS = {"monolithic": ("#e8590c", "circle"), "piecewise": ("#3b82d6", "square"), "choosing": ("#12a37a", "diamond"),
          "shared": ("#a35bd6", "square"), "eager": ("#b0891a", "diamond"), "exact": (GREY, "")}
LABELS = {"fa3": "FlashAttention-3", "flashinfer": "FlashInfer"}
DEVICES = {"h200": "NVIDIA H200"}
MIXED = "Llama-3.2-1B, up to 31 decodes and a chunk of a prompt, bf16"
SETTING = "32 query heads, 8 KV heads, D 128, page 16, bf16, cold caches"


@dataclass(frozen=True)
class Axis:
    label: str
    low: float
    high: float
    ticks: dict[float, str]               # value -> its words
    is_log: bool = False

    def at(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        scale = math.log if self.is_log else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))


def attention(path: Path) -> list[Path]:
    """Writes attention_context.svg and attention_batch.svg beside the results and returns their paths; none that would show no row of ours.
    Rows of ours count while their source is the tree's; those of the others do not depend on it."""
    results, source = json.loads(path.read_text()), harness.source()
    rows = [row for row in results["rows"] if row["bench"] == "attention" and row["provider"] in STYLES
            and (row["provider"] != "gkernels" or row["source"] == source)]
    ceiling = harness.CEILINGS.get(results["device"], {}).get("tbs")
    device, written = DEVICES.get(results["device"], results["device"]), []
    for name, draw in (("attention_context", context), ("attention_batch", batch)):
        figure = draw(rows, device, ceiling)
        if figure:
            written.append(path.with_name(f"{name}.svg"))
            written[-1].write_text(figure)
    return written


def graphs(path: Path) -> list[Path]:
    """Writes graph_latency.svg and graph_memory.svg beside the results, of rows whose source is the tree's, and returns their paths; none without a
    row of monolithic."""
    results, source = json.loads(path.read_text()), harness.source()
    rows = [row for row in results["rows"] if row["bench"] == "graph" and row["provider"] in GRAPHS and row["source"] == source]
    device, written = DEVICES.get(results["device"], results["device"]), []
    for name, draw in (("graph_latency", latency), ("graph_memory", memory)):
        figure = draw(rows, device)
        if figure:
            written.append(path.with_name(f"{name}.svg"))
            written[-1].write_text(figure)
    return written


def latency(rows: list[dict], device: str) -> str:
    """Time of a mixed step over its live tokens."""
    points, shown = series(rows, r".* mixed (\d+)", lambda row, n: (n, row["us"]), GRAPHS)
    if "monolithic" not in points:
        return ""
    times, live = [row["us"] for row in shown], sorted({x for line in points.values() for x, _ in line})
    x = Axis("live tokens", live[0] / 1.25, live[-1] * 1.25, {n: f"{n:,}" for n in live}, True)
    y = Axis("time, us", min(times) / 1.3, max(times) * 1.3, decades(min(times) / 1.3, max(times) * 1.3), True)
    return svg("A mixed step in one graph", x, y, points, caption(device, shown, MIXED), styles=GRAPHS)


def memory(rows: list[dict], device: str) -> str:
    """What the pool holds once a bucket is captured, the largest first."""
    shown = [row for row in rows if "pools" in row]
    points = {row["provider"]: sorted(held(row["pools"])) for row in shown}
    if "monolithic" not in points:
        return ""
    sizes = [size for size, _ in points["monolithic"]]
    most = max(mib for line in points.values() for _, mib in line) * 1.1 or 1.0
    powers = {n: f"{n:,.0f}" for n in sizes if math.log2(n).is_integer()}
    x = Axis("bucket, tokens; the largest is captured first", sizes[0] / 1.25, sizes[-1] * 1.25, powers, True)
    y = Axis("memory of the pool, MiB", 0.0, most, {most * i / 4: f"{most * i / 4:.0f}" for i in range(5)})
    return svg("Memory over buckets", x, y, points, caption(device, shown, MIXED), styles=GRAPHS)


def held(pools: dict[str, float]) -> list[tuple[float, float]]:
    """(bucket, what is held after its capture) of what each capture, the largest first, takes from the device."""
    sizes = sorted(map(int, pools), reverse=True)
    return list(zip(map(float, sizes), itertools.accumulate(pools[str(size)] for size in sizes), strict=True))


def context(rows: list[dict], device: str, ceiling: float | None) -> str:
    """Time over context, one request."""
    points, shown = series(rows, r"decode 1x(\d+)", lambda row, n: (n, row["us"]))
    if "gkernels" not in points:
        return ""
    times = [row["us"] for row in shown]
    lengths = sorted({x for line in points.values() for x, _ in line})
    x = Axis("context, tokens", lengths[0] / 1.25, lengths[-1] * 1.25, {n: f"{n:,}" for n in lengths}, True)
    y = Axis("time, us", min(times) / 1.3, max(times) * 1.3, decades(min(times) / 1.3, max(times) * 1.3), True)
    return svg("Decode attention, one request", x, y, points, caption(device, shown), floor_label(ceiling))


def batch(rows: list[dict], device: str, ceiling: float | None) -> str:
    """Share of the read ceiling over the batch."""
    if ceiling is None:
        return ""
    contexts: dict[float, str] = {}

    def point(row, n, length):
        contexts[n] = f"{n} x {length}"
        return n, 100 * row["tbs"] / ceiling
    points, shown = series(rows, r"decode (\d+)x(\d+)", lambda row, n, length: point(row, n, length) if n > 1 else None)
    if "gkernels" not in points:
        return ""
    top = max(100.0, *(share for line in points.values() for _, share in line)) + 5
    x = Axis("requests x context, tokens", min(contexts) / 1.25, max(contexts) * 1.25, contexts, True)
    y = Axis("share of the read ceiling, %", 0.0, top, {share: f"{share:.0f}" for share in range(0, 101, 20)})
    return svg("Decode attention, keys and values read", x, y, points, caption(device, shown), floor_label(ceiling))


def series(rows, pattern, point, styles=STYLES):
    """{provider: [(x, y), ...] in order of x}, and the rows shown: those whose whole case fits the pattern, where `point` of the row and the
    case's numbers is not None."""
    found = {provider: [] for provider in styles}
    for row in rows:
        match = re.fullmatch(pattern, row["case"])
        if match and (at := point(row, *map(int, match.groups()))) is not None:
            found[row["provider"]].append((at, row))
    points = {provider: sorted(at for at, _ in line) for provider, line in found.items() if line}
    return points, [row for line in found.values() for _, row in line]


def decades(low: float, high: float) -> dict[float, str]:
    """1, 2 and 5 times the powers of ten between."""
    steps = [digit * 10.0**power for power in range(-2, 8) for digit in (1, 2, 5)]
    return {step: f"{step:g}" for step in steps if low <= step <= high}


def caption(device, shown, setting=SETTING):
    dates = sorted({row["date"] for row in shown})
    return f"{device}, {' to '.join(dates[:1] + dates[1:][-1:])}; {setting}"


def floor_label(ceiling):
    return f"floor: read at {ceiling:.2f} TB/s" if ceiling else "floor"


def svg(title: str, x: Axis, y: Axis, points: dict[str, list[tuple[float, float]]], caption: str, floor: str = "floor",
        styles: dict[str, tuple[str, str]] = STYLES) -> str:
    """One line a provider, in the order of `styles`, with a legend under the axis."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    px = lambda value: LEFT + x.at(value) * (right - LEFT)
    py = lambda value: bottom - y.at(value) * (bottom - TOP)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
             f'font-family="system-ui, sans-serif" font-size="12" fill="{GREY}">', f"<title>{escape(title)}</title>",
             text(LEFT, TOP - 22, title, "start", 'font-size="15" font-weight="600"')]
    for value, words in y.ticks.items():
        lines += [f'<path d="M{LEFT} {py(value):.1f}H{right}" stroke="{GREY}" stroke-opacity=".25"/>', text(LEFT - 8, py(value) + 4, words, "end")]
    for value, words in x.ticks.items():
        lines += [f'<path d="M{px(value):.1f} {bottom}v5" stroke="{GREY}"/>', text(px(value), bottom + 19, words, "middle")]
    middle = (TOP + bottom) / 2
    lines += [f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="{GREY}"/>',
              text((LEFT + right) / 2, bottom + 37, x.label + " (log scale)" * x.is_log, "middle"),
              text(16, middle, y.label + " (log scale)" * y.is_log, "middle", f'transform="rotate(-90 16 {middle:.0f})"'),
              text(LEFT, HEIGHT - 8, caption, "start", 'font-size="11"')]
    at = float(LEFT)
    for provider in reversed([name for name in styles if name in points]):      # drawn last, gkernels lies on top
        colour, shape = styles[provider]
        path = "L".join(f"{px(a):.1f} {py(b):.1f}" for a, b in points[provider])
        dashes = "" if shape else ' stroke-dasharray="5 4"'
        lines.append(f'<g id="{provider}" fill="{colour}"><path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        lines += [marker(shape, px(a), py(b)) for a, b in points[provider] if shape] + ["</g>"]
    for provider in (name for name in styles if name in points):
        colour, shape = styles[provider]
        words, dashes = floor if provider == "floor" else LABELS.get(provider, provider), "" if shape else ' stroke-dasharray="5 4"'
        lines += [f'<path d="M{at:.0f} {bottom + 57}h22" stroke="{colour}" stroke-width="2"{dashes}/>',
                  f'<g fill="{colour}">{marker(shape, at + 11, bottom + 57)}</g>' if shape else "", text(at + 28, bottom + 61, words, "start")]
        at += 28 + 6.6 * len(words) + 18
    return "\n".join(filter(None, lines + ["</svg>"])) + "\n"


def text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'.replace(" >", ">")


def marker(shape: str, x: float, y: float) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if shape == "diamond" else ""
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"{turn}/>'


if __name__ == "__main__":
    saved = Path(sys.argv[1] if len(sys.argv) > 1 else harness.ROOT / "bench" / "results" / "h200.json")
    for written in (*attention(saved), *graphs(saved)):
        print(written)
