"""How much privacy a site has spent: Opacus' accountant, and a ledger that never forgets a step.

The ledger is a file of its own, beside the checkpoints: a site that goes back to an earlier round has still
released what came after it, and draws other noise the second time.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

from gcml_ray.errors import CheckpointError, ConfigError
from gcml_ray.files.whole_files import replace_file

log = logging.getLogger(__name__)


def require_opacus() -> None:
    """Says how to install Opacus where it is missing.

    Raises:
        ConfigError: it is.
    """
    if importlib.util.find_spec("opacus") is None:
        raise ConfigError("privacy needs Opacus, not found: pip install 'gcml-ray[dp]', or set privacy.mode none")


def epsilon_of(noise_multiplier: float, *, sample_rate: float, num_steps: int, delta: float) -> float:
    """Epsilon at ``delta`` of ``num_steps`` subsampled Gaussian mechanisms; infinite without noise.

    Opacus' accountant of Renyi differential privacy (Mironov, Talwar, Zhang 2019, arXiv 1908.10530). It is an upper
    bound: the numerical accountants are tighter by some per cent, but add an error of their own.

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity.
        sample_rate: the chance of a case to be in a batch, drawn anew each step (Poisson); 1 for no sampling.
        num_steps: how many.
        delta: the chance in which the bound may fail.
    """
    if num_steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    accountant = _new_accountant()
    accountant.history = [(noise_multiplier, sample_rate, num_steps)]
    with warnings.catch_warnings():  # the best order is the first or last it tries: the bound holds all the same
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def _new_accountant() -> Any:
    """Opacus' accountant. Importing Opacus sets up the root logger: it is left as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from opacus.accountants import RDPAccountant  # noqa: PLC0415 - an extra, and heavy

    root.handlers[:] = handlers
    root.setLevel(level)
    return RDPAccountant()


_REMEDY = "it counts the privacy that this site has spent. Restore it, or start anew in another output.folder"


class Ledger:
    """The number of private mechanisms that a site has run, on its disk before each of them runs.

    Args:
        path: the file, read where it is there.
        identity: of the configuration; a file of another one is left from another run and does not count.
        sample_rate: of the mechanisms; it must stay what it was.
        is_expected: whether some have run before, so that the file must be there.

    Raises:
        CheckpointError: the file is lost, cannot be read, or counts mechanisms of another rate.
    """

    def __init__(self, path: Path, *, identity: str, sample_rate: float, is_expected: bool = False) -> None:
        self._path = path
        self._identity = identity
        self._sample_rate = sample_rate
        if is_expected and not path.exists():
            raise CheckpointError(f"{path} is not there any more: {_REMEDY}")
        self.num_spent = self._read()

    def spend(self, number: int) -> None:
        """Counts mechanisms that are about to run."""
        self.num_spent += number
        counted = {"identity": self._identity, "sample_rate": self._sample_rate, "num_spent": self.num_spent}
        replace_file(self._path, json.dumps(counted))

    def _read(self) -> int:
        if not self._path.exists():
            return 0
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
            identity, number, rate = str(values["identity"]), int(values["num_spent"]), float(values["sample_rate"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self._path} cannot be read ({error!r}): {_REMEDY}") from error
        if identity != self._identity:
            log.warning("%s counts another configuration's steps (%s): starting from 0", self._path, identity)
            return 0
        if rate != self._sample_rate:
            raise CheckpointError(
                f"{self._path} counts {number} steps that drew each case at rate {rate:g}, now it would be "
                f"{self._sample_rate:g}: this site's training cases have changed. Start anew in another output.folder"
            )
        return number
