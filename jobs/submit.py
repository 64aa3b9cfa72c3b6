"""Run a vqray command as a job on a Ray cluster; its log comes here, its exit code is this one's.

The program travels with the job, data does not: paths are s3:// URIs, or absolute where all nodes see them. Of the
environment only what --env names goes along. The cluster's token is read from RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN.

Examples:
  vqray submit -- train --recipe rotation_trick --shards s3://b/cells --out s3://b/runs/cells --workers 8
  vqray submit --address http://127.0.0.1:8265 --env MLFLOW_TRACKING_URI AWS_PROFILE -- tune --recipe plain_vq ...
  vqray submit --no-wait -- ingest --corpus images --source s3://b/photos --out s3://b/cells
"""

import argparse
from typing import Any

from jobs import cli
from jobs.arguments import add_address, paths_of
from pipelines.errors import Refused, nearest_names

NOT_HERE = {"submit", "jobs"}
"""What talks to a cluster from outside."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_address(parser)
    parser.add_argument(
        "--env", nargs="+", default=[], metavar="NAME", action="extend", help="environment variables that go along"
    )
    parser.add_argument("--no-wait", action="store_true", help="return once the job is accepted")
    parser.add_argument("words", nargs="+", metavar="-- VERB ARGS", help="a vqray command, after two dashes")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    verb, *rest = arguments.words
    known = cli.verbs().keys() - NOT_HERE
    if verb not in known:
        raise Refused(f"a job is one of vqray's verbs, and {verb!r} is none; {nearest_names(verb, known)}")
    paths = paths_of(cli.parser_of(verb)[0].parse_args(rest))
    from pipelines.submission import Submission, submit

    return submit(
        Submission(
            words=arguments.words,
            paths=paths,
            address=arguments.address,
            variables=arguments.env,
            wait=not arguments.no_wait,
        )
    )


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
