"""What happens in which round, and which models are tested after the last one: pure functions of the configuration."""

from __future__ import annotations

from gcml_ray.config import Config, FederationConfig, has_two_models
from gcml_ray.records import BEFORE_GOSSIP, ENSEMBLE, PERSONALISED, SHARED, Phase, TrainOrder


def phase_of(federation: FederationConfig, round_number: int) -> Phase:
    """The phase of a round: the first ``num_warmup`` and the last ``num_cooldown`` have no exchange."""
    assert 1 <= round_number <= federation.rounds, f"round {round_number} is outside 1..{federation.rounds}"
    if round_number <= federation.num_warmup:
        return "warmup"
    return "cooldown" if round_number > federation.rounds - federation.num_cooldown else "exchange"


def rounds_left(federation: FederationConfig, round_number: int) -> dict[Phase, int]:
    """How many rounds of each phase follow after a round."""
    left = federation.rounds - round_number
    warmup = max(0, federation.num_warmup - round_number)
    cooldown = min(left, federation.num_cooldown)
    return {"warmup": warmup, "exchange": left - warmup - cooldown, "cooldown": cooldown}


def order_of(config: Config, round_number: int) -> TrainOrder:
    """What a site does in a round: evaluation and checkpoints by their rhythm, and always where a run ends.

    The end of the warm-up is evaluated too: it gives the model before gossip.
    """
    federation = config.federation
    is_last, ends_warmup = round_number == federation.rounds, round_number == federation.num_warmup
    return TrainOrder(
        round_number=round_number,
        phase=phase_of(federation, round_number),
        evaluate=round_number % federation.evaluate_every == 0 or ends_warmup or is_last,
        checkpoint=round_number % config.output.checkpoint_every == 0 or is_last,
    )


def models_to_test(config: Config, *, last_round: int | None = None) -> tuple[str, ...]:
    """The models that every site scores on its test cases, in this order.

    Args:
        config: the configuration.
        last_round: where the run ended, if before its time; a warm-up that was not done has left no model.
    """
    federation = config.federation
    is_warm = last_round is None or last_round >= federation.num_warmup
    has_warmup = 0 < federation.num_warmup < federation.rounds and is_warm
    models = {
        PERSONALISED: True,
        BEFORE_GOSSIP: has_warmup,
        SHARED: has_two_models(config.method),
        ENSEMBLE: config.evaluation.ensemble_peers > 0,
    }
    return tuple(model for model, is_tested in models.items() if is_tested)
