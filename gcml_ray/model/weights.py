"""One persistent flat buffer a model: trained parameters first, then floating-point buffers, frozen parameters last.

Legend: P values of trained parameters, F all other values: floating-point buffers and frozen parameters, S values that
are sent: P, or with the buffers more, or fewer than P where normalisation layers stay local.

Every parameter and floating-point buffer of the network is a view into ``flat``, every gradient a view
into ``gradient``; so exporting, importing, mixing, clipping and stepping are operations on one vector. Frozen
parameters (``requires_grad=False`` when the network is built) are neither trained nor sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gcml_ray.model.weight_average import WeightAverage
from gcml_ray.push.wire import TensorSpec

NORMALISATION = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
)


@dataclass(frozen=True)
class Snapshot:
    """A model as it was.

    ``flat``: (P + F,) its values; ``average``: those of its average, if it has one, with the steps that that had seen;
    ``counters``: its integer buffers.
    """

    flat: Tensor
    average: Tensor | None = None
    average_steps: int = 0
    counters: Mapping[str, Tensor] = field(default_factory=dict)


class FlatModel:
    """A network whose weights live in one vector.

    Args:
        module: a network in float32, already on its device. It is changed in place.
        send_buffers: whether floating-point buffers (BatchNorm statistics) are part of a push. Integer
            buffers (counters) never are.
        keep_norms: whether the parameters of normalisation layers are left out of a push (FedBN). They come
            after the others then, and buffers must not be sent.

    Attributes:
        flat: (P + F,) all weights, on the module's device.
        gradient: (P,) their gradients; ``parameter.grad`` is this tensor.
        parameter: (P,) the one parameter that an optimiser sees; shares memory with ``flat``.
        num_sent: S, how many leading values of ``flat`` make up a push.
        num_frozen: how many values at the end of ``flat`` are frozen.
        average: the moving average of the weights, where there is one; :meth:`load` and :meth:`mix` change it too.
    """

    def __init__(self, module: nn.Module, *, send_buffers: bool, keep_norms: bool = False) -> None:
        assert not (send_buffers and keep_norms), "what is sent must be the first part of the vector"
        kept = norm_parameters(module) if keep_norms else set()
        named = sorted(module.named_parameters(), key=lambda item: item[0] in kept)
        trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        frozen = {name: parameter for name, parameter in named if not parameter.requires_grad}
        if not trained:
            raise ValueError("no parameter of the network is to be trained: all have requires_grad=False")
        kept &= trained.keys()  # of a parameter that layers share, the first name
        buffers = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
        tensors = trained | buffers | frozen
        self.module = module
        self.layout = _layout(tensors)
        self.num_parameters = _num_values(trained)
        self.num_sent = self.num_parameters + (_num_values(buffers) if send_buffers else 0)
        self.num_sent -= _num_values({name: trained[name] for name in kept})
        self.num_frozen = _num_values(frozen)
        device = next(iter(trained.values())).device
        self.flat = torch.empty(_num_values(tensors), dtype=torch.float32, device=device)
        self.gradient = torch.zeros(self.num_parameters, dtype=torch.float32, device=device)
        self._adopt(tensors, set(trained))
        self.parameter = nn.Parameter(self.flat[: self.num_parameters])
        self.parameter.grad = self.gradient
        self.average: WeightAverage | None = None
        self._counters = {n: b.detach() for n, b in module.named_buffers() if not b.is_floating_point()}

    def _adopt(self, tensors: dict[str, Tensor], parameter_names: set[str]) -> None:
        """Moves every tensor's values into ``flat`` and points the module at the views."""
        for spec in self.layout:
            tensor = tensors[spec.name]
            end = spec.offset + tensor.numel()
            view = self.flat[spec.offset : end].view(spec.shape)
            view.copy_(tensor.detach())
            tensor.data = view
            if spec.name in parameter_names:
                tensor.grad = self.gradient[spec.offset : end].view(spec.shape)

    def settle(self, module: nn.Module, gradient: Tensor) -> None:
        """Replaces the own network and gradient by shared ones.

        Args:
            module: a network of the same architecture; :meth:`attach` lets it work with these weights.
            gradient: (P,) what the network's gradients are views of.
        """
        self.module, self.gradient = module, gradient
        self.parameter.grad = gradient

    def attach(self) -> None:
        """Points the network at these weights and counters: several models may take turns with one network."""
        tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        for spec in self.layout:
            tensor = tensors[spec.name]
            tensor.data = self.flat[spec.offset : spec.offset + tensor.numel()].view(spec.shape)
        for name, counter in self._counters.items():
            tensors[name].data = counter
        self.parameter.data = self.flat[: self.num_parameters]

    @property
    def sent_layout(self) -> tuple[TensorSpec, ...]:
        """The part of the layout that a push holds."""
        return tuple(itertools.takewhile(lambda spec: spec.offset < self.num_sent, self.layout))

    @property
    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite: then their sum is neither, unless large ones overflow it."""
        return bool(torch.isfinite(self.flat.sum())) or bool(torch.isfinite(self.flat).all())

    def load(self, weights: Tensor) -> None:
        """Takes over (S,) sent weights, float32 on any device, beside which the unsent values stay; or all (P + F,)."""
        assert weights.numel() in (self.num_sent, self.flat.numel())
        self.flat[: weights.numel()].copy_(weights)
        if self.average is not None:
            self.average.replace(weights)

    def mix(self, other: Tensor, *, own_share: float) -> None:
        """``own_share`` x own weights + (1 - ``own_share``) x ``other``, (S,) on the same device, in place."""
        self.flat[: self.num_sent].lerp_(other, 1.0 - own_share)
        if self.average is not None:
            self.average.mix(other, own_share=own_share)

    def snapshot(self) -> Snapshot:
        """A copy to come back to."""
        counters = {name: counter.clone() for name, counter in self._counters.items()}
        if self.average is None:
            return Snapshot(self.flat.clone(), counters=counters)
        return Snapshot(self.flat.clone(), self.average.values.clone(), self.average.num_steps, counters)

    def restore(self, snapshot: Snapshot) -> None:
        """Back to an earlier state of this model, average included."""
        self.flat.copy_(snapshot.flat)
        self._load_counters(snapshot.counters)
        if self.average is not None:
            assert snapshot.average is not None, "the average must be as old as the model"
            self.average.restore(snapshot.average, snapshot.average_steps)

    def take_over(self, other: FlatModel) -> None:
        """Becomes another model of the same architecture: all its weights and statistics, and its counters."""
        self.load(other.flat)
        self._load_counters(other.counters())

    def _load_counters(self, counters: Mapping[str, Tensor]) -> None:
        for name, counter in counters.items():
            self._counters[name].copy_(counter)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model has its averaged weights, where there are any; the others come back after it."""
        if self.average is None:
            yield
            return
        trained = self.flat.clone()
        self.flat.copy_(self.average.values)
        try:
            yield
        finally:
            self.flat.copy_(trained)

    def counters(self) -> dict[str, Tensor]:
        """The integer buffers: part of a checkpoint, never of a push."""
        return dict(self._counters)


def norm_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters of normalisation layers, found by the layers' type."""
    return {
        f"{name}.{part}" if name else part
        for name, layer in module.named_modules()
        if isinstance(layer, NORMALISATION)
        for part, _ in layer.named_parameters(recurse=False)
    }


def _num_values(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _layout(tensors: dict[str, Tensor]) -> tuple[TensorSpec, ...]:
    """Names, shapes and offsets in order; refuses what is not float32."""
    specs, offset = [], 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"weight {name} is {tensor.dtype}; networks are built in torch.float32")
        specs.append(TensorSpec(name, tuple(tensor.shape), "float32", offset))
        offset += tensor.numel()
    return tuple(specs)
