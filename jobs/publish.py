"""Put a bundle into the registry as the next version of a name.

A bundle that is already there keeps its version.

Example:
  vqray publish --bundle runs/cells --name cells
"""

import argparse
from typing import Any

from jobs import cli
from jobs.arguments import add_bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument("--name", required=True, help="the registry name")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipelines import registry

    published = registry.publish(registry.local_bundle(arguments.bundle), arguments.name)
    ref = f"{published.name}@v{published.version}"
    return {"out": ref, "digest": published.digest, "registered": ref, "skipped": published.skipped}


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
