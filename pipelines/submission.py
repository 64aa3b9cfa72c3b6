"""A vqray command as a job on a cluster: the program goes with it, the data does not."""

import json
import os
import secrets
import shlex
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines import jobs_api, project, storage, tokens
from pipelines.errors import Refused, nearest_names
from pipelines.jobs_api import Job, JobsApi

OFTEN_MEANT = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    *storage.SECRETS,
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
)
STOP_SECONDS = 60
"""What a job has between being asked to stop and being killed: `train` writes a checkpoint in it."""


@dataclass(frozen=True)
class Submission:
    words: Sequence[str]
    """A verb and its arguments."""
    paths: Mapping[str, Sequence[str]]
    """Those of the arguments that are paths, by option."""
    address: str | None = None
    variables: Sequence[str] = ()
    """Names of environment variables that go with it."""
    wait: bool = True


def submit(request: Submission) -> dict[str, Any]:
    """Run a command on a cluster. With `wait`, its log goes to standard error until it has ended.

    Returns:
        What the command printed as JSON, with `job`, `address`, `status` and `exit_code` (the command's own 0, 1 or 2;
        1 where a signal or somebody stopped it).

    Raises:
        Refused: a mistake in the request, or a cluster that is not there or not guarded by this token.
    """
    variables = _variables(request.variables)
    _refuse_paths_of_nowhere(request.paths, variables)
    api = jobs_api.connect(request.address)
    job = f"{request.words[0]}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="vqray-") as scratch:
        package = project.pack(Path(scratch) / "vqray.zip")
        packed = (
            f"{package.files} files, {project.mebibytes(package.bytes)}, {project.mebibytes(package.packed)} packed"
        )
        print(f"the program: {packed}; no data", file=sys.stderr)
        _tell_variables(variables)
        api.submit(
            job,
            _entrypoint(request.words),
            package.path,
            _runtime(job, variables, api.token),
            {"command": shlex.join(["vqray", *request.words]), "variables": " ".join(variables)},
        )
    at = "" if api.address == jobs_api.HERE else f" --address {api.address}"
    print(f"job {job} at {api.address}; `vqray jobs stop{at} {job}` stops it", file=sys.stderr)
    if not request.wait:
        return {"job": job, "address": api.address, "status": "PENDING", "exit_code": 0}
    try:
        return followed(api, job)
    except KeyboardInterrupt:
        print(
            f"\njob {job} goes on without this command.\n"
            f"  see it:  vqray jobs logs{at} {job} --follow\n  stop it: vqray jobs stop{at} {job}",
            file=sys.stderr,
        )
        return {"job": job, "address": api.address, "status": "RUNNING", "exit_code": 1}


def followed(api: JobsApi, job: str) -> dict[str, Any]:
    """Show a job's log on standard error until it has ended, and return how it ended, as `submit` does."""
    tail: deque[str] = deque(maxlen=200)

    def show(text: str) -> None:
        tail.append(text)
        sys.stderr.write(text)
        sys.stderr.flush()

    ended = api.follow(job, show)
    if (why := _why_no_code(ended)) is not None:
        print(why, file=sys.stderr)
    return {**_last_line("".join(tail)), **outcome(api, ended)}


def outcome(api: JobsApi, job: Job) -> dict[str, Any]:
    """How a job ended: its id, address, status, and the exit code for a command that stands for it."""
    usable = job.exit_code is not None and 0 <= job.exit_code < 256
    return {"job": job.id, "address": api.address, "status": job.status, "exit_code": job.exit_code if usable else 1}


def table(jobs: Sequence[Job]) -> list[str]:
    """A line for each job: when it began, how long it took, how it ended, the command."""
    lines = []
    for job in jobs:
        began = datetime.fromtimestamp(job.began).isoformat(" ", "minutes") if job.began else "not yet"
        took = f"{(job.ended or time.time()) - job.began:,.0f} s" if job.began else ""
        code = "" if job.exit_code is None else f"exit {job.exit_code}"
        lines.append(f"{job.id:<20}{job.status:<11}{code:<9}{began:<18}{took:>9}  {job.metadata.get('command', '')}")
    return lines


def _why_no_code(job: Job) -> str | None:
    if job.status == "STOPPED":
        return f"job {job.id} was stopped; submitting the same command again goes on from there"
    if job.exit_code is None:
        return f"job {job.id} ended without an exit code: {job.message.strip()}"
    if job.exit_code < 0:
        return f"job {job.id} was killed by signal {-job.exit_code}"
    return None


def _variables(names: Sequence[str]) -> dict[str, str]:
    for name in names:
        if "=" in name:
            raise Refused(
                f"--env takes names, and {name.partition('=')[0]} was given with a value, which everybody on this"
                " machine could read in the list of processes: set the variable, then name it."
            )
        if name.startswith("RAY_"):
            raise Refused(f"--env {name}: what begins with RAY_ is the cluster's own; it cannot be passed.")
        if name not in os.environ:
            raise Refused(f"--env {name}: there is no such variable here; {nearest_names(name, _close(name))}")
    return {name: os.environ[name] for name in names}


def _close(name: str) -> list[str]:
    """Names that share a word with the one given: all there are would say too much."""
    words = set(name.upper().split("_"))
    return [known for known in os.environ if words & set(known.upper().split("_"))]


def _tell_variables(variables: Mapping[str, str]) -> None:
    passed = f"{', '.join(variables)} (sealed under the token)" if variables else "none"
    print(f"environment variables that go with it: {passed}", file=sys.stderr)
    left = [name for name in OFTEN_MEANT if name in os.environ and name not in variables]
    if left:
        print(f"set here, but not passed: {', '.join(left)} (--env NAME passes one)", file=sys.stderr)


def _runtime(job: str, variables: Mapping[str, str], token: tokens.Token) -> dict[str, Any]:
    environment = {
        project.JOB: job,
        # Ray's supervisor of the job reads this one; a bar once a second is enough in a log that is kept.
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
        "TQDM_MININTERVAL": "1",
    }
    if not variables:
        return {"env_vars": environment}
    sealed = {tokens.SEALED: tokens.seal(variables, token)}
    hook = f"{tokens.__name__}.{tokens.open_environment.__name__}"
    return {"env_vars": {**environment, **sealed}, "worker_process_setup_hook": hook}


def _entrypoint(words: Sequence[str]) -> str:
    """A shell command that finds a Python with Ray: that at the same place as here, or the first of the head's PATH.

    The head may be this machine or another, and Ray tells a job nothing of the Python that Ray itself runs on.
    """
    pythons = " ".join(shlex.quote(python) for python in (sys.executable, "python", "python3"))
    has_ray = "import sys, importlib.util as u; sys.exit(u.find_spec('ray') is None)"
    run = shlex.join(["-m", "jobs.cli", *words])
    missing = (
        "no Python with Ray is in the PATH of this head: start Ray from the environment that vqray is installed in"
    )
    return (
        f'for python in {pythons}; do "$python" -c "{has_ray}" 2>/dev/null && exec "$python" {run}; done;'
        f' echo "{missing}" >&2; exit 1'
    )


def _refuse_paths_of_nowhere(paths: Mapping[str, Sequence[str]], variables: Mapping[str, str]) -> None:
    runs = variables.get(project.RUNS)
    for option, values in paths.items():
        if not values and runs is None:
            raise Refused(
                f"{option} was not given, and what a job writes into its working directory is thrown away: give"
                f" {option}, or for `train` set {project.RUNS} to where runs go and name it with --env."
            )
        for value in values or [str(runs)]:
            if "://" not in value and not os.path.isabs(value):
                raise Refused(
                    f"{option if values else project.RUNS} {value} is relative to this directory, and a job runs in"
                    " another: give an s3:// URI, or where all nodes are one machine or share a disk, an absolute path."
                )


def _last_line(text: str) -> dict[str, Any]:
    """The JSON object that every vqray command prints at its end, if this one came so far."""
    lines = text.rstrip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
