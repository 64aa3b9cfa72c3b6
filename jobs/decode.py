"""Turn codes back into rows, or into files that people open, with the bundle that made them.

Examples:
  vqray decode --bundle cells@champion --codes codes/ --out restored/
  vqray decode --bundle runs/cells --codes codes-test/ --out pictures/ --format files
"""

import argparse
from typing import Any

from jobs import cli
from jobs.arguments import add_bundle, add_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument("--codes", required=True, metavar="URI", help="a directory that `vqray encode` made")
    add_out(parser, "where the rows or files go")
    parser.add_argument(
        "--format", choices=("shards", "files"), default="shards", help="files: PNG pictures for images"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipelines.encode import decode

    return vars(decode(arguments.bundle, arguments.codes, arguments.out, files=arguments.format == "files"))


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
