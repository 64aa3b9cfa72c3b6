"""Fetch a bundle from the registry into a directory, and verify every byte of it.

Examples:
  vqray pull cells@champion --out bundles/cells
  vqray pull cells@v3 --out bundles/cells-3
"""

import argparse
from typing import Any

from jobs import cli
from jobs.arguments import add_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", metavar="REF", help="NAME@ALIAS or NAME@v3")
    add_out(parser, "the directory to make")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipelines import registry

    return vars(registry.pull(arguments.ref, arguments.out))


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
