"""python -m bench [room ...]: runs the named benches, or all, saves their figures and prints them as one table."""

import sys
from importlib import import_module
from pathlib import Path

import torch

from bench import harness

NOT_BENCHES = {"__init__", "__main__", "harness", "tune"}


def main(names: list[str]) -> int:
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_BENCHES)
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"python -m bench: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    if not torch.cuda.is_available():
        sys.exit("python -m bench: no GPU: torch sees no CUDA device, and a time measured without one would mean nothing")
    failed = []
    for i, name in enumerate(names or known, 1):
        print(f"[{i}/{len(names or known)}] {name}", flush=True)
        try:
            import_module(f"bench.{name}").main()
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
        path = harness.save()
    print(f"\nsaved to {path}\n")
    harness.table(harness.ROWS, harness.CEILINGS.get(harness.device()))
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
