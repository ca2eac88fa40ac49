"""The pre-flight of a configuration without its cases: its file, run folder and tracker.

Each function looks at one thing and gives its line of the report; none raises for what a user can mend.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import tempfile
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from gcml_ray.config import Config
from gcml_ray.config.file import load_config
from gcml_ray.doctor.machine import Check, nearest_existing
from gcml_ray.errors import ConfigError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.tracking.client import tracking_uri
from gcml_ray.wording import in_shell, without_secrets

REACH_TIMEOUT_S = 5.0


def read_config(path: str, overrides: Sequence[str]) -> tuple[Check, Config | None]:
    """The configuration, or why there is none."""
    if _is_datalist(path):
        remedy = f"name a configuration whose data.datalist is {path}, such as an edited copy of one in configs/"
        return Check("config", "FAIL", f"{path} is a datalist, not a configuration", remedy), None
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        remedy = f"change {path} (or the --set options) as it says"
        if not (Path(path).is_file() and os.access(path, os.R_OK)):
            remedy = "check the path; gcml-ray's own configurations lie in configs/, `ls configs` shows them"
        return Check("config", "FAIL", str(error), remedy), None
    return Check("config", "PASS", f"{path}: {config.name}, method {config.method.name}"), config


def _is_datalist(path: str) -> bool:
    """Whether a file looks like a datalist, with or without mistakes in it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and not content.keys().isdisjoint(("cases", "training"))


def check_output_folder(config: Config) -> Check:
    """Whether the run folder can be made, and is not taken by another run."""
    name, path = "output folder", Path(config.output.folder)
    if RunFolder(path).is_taken:
        remedy = f"continue it with `gcml run --resume {in_shell(path)}`, or set another output.folder"
        return Check(name, "WARN", f"{path} already holds a run", remedy)
    parent = nearest_existing(path)
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        remedy = "set output.folder to a place where you may write"
        return Check(name, "FAIL", f"{path} cannot be made: {parent} is not writable ({error.strerror})", remedy)
    return Check(name, "PASS", f"{path} can be written")


def check_tracking(config: Config) -> Check:
    """Whether the tracking URI is one that MLflow takes, and is there; nothing is created."""
    if not config.tracking.enabled:
        return Check("tracking", "PASS", "off")
    try:
        uri = tracking_uri(config, Path(config.output.folder))
    except ConfigError as error:
        return Check("tracking", "FAIL", str(error), "set tracking.uri to a database or a server")
    problem = _tracking_problem(uri)
    if problem:
        remedy = "mend tracking.uri, start its server, or set tracking.enabled=false"
        return Check("tracking", "FAIL", f"{without_secrets(uri)}: {problem}", remedy)
    return Check("tracking", "PASS", without_secrets(uri))


def _tracking_problem(uri: str) -> str:
    """Why a store cannot be used, as far as can be told without MLflow; empty where nothing speaks against it."""
    if uri.startswith("sqlite:///"):
        return _sqlite_problem(Path(uri.removeprefix("sqlite:///")))
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return ""
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=REACH_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return f"the server cannot be reached ({error})"
    return ""


def _sqlite_problem(path: Path) -> str:
    if not path.exists():
        parent = nearest_existing(path.parent)
        can_write = parent.is_dir() and os.access(parent, os.W_OK)
        return "" if can_write else f"the database cannot be made: {parent} is not a folder that can be written"
    try:
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
        try:
            connection.execute("SELECT name FROM sqlite_master LIMIT 1").fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return f"not a database that can be read ({error})"
    return "" if os.access(path, os.W_OK) else "the database cannot be written"
