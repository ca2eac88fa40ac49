"""The one direction of imports, read from the source; and what importing a module loads, seen from a fresh process."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gcml_ray", "actors", "tune")
# Higher packages know lower ones, never the other way.
MAY_KNOW = {"gcml_ray": {"gcml_ray"}, "actors": {"gcml_ray", "actors"}, "tune": {"gcml_ray", "actors", "tune"}}
# What only these files may import, by the start of their path.
ONLY_IN = {
    "ray": ("actors/ray_pool.py", "actors/object_store.py", "actors/ray_errors.py", "actors/cluster.py", "tune/"),
    "mlflow": ("gcml_ray/tracking/", "gcml_ray/export/pyfunc.py"),  # a pyfunc is a subclass of MLflow's
    "matplotlib": ("gcml_ray/report/",),
    "plotly": ("gcml_ray/report/page/",),
}
# Rooms and single modules of gcml_ray, by storey: each may know those of the storeys below, and a room itself.
STOREYS = (
    ("errors", "wording", "seeding", "stopwatch", "cores", "lean_imports", "signals"),
    ("chaos", "records", "files/site_names", "files/whole_files"),
    ("config",),
    ("files", "gossip", "push", "losses", "networks"),
    ("data", "search"),
    ("model", "inspection", "demo"),
    ("methods", "privacy", "prediction"),
    ("comparison",),
    ("tracking",),
    ("console", "export"),
    ("report",),
    ("callbacks", "training"),  # a site draws its own overlays
    ("doctor", "federation"),
    ("cli",),
    ("__init__", "__main__"),
)
STOREY = {room: number for number, rooms in enumerate(STOREYS) for room in rooms}
COMPOSITION_ROOTS = ("gcml_ray/cli/", "gcml_ray/federation.py")  # may import all packages, inside their functions
TORCH_FREE = (
    *("config", "records", "seeding", "gossip/graph", "files/run_folder", "data/datalist", "errors"),
    *(f"tracking/{name}" for name in ("run", "client")),
    *(f"push/{name}" for name in ("wire", "payload", "signing", "outbox", "inbox")),
)


@dataclass(frozen=True)
class Import:
    """One imported module, and whether the import stands inside a function."""

    path: str
    line: int
    module: str
    is_inside_function: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def imports_in(source: str, path: str) -> Iterator[Import]:
    """All imports but those for type checkers alone."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while pending:
        node, inside = pending.pop()
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module if node.level == 0 and node.module else f"{Path(path).parts[0]}.?"
            yield Import(path, node.lineno, module, inside)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending += [(child, inside) for child in node.orelse]
        else:
            deeper = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            pending += [(child, deeper) for child in ast.iter_child_nodes(node)]


def storey(parts: Sequence[str]) -> int:
    """Of a module of ``gcml_ray``; its own where it has one, else that of its room. KeyError for one without."""
    inside = [part.removesuffix(".py") for part in parts[1:]] or ["__init__"]
    module = "/".join(inside[:2])
    return STOREY[module if module in STOREY else inside[0]]


def is_upwards(each: Import) -> bool:
    """Whether a room of ``gcml_ray`` imports one of its own storey or of one above."""
    home, target = Path(each.path).parts, each.module.split(".")
    if home[0] != "gcml_ray" or target[0] != "gcml_ray":
        return False
    is_same_room = home[:2] == tuple(target[:2])
    return storey(target) > storey(home) or (storey(target) == storey(home) and not is_same_room)


def all_imports() -> list[Import]:
    return [
        each
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"))
        for each in imports_in(file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix())
    ]


def wrong_imports(found: list[Import]) -> list[str]:
    wrong = []
    for each in found:
        home = Path(each.path).parts[0]
        is_root = each.path.startswith(COMPOSITION_ROOTS) and each.is_inside_function
        if each.top in PACKAGES and each.top not in MAY_KNOW[home] and not is_root:
            wrong.append(str(each))
        if each.top in ONLY_IN and not each.path.startswith(ONLY_IN[each.top]):
            wrong.append(str(each))
        if each.top == "tests" or is_upwards(each):
            wrong.append(str(each))
    return wrong


def test_packages_import_in_one_direction_and_keep_heavy_libraries_in_their_place() -> None:
    found = all_imports()
    assert {each.top for each in found} >= {"gcml_ray", "actors", "ray", "mlflow", "torch"}, "the reading itself works"
    assert wrong_imports(found) == []


def test_every_room_has_its_storey() -> None:
    rooms = {path.stem for path in (ROOT / "gcml_ray").iterdir() if path.suffix == ".py" or list(path.glob("*.py"))}
    assert rooms == {name for name in STOREY if "/" not in name}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gcml_ray/gossip/graph.py", "from actors.driver import Driver"),
        ("gcml_ray/gossip/graph.py", "def f():\n    import actors"),
        ("actors/driver.py", "import tune.search"),
        ("actors/driver.py", "import ray"),
        ("gcml_ray/training/trainer.py", "def f():\n    from ray.util import queue"),
        ("gcml_ray/files/run_folder.py", "import mlflow"),
        ("gcml_ray/prediction/metrics.py", "if True:\n    import matplotlib.pyplot as plt"),
        ("gcml_ray/cli/main.py", "import actors.run"),
        ("gcml_ray/federation.py", "import actors.run"),
        ("gcml_ray/callbacks.py", "def f():\n    import actors.listener"),
        ("gcml_ray/cli/main.py", "def f():\n    import ray"),
        ("actors/site.py", "from tests.makers import make_config"),
        ("gcml_ray/files/run_folder.py", "from gcml_ray.model.weights import FlatModel"),
        ("gcml_ray/methods/gcml.py", "from gcml_ray.privacy.pushes import PrivatePush"),
        ("gcml_ray/files/run_folder.py", "from gcml_ray.report.run import write_plots"),
        ("gcml_ray/losses/mutual.py", "from gcml_ray.console.run import RunConsole"),
        ("gcml_ray/config/file.py", "from gcml_ray.files.run_folder import RunFolder"),
        ("gcml_ray/errors.py", "import gcml_ray.records"),
        ("gcml_ray/files/site_names.py", "from gcml_ray.files.run_folder import RunFolder"),
        ("gcml_ray/data/reading.py", "import gcml_ray"),
    ],
)
def test_an_import_against_the_direction_would_be_found(path: str, source: str) -> None:
    assert len(wrong_imports(list(imports_in(source, path)))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gcml_ray/cli/main.py", "def run():\n    from actors.run import run_federation"),
        ("gcml_ray/federation.py", "def run():\n    from actors.run import run_federation"),
        ("actors/ray_pool.py", "import ray"),
        ("gcml_ray/training/trainer.py", "import gcml_ray.methods.gcml\nfrom gcml_ray.training.judge import Judge"),
        ("tune/search.py", "from ray import tune\nimport actors.run\nimport gcml_ray.config"),
        ("gcml_ray/config/__init__.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import actors"),
    ],
)
def test_an_import_along_the_direction_is_no_fault(path: str, source: str) -> None:
    assert wrong_imports(list(imports_in(source, path))) == []


# --- what an import loads ------------------------------------------------------------------------


def in_fresh_process(program: str) -> str:
    """What a program prints, run from the repository's root."""
    run = subprocess.run(  # noqa: S603 - our own interpreter and program
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def loaded_by(modules: str, watched: str) -> str:
    """Which of the watched libraries a process holds after importing the modules."""
    return in_fresh_process(f"import sys, {modules}; print(*sorted(set({watched.split()!r}) & set(sys.modules)))")


def test_the_driver_loads_neither_torch_nor_monai() -> None:
    modules = "actors.driver, actors.run, actors.ray_pool, gcml_ray.config.file"
    assert loaded_by(modules, "torch monai") == ""


def test_the_algorithm_and_the_local_pool_work_where_ray_mlflow_and_matplotlib_are_missing() -> None:
    """Libraries are made missing rather than watched: MONAI itself loads mlflow and matplotlib where it finds them."""
    missing = "import sys; sys.modules.update(dict.fromkeys(['ray', 'mlflow', 'matplotlib']))"
    modules = "actors.run, actors.local_pool, gcml_ray.training.trainer"
    assert in_fresh_process(f"{missing}; import {modules}; print('torch' in sys.modules)") == "True"


def test_light_modules_load_no_heavy_library() -> None:
    modules = ", ".join(f"gcml_ray.{name.replace('/', '.')}" for name in TORCH_FREE)
    assert loaded_by(modules, "torch monai ray mlflow matplotlib scipy numpy") == "numpy"


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    assert loaded_by("gcml_ray.cli.main", "torch monai ray mlflow matplotlib scipy nibabel pandas") == ""


def test_the_python_interface_loads_the_heavy_libraries_only_where_they_are_used() -> None:
    assert loaded_by("gcml_ray.federation", "torch monai ray mlflow matplotlib actors") == ""


def test_a_site_s_own_process_goes_without_what_monai_would_load_on_the_side(tmp_path: Path) -> None:
    """And what was left out can be imported afterwards, whole."""
    program = "\n".join(
        [
            "import sys",
            "from pathlib import Path",
            "from actors.site import trainer_in_own_process",
            "from tests.makers import make_config",
            f"folder = Path({str(tmp_path)!r})",
            "trainer_in_own_process(make_config(folder), 'A', folder, use_gpu=False, on_progress=print)",
            "print('monai' in sys.modules, *sorted({'mlflow', 'pandas', 'sklearn', 'ignite'} & set(sys.modules)))",
            "import pandas, mlflow",
            "print(pandas.DataFrame({'a': [1]}).size, mlflow.__name__)",
        ]
    )
    assert in_fresh_process(program).splitlines() == ["True", "1 mlflow"]
