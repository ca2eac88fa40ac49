"""The configuration of one federation: frozen, strict, one file a run.

Every section is a pydantic model that refuses unknown keys and takes nothing for what it
is not, but an int for a float and a YAML list for a tuple.
Reading a file and applying ``--set`` overrides is in :mod:`gcml_ray.config.file`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gcml_ray.chaos import parse_chaos
from gcml_ray.config.data import AugmentConfig, DataConfig, SplitConfig
from gcml_ray.config.defence import DefenceConfig
from gcml_ray.config.federation import AttendanceConfig, FederationConfig
from gcml_ray.config.methods import (
    POOLED,
    SERVER,
    BernoulliTopology,
    DcmlConfig,
    DefKtMethod,
    DittoMethod,
    DpsgdMethod,
    ExponentialTopology,
    FedAvgMethod,
    FedBnMethod,
    FedProxMethod,
    GcmlMethod,
    GmlMethod,
    GossipAvgMethod,
    GossipMethod,
    LocalMethod,
    MatchingTopology,
    Method,
    PeerMethod,
    PooledMethod,
    ProxyFlMethod,
    PushKTopology,
    RingTopology,
    ServerMethod,
    Topology,
    UsefulnessTopology,
    dcml_keys,
    has_peers,
    has_server,
    has_two_models,
    keeps_norms,
    needs_one_network,
    sends_buffers,
    takes_coupled_steps,
    takes_mutual_steps,
)
from gcml_ray.config.optimiser import OptimiserConfig
from gcml_ray.config.privacy import PrivacyConfig, privacy_problem
from gcml_ray.config.resources import ResourcesConfig
from gcml_ray.config.section import (
    Count,
    CountOrZero,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Section,
    Sizes,
    Weights,
)
from gcml_ray.config.wire import WireConfig
from gcml_ray.errors import ConfigError

__all__ = [  # the long sections have their own modules, but are parts of this one
    "POOLED",
    "SERVER",
    "AttendanceConfig",
    "AugmentConfig",
    "BernoulliTopology",
    "Config",
    "DataConfig",
    "DcmlConfig",
    "DefKtMethod",
    "DefenceConfig",
    "DittoMethod",
    "DpsgdMethod",
    "EvaluationConfig",
    "ExponentialTopology",
    "FedAvgMethod",
    "FedBnMethod",
    "FedProxMethod",
    "FederationConfig",
    "GcmlMethod",
    "GmlMethod",
    "GossipAvgMethod",
    "GossipMethod",
    "LocalMethod",
    "LossConfig",
    "MatchingTopology",
    "Method",
    "NetworkConfig",
    "OptimiserConfig",
    "OutputConfig",
    "PooledMethod",
    "PrivacyConfig",
    "ProxyFlMethod",
    "PushKTopology",
    "ResourcesConfig",
    "RingTopology",
    "Section",
    "ServerMethod",
    "SplitConfig",
    "Topology",
    "TrackingConfig",
    "UsefulnessTopology",
    "WireConfig",
    "dcml_keys",
    "has_peers",
    "has_server",
    "has_two_models",
    "keeps_norms",
    "sends_buffers",
    "takes_coupled_steps",
    "takes_mutual_steps",
]


BARRIER_FREE = (LocalMethod, PooledMethod, GossipMethod)  # kinds of methods that federation.mode: async can run

# --- network, loss --------------------------------------------------------------------------


class NetworkConfig(Section):
    """A network by name; ``options`` are the arguments of its constructor (see networks/registry.py).

    ``start_from``: weights to start from instead of random ones (see start_weights.py).
    """

    name: str
    options: dict[str, Any] = Field(default={})
    start_from: str | None = None


class LossConfig(Section):
    """Segmentation loss: ``jaccard_weight`` x Jaccard + (1 - ``jaccard_weight``) x cross-entropy or focal.

    ``head_weights`` weighs the heads under deep supervision, main head first.
    """

    name: Literal["jaccard_ce", "jaccard_focal"] = "jaccard_ce"
    jaccard_weight: Fraction = 0.5
    smooth: Positive = 1.0
    include_background: bool = True
    batch_sums: bool = True
    class_weights: Weights | None = None
    focal_gamma: NonNegative | None = None
    head_weights: Weights | None = None

    @model_validator(mode="after")
    def _gamma_only_for_focal(self) -> LossConfig:
        if self.focal_gamma is not None and self.name != "jaccard_focal":
            raise ValueError("focal_gamma would be ignored: only jaccard_focal has it")
        return self


# --- evaluation, tracking, output ---------------------------------------------------------


class EvaluationConfig(Section):
    """Sliding-window inference and metrics. The tolerance's unit is mm, or voxels where spacing is unreal.

    ``window_size`` defaults to the patch size. A larger one is faster where memory allows; normalisation by instance
    then sees other statistics than in training, and cases that are smaller get a margin of zeros. ``cross_site``:
    after the test every site's personalised model travels to every other site and is scored there.
    ``ensemble_peers``: how many of its peers' last models a site keeps, to test as well what they and its own predict
    together.
    """

    window_size: Sizes | None = None
    window_overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    window_batch: Count = 4
    surface_tolerance: Positive = 1.0
    cross_site: bool = False
    ensemble_peers: CountOrZero = 0


class TrackingConfig(Section):
    """MLflow. Without ``uri`` the runs go to ``<output.folder>/../mlflow.db`` (sqlite)."""

    enabled: bool = True
    uri: str | None = None
    experiment: str = "gcml-ray"


class OutputConfig(Section):
    """The run folder, and how often sites write a checkpoint to resume from."""

    folder: str
    checkpoint_every: Count = 1
    num_overlays: CountOrZero = 2


class Config(Section):
    """One federation, whole."""

    name: Name
    data: DataConfig
    network: NetworkConfig
    site_networks: dict[str, NetworkConfig] = Field(default={})
    loss: LossConfig = LossConfig()
    optimiser: OptimiserConfig
    method: Method
    federation: FederationConfig
    resources: ResourcesConfig = ResourcesConfig()
    wire: WireConfig = WireConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    tracking: TrackingConfig = TrackingConfig()
    output: OutputConfig
    defence: DefenceConfig = DefenceConfig()
    chaos: str = ""

    def in_folder(self, folder: Path) -> Config:
        """The same federation with another run folder."""
        return self.model_copy(update={"output": self.output.model_copy(update={"folder": str(folder.resolve())})})

    @property
    def window_size(self) -> tuple[int, ...]:
        """Voxels of a window of sliding-window inference."""
        return self.evaluation.window_size or self.data.patch_size

    def network_of(self, site: str) -> NetworkConfig:
        """The network that a site trains: its own from ``site_networks``, or the common one."""
        return self.site_networks.get(site, self.network)

    @property
    def signs_pushes(self) -> bool:
        """Whether pushes are signed: as ``wire.sign`` says, else where each site has a node of its own."""
        return self.resources.placement == "label" if self.wire.sign is None else self.wire.sign

    @property
    def identity(self) -> str:
        """Short hash of what decides a run's result."""
        deciding = self.deciding(by_alias=False)
        return hashlib.blake2b(json.dumps(deciding, sort_keys=True).encode(), digest_size=8).hexdigest()

    def deciding(self, *, by_alias: bool) -> dict[str, Any]:
        """All that decides a run's result, as a mapping; where it runs, tracking and output do not.

        Values at their default are left out, so a new key invalidates no older run: who changes what a default means
        renames its key. ``by_alias``: with the keys of a file (``lambda``), not those of the sections.
        """
        clocks = {
            "start_timeout_s",
            "push_timeout_s",
            "round_timeout_s",
            "rejoin_timeout_s",
            "timeout_factor",
            "late_factor",
            "round_deadline_s",
            "time_limit_s",
        }
        deciding = self.model_dump(
            mode="json",
            by_alias=by_alias,
            exclude_defaults=True,
            exclude={
                "name": True,
                "resources": set(ResourcesConfig.model_fields) - {"amp", "compile"},
                "tracking": True,
                "output": True,
                "wire": {"sign"},
                "evaluation": {"cross_site"},
                "chaos": True,  # it changes the result, but a resume must be able to go on without it
                "data": {"datalist", "cache_folder", "num_workers"},
                "federation": clocks,
            },
        )
        return {section: values for section, values in deciding.items() if values != {}}

    @field_validator("chaos")
    @classmethod
    def _can_be_read(cls, value: str) -> str:
        try:
            parse_chaos(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Config:
        if self.optimiser.push_average and not (has_peers(self.method) or has_server(self.method)):
            raise ValueError(f"optimiser.push_average would be ignored: method {self.method.name} pushes nothing")
        if self.evaluation.ensemble_peers and not isinstance(self.method, PeerMethod):
            raise ValueError(
                f"evaluation.ensemble_peers would be ignored: with method {self.method.name} no site gets its peers' "
                "models; gossip_avg, gml, gcml, defkt and dpsgd do that"
            )
        if self.evaluation.cross_site and isinstance(self.method, PooledMethod):
            raise ValueError("evaluation.cross_site would be ignored: method pooled has one model for all sites")
        if self.federation.round_deadline_s is not None and self.resources.sites_per_actor > 1:
            raise ValueError("federation.round_deadline_s would be ignored: sites_per_actor lets sites take turns")
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        if needs_one_network(self.method) and any(network != self.network for network in self.site_networks.values()):
            raise ValueError(
                "site_networks gives sites different networks, but method mixes weights, or normalisation layers that "
                "a model is to have at each site: use method.name gml or proxyfl, or gcml with merge: keep_local and "
                "merge_first: none, and leave share_norms true"
            )
        steps, incoming = self.federation.local_steps, self.method.max_incoming
        if isinstance(self.method, GmlMethod | GcmlMethod | DefKtMethod) and incoming > steps:
            raise ValueError(
                f"method.max_incoming {incoming} is more than federation.local_steps {steps}: a round's steps are "
                "divided among the models that come in, and one without a step would be merged untrained"
            )
        if isinstance(self.method, PooledMethod) and self.resources.placement == "label":
            raise ValueError(
                "method pooled brings the cases of all sites together, but resources.placement: label promises that "
                "none leaves its node"
            )
        if self.federation.mode == "async" and not isinstance(self.method, BARRIER_FREE):
            raise ValueError(
                f"federation.mode async cannot run method {self.method.name}, whose rounds need all sites at once; "
                "without a barrier run local, pooled, gossip_avg, gml, gcml, defkt, or set mode: sync"
            )
        problem = privacy_problem(self.privacy, self.method, self.data, self.resources)
        if problem := problem or self.resources.workers_problem(self.data.num_workers):
            raise ValueError(problem)
        if self.federation.time_limit_s is not None and self.output.checkpoint_every > 1:
            raise ValueError(
                f"federation.time_limit_s may end a run after any round, and output.checkpoint_every "
                f"{self.output.checkpoint_every} would lose the rounds after the last checkpoint at a resume: set "
                "checkpoint_every to 1"
            )
        if self.evaluation.cross_site and self.privacy.mode == "update_noise":
            raise ValueError(
                "evaluation.cross_site sends personalised models as they are, but privacy.mode update_noise promises "
                "that no weights leave a site without noise"
            )
        window = self.evaluation.window_size
        if window is not None and len(window) != self.data.spatial_dims:
            raise ValueError(
                f"evaluation.window_size has {len(window)} numbers, data.spatial_dims is {self.data.spatial_dims}"
            )
        weights = self.loss.class_weights
        if weights is not None and len(weights) != self.data.num_outputs:
            raise ValueError(f"loss.class_weights has {len(weights)} numbers for {self.data.num_outputs} outputs")
        return self
