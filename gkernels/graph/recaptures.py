"""A runner captured again and again, each time over another batch: do its graphs hold the same, down into the bodies of loops and switches?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .capture import GraphRunner
from .captures import first_of, passed_names, why
from .findings import Report
from .launches import Launch, record
from .lint import unwrapped
from .nodes import Node, compare_nodes, different_words, unread, unreadable, unsafe_nodes

DIFFERENT = {"kernel-by-data", "data-dependent-grid", "different-node", "specialisation", "baked-scalar", "forbidden-node"}


def examine_runner(runner: GraphRunner, stage: Callable[[Any], None], cases: Sequence[Any]) -> Report:
    """The report of `check_runner`. The runner holds the last capture's graphs afterwards; where one failed, none."""
    report = Report(f"{type(runner).__name__} of {getattr(runner.step, '__qualname__', type(runner.step).__name__)}", runner.device.type,
                    [str(case) for case in cases])
    function, _ = unwrapped(runner.step)
    home = f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}" if function else "?:0"
    missing = unreadable() if runner.device.type == "cuda" else "there are none without CUDA; check the step, which needs none"
    if missing:
        report.unproven.append(f"the nodes of its graphs: {missing}")
        return report
    made, held, launches = [], [], list[Launch]()
    first, *others = cases
    for case in (first, first, *others, first):
        held.append(runner.detach())                    # kept: so no address of one capture's pool comes again in another
        stage(case)
        try:
            with record(launches):
                runner.capture(progress=False)
        except Exception as error:
            cause = first_of(error)
            report.add(why(cause), home, f"{type(cause).__name__}: {str(cause).splitlines()[0]}", str(case))
            report.unproven.append("the nodes of its graphs: a capture failed")
            break
        made.append((case, runner.nodes()))
    for captured in held:
        captured.release()
    if len(made) == len(cases) + 2:
        compare(report, Sources(home, launches), made)
    return report


class Sources:
    """What the launches seen tell of kernels by their names in a binary: the user's line, and the names of the arguments."""

    def __init__(self, home: str, launches: list[Launch]):
        self.home, self.launches = home, {launch.symbol: launch for launch in reversed(launches) if launch.symbol}
        passed = {(launch.symbol, tuple(passed_names(launch))) for launch in launches}
        self.names = {symbol: names for symbol, names in passed if sum(symbol == other for other, _ in passed) == 1}

    def place(self, nodes: Sequence[Node], i: int) -> str:
        launch = self.launches.get(nodes[i].name) if i < len(nodes) else None
        return launch.place if launch else self.home

    def of(self, nodes: Sequence[Node]) -> dict[int, Sequence[str]]:
        """By node: its arguments, of kernels that are always compiled for the same ones."""
        return {i: self.names[node.name] for i, node in enumerate(nodes) if node.kind == "kernel" and node.name in self.names}


def compare(report: Report, sources: Sources, made: list[tuple[Any, dict]]) -> None:
    """The captures against the second, whose case is the first one's and the last one's too: what differs among those three is noise."""
    (_, before), (_, first), *others, (_, after) = made
    noise = {launch: [word for again in (before, after) for word in different_words(again[launch], nodes)] for launch, nodes in first.items()}
    for case, nodes in (made[0], *made[2:]):
        for launch in first:
            for difference in compare_nodes(first[launch], nodes[launch], noise[launch], sources.of(first[launch])):
                report.add(difference.finding, sources.place(first[launch], difference.node), f"{launch}: {difference.what}", str(case))
    for case, nodes in made[1:]:
        for launch in nodes:
            for difference in unsafe_nodes(nodes[launch]):
                report.add(difference.finding, sources.home, f"{launch}: {difference.what}", str(case))
    count = sum(map(len, first.values()))
    inside = sum(node.within != "" for nodes in first.values() for node in nodes)
    if not DIFFERENT & report.names:
        report.proven.append(f"{count} nodes of {', '.join(first)}, {inside} of them in conditional bodies, all safe, are the same in {len(made)} "
                             f"captures of {len(others) + 1} cases")
    if hidden := sum(map(unread, first.values())):
        report.unproven.append(f"the bodies of {hidden} conditional nodes, which drivers before CUDA 13.2 do not tell")
