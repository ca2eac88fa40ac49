"""How much each searched key matters, by Optuna's fANOVA over the trials."""

from __future__ import annotations

import logging
import math
from typing import Any

from gcml_ray.search.effects import MIN_TRIALS, comparable, value_at
from gcml_ray.search.records import SearchRecord
from tune.space import ChoiceDomain, Domain, IntegerDomain, LogUniformDomain
from tune.trial_config import Search

log = logging.getLogger(__name__)


def importances(search: Search, record: SearchRecord) -> dict[str, float]:
    """Shares that sum to 1, by key; empty where too few trials say anything.

    Trials that finished or were cut are compared at the last round that all of them have reached, so that a trial that
    was cut is not held to be worse for its length.
    """
    evaluated = [trial for trial in comparable(record) if set(trial.params) == set(search.config.space)]
    if len(evaluated) < MIN_TRIALS:
        return {}
    common = min(trial.last_round for trial in evaluated)
    values = [value_at(trial, common, record) for trial in evaluated]
    if max(values) - min(values) == 0:
        return {}
    import optuna  # noqa: PLC0415 - slow, and only needed at the end

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    distributions = {key: _distribution(domain) for key, domain in search.config.space.items()}
    for trial, value in zip(evaluated, values, strict=True):
        study.add_trial(optuna.trial.create_trial(params=trial.params, distributions=distributions, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ImportError, RuntimeError, ValueError) as error:
        log.warning("no importance of the searched keys: %s", error)
        return {}
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}


def _distribution(domain: Domain) -> Any:
    from optuna import distributions  # noqa: PLC0415 - see importances

    if isinstance(domain, ChoiceDomain):
        return distributions.CategoricalDistribution(domain.labels)
    if isinstance(domain, IntegerDomain):
        return distributions.IntDistribution(domain.low, domain.high)
    return distributions.FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogUniformDomain))
