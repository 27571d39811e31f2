"""python -m tests.counts FILE: puts the counts of a pytest run, read from its junit xml, into bench/results/<device>.json."""

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from bench import harness


def counts(xml):
    """{"passed", "failed", "skipped"} of a junit report; an error in a fixture or in collection counts as a failure."""
    suites = list(ET.fromstring(xml).iter("testsuite"))
    names = "tests", "failures", "errors", "skipped"
    tests, failures, errors, skipped = (sum(int(suite.get(name, 0)) for suite in suites) for name in names)
    return {"passed": tests - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def merge(xml, name=None):
    """Writes the counts and the source they belong to; the rows stay."""
    path = harness.save([], name)
    results = json.loads(path.read_text())
    results["tests"] = counts(xml) | {"source": harness.source()}
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


if __name__ == "__main__":
    print(f"counts saved to {merge(Path(sys.argv[1]).read_text())}")
