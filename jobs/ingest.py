"""Turn raw files into Arrow shards with a manifest.

Every unit read is kept, quarantined with a reason, or filtered by a named setting; the manifest says how many of each.
An interrupted ingest goes on when the same command is run again; a finished one is a no-op.

Examples:
  vqray ingest --corpus images --source photos/ --out shards/ --set size=64 colour=rgb
  vqray ingest --corpus images --source s3://bucket/train-{00000..00099}.tar --out s3://bucket/shards --limit 100000
  vqray ingest --corpus activations --source news.csv --out shards/ --set model=models/minilm layers=3,6
  vqray ingest --bundle cells@champion --source new-photos/ --out new-shards/
"""

import argparse
from typing import Any

from jobs import cli
from jobs.arguments import add_out, add_settings
from pipelines.options import parse_pairs

KINDS = "what the files hold: activations, images, items, molecules, proteins, streamlines or vectors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--corpus", metavar="KIND", help=KINDS)
    kind.add_argument("--recipe", metavar="R", help="the corpus kind that this recipe trains on")
    kind.add_argument("--bundle", metavar="REF", help="prepare the files as this bundle's training data was prepared")
    parser.add_argument("--source", required=True, nargs="+", metavar="URI", help="files or directories to read")
    add_out(parser, "where the shards and manifest.json go")
    parser.add_argument("--limit", type=int, metavar="N", help="take N units, spread evenly over the sources")
    parser.add_argument(
        "--holdout", type=float, default=0.1, metavar="F", help="share of groups for valid and for test each (0.1)"
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.05, metavar="F", help="fail when more than this is bad (0.05)"
    )
    add_settings(parser, "settings of the corpus kind, e.g. size=64 crop=center colour=grey")
    parser.add_argument(
        "--format", choices=("arrow", "parquet"), default="arrow", help="parquet: also write files for other tools"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipelines.ingest import ingest, prepared_by

    kind, settings = prepared_by(
        corpus=arguments.corpus,
        recipe_name=arguments.recipe,
        bundle=arguments.bundle,
        overrides=parse_pairs(arguments.set),
    )
    result = ingest(
        kind,
        arguments.source,
        arguments.out,
        settings=settings,
        limit=arguments.limit,
        holdout=arguments.holdout,
        max_bad_fraction=arguments.max_bad_fraction,
        parquet=arguments.format == "parquet",
    )
    return vars(result)


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
