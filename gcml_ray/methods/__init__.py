"""The methods, one file each. A new one is a file with ``train_round`` and an entry in ``METHODS``."""

from __future__ import annotations

from gcml_ray.methods import (
    defkt,
    ditto,
    dpsgd,
    fedavg,
    fedbn,
    fedprox,
    gcml,
    gml,
    gossip_avg,
    local,
    pooled,
    proxyfl,
)
from gcml_ray.methods.rounds import TrainRound

METHODS: dict[str, TrainRound] = {
    "local": local.train_round,
    "pooled": pooled.train_round,
    "gossip_avg": gossip_avg.train_round,
    "gml": gml.train_round,
    "gcml": gcml.train_round,
    "defkt": defkt.train_round,
    "dpsgd": dpsgd.train_round,
    "proxyfl": proxyfl.train_round,
    "fedavg": fedavg.train_round,
    "fedprox": fedprox.train_round,
    "fedbn": fedbn.train_round,
    "ditto": ditto.train_round,
}
