"""python -m bench [room ...] [--only REGEX] [--providers NAME,NAME] [--trace]: runs the named benches, or all, saves their figures and prints them
as one table. --only leaves out the cases that its regular expression is not found in, --providers those not named: python -m bench attention
--only 'decode .*x' --providers gkernels,fa3. --trace shows where the time of decode_step goes, node by node."""

import argparse
import re
import sys
from importlib import import_module
from pathlib import Path

import torch

from bench import harness

NOT_BENCHES = {"__init__", "__main__", "harness", "plot", "timeline"}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="time the kernels on this GPU")
    parser.add_argument("room", nargs="*", help="which benches (default: all)")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the cases that it is found in")
    parser.add_argument("--providers", default="", metavar="NAME,NAME", help="only these providers")
    parser.add_argument("--trace", action="store_true", help="of decode_step: print what each kernel adds, and draw the nodes")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_BENCHES)
    unknown = [name for name in options.room if name not in known]
    if unknown:
        sys.exit(f"python -m bench: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    try:
        re.compile(options.only)
    except re.error as error:
        sys.exit(f"python -m bench: --only: got {options.only!r}, expected a regular expression: {error}")
    if not torch.cuda.is_available():
        sys.exit("python -m bench: no GPU: torch sees no CUDA device, and a time measured without one would mean nothing")
    harness.ONLY, harness.PROVIDERS = options.only, tuple(filter(None, options.providers.split(",")))
    harness.TRACE = options.trace
    failed, names = [], options.room or known
    for i, name in enumerate(names, 1):
        print(f"[{i}/{len(names)}] {name}", flush=True)
        try:
            import_module(f"bench.{name}").main()
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
        path = harness.save()
    print(f"\nsaved to {path}\n")
    harness.table(harness.ROWS, harness.CEILINGS.get(harness.device()))
    absent = [provider for provider in harness.PROVIDERS if provider not in {row["provider"] for row in harness.ROWS}]
    if absent:
        print(f"no row by {', '.join(absent)}", file=sys.stderr)
    if not harness.ROWS and not failed:
        failed.append(f"no row: --only {options.only!r} and --providers {options.providers!r} leave nothing")
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
