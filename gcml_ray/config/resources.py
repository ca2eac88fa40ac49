"""The ``resources`` section: where sites run, and what each one may use."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from gcml_ray.config.section import Count, NonNegative, Positive, Section


class ResourcesConfig(Section):
    """Where sites run and what each one may use. Fractions of a GPU are shares, not memory limits.

    ``address``: ``auto`` joins the running cluster (``RAY_ADDRESS``, or ``ray start`` on this machine) and
    starts a local one where there is none; ``local`` always starts one; anything else is an address.
    ``placement``: ``none`` anywhere, ``label`` on the node whose label ``label_key`` equals the site's
    name (the data never leaves it), ``pg`` one placement group with a bundle an actor.
    ``sites_per_actor``: so many sites share a process at most, for simulations; they take turns, so it asks for no more
    CPUs and GPUs than one site. ``park``: where a site of several is kept while it waits for its turn.
    ``amp`` and ``compile``: how training's forward and backward passes run.
    """

    pool: Literal["ray", "local"] = "ray"
    address: str = "auto"
    cpus_per_site: Positive = 1.0
    gpus_per_site: NonNegative = 0.0
    sites_per_actor: Count = 1
    park: Literal["memory", "disk"] = "memory"
    placement: Literal["none", "label", "pg"] = "none"
    label_key: str = "site"
    amp: Literal["none", "bf16", "fp16"] = "none"
    compile: bool = False

    @model_validator(mode="after")
    def _sites_keep_their_promises(self) -> ResourcesConfig:
        if self.pool == "local" and self.placement != "none":
            raise ValueError(
                f"placement: {self.placement} cannot be kept: with pool: local all sites work in one process on this "
                "machine; set pool: ray, or for a simulation placement: none"
            )
        if self.sites_per_actor > 1 and self.placement == "label":
            raise ValueError(
                f"sites_per_actor {self.sites_per_actor} would put the data of several sites into one process, but "
                "placement: label promises that none leaves its own node: set sites_per_actor: 1, or for a "
                "simulation placement: none"
            )
        if self.sites_per_actor == 1 and self.park != "memory":
            raise ValueError(f"park: {self.park} would be ignored: no site waits where sites_per_actor is 1")
        return self

    def workers_problem(self, num_workers: int) -> str:
        """Why sites cannot have processes of ``data.num_workers`` beside them; empty where they can."""
        if not num_workers or self.sites_per_actor == 1:
            return ""
        return (
            f"data.num_workers {num_workers} would keep the cases of every site that waits in memory, but "
            f"resources.sites_per_actor {self.sites_per_actor} is there to spare it: set one of them to its default"
        )

    def num_actors(self, num_sites: int) -> int:
        """How many processes so many sites make up; a server has one more."""
        return -(-num_sites // self.sites_per_actor)
