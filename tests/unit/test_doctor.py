import importlib.metadata
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import actors.doctor
from actors import cluster
from actors.doctor import check_capacity, check_cluster, run_checks
from gcml_ray import cores
from gcml_ray.config import ResourcesConfig
from gcml_ray.doctor import configuration
from gcml_ray.doctor import machine as machine_checks
from gcml_ray.doctor.machine import Check, Machine
from tests.tiny_federation import make_config, make_federation

MACHINE = Machine(num_cpus=4, memory_bytes=10**11, shm_bytes=5 * 10**10)


# --- Check, Python, packages -------------------------------------------------------------------


def test_a_warning_without_a_remedy_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="no remedy"):
        Check("disk", "WARN", "full")


def test_python_that_is_too_old_fails() -> None:
    assert machine_checks.check_python(">=3.11", version="3.10.9").verdict == "FAIL"
    assert machine_checks.check_python(">=3.11", version="3.12.1").verdict == "PASS"


def test_a_missing_package_fails_with_the_pip_line() -> None:
    def installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    (check,) = machine_checks.check_packages(["monai>=1.5,<2"], installed=installed)
    assert (check.name, check.verdict) == ("package monai", "FAIL")
    assert check.remedy == "pip install 'monai>=1.5,<2'"


def test_a_package_of_a_wrong_version_fails_and_the_others_are_still_checked() -> None:
    versions = {"ray": "2.9.0", "torch": "1.13"}
    found = list(
        machine_checks.check_packages(["ray[default,tune]>=2.60,<3", "torch>=2.6"], installed=versions.__getitem__)
    )
    assert [check.verdict for check in found] == ["FAIL", "FAIL"]
    assert "version 2.9.0" in found[0].detail
    assert found[0].remedy == "pip install 'ray[default,tune]>=2.60,<3'"


def test_requirements_of_an_extra_are_not_asked_for() -> None:
    requirements = ['pytest>=8; extra == "test"', "numpy>=1.26"]
    (check,) = machine_checks.check_packages(requirements, installed={"numpy": "2.4"}.__getitem__)
    assert (check.verdict, check.detail) == ("PASS", "numpy 2.4")


def test_a_local_build_and_a_release_candidate_are_in_range() -> None:
    (check,) = machine_checks.check_packages(["torch>=2.6"], installed={"torch": "2.7.0rc1+cu128"}.__getitem__)
    assert check.verdict == "PASS"


def test_our_own_requirements_are_found() -> None:
    requires_python, requirements = machine_checks.read_requirements()
    assert requires_python == ">=3.11"
    assert any(text.startswith("monai") for text in requirements)


def test_a_package_that_cannot_be_imported_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenpackage.py").write_text("raise OSError('libcuda.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    check = machine_checks.check_import("brokenpackage", purpose="runs are tracked with it")
    assert check.verdict == "FAIL"
    assert "libcuda.so is missing" in check.detail


# --- the machine -------------------------------------------------------------------------------


def test_no_gpu_is_fine() -> None:
    check = machine_checks.check_gpus(MACHINE, has_nvidia_device=False)
    assert (check.verdict, check.detail) == ("PASS", "no GPU: sites train on the CPU")


def test_a_gpu_that_torch_cannot_use_warns() -> None:
    check = machine_checks.check_gpus(MACHINE, has_nvidia_device=True)
    assert check.verdict == "WARN"
    assert "CUDA build of torch" in check.remedy


def test_gpus_are_shown_with_their_memory() -> None:
    check = machine_checks.check_gpus(replace(MACHINE, gpu_bytes=(80 * 10**9,) * 2), has_nvidia_device=True)
    assert (check.verdict, check.detail) == ("PASS", "2 GPU(s) with 80.0 GB, 80.0 GB")


def test_a_container_with_64_mb_of_shared_memory_warns() -> None:
    """Of 16 GB of memory Ray takes 30 %."""
    check = machine_checks.check_shared_memory(Machine(4, 16 * 10**9, 64 * 10**6))
    assert check.verdict == "WARN"
    assert "--shm-size=4.8gb" in check.remedy


def test_shared_memory_that_holds_the_object_store_passes() -> None:
    assert machine_checks.check_shared_memory(Machine(4, 16 * 10**9, 5 * 10**9)).verdict == "PASS"


def test_a_system_without_dev_shm_passes() -> None:
    assert machine_checks.check_shared_memory(Machine(4, 16 * 10**9, None)).verdict == "PASS"


def test_a_full_disk_warns(tmp_path: Path) -> None:
    check = machine_checks.check_disk(tmp_path / "not" / "there", needed_bytes=10**18)
    assert check.verdict == "WARN"
    assert "output.folder" in check.remedy


def test_a_token_that_others_can_read_warns(tmp_path: Path) -> None:
    token = tmp_path / "auth_token"
    token.write_text("secret")
    token.chmod(0o644)
    assert machine_checks.check_auth_token(str(token)).remedy == f"chmod 600 {token}"
    token.chmod(0o600)
    assert machine_checks.check_auth_token(str(token)).verdict == "PASS"


def test_a_token_path_to_nowhere_warns(tmp_path: Path) -> None:
    check = machine_checks.check_auth_token(str(tmp_path / "none"))
    assert check.verdict == "WARN"
    assert "RAY_AUTH_TOKEN_PATH" in check.detail


def test_cpu_quota_and_memory_limit_of_a_container_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text("123456789\n")
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    machine = machine_checks.this_machine()
    assert (machine.num_cpus, machine.memory_bytes) == (1, 123456789)


# --- Ray ---------------------------------------------------------------------------------------


def test_an_address_that_does_not_answer_fails() -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        check, _ = check_cluster(ResourcesConfig(address=address), MACHINE)
    assert check.verdict == "FAIL"
    assert address in check.detail


def test_ray_address_of_the_environment_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    check, _ = check_cluster(ResourcesConfig(), MACHINE)
    assert check.verdict == "FAIL"
    assert "'nonsense' is not host:port" in check.detail


def test_without_a_cluster_one_would_be_started_here() -> None:
    check, nodes = check_cluster(ResourcesConfig(address="local"), MACHINE)
    assert (check.verdict, check.detail) == ("PASS", "a run will start a cluster here, with 4 CPUs")
    assert [node.cpus for node in nodes] == [4.0]


def test_a_running_cluster_is_joined_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def joined(address: str) -> Iterator[str]:
        yield f"the cluster at {address}"

    two = (cluster.Node("n1", 8, 1, {}), cluster.Node("n2", 8, 1, {}))
    monkeypatch.setattr(cluster, "joined", joined)
    monkeypatch.setattr(cluster, "nodes", lambda: two)
    check, nodes = check_cluster(ResourcesConfig(address="head:6379"), MACHINE)
    assert check.detail == "the cluster at head:6379: 2 node(s), 16 CPUs, 2 GPUs"
    assert nodes == list(two)


def test_the_local_pool_needs_no_cluster() -> None:
    assert check_cluster(ResourcesConfig(pool="local"), MACHINE)[0].verdict == "PASS"


def test_sites_that_do_not_fit_fail(tmp_path: Path) -> None:
    config = make_config(tmp_path, resources={"pool": "ray", "cpus_per_site": 3.0})
    node = cluster.Node("here", 4, 0, {})
    assert check_capacity(config, ("A", "B"), [node]).verdict == "FAIL"
    assert check_capacity(config, ("A",), [node]).verdict == "PASS"


# --- run_checks --------------------------------------------------------------------------------


def test_a_wrong_configuration_fails_and_the_machine_is_checked_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("name: x\ndata: {datalst: 3}\n")
    found = {check.name: check for check in run_checks(str(path), ["resources.pool=local"])}
    assert found["config"].verdict == "FAIL"
    assert "data.datalst" in found["config"].detail
    assert found["machine"].verdict == "PASS"


def test_a_configuration_that_is_not_there_fails(tmp_path: Path) -> None:
    check, config = configuration.read_config(str(tmp_path / "none.yaml"), [])
    assert (check.verdict, config) == ("FAIL", None)
    assert "No such file" in check.detail
    assert check.remedy.startswith("check the path")


def test_a_datalist_in_place_of_a_configuration_is_called_one(tmp_path: Path) -> None:
    make_federation(tmp_path)
    check, config = configuration.read_config(str(tmp_path / "data.json"), [])
    assert (check.verdict, config) == ("FAIL", None)
    assert "is a datalist, not a configuration" in check.detail
    assert "data.datalist" in check.remedy


def test_a_missing_package_behind_our_modules_is_a_line_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Iterator[Check]:
        raise ImportError("No module named 'monai'")
        yield

    monkeypatch.setattr(actors.doctor, "_check_run", broken)
    last = list(run_checks(None, []))[-1]
    assert (last.name, last.verdict) == ("imports", "FAIL")
    assert "monai" in last.detail


def test_a_sound_federation_passes_from_file_to_forecast(tmp_path: Path) -> None:
    config = make_federation(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
    found = {check.name: check for check in run_checks(str(path), ["federation.rounds=5"])}
    bad = {name for name, check in found.items() if check.verdict != "PASS"}
    assert bad <= {"auth token", "disk", "shared memory", "gpu"}, [found[name] for name in bad]
    assert {"read A", "read B", "step A", "step B", "memory", "traffic", "time"} <= set(found)
    assert "for 5 rounds" in found["time"].detail
