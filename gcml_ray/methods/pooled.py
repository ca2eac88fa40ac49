"""Pooled training: one model on the cases of all sites, the upper bound that no federation is allowed.

The data leave the sites, so it is for comparison only. The trainer of the one "site" named ``pooled`` brings
the cases together; its rounds are those of a site alone, on patches of all cases, each case as likely as any other.
"""

from __future__ import annotations

from gcml_ray.methods.local import train_round

__all__ = ["train_round"]
