"""Point an alias at a version: `cells@champion` then means that one.

Example:
  vqray promote cells@v3 --alias champion
"""

import argparse
from typing import Any

from jobs import cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", metavar="REF", help="NAME@v3, or NAME@ALIAS for the version another alias means")
    parser.add_argument("--alias", required=True, help="champion, or a word of your own")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipelines import registry

    return vars(registry.promote(arguments.ref, arguments.alias))


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
