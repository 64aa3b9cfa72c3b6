"""How much each searched setting matters for each objective: shares of the variance, by Optuna's fANOVA."""

import json
import math
from collections.abc import Sequence
from typing import Any

from pipelines.front import Objective, is_log
from pipelines.trials import Trial

LEAST = 8
"""Finished trials below which nothing is said; and at least this many times the settings:"""
PER_SETTING = 4


def importance(trials: Sequence[Trial], objective: Objective) -> dict[str, float] | str:
    """Setting -> its share of the variance of an objective over the finished trials, the largest first.

    A sentence where nothing can be said: too few trials, settings that do not vary, an objective that does not.
    """
    name, direction = objective
    finished = [trial for trial in trials if trial.state == "finished" and name in trial.values()]
    varied = _varied(finished)
    if not varied:
        return "no setting varies among the finished trials"
    if len(finished) < (least := max(LEAST, PER_SETTING * len(varied))):
        return f"too few finished trials to tell: {len(finished)}, and {least} are needed for {len(varied)} settings"
    values = [trial.values()[name] for trial in finished]
    if min(values) == max(values):
        return f"{name} is the same in all finished trials"
    shares = _shares(finished, varied, values, direction)
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


def _shares(finished: Sequence[Trial], varied: Sequence[str], values: list[float], direction: str) -> dict[str, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    columns = {key: _coded([trial.settings.get(key) for trial in finished]) for key in varied}
    # Of values over several orders of magnitude the largest would be all the variance.
    if is_log(values):
        values = [math.log(value) for value in values]
    study = optuna.create_study(direction="minimize" if direction == "min" else "maximize")
    for row, value in enumerate(values):
        params = {key: column[row] for key, (column, _) in columns.items()}
        distributions = {key: distribution for key, (_, distribution) in columns.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return {
        key: float(share) for key, share in optuna.importance.get_param_importances(study, evaluator=evaluator).items()
    }


def _varied(trials: Sequence[Trial]) -> list[str]:
    keys = dict.fromkeys(key for trial in trials for key in trial.settings)
    return [key for key in keys if len({json.dumps(trial.settings.get(key)) for trial in trials}) > 1]


def _coded(values: list[Any]) -> tuple[list[Any], Any]:
    """Numbers as they are, on a log scale where they span an order of magnitude; all else by its place in a list."""
    import optuna

    kinds = optuna.distributions
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        numbers = [float(value) for value in values]
        return numbers, kinds.FloatDistribution(min(numbers), max(numbers), log=is_log(numbers))
    names = [json.dumps(value, sort_keys=True) for value in values]
    return names, kinds.CategoricalDistribution(sorted(set(names)))
