"""List what the registry holds: names, versions, aliases, recipes, codebook sizes.

Example:
  vqray registry
"""

import argparse
from typing import Any

from jobs import cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="only this name")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipelines import registry

    entries = registry.list_entries(arguments.name)
    for entry in entries:
        print(entry)
    return {"entries": [vars(entry) for entry in entries]}


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
