"""python -m tests.counts FILE: puts the counts of a pytest run, read from its junit xml, into bench/results/<device>.json."""

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from bench import harness


def counts(xml):
    """{"passed", "failed", "skipped"} of a junit report; an error in a fixture or in collection counts as a failure."""
    suites = [{name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")} for suite in ET.fromstring(xml).iter("testsuite")]
    total = {name: sum(suite[name] for suite in suites) for name in ("tests", "failures", "errors", "skipped")}
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


def merge(xml, name=None):
    """Writes the counts and the source they belong to; the rows stay."""
    path = harness.save([], name)
    results = json.loads(path.read_text())
    results["tests"] = counts(xml) | {"source": harness.source()}
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


if __name__ == "__main__":
    print(f"counts saved to {merge(Path(sys.argv[1]).read_text())}")
