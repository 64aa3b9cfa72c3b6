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
    parser.add_argument("recipe", nargs="?", default="rotation_trick", help="a recipe that names demo data")
    parser.add_argument("--out", type=Path, help="where everything goes (demo/RECIPE)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipelines.demo import demo

    result = vars(demo(arguments.recipe, arguments.out or Path("demo") / arguments.recipe))
    print("\n" + "\n".join(result.pop("story")), file=sys.stderr)
    return result


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
