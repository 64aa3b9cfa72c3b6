"""Settings every test needs, made before ray, torch or mlflow are imported."""

import os

os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    MLFLOW_DISABLE_TELEMETRY="true",
    MPLBACKEND="Agg",
    AWS_EC2_METADATA_DISABLED="true",
)
