"""MLflow runs: settings, metrics, pictures, digests. The driver is the only writer.

MLflow is imported at the first call, never at import: it reads its environment when it is imported, and telemetry must
be off and unpickling forbidden by then.
"""

import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.parse import urlsplit

from pipelines.errors import Failed, Refused
from pipelines.project import JOB

PARAM_LENGTH = 6000
"""MLflow keeps no more of a value. A setting that long is a list nobody reads there, and the card has it whole."""
PARAMS_AT_ONCE = 100
METRICS_AT_ONCE = 1000
ARTIFACTS = "vqray-artifacts"


def uri() -> str:
    """MLFLOW_TRACKING_URI, or a database file in the working directory.

    Raises:
        Refused: there is no such variable in a job, whose working directory nobody keeps.
    """
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    if JOB in os.environ:
        raise Refused(
            "this job has no MLFLOW_TRACKING_URI, and its working directory, where a database would be, is thrown away:"
            " set it to a server, and submit with --env MLFLOW_TRACKING_URI."
        )
    return f"sqlite:///{Path.cwd() / 'vqray.db'}"


def where() -> str:
    """The tracking store as it may be shown: a password in its address is left out."""
    parts = urlsplit(uri())
    if not parts.password:
        return uri()
    return parts._replace(netloc=f"{parts.username}:***@{parts.netloc.rpartition('@')[2]}").geturl()


def client() -> Any:
    """An MLflow client of the store at `uri()`, opened once per process."""
    with told("open the store"):
        return _client(uri(), os.getpid())


@contextmanager
def told(doing: str) -> Iterator[None]:
    """Turn what MLflow raises into Failed, with the store's address and without its password."""
    exceptions = _mlflow().exceptions
    try:
        yield
    except exceptions.MlflowException as error:
        reason = str(error).strip().partition("\n")[0].replace(uri(), where())
        raise Failed(
            f"could not {doing} in MLflow at {where()}: {reason}. "
            "Check that MLFLOW_TRACKING_URI is right and that the store answers."
        ) from None


def download(artifact_uri: str, directory: Path) -> Path:
    """Fetch one artifact directory below `directory` and return where it is."""
    with told(f"download {artifact_uri}"):
        artifacts = _mlflow().artifacts
        return Path(artifacts.download_artifacts(artifact_uri, dst_path=str(directory), tracking_uri=uri()))


class Run:
    """One MLflow run, open for writing."""

    def __init__(self, run_id: str):
        self.id = run_id

    def log_metrics(self, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """(step, {name: value}) points, in as few calls as MLflow takes: a call costs far more than a number."""
        entities = _mlflow().entities
        now = int(time.time() * 1000)
        flat = [
            entities.Metric(name, float(value), now, step) for step, values in points for name, value in values.items()
        ]
        with told("log metrics"):
            for low in range(0, len(flat), METRICS_AT_ONCE):
                client().log_batch(self.id, metrics=flat[low : low + METRICS_AT_ONCE])

    def log_picture(self, path: str | Path) -> None:
        """A picture file, under `pictures/` of the run."""
        with told(f"log {path}"):
            client().log_artifact(self.id, str(path), "pictures")

    def log_files(self, directory: str | Path, folder: str) -> None:
        """Every file of a local directory, under `folder` of the run."""
        with told(f"log {directory}"):
            client().log_artifacts(self.id, str(directory), folder)

    def tags(self, values: Mapping[str, str]) -> None:
        entities = _mlflow().entities
        with told("set tags"):
            client().log_batch(self.id, tags=[entities.RunTag(name, str(value)) for name, value in values.items()])

    def artifact_uri(self, folder: str) -> str:
        """Where the files of `folder` lie in the store."""
        with told(f"find run {self.id}"):
            return f"{client().get_run(self.id).info.artifact_uri}/{folder}"

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        with told(f"end run {self.id}"):
            client().set_terminated(self.id, status)


def start_run(
    experiment: str,
    name: str,
    settings: Mapping[str, Any],
    tags: Mapping[str, str],
    resume_run_id: str | None = None,
) -> Run:
    """A new run with its settings as parameters, or an earlier one opened again.

    An earlier run that this store does not have (it was deleted, or another store was in use) stays where it is, and a
    new one begins here.

    Raises:
        Refused: the experiment was deleted.
        Failed: the store does not answer.
    """
    if resume_run_id is not None and (earlier := find_run(resume_run_id)) is not None:
        with told(f"open run {earlier.id} again"):
            client().update_run(earlier.id, status="RUNNING")
        return earlier
    entities = _mlflow().entities
    params = [entities.Param(key, _shortened(value)) for key, value in settings.items()]
    experiment_id = _experiment(experiment)
    with told(f"start run {name!r}"):
        run = client().create_run(experiment_id, run_name=name, tags=dict(tags))
        for low in range(0, len(params), PARAMS_AT_ONCE):
            client().log_batch(run.info.run_id, params=params[low : low + PARAMS_AT_ONCE])
    return Run(run.info.run_id)


def find_run(run_id: str) -> Run | None:
    """The run of this id, if this tracking store has it and it was not deleted."""
    exceptions = _mlflow().exceptions
    with told(f"look for run {run_id}"):
        try:
            found = client().get_run(run_id)
        except exceptions.MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
    return Run(run_id) if found.info.lifecycle_stage == "active" else None


def _experiment(name: str) -> str:
    """The id of an experiment, made if there is none. Another process may make it at the same moment."""
    exceptions = _mlflow().exceptions
    with told(f"open experiment {name!r}"):
        found = client().get_experiment_by_name(name)
        if found is None:
            try:
                return str(client().create_experiment(name, artifact_location=_artifact_location(name)))
            except exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = client().get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        raise Refused(
            f"the MLflow experiment {name!r} at {where()} was deleted: restore it, or delete it for good (mlflow gc)."
        )
    return str(found.experiment_id)


def _artifact_location(experiment: str) -> str | None:
    """Beside a database file. A server decides for itself."""
    if not uri().startswith("sqlite:///"):
        return None
    database = Path(uri().removeprefix("sqlite:///").partition("?")[0]).absolute()
    return (database.parent / ARTIFACTS / experiment.replace("/", "_")).as_uri()


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if len(text) <= PARAM_LENGTH:
        return text
    end = f"... ({len(text):,} characters; the card has all of them)"
    return text[: PARAM_LENGTH - len(end)] + end


def _mlflow() -> ModuleType:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Those lines hold the store's address with its password, on the stream that ends in our JSON.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    import mlflow

    return mlflow


@lru_cache(maxsize=8)
def _client(address: str, process: int) -> Any:
    """Opening a database file costs seconds the first time: MLflow creates and migrates its tables."""
    mlflow = _mlflow()
    for noisy in ("alembic", "mlflow.store", "mlflow.tracking"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Between MLflow and its own dependencies, at the first opening; nothing here can change it.
        warnings.simplefilter("ignore")
        opened = mlflow.MlflowClient(tracking_uri=address, registry_uri=address)
        opened.search_experiments(max_results=1)
        opened.search_registered_models(max_results=1)
    return opened
