"""The demo: four phantom sites and the configuration that goes with them, both part of the package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from gcml_ray.config import Config
from gcml_ray.config.file import load_config, parse_config, setting
from gcml_ray.data.datalist import write_datalist
from gcml_ray.data.phantom import prepare_phantom

DEMO_SHAPE = (36, 32, 20)
DEMO_SEED = 0


def prepare_demo(folder: Path) -> Path:
    """Writes the demo's volumes and returns their datalist."""
    folder.mkdir(parents=True, exist_ok=True)
    volumes = folder.resolve() / "volumes"
    cases = prepare_phantom(volumes, sites=None, cases_per_site=None, shape=DEMO_SHAPE, seed=DEMO_SEED)
    datalist = folder / "datalist.json"
    write_datalist(datalist, cases, description="phantom sites of the demo")
    return datalist


def demo_config(datalist: Path, output: Path, overrides: Sequence[str]) -> Config:
    """The packaged configuration, pointed at a datalist and an output folder.

    Args:
        datalist: what :func:`prepare_demo` returned.
        output: the run folder.
        overrides: as for ``gcml run --set``.
    """
    own = (setting("data.datalist", datalist), setting("output.folder", output))
    with as_file(files("gcml_ray") / "demo.yaml") as path:
        return load_config(path, (*own, *overrides))


def alone_config(config: Config, output: Path) -> Config:
    """The same sites, each one alone; what concerns peers is left out.

    Args:
        config: of the demo's first run.
        output: the run folder.
    """
    values = config.model_dump(mode="json", by_alias=True)
    alone = (
        setting("name", "local"),
        setting("method", {"name": "local"}),
        setting("optimiser.push_average", value=False),
        setting("evaluation.ensemble_peers", 0),
        setting("output.folder", output),
    )
    return parse_config(values, alone, source="the demo's run of sites alone")
