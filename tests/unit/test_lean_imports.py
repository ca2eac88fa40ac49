"""Large libraries without what they bring along."""

from __future__ import annotations

import sys
import threading

import pytest

from gcml_ray.lean_imports import hidden
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
