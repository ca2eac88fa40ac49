"""Several models that predict as one: the mean of their probabilities.

Legend: C channels or classes, F all values of a model, *spatial = D H W (3D) or H W (2D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gcml_ray.model.learner import Learner
from gcml_ray.prediction.inference import mean_of, to_probabilities


@dataclass(frozen=True, eq=False)
class EnsembleMember:
    """One model: (F,) its values, and a learner of its network, which members of one network share.

    ``site``: whose model it is; ``file``: the name of its file among the site's checkpoints.
    """

    site: str
    file: str
    learner: Learner
    values: Tensor


@dataclass(frozen=True)
class Ensemble:
    """The members, the site's own model first."""

    members: tuple[EnsembleMember, ...]

    def joined_by(self, member: EnsembleMember) -> Ensemble:
        """An ensemble of these members and one more."""
        return Ensemble((*self.members, member))

    def loaded(self) -> Iterator[Learner]:
        """A learner with each member in turn."""
        for member in self.members:
            member.learner.model.flat.copy_(member.values)
            yield member.learner

    def scores(self, logits_of: Callable[[Learner], Tensor], *, sigmoid: bool) -> Tensor:
        """What ``predict_labels`` decides by, (C, *spatial): of one member its logits, of several the mean probability.

        Args:
            logits_of: the logits (C, *spatial) of one model.
            sigmoid: channels that overlap, decided at a probability of 0.5, which comes out as 0.
        """
        if len(self.members) == 1:
            return logits_of(next(self.loaded()))
        mean = mean_of(to_probabilities(logits_of(learner), sigmoid=sigmoid) for learner in self.loaded())
        return torch.sub(mean, 0.5)
