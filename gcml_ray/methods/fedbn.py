"""FedBN: federated averaging in which every site keeps its own normalisation layers.

Li, Jiang, Zhang, Kamp, Dou: "FedBN: Federated learning on non-IID features via local batch normalization",
ICLR 2021, arXiv 2102.07623. Our reading: instance, group and layer normalisation with parameters stay local as
batch normalisation does there, running statistics too; layers are found by their type. They are no part of a
push (``gcml_ray/model/weights.py``), so a round differs from FedAvg's in nothing else.
"""

from __future__ import annotations

from gcml_ray.methods.fedavg import train_round

__all__ = ["train_round"]
