"""The files in ``docs/deploy/``, as far as they can be checked without a cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gcml_ray.config.file import load_config
from tests.waiting import wait_until

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "deploy"
CONFIG = load_config(FOLDER / "federation.yaml")
SITES = CONFIG.federation.sites or ()
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # what Kubernetes allows as a name


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def cluster(name: str) -> dict[str, Any]:
    """The specification of the Ray cluster in a manifest."""
    (manifest,) = documents(name)
    spec: dict[str, Any] = manifest["spec"]
    return spec if manifest["kind"] == "RayCluster" else spec["rayClusterSpec"]


def pods() -> list[dict[str, Any]]:
    """The pod specification of the head, then of every site."""
    spec = cluster("raycluster.yaml")
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


# --- Kubernetes --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")])
def test_manifest_has_what_kuberay_requires(name: str, kind: str) -> None:
    (manifest,) = documents(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert DNS_LABEL.fullmatch(manifest["metadata"]["name"])
    for group in cluster(name)["workerGroupSpecs"]:
        assert {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= set(group)
        assert DNS_LABEL.fullmatch(group["groupName"])
        assert "labels" not in group["rayStartParams"], "KubeRay refuses labels there since 1.5"


def test_job_starts_the_same_cluster() -> None:
    assert cluster("rayjob.yaml") == cluster("raycluster.yaml")


def test_ray_is_the_tested_version_and_asks_for_a_token() -> None:
    """Every client of a cluster can run code in all pods."""
    spec = cluster("raycluster.yaml")
    pins = (FOLDER.parents[1] / "constraints.txt").read_text(encoding="utf-8")
    assert f"\nray=={spec['rayVersion']}\n" in pins
    assert f"rayproject/ray:{spec['rayVersion']}-" in (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    assert spec["authOptions"] == {"mode": "token"}


def test_every_site_has_one_pod_with_its_label_on_its_machine_and_its_own_volumes() -> None:
    groups = cluster("raycluster.yaml")["workerGroupSpecs"]
    assert tuple(group["labels"][CONFIG.resources.label_key] for group in groups) == SITES
    for group, site, pod in zip(groups, SITES, pods()[1:], strict=True):
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 1)
        assert pod["nodeSelector"] == {"hospital": site}
        claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if claim_of(volume)}
        assert claims == {f"data-{site.lower()}", f"runs-{site.lower()}"}


def claim_of(volume: dict[str, Any]) -> str | None:
    name: str | None = volume.get("persistentVolumeClaim", {}).get("claimName")
    return name


def test_every_mount_has_its_volume_and_images_are_read_only() -> None:
    for pod in pods():
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert set(mounts) == volumes
        assert mounts["config"]["readOnly"]
        assert mounts.get("data", {"readOnly": True})["readOnly"]


def test_paths_of_the_configuration_lie_in_mounts() -> None:
    head, *sites = ({m["mountPath"] for m in pod["containers"][0]["volumeMounts"]} for pod in pods())
    datalist, runs = str(Path(CONFIG.data.datalist).parent), str(Path(CONFIG.output.folder).parent)
    assert all({datalist, runs} <= paths for paths in (head, *sites))
    assert "/data" not in head, "the driver sees no images"


def test_pod_of_a_site_has_what_the_site_asks_for() -> None:
    for pod in pods()[1:]:
        resources = pod["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        assert float(resources["limits"]["nvidia.com/gpu"]) >= CONFIG.resources.gpus_per_site
        assert float(resources["limits"]["cpu"]) >= CONFIG.resources.cpus_per_site


def test_head_offers_no_cpu_to_a_site() -> None:
    assert cluster("raycluster.yaml")["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_job_runs_the_configuration_and_is_not_tried_twice() -> None:
    (job,) = documents("rayjob.yaml")
    assert job["spec"]["entrypoint"] == "gcml run /etc/gcml/federation.yaml"
    assert job["spec"]["backoffLimit"] == 0


def test_every_claim_exists_and_a_sites_volume_is_bound_to_its_machine() -> None:
    found = documents("volumes.yaml")
    claims = {each["metadata"]["name"] for each in found if each["kind"] == "PersistentVolumeClaim"}
    assert claims == {name for pod in pods() for name in map(claim_of, pod["volumes"]) if name}
    for volume in (each for each in found if each["kind"] == "PersistentVolume"):
        (term,) = volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
        (rule,) = term["matchExpressions"]
        assert [site.lower() for site in rule["values"]] == [volume["metadata"]["name"].partition("-")[2]]


# --- ray up ------------------------------------------------------------------------------------


def test_ray_up_file_follows_rays_own_schema() -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    schema = Path(spec.submodule_search_locations[0]) / "autoscaler" / "ray-schema.json"  # type: ignore[index]
    jsonschema.validate(documents("ray-up.yaml")[0], json.loads(schema.read_text(encoding="utf-8")))


def test_ray_up_has_a_machine_a_site_and_labels_every_node_under_a_token() -> None:
    (file,) = documents("ray-up.yaml")
    assert len([file["provider"]["head_ip"], *file["provider"]["worker_ips"]]) == len(SITES)
    for commands in (file["head_start_ray_commands"], file["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token ray start" in commands[-1]
        assert f'--labels="{CONFIG.resources.label_key}=$(cat /etc/gcml/site)"' in commands[-1]


# --- Slurm -------------------------------------------------------------------------------------

STUBS = {
    "scontrol": 'printf "%s\\n" n1 n2 n3',
    "hostname": "echo 10.0.0.1 fe80::1",
    "srun": 'echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $*" >>"$LOG"; exec /bin/sleep 60',
    "python": 'until [ "$(grep -c "ray start" "$LOG")" = 3 ]; do /bin/sleep 0.05; done; echo "${PRESENT:-3}"',
    "sleep": 'exec /bin/sleep "$([ "$1" = 5 ] && echo 0 || echo "$1")"',  # the pause between two looks
}
# In Python as the real one: a program in the background of a script starts with SIGINT ignored, and must undo that.
GCML = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
log = open(os.environ["LOG"], "a", buffering=1)
def interrupt(*_):
    log.write("interrupted\\n")
    sys.exit(130)
signal.signal(signal.SIGINT, interrupt)
log.write(f"gcml {{' '.join(sys.argv[1:])}} at {{os.environ['RAY_ADDRESS']}}\\n")
time.sleep(float(os.environ.get("SECONDS_TO_RUN", "0")))
sys.exit(int(os.environ.get("CODE", "0")))
"""


def slurm(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """The job's script on three nodes that do not exist: the programs that it calls write down how."""
    programs = {name: f"#!/bin/bash\n{body}\n" for name, body in STUBS.items()} | {"gcml": GCML}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "LOG": str(folder / "log"),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_CPUS_PER_TASK": "8",
        **variables,
    }
    return subprocess.Popen(  # noqa: S603 - our own script
        ["/bin/bash", str(FOLDER / "slurm.sh"), *arguments], env=environment, text=True, stderr=subprocess.PIPE
    )


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was said on standard error."""
    _, errors = job.communicate(timeout=120)
    return job.returncode, errors


def test_slurm_script_can_be_submitted_and_asks_for_a_node_a_site() -> None:
    path = FOLDER / "slurm.sh"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_mode & stat.S_IXUSR
    assert f"#SBATCH --nodes={len(SITES)}\n" in text
    assert f"SITES=${{SITES:-{' '.join(SITES)}}}" in text


def test_slurm_script_starts_a_labelled_node_a_site_under_one_token_and_then_the_run(tmp_path: Path) -> None:
    assert ended(slurm(tmp_path, "federation.yaml", "--set", "name=x"))[0] == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[-1] == "gcml run federation.yaml --set name=x at 10.0.0.1:22345"
    starts = {re.search(r"--nodelist=(\S+)", line)[1]: line for line in lines[:-1]}  # type: ignore[index]
    assert all(line.startswith("token 64 ") for line in starts.values())
    assert [re.search(r"site=(\w+)", starts[node])[1] for node in ("n1", "n2", "n3")] == list(SITES)  # type: ignore[index]
    assert "ray start --head --node-ip-address=10.0.0.1 --port=22345" in starts["n1"]
    assert all("ray start --address=10.0.0.1:22345" in starts[node] for node in ("n2", "n3"))


def test_slurm_script_ends_with_the_exit_code_of_the_run(tmp_path: Path) -> None:
    assert ended(slurm(tmp_path, "federation.yaml", CODE="1"))[0] == 1


def test_slurm_script_interrupts_the_run_where_time_is_over_and_waits_for_it(tmp_path: Path) -> None:
    job = slurm(tmp_path, "federation.yaml", SECONDS_TO_RUN="200")
    log = tmp_path / "log"
    assert wait_until(lambda: log.exists() and "gcml run" in log.read_text())
    job.terminate()
    assert ended(job)[0] == 130
    assert (tmp_path / "log").read_text().splitlines()[-1] == "interrupted"


def test_slurm_script_says_which_nodes_are_missing(tmp_path: Path) -> None:
    code, errors = ended(slurm(tmp_path, "federation.yaml", PRESENT="2", ATTEMPTS="2"))
    assert (code, "2 of 3 nodes have joined" in errors) == (1, True)
    code, errors = ended(slurm(tmp_path, "federation.yaml", SITES="CS DU"))
    assert (code, "2 sites (CS DU), but 3 nodes" in errors) == (2, True)


# --- the page ----------------------------------------------------------------------------------


def test_page_links_every_file() -> None:
    page = (FOLDER.parent / "deploy.md").read_text(encoding="utf-8")
    assert [file.name for file in FOLDER.iterdir() if f"](deploy/{file.name})" not in page] == []


def test_bash_can_read_the_script() -> None:
    subprocess.run(["/bin/bash", "-n", str(FOLDER / "slurm.sh")], check=True)  # noqa: S603 - our own script
