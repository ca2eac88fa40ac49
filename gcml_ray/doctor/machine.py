"""The pre-flight of a machine: does what is installed here fit, and what does the machine offer.

Nothing is imported at the top but the standard library, so that a missing package is a line of the
report and not a traceback. What a configuration needs is checked in the other modules of this room.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import stat
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gcml_ray.cores import num_usable_cpus, read_limit

Verdict = Literal["PASS", "WARN", "FAIL"]

DISTRIBUTION = "gcml-ray"
LOW_DISK_BYTES = 5_000_000_000
NVIDIA_DEVICE = Path("/dev/nvidiactl")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the file system itself, nothing is written there
# How Ray 2.60 sizes its object store: 30 % of the memory, at most 200 GB and at most /dev/shm, which is
# ignored below 10 GB. A store that /dev/shm cannot hold goes to a file in /tmp, at the disk's speed.
STORE_SHARE = 0.3
STORE_MAX_BYTES = 200_000_000_000
STORE_SMALL_BYTES = 10_000_000_000
STORE_SHM_SHARE = 0.95


@dataclass(frozen=True)
class Check:
    """One line of the report. ``remedy`` says what to do; a WARN or FAIL always has one."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.remedy or self.verdict == "PASS", f"check {self.name} has no remedy"


@dataclass(frozen=True)
class Machine:
    """What this machine offers; limits of a container count.

    ``shm_bytes`` is what is free in ``/dev/shm``, None where the system has none (macOS); ``gpu_bytes`` the
    memory of each GPU that torch can use.
    """

    num_cpus: int
    memory_bytes: int
    shm_bytes: int | None
    gpu_bytes: tuple[int, ...] = ()


def gigabytes(size_bytes: float) -> str:
    """A size in words, in decimal units."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def check_environment(machine: Machine, *, folder: Path) -> Iterator[Check]:
    """Every check that needs no configuration and no Ray.

    Args:
        machine: from :func:`this_machine`.
        folder: where a run would be started, for the disk space.
    """
    requires_python, requirements = read_requirements()
    with suppress(importlib.metadata.PackageNotFoundError):  # it runs from its source
        yield Check(DISTRIBUTION, "PASS", importlib.metadata.version(DISTRIBUTION))
    yield check_python(requires_python, version=sys.version.split()[0])
    yield from check_packages(requirements, installed=importlib.metadata.version)
    yield check_gpus(machine, has_nvidia_device=NVIDIA_DEVICE.exists() or shutil.which("nvidia-smi") is not None)
    yield Check("machine", "PASS", f"{machine.num_cpus} CPUs, {gigabytes(machine.memory_bytes)} of memory")
    yield check_disk(folder, needed_bytes=LOW_DISK_BYTES)
    yield check_shared_memory(machine)
    yield check_auth_token(os.environ.get("RAY_AUTH_TOKEN_PATH"))
    yield check_import("mlflow", purpose="runs are tracked with it")


# --- Python and packages -----------------------------------------------------------------------


def read_requirements() -> tuple[str, tuple[str, ...]]:
    """Allowed Python versions and the requirements, from the installed package or else ``pyproject.toml``."""
    try:
        requires_python = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
        return requires_python, tuple(importlib.metadata.requires(DISTRIBUTION) or ())
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return project["requires-python"], tuple(project["dependencies"])


def check_python(requires: str, *, version: str) -> Check:
    """Whether this Python is one that the package allows."""
    from packaging.specifiers import SpecifierSet  # noqa: PLC0415 - see the top of the file

    if SpecifierSet(requires).contains(version, prereleases=True):
        return Check("python", "PASS", f"{version} ({sys.executable})")
    remedy = f"make an environment with a Python {requires} and install gcml-ray there"
    return Check("python", "FAIL", f"{version}, gcml-ray needs {requires}", remedy)


def check_packages(requirements: Sequence[str], *, installed: Callable[[str], str]) -> Iterator[Check]:
    """One FAIL for each package that is missing or of a wrong version, else one PASS for all of them.

    Args:
        requirements: as in ``pyproject.toml``; those of an extra are left out.
        installed: version of a distribution; raises ``importlib.metadata.PackageNotFoundError``.
    """
    from packaging.requirements import Requirement  # noqa: PLC0415

    versions: list[str] = []
    all_good = True
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        plain = text.split(";")[0].strip()
        try:
            version = installed(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            all_good = False
            yield Check(f"package {wanted.name}", "FAIL", "is not installed", f"pip install '{plain}'")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            all_good = False
            detail = f"version {version}, gcml-ray needs {wanted.specifier}"
            yield Check(f"package {wanted.name}", "FAIL", detail, f"pip install '{plain}'")
        versions.append(f"{wanted.name} {version}")
    if all_good:
        yield Check("packages", "PASS", ", ".join(versions))


def check_import(module: str, *, purpose: str) -> Check:
    """Whether a package that is installed can be imported as well."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises whatever it likes: ImportError, OSError, AttributeError
        detail = f"cannot be imported ({type(error).__name__}: {error}); {purpose}"
        return Check(module, "FAIL", detail, f"pip install --force-reinstall {module}")
    return Check(module, "PASS", "can be imported")


# --- what the machine offers -------------------------------------------------------------------


def this_machine() -> Machine:
    """CPUs, memory, shared memory and GPUs that this process may use."""
    return Machine(
        num_cpus=num_usable_cpus(),
        memory_bytes=_memory_bytes(),
        shm_bytes=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        gpu_bytes=_gpu_bytes(),
    )


def _memory_bytes() -> int:
    """The machine's memory, or the container's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = read_limit("memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def _gpu_bytes() -> tuple[int, ...]:
    """Memory of each GPU that torch can use; none where torch itself is missing or broken."""
    try:
        import torch  # noqa: PLC0415 - see the top of the file
    except (ImportError, OSError):
        return ()
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))


def check_gpus(machine: Machine, *, has_nvidia_device: bool) -> Check:
    """The GPUs; none is fine, unless the machine has one that torch cannot use."""
    broken = check_import("torch", purpose="sites train with it")
    if broken.verdict == "FAIL":
        return broken
    if machine.gpu_bytes:
        sizes = ", ".join(gigabytes(size) for size in machine.gpu_bytes)
        return Check("gpu", "PASS", f"{len(machine.gpu_bytes)} GPU(s) with {sizes}")
    if has_nvidia_device:
        return Check(
            "gpu",
            "WARN",
            "this machine has an NVIDIA driver, but torch sees no GPU: sites would train on the CPU",
            "install a CUDA build of torch that fits the driver (pytorch.org/get-started), and check "
            "CUDA_VISIBLE_DEVICES and the container's --gpus option",
        )
    return Check("gpu", "PASS", "no GPU: sites train on the CPU")


def check_disk(folder: Path, *, needed_bytes: int, name: str = "disk") -> Check:
    """Whether the disk below a folder has room for what is needed."""
    free = shutil.disk_usage(nearest_existing(folder)).free
    detail = f"{gigabytes(free)} free at {folder}, {gigabytes(needed_bytes)} are wanted"
    if free >= needed_bytes:
        return Check(name, "PASS", detail)
    remedy = "free some space, or set output.folder on another disk"
    return Check(name, "WARN", detail, remedy)


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or the first of its parents that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))


def default_object_store_bytes(machine: Machine) -> int:
    """The size that Ray gives its object store when it starts on this machine."""
    cap = max(STORE_SMALL_BYTES, int(STORE_SHM_SHARE * (machine.shm_bytes or 0)))
    return int(min(STORE_SHARE * machine.memory_bytes, STORE_MAX_BYTES, cap))


def check_shared_memory(machine: Machine) -> Check:
    """Whether Ray's object store fits into shared memory; containers often have 64 MB of it."""
    if machine.shm_bytes is None:
        return Check("shared memory", "PASS", f"this system has no {SHARED_MEMORY}: Ray uses files of its own")
    store = default_object_store_bytes(machine)
    detail = (
        f"{gigabytes(machine.shm_bytes)} free in {SHARED_MEMORY}, Ray's object store takes up to {gigabytes(store)}"
    )
    if machine.shm_bytes >= store:
        return Check("shared memory", "PASS", detail)
    return Check(
        "shared memory",
        "WARN",
        f"{detail}: pushes would go through a file on disk, many times slower",
        f"start the container with --shm-size={store / 1e9:.1f}gb (Kubernetes: an emptyDir of medium Memory there)",
    )


def check_auth_token(configured_path: str | None) -> Check:
    """Whether others on this machine can read Ray's token; Ray makes the file readable for everybody.

    Args:
        configured_path: the value of ``RAY_AUTH_TOKEN_PATH``; None means ``~/.ray/auth_token``.
    """
    path = Path(configured_path) if configured_path else Path.home() / ".ray" / "auth_token"
    if not path.is_file():
        if configured_path is None:
            return Check("auth token", "PASS", "no token file: Ray makes one when it is needed")
        remedy = "write the cluster's token there (`ray get-auth-token` on its head node), or unset RAY_AUTH_TOKEN_PATH"
        return Check("auth token", "WARN", f"RAY_AUTH_TOKEN_PATH names {path}, which does not exist", remedy)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        detail = f"{path} has mode {mode:04o}: other users can read it and run code on the cluster"
        return Check("auth token", "WARN", detail, f"chmod 600 {path}")
    return Check("auth token", "PASS", f"{path} is readable by its owner only")
