"""The parts of the benchmarks that decide something, and tiny runs of those that need no cluster."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from actors.local_pool import LocalPool
from benchmarks import dcml, gpu, memory, scale, smoke
from benchmarks.floor import Span, Times
from benchmarks.memory import Sample, growth, tiny_config
from benchmarks.profile_picture import parts_of
from benchmarks.workloads import WORKLOADS, interleaved, make_batch, make_config, median_ratio
from gcml_ray.config import DcmlConfig, ExponentialTopology, RingTopology


def times(*, share: float, wall_s: float, cpu_s: float) -> Times:
    """Two bare processes of 10 s against a federation."""
    return Times(10.0, Span(10.0, 20.0 * share), 2, {"sync": Span(wall_s, cpu_s)})


# --- smoke -------------------------------------------------------------------------------------


def test_on_a_quiet_machine_the_wall_clock_decides() -> None:
    ratio, _ = smoke.verdict([times(share=1.0, wall_s=12.5, cpu_s=20.0)])
    assert ratio == pytest.approx(0.8)


def test_on_a_busy_machine_the_processor_time_decides() -> None:
    """10 of 20 processor seconds against 12.5: 0.8, whatever the wall clock says."""
    ratio, words = smoke.verdict([times(share=0.5, wall_s=40.0, cpu_s=12.5)])
    assert ratio == pytest.approx(0.8)
    assert "50% of their cores" in words


def test_one_bad_repetition_of_three_decides_nothing() -> None:
    good, bad = times(share=1.0, wall_s=10.5, cpu_s=20.0), times(share=1.0, wall_s=30.0, cpu_s=20.0)
    assert smoke.verdict([good, bad, good])[0] == pytest.approx(10 / 10.5)


# --- steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_batches_have_the_shape_of_their_workload(name: str) -> None:
    config = make_config(WORKLOADS[name])
    batch = make_batch(config, torch.device("cpu"))
    data = config.data
    assert batch.image.shape == (data.batch_size, len(data.channels), *data.patch_size)
    assert batch.label.shape == (data.batch_size, data.num_outputs if data.is_sigmoid else 1, *data.patch_size)
    assert 0 < batch.label.float().mean() < 0.5


def test_the_mutual_step_is_measured_against_two_local_ones() -> None:
    found = dcml.measure("tiny", torch.device("cpu"), dcml=DcmlConfig(), repeats=1, steps=1, amp="none")
    assert found.ratio == pytest.approx(found.mutual_s / found.two_local_s)
    assert 0 < found.ratio < math.inf  # one step says no more


def test_ratios_are_taken_side_by_side() -> None:
    """3/1, 4/2, 9/3: the median of the ratios is 3, not the ratio of the medians 4/2."""
    assert median_ratio([3, 4, 9], [1, 2, 3]) == 3


def test_what_is_compared_is_measured_in_turn() -> None:
    order: list[str] = []

    def call(name: str) -> float:
        order.append(name)
        return 0.0

    interleaved([lambda: call("a"), lambda: call("b")], repeats=2)
    assert order == ["a", "b", "a", "b"]


# --- memory ------------------------------------------------------------------------------------


def test_growth_is_the_slope_of_the_second_half() -> None:
    """Warm-up adds 50 MB in the first rounds; from round 30 on it is 2 MB in 10 rounds."""
    samples = [Sample(number, driver, 0, 0, 0, 0) for number, driver in ((10, 50), (20, 100), (30, 102), (40, 104))]
    assert growth(samples, "driver") == pytest.approx(0.2)


def test_a_run_in_one_process_is_weighed_as_rounds_end(tmp_path: Path) -> None:
    scale = memory.run(tiny_config(tmp_path, num_sites=2, rounds=4, pool="local"), every=2)
    assert [sample.round_number for sample in scale.samples] == [2, 4]
    assert scale.samples[0].driver == pytest.approx(scale.samples[0].sites, rel=0.2)  # the same process
    assert scale.samples[0].store == 0


# --- scale -------------------------------------------------------------------------------------


def test_knowledge_doubles_each_round_on_the_exponential_graph() -> None:
    """Distances 1, 2, 4 reach all of 8 sites in 3 rounds."""
    assert scale.spread(ExponentialTopology(name="exponential"), 8, rounds=10) == [1, 2, 4, 8]


def test_on_a_ring_knowledge_moves_one_site_a_round() -> None:
    counts = scale.spread(RingTopology(name="ring"), 6, rounds=3)
    assert counts == [1, 2, 3, 4]
    assert scale.rounds_until(counts, 0.5, 6) == "2"
    assert scale.rounds_until(counts, 1.0, 6) == "-"


def test_sites_that_sleep_leave_the_driver_its_own_work(tmp_path: Path) -> None:
    config = scale.make_config(tmp_path / "run", num_sites=4, rounds=3, per_actor=1, pool="local")
    row = scale.measure_sites(config, LocalPool, seconds=0.01, processes=1)
    assert (row.sites, row.processes) == (4, 1)
    assert row.round_s > 0.04  # four sites in turn
    assert row.rounds_per_s == pytest.approx(1 / row.round_s)


# --- gpu ---------------------------------------------------------------------------------------


def test_steps_are_compared_with_a_bare_loop() -> None:
    found = gpu.measure("tiny", torch.device("cpu"), amp="none", repeats=1, steps=1)
    assert 0 < found.local_to_bare < math.inf  # one step says no more
    assert found.flops > 1e6
    assert set(found.peak_bytes) == {"bare", "local", "mutual"}


def test_shares_of_the_peak_are_shares() -> None:
    peak = gpu.measure_peak(torch.device("cpu"), amp="none", size=256, repeats=2)
    assert peak.flops > 1e8
    assert gpu.optimiser_share("tiny", torch.device("cpu"), peak, steps=2) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is none")
def test_without_a_gpu_the_gpu_benchmark_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match=r"no CUDA device.*benchmarks\.dcml"):
        gpu.main()


# --- profile -----------------------------------------------------------------------------------


def test_a_sample_counts_for_the_innermost_part() -> None:
    step = "main (a.py:1);local_step (gcml_ray/model/learner.py:9)"
    lines = [
        f"{step};segmentation_loss (gcml_ray/losses/segmentation.py:70);mean (monai/x.py:3) 5",
        f"{step};apply_gradients (gcml_ray/model/learner.py:80);backward (torch/_tensor.py:600) 7",
        f"{step};zip (b.py:1) 2",
    ]
    assert parts_of(lines) == {"segmentation loss": 5, "backward pass": 7, "the rest": 2}
