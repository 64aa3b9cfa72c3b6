"""Everything once, on real photos: ingest, train, register, pull, evaluate, encode, decode. About three minutes.

Examples:
  vqray demo
  vqray demo rotation_trick --out demo/mine
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from jobs import cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a recipe that names demo data (the first that does)")
    parser.add_argument("--out", type=Path, help="where everything goes (demo/RECIPE)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipelines.demo import able, demo

    name = arguments.recipe or able()[0]
    result = vars(demo(name, arguments.out or Path("demo") / name))
    print("\n" + "\n".join(result.pop("story")), file=sys.stderr)
    return result


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
