"""A cluster's Jobs API, guarded by a token that is sent with every request: submit, list, follow, stop.

Whoever reaches that API may run any program on the cluster; that is what it is for. So vqray speaks to no cluster that
does not ask for a token.
"""

import asyncio
import codecs
import ipaddress
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient, JobType

from pipelines import tokens
from pipelines.errors import Failed, Refused, nearest_names
from pipelines.tokens import Token

HERE = "http://127.0.0.1:8265"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
DANGER = "Whoever reaches a cluster's Jobs API may run any program on it"
PREAMBLE = "Running entrypoint for job "
SECONDS = 10.0
"""What a request may take, and how long a connection may be silent before it is tried again."""


@dataclass(frozen=True)
class Job:
    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    exit_code: int | None
    """None while it runs, and where a signal or Ray ended it."""
    message: str
    metadata: dict[str, str]
    began: float | None
    """Seconds since 1970."""
    ended: float | None
    node: str | None
    """Where its driver runs; None before it runs."""

    @property
    def over(self) -> bool:
        return self.status in ENDED


def address_of(given: str | None) -> str:
    """The dashboard's URL: what was given, or else RAY_API_SERVER_ADDRESS, RAY_ADDRESS where it is a URL, this machine.

    Raises:
        Refused: it is no http:// or https:// address.
    """
    address, source = given, "--address"
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if not address and os.environ.get(name):
            address, source = os.environ[name], name
    address = (address or HERE).rstrip("/")
    if "://" not in address and source != "RAY_ADDRESS":
        address = f"http://{address}"
    parts = urlsplit(address)
    if parts.username or parts.password:
        raise Refused(f"{source} holds a name or password; the token goes into RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refused(
            f"{source} {address} is not a dashboard's address. Jobs go to the dashboard's port, as in"
            f" --address {HERE}; a ray:// address or the port that nodes join at is another one."
        )
    return address


def is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class JobsApi:
    """An open connection. Everything it raises is Refused or Failed, with the address and without the token."""

    def __init__(self, address: str, token: Token, client: JobSubmissionClient):
        self.address = address
        self.token = token
        self._client = client
        self._headers = _headers(token)

    def submit(self, job: str, entrypoint: str, package: Path, runtime: dict[str, Any], about: dict[str, str]) -> None:
        """Start a job of that id in the unpacked package. A head whose agent is still starting is waited for."""
        until = time.monotonic() + 60
        while True:
            try:
                with self._told("submit a job"):
                    self._client.submit_job(
                        submission_id=job,
                        entrypoint=entrypoint,
                        runtime_env={"working_dir": str(package), **runtime},
                        metadata=about,
                    )
                return
            except Failed as error:
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
            print("waiting for the head to take jobs", file=sys.stderr)
            time.sleep(2)

    def info(self, job: str) -> Job:
        with self._told(f"look for job {job}", job):
            return _job(self._client.get_job_info(job))

    def list(self) -> list[Job]:
        """All submitted jobs, the newest last."""
        with self._told("list jobs"):
            found = [_job(one) for one in self._client.list_jobs() if one.type == JobType.SUBMISSION]
        return sorted(found, key=lambda job: job.began or 0)

    def stop(self, job: str, patience: float = 90.0) -> tuple[Job, bool]:
        """Ask a job to end and wait until it did; the job, and whether it still ran.

        Raises:
            Failed: it has not ended within `patience` seconds.
        """
        before = self.info(job)
        if before.over:
            return before, False
        with self._told(f"stop job {job}"):
            self._client.stop_job(job)
        until = time.monotonic() + patience
        while not (now := self.info(job)).over:
            if time.monotonic() > until:
                raise Failed(f"job {job} was asked to stop and is still {now.status} after {patience:g} s.")
            time.sleep(0.3)
        return now, True

    def log(self, job: Job) -> bytes:
        """All of a job's log so far. Ray's own call would turn carriage returns into line ends."""
        if job.node is None:
            return b""
        with self._told(f"read the log of job {job.id}"):
            got = requests.get(self._log_url("file"), params=_log_file(job), headers=self._headers, timeout=6 * SECONDS)
            got.raise_for_status()
            return got.content

    def follow(self, job: str, write: Callable[[str], None]) -> Job:
        """Pass a job's log on as it is written, bars and all, until the job has ended; the job as it ended."""
        return asyncio.run(self._follow(job, _Text(write)))

    async def _follow(self, job: str, text: "_Text") -> Job:
        while (now := self.info(job)).node is None and not now.over:
            await asyncio.sleep(0.3)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SECONDS)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session:
            while not now.over:
                try:
                    now = await self._stream(session, now, text)
                except aiohttp.ClientError:
                    # Not the job's end: the connection's. `info` tells whether the cluster is still there.
                    await asyncio.sleep(1)
                    now = self.info(job)
        text.catch_up(self.log(now))
        return now

    async def _stream(self, session: aiohttp.ClientSession, job: Job, text: "_Text") -> Job:
        """One connection: from the log's beginning, what was passed on before left out, to the job's end."""
        skip = text.seen
        async with session.get(self._log_url("stream"), params={**_log_file(job), "interval": "0.5"}) as answer:
            answer.raise_for_status()
            while True:
                try:
                    chunk = await asyncio.wait_for(answer.content.readany(), 1.0)
                except TimeoutError:
                    if (now := self.info(job.id)).over:
                        return now
                    continue
                if not chunk:
                    return self.info(job.id)
                text.write(chunk[skip:])
                skip = max(0, skip - len(chunk))

    def _log_url(self, how: str) -> str:
        return f"{self.address}/api/v0/logs/{how}"

    @contextmanager
    def _told(self, doing: str, job: str | None = None) -> Iterator[None]:
        try:
            yield
        except AuthenticationError:
            raise _wrong_token(self.address, self.token) from None
        except (requests.RequestException, ConnectionError) as error:
            raise Failed(
                f"could not {doing} at {self.address} ({type(error).__name__}). A job that began goes on without this"
                " command: `vqray jobs` shows it once the cluster answers."
            ) from None
        except RuntimeError as error:
            if job is not None and "404" in str(error):
                raise Refused(f"{self.address} has no job {job!r}; {self._nearest(job)}") from None
            raise Failed(f"could not {doing} at {self.address}: {_reason(error)}") from None

    def _nearest(self, job: str) -> str:
        return nearest_names(job, [known.id for known in self.list()])


def connect(given: str | None) -> JobsApi:
    """Open the Jobs API of a cluster.

    Raises:
        Refused: there is no token, or the cluster takes another one, or none; nothing answers; another version of Ray.
    """
    address = address_of(given)
    token = tokens.find()
    if token is None:
        public = (
            "" if is_loopback(address) else f" {address} is no address of this machine alone, so nothing goes there."
        )
        raise Refused(
            f"there is no token for {address}. {DANGER}, so vqray submits to none without one.{public} Set"
            " RAY_AUTH_TOKEN_PATH to a file that holds the token the head was started with (or RAY_AUTH_TOKEN to it)."
        )
    _require_guard(address, token)
    if not is_loopback(address) and address.startswith("http://"):
        print(f"the token travels to {address} unencrypted; an ssh tunnel would hide it", file=sys.stderr)
    for noisy in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Ray lets these two overrule the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        return JobsApi(address, token, JobSubmissionClient(address, headers=_headers(token)))
    except (RuntimeError, ConnectionError, requests.RequestException) as error:
        raise Refused(f"{address} does not take jobs: {_reason(error)}") from None


def _require_guard(address: str, token: Token) -> None:
    """Ask without the token, then with it: the first must be turned away, the second welcome."""
    try:
        bare = requests.get(f"{address}/api/version", timeout=SECONDS)
        asked = requests.get(f"{address}/api/version", timeout=SECONDS, headers=_headers(token))
    except requests.RequestException as error:
        raise Refused(
            f"nothing answers at {address} ({type(error).__name__}). Is a head running there with its dashboard, and"
            " the tunnel to it open? `ray start --head` prints the address; --address gives another one."
        ) from None
    if bare.ok:
        raise Refused(
            f"the cluster at {address} takes jobs from anybody, without a token. {DANGER}. Start it again with"
            " RAY_AUTH_MODE=token and a token on every node; the README shows how."
        )
    if bare.status_code != 401:
        raise Refused(
            f"{address} answers with status {bare.status_code}, as no Ray dashboard does: give the dashboard's address."
        )
    if not asked.ok:
        raise _wrong_token(address, token)
    theirs = str(asked.json().get("ray_version"))
    if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise Refused(
            f"the cluster at {address} runs Ray {theirs}, and this vqray was tested with {ray.__version__}:"
            " install the same version on both (constraints.txt)."
        )


def _wrong_token(address: str, token: Token) -> Refused:
    return Refused(
        f"the cluster at {address} does not take the token from {token.source}."
        " Use the one its head was started with: RAY_AUTH_TOKEN_PATH names its file."
    )


def _headers(token: Token) -> dict[str, str]:
    return {"Authorization": f"Bearer {token.value}"}


def _reason(error: BaseException) -> str:
    """What the server said, without the traceback that comes with it."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (lines[0] if len(lines) < 2 else f"{lines[0]} ... {lines[-1]}") if lines else type(error).__name__


def _log_file(job: Job) -> dict[str, str]:
    return {"node_id": job.node or "", "filename": f"job-driver-{job.id}.log", "lines": "-1"}


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        status=details.status.value,
        exit_code=details.driver_exit_code,
        message=details.message or "",
        metadata=details.metadata or {},
        began=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        node=details.driver_node_id,
    )


class _Text:
    """Bytes of a log to text, without Ray's own first lines (they repeat the command)."""

    def __init__(self, write: Callable[[str], None]):
        self.seen = 0
        self._write = write
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._head: str | None = ""

    def write(self, chunk: bytes) -> None:
        self.seen += len(chunk)
        text = self._decoder.decode(chunk)
        if self._head is not None:
            self._head += text
            _, found, after = self._head.partition(PREAMBLE)
            _, ended, text = after.partition("\n")
            if not (found and ended):
                return
            self._head = None
        if text:
            self._write(text)

    def catch_up(self, whole: bytes) -> None:
        """The rest of a log that has ended. One that never got as far as the command is shown whole."""
        self.write(whole[self.seen :])
        if self._head:
            self._write(self._head)
