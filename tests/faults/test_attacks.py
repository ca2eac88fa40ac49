"""Peers that lie: with the defence, honest sites end no worse than alone; without it, at least one lie does harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.attack_runs import OFF, Attacked, make_pictures, run_attack

MARGIN = 0.03  # Dice; the test pictures of a site are few
# Per lie: how it is written, why it is refused, and by whom: the judge, or the wire, which never opens the push.
JUDGED = {
    "random": ("random:{liar}", "direction"),
    "flip": ("flip:{liar}", "direction"),
    "scale": ("scale:{liar}x100", "norm"),
    "labels": ("labels:{liar}", "validation"),
    "replay": ("replay:{liar}", "replay"),
}
UNOPENED = {"nan_push": ("nan_push:{liar}", "not finite"), "stale": ("stale:{liar}", "stale")}
GOSSIP = {"name": "gossip_avg", "topology": {"name": "push_k", "k": 1}}  # mixes whatever comes


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of four sites, of which D lies."""
    folder = tmp_path_factory.mktemp("four")
    make_pictures(folder, num_sites=4)
    return folder


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of eight sites, of which G and H lie."""
    folder = tmp_path_factory.mktemp("eight")
    make_pictures(folder, num_sites=8)
    return folder


@pytest.fixture(scope="module")
def alone_of_four(four: Path) -> float:
    """Dice of A, B and C, each trained alone."""
    return run_attack(four, num_sites=4, name="alone", liars="D", method={"name": "local"}).dice


@pytest.fixture(scope="module")
def alone_of_eight(eight: Path) -> float:
    """Dice of the six honest sites, each trained alone."""
    return run_attack(eight, num_sites=8, name="alone", liars="GH", method={"name": "local"}).dice


@pytest.fixture(scope="module")
def peaceful(four: Path) -> Attacked:
    """Four honest sites."""
    return run_attack(four, num_sites=4, name="peaceful")


def test_honest_pushes_are_all_accepted(peaceful: Attacked) -> None:
    judged = peaceful.judged("ABCD")
    assert len(judged) == 32  # 4 sites x 8 rounds of exchange
    assert [judgement.reason for judgement in judged if not judgement.accepted] == []


@pytest.mark.parametrize("lie", JUDGED)
def test_lie_is_refused_and_honest_sites_end_no_worse_than_alone(four: Path, alone_of_four: float, lie: str) -> None:
    text, word = JUDGED[lie]
    attacked = run_attack(four, num_sites=4, name=lie, liars="D", chaos=text.format(liar="D"))
    refused = [judgement.reason for judgement in attacked.judged("D") if not judgement.accepted]
    assert {reason.partition(":")[0] for reason in refused} == {word}
    assert len(refused) >= (1 if lie in ("labels", "replay") else 3)  # of 8 rounds: who is distrusted sends less often
    if lie not in ("labels", "replay"):  # those two are good models at times
        assert len(refused) == len(attacked.judged("D"))
    assert all(judgement.accepted for judgement in attacked.judged("ABC"))
    assert attacked.dice >= alone_of_four - MARGIN


@pytest.mark.parametrize("lie", UNOPENED)
def test_malformed_lie_never_reaches_the_judge(four: Path, alone_of_four: float, lie: str) -> None:
    text, words = UNOPENED[lie]
    attacked = run_attack(four, num_sites=4, name=lie, liars="D", chaos=text.format(liar="D"))
    assert attacked.refused_unopened(words) >= 7  # the first push of all is not stale yet
    assert attacked.dice >= alone_of_four - MARGIN


@pytest.mark.parametrize(
    ("lies", "least"), [("random:G, flip:H", 8), ("scale:Gx100, labels:H", 7), ("replay:G, nan_push:H", 1)]
)
def test_two_liars_of_eight_do_no_harm(eight: Path, alone_of_eight: float, lies: str, least: int) -> None:
    """``least``: how many of their at most 16 pushes are refused: liars also push to liars, and soon less often."""
    attacked = run_attack(eight, num_sites=8, name=lies.partition(":")[0], liars="GH", chaos=lies)
    assert sum(not judgement.accepted for judgement in attacked.judged("GH")) >= least
    assert all(judgement.accepted for judgement in attacked.judged("ABCDEF"))
    assert attacked.dice >= alone_of_eight - MARGIN


def test_without_the_defence_a_lie_does_harm(four: Path) -> None:
    """Where weights are mixed unseen, a model of turned signs spoils those who take it."""
    flip = {"num_sites": 4, "liars": "D", "method": GOSSIP, "chaos": "flip:D"}
    without = run_attack(four, name="open", defence=OFF, **flip)  # type: ignore[arg-type]
    protected = run_attack(four, name="protected", **flip)  # type: ignore[arg-type]
    assert without.mean_validation < protected.mean_validation - MARGIN


def test_impersonation_is_refused_where_pushes_are_signed(four: Path) -> None:
    attacked = run_attack(
        four, num_sites=4, name="impersonate", liars="D", chaos="impersonate:D->C", wire={"sign": True}
    )
    assert attacked.refused_unopened("signature: not made by the key of C") >= 6
