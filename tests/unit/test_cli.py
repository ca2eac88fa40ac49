"""The command line as a user meets it: words, exit codes, and a whole demo in this process."""

import importlib.metadata
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from gcml_ray.cli.main import main
from gcml_ray.cli.running import STOPPED, stop_on_signal
from gcml_ray.config.file import load_config, save_config
from gcml_ray.console.run import RunConsole
from gcml_ray.demo import alone_config, demo_config
from gcml_ray.records import RoundRecord
from tests.signal_handlers import handled

SMALL = ("federation.rounds=4", "federation.local_steps=2", "federation.evaluate_every=2", "tracking.enabled=false")


def gcml(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs a command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["gcml", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run",), "give a configuration file, or --resume with the folder of a run, one of them"),
        (("run", "a.yaml", "--resume", "x"), "not both: the run folder has its configuration"),
        (("run", "a.yaml", "--finish"), "--finish ends a run that has begun: give its folder with --resume"),
        (("run", "nowhere.yaml"), "nowhere.yaml"),
        (("run", "--resume", "nowhere"), "nowhere is not the folder of a run"),
        (("run", "--resume", "x", "--set", "a=1"), "--set cannot change it"),
        (("compare", "nowhere.yaml"), "nowhere.yaml"),
        (("doctor", "--set", "federation.rounds=3"), "--set changes a configuration: name its file too"),
    ],
)
def test_users_error_is_one_message_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert gcml(monkeypatch, *arguments) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err


def test_place_that_cannot_be_written_is_named_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert gcml(monkeypatch, "prepare", "phantom", "--out", str(tmp_path / "file" / "datalist.json")) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file'}")


def test_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert gcml(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"gcml-ray {importlib.metadata.version('gcml-ray')}\n"


def test_unknown_key_is_named_with_the_closest_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    phantom = str(Path(__file__).parents[2] / "configs" / "phantom.yaml")
    assert gcml(monkeypatch, "run", phantom, "--set", "federation.round=3") == 1
    assert "federation.round" in (err := capsys.readouterr().err)
    assert "rounds" in err


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal: what a shell started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_once_asks_to_stop_and_twice_stops_now(capsys: pytest.CaptureFixture[str]) -> None:
    with RunConsole(Console(), title="t") as listener, stop_on_signal(listener) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        assert "stopping as soon as the round in progress, or the final test, is over" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert STOPPED == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_and_a_closed_terminal_stop_now(number: int) -> None:
    with handled(number, signal.SIG_DFL):
        with RunConsole(Console(), title="t") as listener, stop_on_signal(listener), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_DFL


def test_run_under_nohup_hears_no_closed_terminal() -> None:
    with handled(signal.SIGHUP, signal.SIG_IGN), RunConsole(Console(), title="t") as listener:
        with stop_on_signal(listener) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_set()


def test_demo_that_is_stopped_in_the_last_round_of_its_first_run_begins_no_second_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def ask_to_stop(_: RunConsole, record: RoundRecord) -> None:
        if record.plan.round_number == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunConsole, "on_round_end", ask_to_stop)
    overrides = [part for key in (*SMALL, "resources.pool=local") for part in ("--set", key)]
    assert gcml(monkeypatch, "demo", "--folder", str(tmp_path / "demo"), *overrides) == STOPPED
    shown = capsys.readouterr().out
    assert "Personalised models on each site's own test cases" in shown
    assert "stopped before the run of sites alone" in shown
    assert not (tmp_path / "demo" / "local").exists()


def test_demo_ends_with_a_table_and_a_verdict_and_predicts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The whole way without Ray: demo, then the same folder again gets a number, then run, resume and its refusals."""
    overrides = [part for key in (*SMALL, "resources.pool=local") for part in ("--set", key)]
    assert gcml(monkeypatch, "demo", "--folder", str(tmp_path / "demo"), *overrides) == 0
    shown = capsys.readouterr().out
    assert "Test Dice: the same sites and steps, alone and together" in shown
    assert "Joining was better than training alone at" in shown
    run = tmp_path / "demo" / "gcml"
    assert {path.name for path in (run / "plots").iterdir()} >= {"dice_by_round.png", "gossip_graph.png"}
    assert (run / "checkpoints" / "north" / "personalised.safetensors").is_file()

    assert gcml(monkeypatch, "run", str(run / "config.yaml")) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert gcml(monkeypatch, "run", "--resume", str(run)) == 0
    assert "Personalised models on each site's own test cases" in capsys.readouterr().out


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_end_no_command(tmp_path: Path, closed: str) -> None:
    """As under a supervisor that starts a program without them. Ray fails where there is no stderr."""
    script = (
        "import os, pathlib, subprocess, sys; from gcml_ray.cli import main; main._open_closed_streams(); print('x');"
        "print('y', file=sys.stderr); sys.stdin.read(); [os.fstat(number) for number in (0, 1, 2)];"
        "subprocess.run(['/bin/sh', '-c', 'echo x; echo y >&2'], check=True); pathlib.Path('done').touch()"
    )
    started = f'exec "$0" -c "$1" {closed}'
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = ["/bin/sh", "-c", started, sys.executable, script]
    subprocess.run(command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, timeout=120, check=True)  # noqa: S603
    assert (tmp_path / "done").exists()


def test_the_demo_s_sites_alone_have_nothing_that_concerns_peers(tmp_path: Path) -> None:
    """Saved and read again: a configuration that says what would be ignored is refused."""
    overrides = ["evaluation.ensemble_peers=1", "optimiser.weight_average=0.9", "optimiser.push_average=true"]
    gcml = demo_config(tmp_path / "datalist.json", tmp_path / "gcml", overrides)
    alone = alone_config(gcml, tmp_path / "local")
    save_config(alone, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == alone
    assert (alone.method.name, alone.federation, alone.data) == ("local", gcml.federation, gcml.data)
