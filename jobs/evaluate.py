"""Measure a bundle on a split: the recipe's metrics, usage, perplexity, dead codes, and pictures.

Counts and errors are summed over the whole split before any metric is taken, never averaged over batches.

Examples:
  vqray evaluate --bundle runs/cells --shards shards/ --out runs/cells/test
  vqray evaluate --bundle cells@champion --shards new-shards/ --out report/ --split all
"""

import argparse
from typing import Any

from jobs import cli
from jobs.arguments import add_bundle, add_out, add_shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add_shards(parser)
    add_out(parser, "where metrics.json and the pictures go")
    parser.add_argument(
        "--split", choices=("train", "valid", "test", "all"), default="test", help="rows to read (test)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipelines.evaluate import evaluate

    return vars(evaluate(arguments.bundle, arguments.shards, arguments.out, arguments.split))


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
