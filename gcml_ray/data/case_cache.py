"""Preprocessed cases on a node's own disk, so that the trials of a search read and preprocess them once, not each.

Legend: C channels, R regions, N voxels. A case is a file of tensors, mapped into memory: trials that run at a time
share its pages. Its name is a hash of all that it follows from, files included, so a changed file is read anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gcml_ray.config import DataConfig
from gcml_ray.data.datalist import Case
from gcml_ray.data.loading import Sample, load_sample
from gcml_ray.files.whole_files import clear_drafts, replaced

log = logging.getLogger(__name__)

LONGEST_WRITE_S = 3600.0
FORMAT = 7  # raised when load_sample makes something else of the same files
# What of the configuration does not decide how a case is preprocessed.
_LATER = {"datalist", "cache_folder", "patch_size", "batch_size", "foreground_share", "augment", "split", "num_workers"}
_TENSORS = ("image", "label", "foreground", "background")  # (C, *spatial), (1 or R, *spatial), (N,), (N,)


def cached_sample(case: Case, data: DataConfig) -> Sample:
    """A case as :func:`~gcml_ray.data.loading.load_sample` gives it, from ``data.cache_folder`` where it is there.

    A cache that cannot be read or written is left alone: the case is read from its own files then.

    Raises:
        DataError: see ``load_sample``.
    """
    if data.cache_folder is None:
        return load_sample(case, data)
    try:
        path = Path(data.cache_folder) / f"{_key(case, data)}.safetensors"
        if path.exists():
            return _read(path, case)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:  # or its metadata are not ours
        log.warning("cannot read %s from the cache: %s", case.name, error)
        return load_sample(case, data)
    sample = load_sample(case, data)
    try:
        _write(path, sample)
    except (OSError, SafetensorError) as error:
        log.warning("cannot keep %s in the cache: %s", case.name, error)
    return sample


def _key(case: Case, data: DataConfig) -> str:
    """A hash of all that a preprocessed case follows from."""
    stats = [os.stat(path) for path in (*case.images, case.label)]
    parts = [
        FORMAT,
        case.name,
        case.images,
        case.label,
        case.label_threshold,
        case.split in (None, "train"),  # only training cases know where their patches may be centred
        [(stat.st_size, stat.st_mtime_ns) for stat in stats],
        data.model_dump(mode="json", exclude=_LATER),
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _read(path: Path, case: Case) -> Sample:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in _TENSORS}
        spacing = tuple(json.loads(file.metadata()["spacing"]))
    return Sample(case=case.name, spacing=spacing, **tensors)


def _write(path: Path, sample: Sample) -> None:
    """Whole or not at all; readable for this user alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    clear_drafts(path.parent, older_than_s=LONGEST_WRITE_S)
    tensors = {name: getattr(sample, name).contiguous() for name in _TENSORS}
    with replaced(path, draft=path.with_suffix(f".{os.getpid()}.tmp")) as draft:  # several runs may share a cache
        save_file(tensors, draft, metadata={"spacing": json.dumps(sample.spacing)})
