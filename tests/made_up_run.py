"""Made-up records of a federation, seeded, for tests of what reads a run folder."""

from __future__ import annotations

import math
from pathlib import Path

from gcml_ray.config import Config
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.records import (
    CaseScore,
    Edge,
    EvaluationReport,
    Phase,
    PushReceipt,
    RoundPlan,
    RoundRecord,
    SiteFailure,
    SiteInfo,
    TrainReport,
)
from gcml_ray.seeding import numpy_generator

SEED = 7
PUSH_BYTES = 16_500_000


def made_up_config(folder: Path, *, rounds: int = 30) -> Config:
    """A configuration that could have made such a run."""
    return Config.model_validate(
        {
            "name": "made-up",
            "data": {
                "datalist": "data.json",
                "channels": ["ct"],
                "labels": {"background": 0, "pancreas": 1},
                "spacing_is_real": True,
                "patch_size": [16, 16, 16],
            },
            "network": {"name": "sanet"},
            "optimiser": {"learning_rate": 0.003},
            "method": {"name": "gcml", "topology": {"name": "push_k", "k": 1}, "dcml": {"lambda": 0.2}},
            "federation": {"rounds": rounds, "local_steps": 20},
            "output": {"folder": str(folder)},
        }
    )


def made_up_infos(sites: tuple[str, ...]) -> tuple[SiteInfo, ...]:
    """What the sites would say at the start."""
    return tuple(
        SiteInfo(site, 20 + index, 3, 5, 4_124_700, PUSH_BYTES, "cpu", "node-1", 4000 + index, 0, 1.5)
        for index, site in enumerate(sites)
    )


def made_up_round(
    number: int, sites: tuple[str, ...], *, rounds: int = 30, evaluate: bool = True, exchange: bool = True
) -> RoundRecord:
    """One round: some site fails about every tenth round, one push of eight is refused."""
    random = numpy_generator(SEED, "round", number)
    phase = _phase(number, rounds) if exchange else "warmup"
    failed = {site for site in sites if random.random() < 0.03 and number > 1}
    edges = tuple(
        Edge(site, str(random.choice([other for other in sites if other != site])))
        for site in sites
        if phase == "exchange" and len(sites) > 1
    )
    pushes = tuple(_receipt(edge, number, refused=bool(random.random() < 0.12)) for edge in edges)
    taught = {push.receiver for push in pushes if push.accepted}
    trained = tuple(
        _report(site, number, index, evaluate=evaluate, is_taught=site in taught)
        for index, site in enumerate(sites)
        if site not in failed
    )
    failures = tuple(SiteFailure(site, number, "train", "died", "the process ended") for site in sorted(failed))
    plan = RoundPlan(round_number=number, phase=phase, sites=sites, edges=edges)
    return RoundRecord(plan, trained, pushes, failures, seconds=12.5, stage_seconds={"push": 1.0, "train": 11.0})


def made_up_evaluation(site: str, model: str, *, num_cases: int = 6, gain: float = 0.0) -> EvaluationReport:
    """Test scores of one site; the first case's HD95 is undefined."""
    random = numpy_generator(SEED, "test", site)
    scores = tuple(
        CaseScore(site, f"case{number}", "test", model, "pancreas", float(dice), math.nan if number == 0 else 4.0, 0.8)
        for number, dice in enumerate(0.55 + gain + 0.3 * random.random(num_cases))
    )
    return EvaluationReport(site, "test", model, round_number=30, scores=scores, seconds=2.0)


def made_up_run(
    path: Path, sites: tuple[str, ...], *, rounds: int = 30, evaluate: bool = True, exchange: bool = True
) -> RunFolder:
    """A whole run folder, without checkpoints."""
    folder = RunFolder(path)
    path.mkdir(parents=True)
    for number in range(1, rounds + 1):
        folder.append_round(made_up_round(number, sites, rounds=rounds, evaluate=evaluate, exchange=exchange))
    for index, site in enumerate(sites):
        folder.write_cases(made_up_evaluation(site, "before_gossip").scores)
        folder.write_cases(made_up_evaluation(site, "personalised", gain=0.06 - 0.03 * index % 0.09).scores)
    return folder


def _phase(number: int, rounds: int) -> Phase:
    if number <= rounds // 10:
        return "warmup"
    return "cooldown" if number > rounds - rounds // 4 else "exchange"


def _receipt(edge: Edge, number: int, *, refused: bool) -> PushReceipt:
    reason = "label map differs" if refused else ""
    return PushReceipt(number, edge.sender, edge.receiver, not refused, reason, PUSH_BYTES, 0.4)


def _report(site: str, number: int, index: int, *, evaluate: bool, is_taught: bool) -> TrainReport:
    random = numpy_generator(SEED, "report", site, number)
    dice = (0.82 - 0.04 * index) * (1 - math.exp(-number / 7)) + 0.02 * float(random.standard_normal())
    losses = {"segmentation": 0.9 * math.exp(-number / 12) + 0.15 + 0.02 * float(random.standard_normal())}
    if is_taught:
        losses |= {"mutual": 0.2 * math.exp(-number / 20), "incoming_segmentation": losses["segmentation"] * 1.1}
    return TrainReport(
        site=site,
        round_number=number,
        peers=("other",) if is_taught else (),
        num_steps=20,
        losses=losses,
        regions={"pull": 6.0, "push": 1.5} if is_taught else {},
        merge="local_after" if is_taught else "",
        candidate_dice={"local_before": dice - 0.02, "local_after": dice, "mix": dice - 0.01} if is_taught else {},
        validation_dice=min(1.0, max(0.0, dice)) if evaluate else None,
        is_best=False,
        seconds={"train": 10.0, "validate": 1.0},
        learning_rate=0.003 * (1 - number / 40),
        peak_memory_bytes=3 * 2**30,
    )
