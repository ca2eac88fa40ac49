"""Large libraries without what they bring along."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from gcml_ray.config.file import save_config
from gcml_ray.lean_imports import hidden
from tests.makers import make_config
from tests.unit.test_layers import in_fresh_process


def test_a_lean_mlflow_logs_a_run_and_others_may_load_the_rest() -> None:
    code = """
import sys, tempfile
from gcml_ray.tracking.client import import_lean_client
import_lean_client()
from mlflow import MlflowClient
with tempfile.TemporaryDirectory() as folder:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run = client.create_run(client.create_experiment("x", artifact_location=f"file://{folder}")).info.run_id
    client.log_metric(run, "dice", 0.5)
    client.log_text(run, "hello", "a.txt")
    print(client.get_run(run).data.metrics, [each.path for each in client.list_artifacts(run)])
print([name for name in ("pandas", "pyarrow") if name in sys.modules])
import pandas, pyarrow
"""
    assert in_fresh_process(code) == "{'dice': 0.5} ['a.txt']\n[]"


def test_other_threads_import_what_is_hidden_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)  # a module that nobody has loaded
    found: list[bool] = []

    def import_it() -> None:
        import this  # noqa: F401, PLC0415

        found.append(True)

    with hidden(["this"]):
        with pytest.raises(ModuleNotFoundError, match="this is not loaded here"):
            import_it()
        thread = threading.Thread(target=import_it)
        thread.start()
        thread.join(timeout=10)
    assert found == [True]


def test_a_site_loads_neither_a_compiler_nor_tables_from_its_start_to_its_test(tmp_path: Path) -> None:
    """70 MB and most of a second in each site's process: a run with four sites on two cores starts 2 s later."""
    config = make_config(tmp_path, name="lean")
    save_config(config, tmp_path / "config.yaml")
    code = f"""
import sys
from pathlib import Path
from actors.site import trainer_in_own_process
from gcml_ray.config.file import load_config
from gcml_ray.records import TrainOrder
config = load_config({str(tmp_path / "config.yaml")!r})
site = trainer_in_own_process(config, "A", Path({config.output.folder!r}), use_gpu=False, on_progress=lambda *_: None)
site.start(resume_round=0)
site.train_round(TrainOrder(1, "warmup", evaluate=True, checkpoint=True), ())
site.evaluate(split="test", model="personalised")
print([name for name in ("torch._dynamo", "sympy", "pandas", "mlflow", "ray.tune") if name in sys.modules])
"""
    assert in_fresh_process(code) == "[]"
