"""Run a paper's claims again on real data, and print paper, ours, spread over seeds and verdict.

The recipe names data, runs and claims. An estimate is printed first; running the same command again goes on where it
stopped. Everything is measured on the test split.

Examples:
  vqray claims RECIPE --out claims/RECIPE --headline
  make claims RECIPE=x HEADLINE=1 SOURCE=folder
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from jobs import cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe that names its paper's claims")
    parser.add_argument("--out", metavar="DIR", help="where everything goes (claims/RECIPE)")
    parser.add_argument("--source", metavar="DIR", help="data that no package has, where a recipe asks for it")
    parser.add_argument("--headline", action="store_true", help="only the claims that fit 45 minutes on two cores")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="of every run (0 1 2)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipelines.paper_claims import claims

    out = Path(arguments.out or f"claims/{arguments.recipe}")
    source = None if arguments.source is None else Path(arguments.source).absolute()
    made = claims(arguments.recipe, out.absolute(), headline=arguments.headline, seeds=arguments.seeds, source=source)
    print("\n".join(["", *made.table]), file=sys.stderr)
    return {name: value for name, value in vars(made).items() if name != "table"}


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
