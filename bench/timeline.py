"""A graph's replay as a timeline:  python -m bench decode_step --trace  prints what each kernel adds to the step and draws all nodes as SVG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import torch

from bench.plot import GREY, text

WIDTH, LANE, LEFT, TOP, BOTTOM = 1200, 22, 230, 46, 40          # pixels
COLOURS = ("#e8590c", "#3b82d6", "#12a37a", "#b5179e", "#c9a227", "#7048e8")


class Node(NamedTuple):
    name: str
    start: float          # us since the first node's
    end: float


class Share(NamedTuple):
    name: str
    nodes: int
    adds: float           # us by which its nodes move the end of the step: all shares together are the step
    gaps: float           # us of these in which no node ran


def trace(replay: Callable[[], object]) -> list[Node]:
    """The nodes of one replay, in the order of their ends, as torch's profiler sees them. Its own cost makes nodes later, not longer."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):                                           # the first starts the profiler's own machinery
        with torch.profiler.profile(activities=activities) as profile:
            replay()
            torch.cuda.synchronize()
    spans = [(event.name, event.time_range.start, event.time_range.end) for event in profile.events()
             if event.device_type == torch.autograd.DeviceType.CUDA]
    first = min((start for _, start, _ in spans), default=0.0)
    return sorted((Node(name, start - first, end - first) for name, start, end in spans), key=lambda node: node.end)


def shares(nodes: list[Node]) -> list[Share]:
    """What each kernel adds to the step, the greatest first. Nodes that overlap count for what they end later than the node before."""
    found: dict[str, Share] = {}
    done = 0.0
    for node in nodes:
        name, count, adds, gaps = found.get(node.name, Share(node.name, 0, 0.0, 0.0))
        found[node.name] = Share(name, count + 1, adds + node.end - done, gaps + max(node.start - done, 0.0))
        done = node.end
    return sorted(found.values(), key=lambda share: -share.adds)


def table(nodes: list[Node]) -> str:
    rows = [("kernel", "nodes", "us", "us a node", "of it gaps")]
    rows += [(share.name[:48], str(share.nodes), f"{share.adds:.1f}", f"{share.adds / share.nodes:.2f}", f"{share.gaps:.1f}")
             for share in shares(nodes)]
    rows.append(("the step", str(len(nodes)), f"{nodes[-1].end:.1f}", "", f"{sum(share.gaps for share in shares(nodes)):.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad = lambda row: [word.rjust(width) if i else word.ljust(width) for i, (word, width) in enumerate(zip(row, widths, strict=True))]
    return "\n".join("  ".join(pad(row)).rstrip() for row in rows)


def svg(title: str, nodes: list[Node]) -> str:
    """A lane a kernel, the one that adds most on top."""
    lanes, bottom = {share.name: i for i, share in enumerate(shares(nodes))}, TOP + LANE * len({node.name for node in nodes})
    scale = (WIDTH - LEFT - 40) / nodes[-1].end
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" font-family="system-ui, sans-serif" '
             f'font-size="12" fill="{GREY}">', f"<title>{escape(title)}</title>",
             text(20, TOP - 20, title, "start", 'font-size="15" font-weight="600"')]
    lines += [text(LEFT - 8, TOP + LANE * i + 15, name[:32], "end") for name, i in lanes.items()]
    for node in nodes:
        lane = lanes[node.name]
        lines.append(f'<rect x="{LEFT + node.start * scale:.2f}" y="{TOP + LANE * lane + 3}" width="{(node.end - node.start) * scale:.2f}" '
                     f'height="{LANE - 6}" fill="{COLOURS[lane % len(COLOURS)]}"/>')
    ticks = [nodes[-1].end * i / 4 for i in range(5)]
    lines += [text(LEFT + at * scale, bottom + 20, f"{at:.0f} us", "middle") for at in ticks]
    return "\n".join([*lines, "</svg>"]) + "\n"


def show(title: str, replay: Callable[[], object], path: Path) -> None:
    """Prints the table and writes the picture."""
    nodes = trace(replay)
    print(f"\n{title}\n{table(nodes)}\n", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg(title, nodes))
    print(f"drawn in {path}\n", flush=True)
