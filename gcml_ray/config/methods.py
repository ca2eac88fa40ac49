"""The ``method`` section: one class a method, with the topologies of those without a server."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from gcml_ray.config.section import Count, CountOrZero, Fraction, NonNegative, Positive, Section


class BernoulliTopology(Section):
    """Each site sends with a probability in proportion to its training cases (GML)."""

    name: Literal["bernoulli"]
    expected_senders: Positive


class MatchingTopology(Section):
    """Random pairs; ``symmetric``: both directions of a pair, else one at random."""

    name: Literal["matching"]
    symmetric: bool = True


class PushKTopology(Section):
    """Every site sends to ``k`` random others."""

    name: Literal["push_k"]
    k: Count = 1


class UsefulnessTopology(Section):
    """As ``push_k``, but receivers that a sender's past pushes have helped more are drawn more often.

    ``temperature``: the gain in validation Dice that makes a receiver e times as likely. ``exploration``: the share of
    draws in which all are equally likely.
    """

    name: Literal["usefulness"]
    k: Count = 1
    temperature: Positive = 0.1
    exploration: Annotated[float, Field(gt=0, le=1)] = 0.2


class RingTopology(Section):
    """Every site sends to the next one in the order of names."""

    name: Literal["ring"]


class ExponentialTopology(Section):
    """One-peer exponential graph: in round t, site i sends to i + 2^(t mod ceil(log2 N))."""

    name: Literal["exponential"]


Topology = Annotated[
    BernoulliTopology | MatchingTopology | PushKTopology | UsefulnessTopology | RingTopology | ExponentialTopology,
    Field(discriminator="name"),
]


def dcml_keys(variant: str) -> set[str]:
    """The keys of ``method.dcml`` that a variant uses; any other would be ignored."""
    if variant == "none":
        return {"variant"}
    keys = {"variant", "lambda", "classwise", "ramp_up_rounds"}
    if variant == "mutual":  # over all voxels: there is one denominator
        return keys
    return keys | {"normalise", "beta", "tau"} if variant.startswith("contrast") else keys | {"normalise"}


class DcmlConfig(Section):
    """Weights of deep contrastive mutual learning (docs/method.md, The mutual step; losses/mutual.py).

    ``weight`` is the paper's lambda, ``beta`` the share of the push-away term, ``tau`` its bound in nats.
    """

    variant: Literal[
        "contrast", "contrast_hinge", "contrast_advantage", "contrast_soft", "regional", "mutual", "none"
    ] = "contrast"
    weight: NonNegative = Field(default=0.1, alias="lambda")
    beta: NonNegative = 0.1
    tau: Positive = 1.0
    normalise: Literal["region", "omega", "volume"] = "region"
    classwise: bool = False
    ramp_up_rounds: CountOrZero = 0

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> DcmlConfig:
        names = {field.alias or name: name for name, field in type(self).model_fields.items()}
        ignored = [key for key, name in names.items() if name in self.model_fields_set - {"variant"}]
        ignored = sorted(set(ignored) - dcml_keys(self.variant))
        if ignored:
            raise ValueError(
                f"{', '.join(ignored)} would be ignored by variant {self.variant}: leave out, or replace the section "
                f"with --set 'method.dcml={{variant: {self.variant}}}'"
            )
        return self

    @model_serializer(mode="wrap")
    def _leave_out_what_is_ignored(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A saved configuration must be accepted again."""
        used = dcml_keys(self.variant) | ({"weight"} if self.variant != "none" else set())
        return {key: value for key, value in dump(self).items() if key in used}


class LocalMethod(Section):
    """Every site trains alone."""

    name: Literal["local"]
    max_incoming: ClassVar[int] = 0


class PooledMethod(Section):
    """One model on the cases of all sites: the upper bound. The data leave the sites."""

    name: Literal["pooled"]
    max_incoming: ClassVar[int] = 0


class PeerMethod(Section):
    """What a push holds.

    ``buffers`` says whether the floating-point buffers (BatchNorm statistics) travel with the parameters or stay
    local; integer counters never travel. ``share_norms: false`` leaves the parameters of normalisation layers at
    their site too, as FedBN does (our addition).
    """

    buffers: Literal["send", "keep"] = "send"
    share_norms: bool = True

    @model_validator(mode="after")
    def _norms_stay_whole(self) -> Self:
        if not self.share_norms and self.buffers == "send":
            raise ValueError("share_norms: false keeps normalisation layers local, statistics too: set buffers: keep")
        return self


class GossipMethod(PeerMethod):
    """What all gossip methods share: who sends to whom. ``max_incoming`` bounds a receiver's models of a round."""

    topology: Topology
    max_incoming: Count = 1


class GossipAvgMethod(GossipMethod):
    """Gossip averaging (Ormandi 2013): size-weighted mean on receipt, then local steps."""

    name: Literal["gossip_avg"]


class GmlMethod(GossipMethod):
    """Gossip mutual learning (arXiv 2401.06180): regional mutual steps, the local model is kept."""

    name: Literal["gml"]
    weight: NonNegative = Field(default=0.3, alias="lambda")

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class GcmlMethod(GossipMethod):
    """Gossip contrastive mutual learning (arXiv 2503.03883).

    ``merge_first`` mixes the incoming weights into the local ones before the mutual steps,
    ``merge`` decides what becomes of the two models after them (docs/method.md, What becomes of the two models).
    """

    name: Literal["gcml"]
    dcml: DcmlConfig = DcmlConfig()
    merge: Literal["keep_local", "val_weighted", "size_weighted", "select_best", "replace"] = "select_best"
    merge_first: Literal["none", "size_weighted", "val_weighted"] = "none"

    @property
    def mixes_weights(self) -> bool:
        """Whether the two models must have the same architecture."""
        return self.merge != "keep_local" or self.merge_first != "none"


class DefKtMethod(GossipMethod):
    """Def-KT (Li 2021): mutual learning at the receiver, then the incoming model replaces the local one."""

    name: Literal["defkt"]
    weight: NonNegative = Field(default=1.0, alias="lambda")

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class DpsgdMethod(PeerMethod):
    """D-PSGD (Lian 2017): doubly stochastic mixing with the neighbours, then local steps.

    ``ring``: with the neighbours on both sides, a third each; ``exponential``: with one neighbour, in halves.
    """

    name: Literal["dpsgd"]
    topology: Annotated[RingTopology | ExponentialTopology, Field(discriminator="name")]

    @property
    def max_incoming(self) -> int:
        """Models that reach a site in a round."""
        return 2 if isinstance(self.topology, RingTopology) else 1


class ProxyFlMethod(Section):
    """ProxyFL (Kalra 2023): a private model that stays, and a proxy that is handed on; they learn from each other.

    ``alpha`` is the share of the divergence in the private model's loss, ``beta`` in the proxy's.
    """

    name: Literal["proxyfl"]
    topology: Topology
    buffers: Literal["send", "keep"] = "send"
    alpha: Fraction
    beta: Fraction
    max_incoming: ClassVar[int] = 1


class ServerMethod(Section):
    """What all methods with a server share. ``buffers`` as in :class:`PeerMethod`."""

    buffers: Literal["send", "keep"] = "send"
    max_incoming: ClassVar[int] = 1


class FedAvgMethod(ServerMethod):
    """Federated averaging (McMahan 2017): local steps, then everybody goes on with the size-weighted mean."""

    name: Literal["fedavg"]


class FedProxMethod(ServerMethod):
    """FedProx (Li 2020): federated averaging whose local loss has mu/2 |w - w_global|^2 added."""

    name: Literal["fedprox"]
    mu: NonNegative


class FedBnMethod(Section):
    """FedBN (Li 2021): federated averaging in which normalisation layers stay local, buffers included."""

    name: Literal["fedbn"]
    buffers: ClassVar[Literal["keep"]] = "keep"
    max_incoming: ClassVar[int] = 1


class DittoMethod(ServerMethod):
    """Ditto (Li 2021): federated averaging, and a personal model beside it that lambda pulls towards its mean."""

    name: Literal["ditto"]
    weight: NonNegative = Field(alias="lambda")

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


Method = Annotated[
    LocalMethod
    | PooledMethod
    | GossipAvgMethod
    | GmlMethod
    | GcmlMethod
    | DefKtMethod
    | DpsgdMethod
    | ProxyFlMethod
    | FedAvgMethod
    | FedProxMethod
    | FedBnMethod
    | DittoMethod,
    Field(discriminator="name"),
]

SERVER = "server"  # in the pool beside the sites, where a method has one
POOLED = "pooled"  # the one "site" of pooled training


def has_server(method: Method) -> bool:
    """Whether the sites exchange through a server rather than with each other."""
    return isinstance(method, ServerMethod | FedBnMethod)


def has_peers(method: Method) -> bool:
    """Whether sites push to each other."""
    return isinstance(method, GossipMethod | DpsgdMethod | ProxyFlMethod)


def has_two_models(method: Method) -> bool:
    """Whether a site trains a model of its own beside the one that is exchanged."""
    return isinstance(method, DittoMethod | ProxyFlMethod)


def takes_mutual_steps(method: Method) -> bool:
    """Whether a receiver trains the incoming model together with its own."""
    return isinstance(method, GcmlMethod | GmlMethod | DefKtMethod)


def takes_coupled_steps(method: Method) -> bool:
    """Whether some steps train two models that learn from each other, incoming or both a site's own."""
    return takes_mutual_steps(method) or isinstance(method, ProxyFlMethod)


def sends_buffers(method: Method) -> bool:
    """Whether floating-point buffers (BatchNorm statistics) are part of a push."""
    return isinstance(method, LocalMethod | PooledMethod) or method.buffers == "send"


def keeps_norms(method: Method) -> bool:
    """Whether the parameters of normalisation layers stay at their site."""
    return isinstance(method, FedBnMethod) or (isinstance(method, PeerMethod) and not method.share_norms)


def needs_one_network(method: Method) -> bool:
    """Whether all sites must have the same network: wherever weights of two sites are mixed or handed on."""
    if keeps_norms(method):  # what is not sent of an incoming model is the receiver's
        return True
    if isinstance(method, GcmlMethod):
        return method.mixes_weights
    return not isinstance(method, LocalMethod | GmlMethod | ProxyFlMethod)
