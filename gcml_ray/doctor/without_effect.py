"""Settings that are not at their default and change nothing with this method or mode.

A run takes them, as one base serves several methods in a comparison; who runs one federation should know.
"""

from __future__ import annotations

from collections.abc import Iterator

from gcml_ray.config import Config, has_peers, has_server
from gcml_ray.config.defence import DefenceConfig
from gcml_ray.config.federation import FederationConfig
from gcml_ray.config.wire import WireConfig
from gcml_ray.doctor.machine import Check


def check_effects(config: Config) -> Iterator[Check]:
    """One warning for all of them; nothing where every setting has an effect."""
    reasons = list(_without_effect(config))
    if reasons:
        remedy = "take them out, or choose the method or mode that they are meant for"
        yield Check("settings", "WARN", f"without effect here: {'; '.join(reasons)}", remedy)


def _without_effect(config: Config) -> Iterator[str]:
    """Each with the reason."""
    method = config.method.name
    if config.defence != DefenceConfig() and not has_peers(config.method):
        no_cases = "has a server, which has no cases to judge models by"
        yield f"defence, as method {method} {no_cases if has_server(config.method) else 'pushes nothing'}"
    if config.wire != WireConfig() and not (has_peers(config.method) or has_server(config.method)):
        yield f"wire, as method {method} pushes nothing"
    default_factor = FederationConfig.model_fields["late_factor"].default
    if config.federation.mode == "async" and config.federation.late_factor != default_factor:
        yield "federation.late_factor, as nobody waits with mode async"
