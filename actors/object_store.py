"""Pushes from actor to actor through Ray's object store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from actors.ray_errors import classify
from actors.site_pool import refused
from gcml_ray.errors import ClusterError
from gcml_ray.push.wire import UNREACHABLE, Payload, PushHeader
from gcml_ray.records import PushReceipt

ANSWER_TIMEOUT_S = 5.0  # of a call that is known to have been answered


class ObjectStoreTransport:
    """One ``ray.put`` a round in the sender's process, one direct call a receiver.

    Args:
        handles: the actor of every site.
        label_key: the node label that must equal the site's name; None where sites may run anywhere.
    """

    def __init__(self, handles: Mapping[str, Any], *, label_key: str | None) -> None:
        self._handles = dict(handles)
        self._label_key = label_key

    def check_placement(self, site: str) -> None:
        """The data-residency guard: with label placement, this process must be on the site's own node."""
        if self._label_key is None:
            return
        labels: Mapping[str, Any] = ray.get_runtime_context().get_node_labels()
        if labels.get(self._label_key) != site:
            raise ClusterError(
                f"site {site} was placed on a node labelled {self._label_key}={labels.get(self._label_key)}: its data "
                "must not leave its own node"
            )

    def send(
        self, header: PushHeader, buffer: Payload, receivers: Sequence[str], *, timeout_s: float
    ) -> tuple[PushReceipt, ...]:
        """Puts the buffer once and calls every receiver; none of it passes through the driver."""
        return self._send_reference(header, ray.put(buffer), receivers, size_bytes=buffer.nbytes, timeout_s=timeout_s)

    def _send_reference(
        self, header: PushHeader, reference: Any, receivers: Sequence[str], *, size_bytes: int, timeout_s: float
    ) -> tuple[PushReceipt, ...]:
        began = time.perf_counter()
        calls = {
            name: self._handles[name].receive.options(concurrency_group="inbox").remote(header, reference)
            for name in receivers
            if name in self._handles  # who has just joined is still introduced
        }
        ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s, fetch_local=False)
        answered = set(ready)
        return tuple(
            self._receipt(header, calls.get(name), name, size_bytes, began if calls.get(name) in answered else None)
            for name in receivers
        )

    def _receipt(
        self, header: PushHeader, call: Any, receiver: str, size_bytes: int, began: float | None
    ) -> PushReceipt:
        """The receiver's own receipt with the sender's clock, or one that says why there is none."""
        if call is None:
            reason = f"{UNREACHABLE} the sender does not know the receiver yet"
        elif began is None:
            reason = f"{UNREACHABLE} the receiver did not answer in time"
        else:
            try:
                receipt: PushReceipt = ray.get(call, timeout=ANSWER_TIMEOUT_S)
            except ray.exceptions.RayError as error:
                failure = classify(error, site=receiver, stage="receive", round_number=header.round_number)
                reason = f"{UNREACHABLE} {failure.message}"
            else:
                return replace(receipt, seconds=time.perf_counter() - began)
        return refused(header, receiver, reason, size_bytes)
