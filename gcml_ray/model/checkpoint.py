"""A site's checkpoints: safetensors with a JSON header, written whole or not at all.

Two kinds of file lie in ``checkpoints/<site>/``. ``round_00012.safetensors`` is what a run resumes from:
weights, counters, optimiser moments, the weights' average and a :class:`SiteState`.
``model_00012.safetensors`` is a model to take away: weights (averaged where there is an average) and counters
under the network's own names; the best one is kept as ``personalised.safetensors`` once it has been tested.
The last three rounds are kept, so that a site which is ahead of what the driver has written down can go back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gcml_ray.errors import CheckpointError, DamagedError, write_remedy
from gcml_ray.files.record_json import from_json
from gcml_ray.files.run_folder import KEPT_ROUNDS
from gcml_ray.files.whole_files import replaced
from gcml_ray.model.learner import Learner
from gcml_ray.model.weight_average import WeightAverage
from gcml_ray.model.weights import FlatModel
from gcml_ray.wording import some

log = logging.getLogger(__name__)

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

ROUND_FILE = re.compile(r"round_(\d{5,})\.safetensors")
CHECKSUM = "checksum"  # in a file's header


@dataclass(frozen=True)
class SiteState:
    """What a site knows beside its tensors. Model files are named relative to the checkpoint's folder.

    ``suspicion``, ``last_push`` and ``best_patch_dice`` are what its judge remembers: of each sender the suspicion
    against it and the checksum of its last push, of its own model the highest Dice that was measured on patches.
    ``peer_files``: of each peer the file of its last model, the newest last.
    """

    site: str
    round_number: int
    identity: str
    best_round: int = 0
    best_dice: float = -1.0
    best_file: str = ""
    before_gossip_file: str = ""
    suspicion: dict[str, int] = field(default_factory=dict)
    last_push: dict[str, str] = field(default_factory=dict)
    best_patch_dice: float = -1.0
    peer_files: dict[str, str] = field(default_factory=dict)

    @property
    def model_files(self) -> set[str]:
        """The model files that it names."""
        return {self.best_file, self.before_gossip_file, *self.peer_files.values()}


def round_file(folder: Path, round_number: int) -> Path:
    """Where the checkpoint of a round lies."""
    return folder / f"round_{round_number:05d}.safetensors"


def damaged_file(folder: Path, round_number: int) -> Path:
    """The name that a damaged checkpoint of a round gets: kept for inspection, ignored by resumes."""
    return round_file(folder, round_number).with_suffix(".damaged")


def saved_rounds(folder: Path) -> list[int]:
    """The rounds that have a checkpoint, ascending."""
    matches = (ROUND_FILE.fullmatch(path.name) for path in folder.glob("round_*.safetensors"))
    return sorted(int(match.group(1)) for match in matches if match)


def save_round(folder: Path, learner: Learner, state: SiteState, *, personal: Learner | None = None) -> None:
    """Writes a round's checkpoint and removes those that are no longer needed.

    Args:
        folder: the site's checkpoints.
        learner: the site's model with its optimiser.
        state: what else the site knows.
        personal: the second model of methods that have two.
    """
    tensors, metadata = _learner_arrays(learner, ""), {"state": json.dumps(asdict(state))}
    metadata["scaler"] = json.dumps(learner.scaler.state_dict())
    if personal is not None:
        tensors |= _learner_arrays(personal, "personal.")
        metadata["personal.scaler"] = json.dumps(personal.scaler.state_dict())
    write_tensors(round_file(folder, state.round_number), tensors, metadata)
    _prune(folder, state)


def load_round(
    folder: Path,
    learner: Learner,
    *,
    site: str,
    round_number: int,
    identity: str,
    personal: Learner | None = None,
) -> SiteState:
    """Restores weights, counters and optimiser from a round's checkpoint; see :func:`save_round`.

    Raises:
        CheckpointError: the file is missing, unreadable, or belongs to another site, network or configuration.
    """
    path = round_file(folder, round_number)
    tensors, metadata = read_tensors(path)
    learners = {"": learner} if personal is None else {"": learner, "personal.": personal}
    try:
        state = _state_of(metadata)
        scalers = {prefix: json.loads(metadata[f"{prefix}scaler"]) for prefix in learners}
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a round's checkpoint of this version of gcml-ray ({error!r})") from error
    if state.site != site:
        raise CheckpointError(f"{path} belongs to site {state.site}, not to {site}: put {site}'s own file back there")
    if state.identity != identity:
        raise CheckpointError(
            f"{path} belongs to configuration {state.identity}, not to {identity}: resume with the configuration that "
            "the run was started with"
        )
    if state.round_number != round_number:
        raise CheckpointError(f"{path} is of round {state.round_number}: it was copied or renamed; put it back")
    for prefix, one in learners.items():
        _load_model(path, one.model, _below(f"{prefix}model.", tensors))
        moments = _below(f"{prefix}optimiser.", tensors)
        _check_moments(path, moments, size=one.model.parameter.numel())
        one.optimiser.moments = {
            key: torch.from_numpy(value).to(one.model.flat.device) for key, value in moments.items()
        }
        try:
            one.scaler.load_state_dict(scalers[prefix])
        except (KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} has another loss scaler than resources.amp asks for ({error!r})") from error
        if one.model.average is not None:
            _load_average(path, one.model.average, _below(f"{prefix}average.", tensors))
    return state


def _state_of(metadata: Mapping[str, str]) -> SiteState:
    """What a round's header says of its site.

    Raises:
        KeyError, ValueError: it is not a round's header, or names files outside the checkpoint's folder.
    """
    state = from_json(SiteState, metadata["state"])
    if elsewhere := [name for name in state.model_files if name != Path(name).name]:
        raise ValueError(f"model files {elsewhere} are not in its folder")
    return state


def _check_moments(path: Path, moments: Mapping[str, Array], *, size: int) -> None:
    """Refuses moments of other weights: optimisers keep counts, and a number a weight."""
    odd = [name for name, array in moments.items() if array.shape not in ((), (size,))]
    if odd:
        raise CheckpointError(f"{path} holds another optimiser's state: {some(odd, 5)} do not fit the network")


def _learner_arrays(learner: Learner, prefix: str) -> dict[str, Array]:
    """Weights, counters, moments and the weights' average by name."""
    arrays = {f"{prefix}model.{name}": array for name, array in _model_arrays(learner.model).items()}
    for key, value in learner.optimiser.moments.items():
        arrays[f"{prefix}optimiser.{key}"] = _array(value)
    if (average := learner.model.average) is not None:
        arrays[f"{prefix}average.values"] = _array(average.values)
        arrays[f"{prefix}average.num_steps"] = _array(average.num_steps)
    return arrays


def _below(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def save_model(path: Path, model: FlatModel, *, facts: Mapping[str, str]) -> None:
    """Writes a model to take away; ``facts`` (site, round, network...) go into the file's header."""
    write_tensors(path, _model_arrays(model), dict(facts))


def keep_as(path: Path, name: Path) -> None:
    """A copy of a file under a name that does not change."""
    with replaced(name) as draft:
        shutil.copyfile(path, draft)


def load_model_file(path: Path, model: FlatModel) -> dict[str, str]:
    """Loads a model file into a network of the same architecture; returns its facts."""
    tensors, facts = read_tensors(path)
    _load_model(path, model, tensors)
    return facts


def _array(value: object) -> Array:
    """A contiguous CPU array of a tensor or number."""
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    array: Array = tensor.detach().cpu().contiguous().numpy()  # np.ascontiguousarray would add an axis to a number
    return array


def _model_arrays(model: FlatModel) -> dict[str, Array]:
    """All weights and counters by name."""
    flat = model.flat.detach().cpu().numpy()
    arrays: dict[str, Array] = {
        spec.name: flat[spec.offset : spec.offset + int(np.prod(spec.shape))].reshape(spec.shape)
        for spec in model.layout
    }
    return arrays | {name: _array(counter) for name, counter in model.counters().items()}


def _load_model(path: Path, model: FlatModel, arrays: Mapping[str, Array]) -> None:
    """Copies arrays by name into a model, refusing another architecture."""
    counters = model.counters()
    shapes = {spec.name: spec.shape for spec in model.layout} | {k: tuple(v.shape) for k, v in counters.items()}
    found = {name: array.shape for name, array in arrays.items()}
    if shapes != found:
        odd = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise CheckpointError(f"{path} holds another network: {some(odd, 5)} differ; check network in the config")
    dtypes = {name: np.dtype(np.float32) for name in shapes} | {k: _array(v).dtype for k, v in counters.items()}
    if odd := [
        f"{name} is {arrays[name].dtype} instead of {dtypes[name]}"
        for name in shapes
        if arrays[name].dtype != dtypes[name]
    ]:
        raise CheckpointError(f"{path} holds other numbers than gcml-ray writes: {some(odd, 5)}")
    for spec in model.layout:
        view = model.flat[spec.offset : spec.offset + int(np.prod(spec.shape))]
        view.copy_(torch.from_numpy(arrays[spec.name].reshape(-1)))
    for name, counter in counters.items():
        counter.copy_(torch.from_numpy(arrays[name]))


def _load_average(path: Path, average: WeightAverage, arrays: Mapping[str, Array]) -> None:
    """Restores the moving average of a model.

    Raises:
        CheckpointError: the file has none of this size.
        DamagedError: the average's number of steps is missing or not a whole number.
    """
    values = arrays.get("values")
    if values is None or values.shape != tuple(average.values.shape):
        raise CheckpointError(f"{path} holds no average of the weights, but optimiser.weight_average asks for one")
    num_steps = arrays.get("num_steps")
    if num_steps is None or num_steps.shape != () or num_steps.dtype.kind != "i":
        raise DamagedError(f"{path} is damaged: it holds an average of the weights without its number of steps")
    average.restore(torch.from_numpy(values), int(num_steps))


def write_tensors(path: Path, tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    """Writes a file of tensors as a whole.

    Raises:
        CheckpointError: the disk does not take it; nothing of it is left there.
    """
    try:
        with replaced(path) as draft:
            save_file(tensors, draft, metadata=metadata | {CHECKSUM: _checksum_of(tensors, metadata)})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}): {write_remedy(error)}; until then the file before it is kept"
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors and the JSON header of a file.

    Raises:
        CheckpointError: there is no such file.
        DamagedError: it is not what was written.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")
    try:
        with safe_open(path, framework="np") as handle:
            tensors = {name: handle.get_tensor(name) for name in list(handle.keys())}
            metadata = dict(handle.metadata() or {})
    except (SafetensorError, OSError, TypeError, AttributeError, ValueError) as error:  # or a type NumPy has not
        raise DamagedError(f"{path} cannot be read ({error})") from error
    known = metadata.pop(CHECKSUM, None)  # older files have none
    if known is not None and known != _checksum_of(tensors, metadata):
        raise DamagedError(f"{path} is damaged: its bytes are not those that were written")
    return tensors, metadata


def _checksum_of(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """Over names, shapes, types and bytes: safetensors itself takes no notice of a flipped bit.

    SHA-256, 2 GB/s where the processor has it; the sums of a push's checksum do not see swapped neighbours.
    """
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(json.dumps([name, array.shape, str(array.dtype)]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _prune(folder: Path, newest: SiteState) -> None:
    """Removes all but the last rounds, and the model files that none of those names.

    Rounds after the newest are older files, from before the run went back; a later resume must not find them.
    """
    saved = saved_rounds(folder)
    rounds = [number for number in saved if number <= newest.round_number][-KEPT_ROUNDS:]
    for number in set(saved) - set(rounds):
        round_file(folder, number).unlink(missing_ok=True)
    kept = newest.model_files
    for number in rounds:
        kept |= _models_named_by(round_file(folder, number))
    for pattern in ("model_*.safetensors", "peer_*.safetensors"):
        for path in folder.glob(pattern):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def _models_named_by(path: Path) -> set[str]:
    """The model files that a checkpoint's header names; none where it cannot be read any more."""
    try:
        with safe_open(path, framework="np") as handle:
            state = _state_of(handle.metadata() or {})
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        log.warning("%s cannot be read (%s); a resume will not be able to use it", path, error)
        return set()
    return state.model_files
