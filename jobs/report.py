"""Tell what a bundle's codes mean: pages people read and the same as JSON, as its recipe has them.

Test rows are read unless told. Running the same command again goes on where it stopped, or does nothing.

Examples:
  vqray report --bundle runs/concepts --shards shards/ --out concepts/
  vqray report --bundle concepts@champion --shards shards/ --out concepts/ --set model=models/minilm source=news/
"""

import argparse
from typing import Any

from jobs import cli
from jobs.arguments import add_bundle, add_out, add_settings, add_shards
from pipelines.options import parse_pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add_shards(parser)
    add_out(parser, "where the pages go")
    parser.add_argument(
        "--split", choices=("train", "valid", "test", "all"), default="test", help="rows to read (test)"
    )
    add_settings(parser, "settings of the recipe's report, e.g. model=FOLDER source=URI")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    overrides = parse_pairs(arguments.set)
    from pipelines.report import report

    return vars(report(arguments.bundle, arguments.shards, arguments.out, arguments.split, overrides))


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
