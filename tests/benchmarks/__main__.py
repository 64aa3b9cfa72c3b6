"""`python -m tests.benchmarks [--quick] [NAME ...]`: run every bench_<NAME>.py of this folder, or the named ones."""

import argparse
import importlib
from pathlib import Path


def main() -> None:
    found = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(found)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, to see that they run")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in found]:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(found)}")
    for name in arguments.names or found:
        print(f"== {name}", flush=True)
        importlib.import_module(f"tests.benchmarks.bench_{name}").run(quick=arguments.quick)


if __name__ == "__main__":
    main()
