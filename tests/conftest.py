"""Settings that must stand before ray and torch are imported: one thread each, a private Ray, no foreign cluster."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

RAY_FOLDER = tempfile.mkdtemp(prefix="gc", dir="/tmp")

os.environ.update(
    OMP_NUM_THREADS="1",
    RAY_TMPDIR=RAY_FOLDER,
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN="0" * 64,
    RAY_ENABLE_AUTO_CONNECT="0",
    RAY_allow_out_of_band_object_ref_serialization="0",
    RAY_USAGE_STATS_ENABLED="0",
)
os.environ.pop("RAY_ADDRESS", None)
atexit.register(shutil.rmtree, RAY_FOLDER, ignore_errors=True)
