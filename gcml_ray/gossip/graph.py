"""Who pushes to whom in a round: the directed gossip graphs, drawn over the sites that are alive.

Everything here is a pure function of its arguments and of a generator that is derived from the
federation's seed and the round, so a graph depends neither on scheduling nor on where a run was resumed.
Sites are numbered in the order of their names; a graph is drawn as two index arrays (senders,
receivers) and becomes :class:`~gcml_ray.records.Edge` records at the very end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from gcml_ray.config import (
    SERVER,
    BernoulliTopology,
    DpsgdMethod,
    ExponentialTopology,
    FedBnMethod,
    FederationConfig,
    LocalMethod,
    MatchingTopology,
    Method,
    PooledMethod,
    PushKTopology,
    RingTopology,
    ServerMethod,
    Topology,
    UsefulnessTopology,
)
from gcml_ray.gossip.phases import phase_of
from gcml_ray.records import Edge, RoundPlan
from gcml_ray.seeding import numpy_generator

Indices = NDArray[np.int64]
Arcs = tuple[Indices, Indices]  # senders and receivers, one entry a push
WeightRows = Mapping[int, Mapping[int, float]]  # by sender, then receiver; 1 where nothing is said


def plan_round(
    method: Method,
    federation: FederationConfig,
    *,
    round_number: int,
    num_train: Mapping[str, int],
    usefulness: Mapping[Edge, float] | None = None,
    trust: Mapping[Edge, float] | None = None,
) -> RoundPlan:
    """The plan of one round: its phase, the sites that train and the pushes between them.

    Args:
        method: the ``method`` section; local and pooled training never have edges. With a server every site
            sends to it and it sends to every site.
        federation: rounds, phases and the seed.
        round_number: 1 to ``federation.rounds``.
        num_train: training cases of every site that is alive; a site that is not named here neither
            sends nor receives.
        usefulness: relative chances of edges where the topology is ``usefulness``; see :func:`sample_edges`.
        trust: the probability with which a drawn edge takes place; see :func:`sample_edges`. Not for D-PSGD, whose
            mixing matrix must stay doubly stochastic, nor with a server.
    """
    phase = phase_of(federation, round_number)
    if phase != "exchange" or isinstance(method, LocalMethod | PooledMethod):
        edges: tuple[Edge, ...] = ()
    elif isinstance(method, ServerMethod | FedBnMethod):  # has_server, in the type checker's words
        edges = server_edges(num_train)
    elif isinstance(method, DpsgdMethod) and isinstance(method.topology, RingTopology):
        edges = both_neighbours(num_train)
    else:
        edges = sample_edges(
            method.topology,
            num_train,
            max_incoming=method.max_incoming,
            rng=numpy_generator(federation.seed, "gossip", round_number),
            exchange_round=round_number - federation.num_warmup - 1,
            usefulness=usefulness,
            trust=None if isinstance(method, DpsgdMethod) else trust,
        )
    return RoundPlan(round_number=round_number, phase=phase, sites=tuple(sorted(num_train)), edges=edges)


def server_edges(sites: Iterable[str]) -> tuple[Edge, ...]:
    """Every site to the server, and the server to every site."""
    up = (Edge(sender=site, receiver=SERVER) for site in sorted(sites))
    down = (Edge(sender=SERVER, receiver=site) for site in sorted(sites))
    return (*up, *down)


def both_neighbours(sites: Iterable[str]) -> tuple[Edge, ...]:
    """The ring of D-PSGD (Lian 2017): every site to the next and to the previous one; two sites send one each."""
    names = sorted(sites)
    if len(names) < 2:
        return ()
    (senders, after), (_, before) = _shift(len(names), 1), _shift(len(names), len(names) - 1)
    if len(names) == 2:
        return _to_edges((senders, after), names)
    return _to_edges((np.concatenate([senders, senders]), np.concatenate([after, before])), names)


def sample_edges(
    topology: Topology,
    num_train: Mapping[str, int],
    *,
    max_incoming: int,
    rng: np.random.Generator,
    exchange_round: int,
    usefulness: Mapping[Edge, float] | None = None,
    trust: Mapping[Edge, float] | None = None,
) -> tuple[Edge, ...]:
    """Draws the pushes of one exchange round, sorted by sender, then receiver.

    Args:
        topology: the graph's family.
        num_train: training cases by site, alive sites only. A single site has nobody to push to.
        max_incoming: models that a receiver takes at most, at least 1.
        rng: the round's generator.
        exchange_round: exchange rounds before this one; only ``exponential`` depends on it.
        usefulness: how much likelier a sender draws an edge than one that is not named here, 0 or more; only
            ``usefulness`` draws by it.
        trust: the probability with which an edge takes place once the graph is drawn; 1 where nothing is said.
            Nobody else's partner changes by it, and the two directions of a pair have their own.
    """
    assert max_incoming >= 1
    names = sorted(num_train)
    if len(names) < 2:
        return ()
    match topology:
        case BernoulliTopology():
            cases = np.array([num_train[name] for name in names], dtype=np.float64)
            arcs = _bernoulli(cases, topology.expected_senders, max_incoming=max_incoming, rng=rng)
        case MatchingTopology():
            arcs = _matching(len(names), symmetric=topology.symmetric, rng=rng)
        case PushKTopology():
            arcs = _push_k(len(names), topology.k, max_incoming=max_incoming, rng=rng)
        case UsefulnessTopology():
            rows = _weight_rows(usefulness or {}, names)
            arcs = _draw_receivers(len(names), topology.k, rows, max_incoming=max_incoming, rng=rng)
        case RingTopology():
            arcs = _shift(len(names), 1)
        case ExponentialTopology():
            arcs = _shift(len(names), 2 ** (exchange_round % (len(names) - 1).bit_length()))
        case _:
            assert_never(topology)
    return _to_edges(_thinned(arcs, _weight_rows(trust or {}, names), rng), names)


def _weight_rows(edge_weights: Mapping[Edge, float], names: list[str]) -> WeightRows:
    """The weights that differ from 1, by the sites' numbers; those of sites that are gone are left out."""
    numbers = {name: number for number, name in enumerate(names)} if edge_weights else {}
    rows: dict[int, dict[int, float]] = {}
    for edge, weight in edge_weights.items():
        assert weight >= 0, f"{edge} has the weight {weight}"
        if weight != 1 and edge.sender in numbers and edge.receiver in numbers:
            rows.setdefault(numbers[edge.sender], {})[numbers[edge.receiver]] = weight
    return rows


def _bernoulli(cases: NDArray[np.float64], expected: float, *, max_incoming: int, rng: np.random.Generator) -> Arcs:
    """Site i sends with probability min(1, m n_i / sum n), to one other site (GML, arXiv 2401.06180).

    Our reading: where a receiver's places are taken, the sender picks again among the others with
    room, which keeps the expected number of pushes near m; a sender with nobody left but itself stays idle,
    which happens where nearly all send (1.9 pushes of 2 with three sites, 1.98 with four). The draw goes in
    batches: all senders pick at once, every receiver keeps the first ``max_incoming`` in random order, the others
    pick again.
    """
    assert cases.sum() > 0, "no site has training cases"
    probability = np.minimum(1.0, expected * cases / cases.sum())
    waiting: Indices = rng.permutation(np.flatnonzero(rng.random(len(cases)) < probability))
    room = np.full(len(cases), max_incoming)
    senders: list[Indices] = []
    receivers: list[Indices] = []
    while len(waiting):
        waiting, picks = _pick_with_room(waiting, room, rng)
        places = _rank_within(picks)
        accepted = places < room[picks]
        np.subtract.at(room, picks[accepted], 1)
        senders.append(waiting[accepted])
        receivers.append(picks[accepted])
        waiting = waiting[~accepted]
    none = np.empty(0, dtype=np.int64)
    return np.concatenate([none, *senders]), np.concatenate([none, *receivers])


def _draw_receivers(num_sites: int, k: int, rows: WeightRows, *, max_incoming: int, rng: np.random.Generator) -> Arcs:
    """In k turns the sites, one after the other in random order, each draw a receiver by the weights.

    Only those with room and not yet drawn by this sender are left to choose from; where there is none, the sender is
    idle in that turn. Takes time in proportion to the square of the sites.
    """
    room = np.full(num_sites, max_incoming)
    drawn: list[list[int]] = [[] for _ in range(num_sites)]
    for _ in range(min(k, num_sites - 1)):
        for sender in rng.permutation(num_sites).tolist():
            weights = np.ones(num_sites)
            for receiver, weight in rows.get(sender, {}).items():
                weights[receiver] = weight
            weights[[sender, *drawn[sender]]] = 0
            weights[room == 0] = 0
            reached = np.cumsum(weights)
            if reached[-1] > 0:
                receiver = int(np.searchsorted(reached, rng.random() * reached[-1], side="right"))
                drawn[sender].append(receiver)
                room[receiver] -= 1
    return (
        np.repeat(np.arange(num_sites), [len(receivers) for receivers in drawn]),
        np.array([receiver for receivers in drawn for receiver in receivers], dtype=np.int64),
    )


def _pick_with_room(waiting: Indices, room: Indices, rng: np.random.Generator) -> Arcs:
    """One site with room for each waiting sender, never itself; senders with no choice are left out."""
    is_open = room > 0
    open_sites = np.flatnonzero(is_open)
    num_choices = len(open_sites) - is_open[waiting]
    waiting = waiting[num_choices > 0]
    picks = rng.integers(0, num_choices[num_choices > 0])
    own_position = np.searchsorted(open_sites, waiting)
    return waiting, open_sites[picks + (is_open[waiting] & (picks >= own_position))]


def _rank_within(values: Indices) -> Indices:
    """For each entry, how many equal entries come before it: [5, 2, 5, 5] gives [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    _, starts, counts = np.unique(values[order], return_index=True, return_counts=True)
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = np.arange(len(values)) - np.repeat(starts, counts)
    return ranks


def _matching(num_sites: int, *, symmetric: bool, rng: np.random.Generator) -> Arcs:
    """A random perfect matching; an odd site is left out at random, one direction is random as well."""
    order = rng.permutation(num_sites)[: num_sites // 2 * 2]
    first, second = order[0::2], order[1::2]
    if not symmetric:
        return first, second
    return np.concatenate([first, second]), np.concatenate([second, first])


def _push_k(num_sites: int, k: int, *, max_incoming: int, rng: np.random.Generator) -> Arcs:
    """Every site sends to k others and k others send to it; every ordered pair is equally likely.

    Our reading: the sites are seated at random on a circle and each sends to the ones at k random,
    distinct distances. So no receiver is over-subscribed while k <= ``max_incoming``. With a larger k
    each receiver keeps ``max_incoming`` of its k pushes, chosen at random. k above N - 1 is N - 1.
    """
    k = min(k, num_sites - 1)
    seats = rng.permutation(num_sites)
    distances = 1 + rng.choice(num_sites - 1, size=k, replace=False)
    kept = distances[None, :].repeat(num_sites, axis=0)
    if k > max_incoming:
        kept = rng.permuted(kept, axis=1)[:, :max_incoming]
    receivers = np.arange(num_sites)[:, None]
    return seats[(receivers - kept) % num_sites].ravel(), seats[receivers.repeat(kept.shape[1], axis=1)].ravel()


def _shift(num_sites: int, distance: int) -> Arcs:
    """Site i sends to i + distance modulo N: the ring, and one step of the one-peer exponential graph.

    The exponential graph (Assran et al. 2019, arXiv 1811.10792; Ying et al. 2021, arXiv 2110.13363)
    goes through the distances 1, 2, 4, ... below N, one a round.
    """
    senders = np.arange(num_sites)
    return senders, (senders + distance) % num_sites


def _thinned(arcs: Arcs, rows: WeightRows, rng: np.random.Generator) -> Arcs:
    """Each push of a graph takes place with the probability in ``rows``. Where all are 1 nothing is drawn."""
    if not rows:
        return arcs
    senders, receivers = arcs
    pairs = zip(senders.tolist(), receivers.tolist(), strict=True)
    chances = np.array([rows.get(sender, {}).get(receiver, 1.0) for sender, receiver in pairs])
    takes_place = rng.random(len(chances)) < chances
    return senders[takes_place], receivers[takes_place]


def _to_edges(arcs: Arcs, names: list[str]) -> tuple[Edge, ...]:
    senders, receivers = arcs
    order = np.lexsort((receivers, senders))  # by index is by name; sorting Edge objects takes seconds at 100,000
    pairs = zip(senders[order].tolist(), receivers[order].tolist(), strict=True)
    return tuple(Edge(sender=names[sender], receiver=names[receiver]) for sender, receiver in pairs)
