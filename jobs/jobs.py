"""Jobs of a cluster: list them, show the log of one, stop one.

Examples:
  vqray jobs
  vqray jobs logs train-1f0c9a2e --follow
  vqray jobs stop train-1f0c9a2e --address http://127.0.0.1:8265
"""

import argparse
import sys
from typing import Any

from jobs import cli
from jobs.arguments import add_address
from pipelines.errors import Refused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=("list", "logs", "stop"), default="list", help="(list)")
    parser.add_argument("job", nargs="?", metavar="ID", help="which one, for logs and stop")
    parser.add_argument("--follow", action="store_true", help="logs: on standard error until the job has ended")
    add_address(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if (arguments.job is None) != (arguments.action == "list"):
        raise Refused("`vqray jobs logs ID` and `vqray jobs stop ID` take a job's id; `vqray jobs` lists them.")
    from pipelines import jobs_api, submission

    api = jobs_api.connect(arguments.address)
    if arguments.action == "list":
        found = api.list()
        for line in submission.table(found):
            print(line)
        told = [{"job": job.id, "status": job.status, "exit_code": job.exit_code, **job.metadata} for job in found]
        return {"address": api.address, "jobs": told}
    if arguments.action == "stop":
        job, stopped = api.stop(arguments.job)
        return {"job": job.id, "address": api.address, "status": job.status, "skipped": not stopped}
    if arguments.follow:
        return submission.followed(api, arguments.job)
    job = api.info(arguments.job)
    sys.stdout.write(api.log(job).decode("utf-8", "replace"))
    return {"job": job.id, "address": api.address, "status": job.status}


if __name__ == "__main__":
    raise SystemExit(cli.main_of(__file__))
