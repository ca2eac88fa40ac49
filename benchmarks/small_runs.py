"""A federation that is over in seconds, and what came of it: four phantom sites of single slices, a small U-Net.

For benchmarks that ask whether a run ends well, or by how much something changes Dice, many times over.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcml_ray.config import Config
from gcml_ray.config.file import parse_config, save_config
from gcml_ray.data.datalist import write_datalist
from gcml_ray.data.phantom import prepare_phantom
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.prediction.averages import mean
from gcml_ray.records import PERSONALISED

SITES = ("north", "east", "south", "west")
SHAPE = (36, 32)
CASES = 28  # of a site: 10 to train on, 4 to validate, 14 to test


def make_data(folder: Path, *, seed: int) -> Path:
    """Writes the phantom; returns its datalist."""
    cases = prepare_phantom(
        folder / "slices", sites=SITES, cases_per_site=CASES, shape=SHAPE, seed=seed, spatial_dims=2
    )
    path = folder / "datalist.json"
    write_datalist(path, cases, description="benchmark")
    return path


def make_config(
    datalist: Path, folder: Path, *, rounds: int, local_steps: int, **sections: Mapping[str, Any]
) -> Config:
    """One federation; ``sections`` are laid over it key by key.

    Args:
        datalist: of :func:`make_data`.
        folder: the run folder.
        rounds: of the federation.
        local_steps: of a round.
        sections: keys of sections that differ.
    """
    values: dict[str, Any] = {
        "name": folder.name,
        "data": {
            "datalist": str(datalist),
            "channels": ["t1", "flair"],
            "labels": {"background": 0, "lesion": 1},
            "spatial_dims": 2,
            "spacing_is_real": True,
            "patch_size": list(SHAPE),
            "batch_size": 4,
        },
        "network": {"name": "unet", "options": {"channels": [8, 16, 32], "strides": [2, 2], "num_res_units": 1}},
        "loss": {"include_background": False},
        "optimiser": {"learning_rate": 4e-3},
        "method": {
            "name": "gcml",
            "topology": {"name": "matching", "symmetric": True},
            "merge_first": "size_weighted",
            "merge": "keep_local",
        },
        "federation": {"rounds": rounds, "local_steps": local_steps, "evaluate_every": 2},
        "resources": {"cpus_per_site": 0.5},
        "tracking": {"enabled": False},
        "output": {"folder": str(folder), "num_overlays": 0},
    }
    for key, changed in sections.items():
        values[key] = {**values.get(key, {}), **changed}
    return parse_config(values, (), source="benchmark")


def start(config: Config, *, chaos: str = "", environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """``gcml run`` in a process of its own; what it says goes to a file beside the run folder."""
    folder = Path(config.output.folder)
    file = folder.parent / f"{folder.name}.yaml"
    save_config(config, file)
    return _spawn(folder, [str(file), *(["--chaos", chaos] if chaos else [])], environment)


def resume(folder: Path, *, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """``gcml run --resume`` in a process of its own."""
    return _spawn(folder, ["--resume", str(folder)], environment)


def _spawn(folder: Path, arguments: list[str], environment: Mapping[str, str] | None) -> subprocess.Popen[str]:
    with console_file(folder).open("a", encoding="utf-8") as console:
        return subprocess.Popen(
            [sys.executable, "-m", "gcml_ray", "run", *arguments],
            stdout=console,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
            start_new_session=True,
        )


def console_file(folder: Path) -> Path:
    """What the command that runs in a folder has said."""
    return folder.parent / f"{folder.name}.console.txt"


def end(process: subprocess.Popen[str]) -> None:
    """Ends a command and whatever it has started, at once."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process: subprocess.Popen[str], *, limit_s: float) -> None:
    """Waits for the end of a command.

    Raises:
        TimeoutError: it did not end; it was killed.
    """
    try:
        process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        end(process)
        raise TimeoutError(f"no end within {limit_s:.0f} s") from error


def num_rounds(folder: Path) -> int:
    """How many records are on disk; cheap enough to ask many times."""
    file = folder / "rounds.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for_rounds(folder: Path, process: subprocess.Popen[str], number: int, *, limit_s: float) -> bool:
    """Waits until so many records are on disk; False where the command ended, or took too long."""
    until = time.monotonic() + limit_s
    while num_rounds(folder) < number:
        if process.poll() is not None or time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def dice_by_site(folder: Path) -> dict[str, float]:
    """Mean test Dice of each site's personalised model."""
    scores = [score for score in RunFolder(folder).cases() if score.model == PERSONALISED]
    return {
        site: mean([score.dice for score in scores if score.site == site])
        for site in sorted({score.site for score in scores})
    }


def last_words(folder: Path, *, num_words: int = 40, since: int = 0) -> str:
    """The end of what a command has said, in one line; ``since``: bytes that are passed over."""
    content = console_file(folder).read_bytes() if console_file(folder).exists() else b""
    text = content[since:].decode("utf-8", errors="replace")
    return json.dumps(" ".join(text.split()[-num_words:]), ensure_ascii=False)
