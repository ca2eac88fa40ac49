"""Nothing but weight buffers and small records leaves a site, over whole runs of the real trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gcml_ray.config import Config
from gcml_ray.networks.registry import build_network
from gcml_ray.records import SiteStatus
from tests.makers import make_config
from tests.message_audit import (
    MAX_BYTES,
    AuditedLocalPool,
    Book,
    assert_only_weights_and_records,
    problems_of,
    problems_of_push,
)
from tests.runs import drive

DP_SGD = {"mode": "dp_sgd", "noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-2, "epsilon_limit": 6.0}
UPDATE_NOISE = {"mode": "update_noise", "noise_multiplier": 0.01, "max_update_norm": 1.0, "delta": 1e-2}


def book_for(config: Config, folder: Path) -> Book:
    """The expected size of a push is counted on a network of its own."""
    network = build_network(config.network, config.data)
    return Book(folder / "messages.jsonl", sum(parameter.numel() for parameter in network.parameters()))


@pytest.mark.parametrize(
    ("method", "privacy"),
    [
        ({"name": "gcml", "topology": {"name": "push_k", "k": 1}}, {}),
        ({"name": "gcml", "topology": {"name": "push_k", "k": 1}}, DP_SGD),
        ({"name": "gcml", "topology": {"name": "push_k", "k": 1}}, UPDATE_NOISE),
        ({"name": "fedavg"}, {}),
    ],
    ids=["gcml", "dp_sgd", "update_noise", "fedavg"],
)
def test_only_weights_and_small_records_cross_a_sites_border(
    tmp_path: Path, method: dict[str, Any], privacy: dict[str, Any]
) -> None:
    """With the limit of ``dp_sgd`` a site stops on the way, and goes on pushing."""
    config = make_config(tmp_path, method=method, privacy=privacy)
    book = book_for(config, tmp_path)
    run = drive(config, AuditedLocalPool(config, book))
    assert run.summary.status == "finished"
    assert_only_weights_and_records(book, senders="AB")


def test_what_is_pushed_are_the_senders_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right size alone would let an image of that size pass."""
    config = make_config(tmp_path)
    pool = AuditedLocalPool(config, book_for(config, tmp_path))
    seen = []

    def note_push(book: Book, header: Any, buffer: Any, receivers: Any) -> None:
        del book, receivers
        trainer: Any = pool._sites[header.sender].trainer
        seen.append(np.array_equal(buffer, trainer.local.model.flat.numpy()))

    monkeypatch.setattr(Book, "note_push", note_push)
    drive(config, pool)
    assert seen == [True] * 4  # two sites in two exchange rounds


# --- the audit itself finds what it is there for -----------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        np.zeros(3),
        torch.zeros(3),
        {"image": torch.zeros(3)},
        (1, [b"bytes"]),
        SiteStatus("A", 1, np.zeros(3), 0, 0),  # type: ignore[arg-type] - a record can hold anything at run time
        np.float32(1.0),
        Path("case.nii.gz"),
        "x" * MAX_BYTES,
        [0.5] * MAX_BYTES,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_small_record_is_found(message: Any) -> None:
    assert problems_of(message)


@pytest.mark.parametrize(
    "buffer",
    [np.zeros(9, np.float32), np.zeros((2, 5), np.float32), np.zeros(10), torch.zeros(10), [0.0] * 10],
    ids=["size", "shape", "dtype", "tensor", "list"],
)
def test_a_buffer_that_is_not_the_models_is_found(buffer: Any) -> None:
    assert problems_of_push(buffer, 10)


def test_records_and_the_models_buffer_pass() -> None:
    assert problems_of((SiteStatus("A", 1, "train", 0, 0), {"A": 0.5}, None)) == []
    assert problems_of_push(np.zeros(10, np.float32), 10) == []
