"""MLflow runs: settings, metrics, pictures, digests. The driver is the only writer."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.errors import Refused

PARAM_LENGTH = 6000
"""MLflow refuses longer values; a setting that long is a list nobody reads there, and the card has it whole."""
METRICS_AT_ONCE = 1000


def uri() -> str:
    """MLFLOW_TRACKING_URI, or a database file in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'vqray.db'}"


def where() -> str:
    """The tracking store as it may be shown: a password in its address is left out."""
    parts = urlsplit(uri())
    if not parts.password:
        return uri()
    return parts._replace(netloc=f"{parts.username}:***@{parts.hostname}").geturl()


def client() -> Any:
    """An MLflow client.

    MLflow is imported here because it reads its environment at import: telemetry is off and unpickling forbidden
    before its first line runs.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    import mlflow

    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return mlflow.MlflowClient(tracking_uri=uri(), registry_uri=uri())


def download(artifact_uri: str, directory: Path) -> Path:
    """Fetch one artifact directory below `directory`."""
    client()
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(artifact_uri, dst_path=str(directory), tracking_uri=uri()))


class Run:
    """One MLflow run, open for writing."""

    def __init__(self, mlflow_client: Any, run_id: str):
        self._client = mlflow_client
        self.id = run_id

    def log_metrics(self, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """(step, {name: value}) points, in as few calls as MLflow takes."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        flat = [Metric(name, float(value), now, step) for step, values in points for name, value in values.items()]
        for low in range(0, len(flat), METRICS_AT_ONCE):
            self._client.log_batch(self.id, metrics=flat[low : low + METRICS_AT_ONCE])

    def log_file(self, path: str | Path, folder: str | None = None) -> None:
        self._client.log_artifact(self.id, str(path), folder)

    def log_directory(self, path: str | Path, folder: str) -> None:
        self._client.log_artifacts(self.id, str(path), folder)

    def tags(self, values: Mapping[str, str]) -> None:
        for name, value in values.items():
            self._client.set_tag(self.id, name, value)

    def artifact_uri(self, folder: str) -> str:
        return f"{self._client.get_run(self.id).info.artifact_uri}/{folder}"

    def finish(self, status: str) -> None:
        """FINISHED or FAILED."""
        self._client.set_terminated(self.id, status)


def start_run(
    experiment: str, name: str, settings: Mapping[str, Any], tags: Mapping[str, str], resume_run_id: str | None = None
) -> Run:
    """A new run with its settings as parameters, or an earlier one opened again."""
    from mlflow.exceptions import MlflowException

    mlflow_client = client()
    if resume_run_id is not None:
        try:
            mlflow_client.update_run(resume_run_id, status="RUNNING")
        except MlflowException:
            # Another tracking store than the run was begun on: its history stays there, and a new one begins here.
            return start_run(experiment, name, settings, tags)
        return Run(mlflow_client, resume_run_id)
    run = mlflow_client.create_run(_experiment(mlflow_client, experiment), run_name=name, tags=dict(tags))
    from mlflow.entities import Param

    params = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in settings.items()]
    for low in range(0, len(params), 100):
        mlflow_client.log_batch(run.info.run_id, params=params[low : low + 100])
    return Run(mlflow_client, run.info.run_id)


def find_run(run_id: str) -> Run | None:
    """The run of this id, if this tracking store has it."""
    from mlflow.exceptions import MlflowException

    mlflow_client = client()
    try:
        mlflow_client.get_run(run_id)
    except MlflowException:
        return None
    return Run(mlflow_client, run_id)


def _experiment(mlflow_client: Any, name: str) -> str:
    found = mlflow_client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise Refused(f"the MLflow experiment {name!r} was deleted; restore it or delete it for good (mlflow gc).")
        return str(found.experiment_id)
    # With a database file, artifacts lie beside it; a server decides for itself.
    database = uri().removeprefix("sqlite:///") if uri().startswith("sqlite:///") else None
    location = (Path(database).parent / "vqray-artifacts" / name).as_uri() if database else None
    return str(mlflow_client.create_experiment(name, artifact_location=location))
