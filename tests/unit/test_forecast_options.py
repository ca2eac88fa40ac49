"""What averages of weights and kept models of peers add to a forecast."""

from __future__ import annotations

from typing import Any

import pytest

from gcml_ray.doctor.forecast import forecast, learner_bytes
from tests.forecast_makers import ONE_PROCESS, cases, config, costs


@pytest.mark.parametrize(
    ("method", "push_average", "num_averages"),
    [({"name": "gossip_avg", "topology": {"name": "ring"}}, True, 1), ({"name": "ditto", "lambda": 1.0}, False, 1),
     ({"name": "ditto", "lambda": 1.0}, True, 2)],
)  # fmt: skip
def test_an_average_is_one_more_vector(method: dict[str, Any], push_average: bool, num_averages: int) -> None:
    plain = learner_bytes(config(method=method), costs("A"))
    optimiser = {"learning_rate": 0.1, "weight_average": 0.9, "push_average": push_average}
    averaged = config(method=method, optimiser=optimiser)
    assert learner_bytes(averaged, costs("A")) == plain + num_averages * 4 * 1100


def test_an_average_is_part_of_each_checkpoint() -> None:
    averaged = config(optimiser={"learning_rate": 0.1, "weight_average": 0.9})
    needs = forecast(averaged, [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    assert needs.disk_bytes == 2 * (4 * (4400 + 8000 + 4400) + 4 * 4400)


def test_models_of_peers_lie_on_disk_for_two_rounds_and_for_the_ensemble() -> None:
    kept = config(evaluation={"ensemble_peers": 2})
    needs = forecast(kept, [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    assert needs.disk_bytes == 2 * (4 * (4400 + 8000) + (4 + 4 * 2) * 4400)
