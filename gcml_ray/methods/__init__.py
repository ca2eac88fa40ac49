"""The methods, one file each. A new one is a file with ``train_round`` and an entry in ``METHODS``."""

from __future__ import annotations

from gcml_ray.methods import gcml, gml, gossip_avg, local
from gcml_ray.methods.rounds import TrainRound

METHODS: dict[str, TrainRound] = {
    "local": local.train_round,
    "gossip_avg": gossip_avg.train_round,
    "gml": gml.train_round,
    "gcml": gcml.train_round,
}
