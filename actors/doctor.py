"""``gcml doctor``: every check of a machine and a configuration, one after the other, as it is made."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gcml_ray.doctor.machine import Check, Machine, check_disk, check_environment, nearest_existing, this_machine

if TYPE_CHECKING:  # what they import may be what is missing here
    from actors.cluster import Node
    from gcml_ray.config import Config, ResourcesConfig
    from gcml_ray.data.datalist import Case
    from gcml_ray.doctor.case_headers import CaseHeader
    from gcml_ray.doctor.forecast_costs import Place
    from gcml_ray.doctor.probe import Probe

THIS_MACHINE = "this machine"
Found = TypeVar("Found")
Checking = Generator[Check, None, Found]  # yields its checks as they are made, and returns what they found


def run_checks(config_path: str | None, overrides: Sequence[str]) -> Iterator[Check]:
    """The pre-flight, a check at a time. What a user can mend is a WARN or FAIL and never an exception.

    Args:
        config_path: the configuration to check; None checks the machine alone.
        overrides: ``a.b.c=value`` for it.
    """
    machine = this_machine()
    yield from check_environment(machine, folder=Path.cwd())
    try:
        yield from _check_run(config_path, overrides, machine)
    except ImportError as error:
        remedy = "install the packages that are named above, then run the check again"
        yield Check("imports", "FAIL", f"the other checks need a package that is missing: {error}", remedy)


def _check_run(config_path: str | None, overrides: Sequence[str], machine: Machine) -> Iterator[Check]:
    """The checks that need our own modules, and so the packages that those import."""
    from gcml_ray.config import ResourcesConfig  # noqa: PLC0415 - see run_checks

    config = None
    if config_path is not None:
        from gcml_ray.doctor.configuration import read_config  # noqa: PLC0415

        check, config = read_config(config_path, overrides)
        yield check
    check, nodes = check_cluster(config.resources if config else ResourcesConfig(), machine)
    yield check
    if config is not None:
        yield from check_config(config, machine, nodes)


# --- Ray ---------------------------------------------------------------------------------------


def check_cluster(resources: ResourcesConfig, machine: Machine) -> tuple[Check, list[Node]]:
    """Where the sites would run. Joins a running cluster for a moment; never starts one.

    Args:
        resources: says which cluster.
        machine: where a new cluster would be started.

    Returns:
        The check, and the nodes that the sites can use.
    """
    from gcml_ray.errors import ClusterError  # noqa: PLC0415 - see run_checks

    if resources.pool == "local":
        return Check("ray", "PASS", "not needed: resources.pool is local, the sites take turns in one process"), []
    try:
        from actors import cluster  # noqa: PLC0415 - ray may be what is missing
    except ImportError as error:
        remedy = "pip install 'ray[default,tune]', or set resources.pool=local"
        return Check("ray", "FAIL", f"cannot be imported ({error})", remedy), []
    own = cluster.Node(THIS_MACHINE, float(machine.num_cpus), float(len(machine.gpu_bytes)), {})
    try:
        with cluster.joined(resources.address) as where:
            nodes = list(cluster.nodes()) if where else [own]
    except ClusterError as error:
        remedy = "start that cluster, mend RAY_ADDRESS or resources.address, or set resources.address=local"
        return Check("ray", "FAIL", str(error), remedy), []
    if not where:
        return Check("ray", "PASS", f"a run will start a cluster here, with {machine.num_cpus} CPUs"), nodes
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return Check("ray", "PASS", f"{where}: {len(nodes)} node(s), {cpus:g} CPUs, {gpus:g} GPUs"), nodes


def check_capacity(config: Config, sites: Sequence[str], nodes: Sequence[Node]) -> Check:
    """Whether every site finds a place on these nodes."""
    from actors import cluster  # noqa: PLC0415 - see check_cluster
    from gcml_ray.errors import ClusterError  # noqa: PLC0415

    detail = cluster.described(config.resources, len(sites))
    try:
        cluster.check_capacity(config.resources, sites, nodes)
    except ClusterError as error:
        remedy = "change resources as it says, or take a larger cluster"
        return Check("capacity", "FAIL", str(error), remedy)
    return Check("capacity", "PASS", f"{detail} fit on {len(nodes)} node(s)")


# --- a configuration ---------------------------------------------------------------------------


def check_config(config: Config, machine: Machine, nodes: Sequence[Node]) -> Iterator[Check]:
    """Everything about one configuration: where it writes, its sites and cases, first steps, forecast."""
    from actors.attendance import check_schedule  # noqa: PLC0415 - see run_checks
    from actors.run import case_sites_of, sites_of  # noqa: PLC0415
    from gcml_ray.chaos import check_sites  # noqa: PLC0415
    from gcml_ray.config import SERVER, has_server  # noqa: PLC0415
    from gcml_ray.data.datalist import read_datalist  # noqa: PLC0415
    from gcml_ray.doctor import case_reading, configuration  # noqa: PLC0415
    from gcml_ray.doctor.without_effect import check_effects  # noqa: PLC0415
    from gcml_ray.errors import GcmlError  # noqa: PLC0415

    yield from check_effects(config)
    yield configuration.check_output_folder(config)
    yield configuration.check_tracking(config)
    try:
        sites, training = case_sites_of(config), sites_of(config)
        listed_cases = read_datalist(config.data.datalist)
    except GcmlError as error:
        remedy = "mend data.datalist, or federation.sites and site_networks; `gcml prepare` writes datalists"
        yield Check("datalist", "FAIL", str(error), remedy)
        return
    yield Check("datalist", "PASS", f"{len(listed_cases)} cases; sites that take part: {', '.join(sites)}")
    if len(sites) == 1:
        remedy = "list cases of further sites, or name more in federation.sites"
        yield Check("sites", "WARN", f"{sites[0]} is the only one: there is nobody to learn from", remedy)
    try:
        check_schedule(config, training)
        check_sites(config.chaos, training, server=SERVER if has_server(config.method) else "")
    except GcmlError as error:
        yield Check("sites", "FAIL", str(error), "mend federation.schedule or chaos as it says")
    if nodes:
        yield check_capacity(config, training, nodes)
    cases = yield from _check_splits(config, sites, listed_cases)
    headers = yield from _check_cases(config, cases)
    place = _place(config, training, machine, nodes)
    probes = yield from _check_steps(config, headers)
    if headers:  # after the steps, whose memory is measured
        yield case_reading.check_voxels([header.case for header in headers], config.data)
    yield from _check_forecast(config, sites, headers, probes, place=place, machine=machine)


def _check_splits(config: Config, sites: Sequence[str], listed_cases: Sequence[Case]) -> Checking[list[Case]]:
    """The splits of every site; returns the cases that have one."""
    from gcml_ray.data.datalist import assign_splits, cases_of_site  # noqa: PLC0415
    from gcml_ray.doctor import case_headers  # noqa: PLC0415 - see run_checks
    from gcml_ray.errors import DataError  # noqa: PLC0415

    cases: list[Case] = []
    for site in sites:
        try:
            own = assign_splits(cases_of_site(listed_cases, site), config.data.split)
        except DataError as error:
            remedy = "add cases, mend their `split`, or leave the site out with federation.sites"
            yield Check(f"cases {site}", "FAIL", str(error), remedy)
            continue
        cases += own
        yield case_headers.check_split(site, own)
    return cases


def _check_cases(config: Config, cases: Sequence[Case]) -> Checking[Sequence[CaseHeader]]:
    """Files and headers of all cases; returns the headers of those that are in order."""
    from gcml_ray.doctor import case_headers, first_steps  # noqa: PLC0415 - see run_checks

    yield case_headers.check_files_exist(cases)
    present = [case for case in cases if all(Path(path).is_file() for path in (*case.images, case.label))]
    check, headers = case_headers.check_all_headers(present, config.data)
    yield check
    yield case_headers.check_affines(headers, config.data)
    yield case_headers.check_voxel_sizes(headers, config.data)
    yield from first_steps.check_patches(config, headers)
    yield from first_steps.check_windows(config, headers)
    return headers


def _check_steps(config: Config, headers: Sequence[CaseHeader]) -> Checking[list[Probe]]:
    """One case of every site read whole, and steps on its patches; returns what they cost."""
    from gcml_ray.config import takes_coupled_steps  # noqa: PLC0415 - see run_checks
    from gcml_ray.doctor import first_steps, probe  # noqa: PLC0415
    from gcml_ray.errors import ConfigError, DataError  # noqa: PLC0415

    probes: list[Probe] = []
    first: dict[str, Case] = {}
    for header in headers:
        if header.case.split == "train":
            first.setdefault(header.case.site, header.case)
    scratch = nearest_existing(Path(config.output.folder))
    for site, case in sorted(first.items()):
        try:
            data, loading = probe.read_first_case(config, case)
        except DataError as error:
            yield Check(f"read {site}", "FAIL", str(error), "mend the file, or take the case out of the datalist")
            continue
        yield first_steps.check_sample(data, config.data)
        try:
            found = probe.measure_site(config, data, loading=loading, scratch=scratch)
        except (ConfigError, RuntimeError, ValueError, OSError) as error:
            remedy = "change network, loss or data.patch_size as it says; for want of memory, a smaller patch or batch"
            yield Check(f"step {site}", "FAIL", f"{type(error).__name__}: {error}", remedy)
            continue
        probes.append(found)
        yield first_steps.check_probe(found, is_mutual=takes_coupled_steps(config.method))
    return probes


# --- forecast ----------------------------------------------------------------------------------


def _place(config: Config, sites: Sequence[str], machine: Machine, nodes: Sequence[Node]) -> Place:
    """Where the sites will run, in the words of the forecast."""
    from gcml_ray.doctor.forecast_costs import Place  # noqa: PLC0415 - see run_checks
    from gcml_ray.doctor.probe import interpreter_bytes  # noqa: PLC0415

    resources = config.resources
    if resources.pool == "local":
        return Place(
            slots=1,
            sites_per_machine=len(sites),
            interpreter_bytes=interpreter_bytes(),
            one_process=True,
            sites_per_process=min(len(sites), resources.sites_per_actor),
        )
    num_nodes = max(1, len(nodes))
    slots = sum(node.cpus for node in nodes) / max(1, int(resources.cpus_per_site))
    if resources.gpus_per_site > 0 and any(node.gpus for node in nodes):
        slots = min(slots, sum(node.gpus for node in nodes) / max(1.0, resources.gpus_per_site))
    return Place(
        slots=min(max(1.0, slots if nodes else float(machine.num_cpus)), resources.num_actors(len(sites))),
        sites_per_machine=-(-len(sites) // num_nodes),
        interpreter_bytes=interpreter_bytes(),
        one_process=False,
        sites_per_process=min(len(sites), resources.sites_per_actor),
    )


def _check_forecast(
    config: Config,
    sites: Sequence[str],
    headers: Sequence[CaseHeader],
    probes: Sequence[Probe],
    *,
    place: Place,
    machine: Machine,
) -> Iterator[Check]:
    """What the run will need, where every site could be measured."""
    from gcml_ray.doctor.case_headers import site_cases  # noqa: PLC0415
    from gcml_ray.doctor.forecast import forecast  # noqa: PLC0415 - see run_checks

    costs = [found.costs for found in probes]
    missing = sorted(set(sites) - {cost.site for cost in costs})
    if missing:
        detail = f"not made: sites {', '.join(missing)} could not be measured"
        yield Check("forecast", "WARN", detail, "mend what failed above, then run the check again")
        return
    # Memory that one site's steps have freed serves the next one: only the largest growth is the true one.
    largest = max(cost.activation_bytes for cost in costs)
    costs = [replace(cost, activation_bytes=largest) for cost in costs]
    needs = forecast(config, site_cases(headers), costs, place)
    yield from needs.to_checks(machine)
    yield check_disk(Path(config.output.folder), needed_bytes=needs.disk_bytes, name="disk for checkpoints")
