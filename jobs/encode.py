"""Turn shards into codes with a bundle: one codes shard per shard, in the smallest integer type that holds K.

The codes carry the bundle's digest, and decoding refuses another bundle's. Running the same command again goes on
where it stopped.

Examples:
  vqray encode --bundle cells@champion --shards shards/ --out codes/
  vqray encode --bundle runs/cells --shards shards/ --out codes-test/ --split test --format parquet
"""

import argparse
from typing import Any

from jobs import cli
from jobs.arguments import add_bundle, add_out, add_shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add_shards(parser)
    add_out(parser, "where the codes and their manifest go")
    parser.add_argument("--split", choices=("train", "valid", "test", "all"), default="all", help="rows to read (all)")
    parser.add_argument(
        "--format", choices=("arrow", "parquet"), default="arrow", help="parquet: also write files for other tools"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipelines.encode import encode

    parquet = arguments.format == "parquet"
    return vars(encode(arguments.bundle, arguments.shards, arguments.out, split=arguments.split, parquet=parquet))


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
