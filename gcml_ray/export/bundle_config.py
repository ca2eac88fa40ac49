"""``configs/inference.json`` of a MONAI bundle: a site's preparation of images, said in MONAI's own transforms.

The same steps as :mod:`gcml_ray.data.loading` and :mod:`gcml_ray.prediction.predict`. Where those go beyond MONAI's
transforms (see :func:`own_code_reason`) the bundle runs gcml_ray's code instead, and says so.

Legend: C outputs, *grid = what the network sees, *source = the grid of the image's file.
"""

from __future__ import annotations

from typing import Any

from gcml_ray.config import Config, DataConfig, NetworkConfig
from gcml_ray.config.data import AXIS_CODES
from gcml_ray.data.loading import NOISE
from gcml_ray.networks.registry import BUILDERS, resolve_options
from gcml_ray.prediction.label_files import label_type, region_values

Json = dict[str, Any]

# Builders that only hand their options on to a class of MONAI; all others are named themselves.
MONAI_CLASSES = {
    "unet": "monai.networks.nets.unet.UNet",
    "dynunet": "monai.networks.nets.dynunet.DynUNet",
    "segresnet": "monai.networks.nets.segresnet.SegResNet",
}
RUNNER = "gcml_ray.export.bundle_runner"
# Ends with an error where there is none: MONAI itself would say that nothing, done, was a success.
SAY_CASES = "$[print(len(@cases), 'case(s) in', @dataset_dir), @cases[0]][:0]"


def own_code_reason(data: DataConfig) -> str | None:
    """Why images cannot be prepared, or labels not written, by MONAI's transforms alone; None where they can."""
    if data.spatial_dims == 2:
        return "pictures and slices are read and written by gcml_ray (MONAI's reader turns a picture's axes)"
    if data.resize is not None:
        return "data.resize shrinks by the mean and grows linearly, which no transform of MONAI does both of"
    if data.is_sigmoid and region_values(data) is None:
        return "regions that cross each other get a file each"
    return None


def network_definition(network: NetworkConfig, data: DataConfig) -> Json:
    """The ``_target_`` and the arguments of a network, with all defaults written out."""
    builder = BUILDERS[network.name]
    options = resolve_options(network)
    if network.name == "dynunet":
        options["upsample_kernel_size"] = options["strides"][1:]
    return {
        "_target_": MONAI_CLASSES.get(network.name, f"{builder.__module__}.{builder.__qualname__}"),
        "spatial_dims": data.spatial_dims,
        "in_channels": len(data.channels),
        "out_channels": data.num_outputs,
        **{name: _plain(value) for name, value in options.items()},
    }


def inference_config(config: Config, network: NetworkConfig) -> Json:
    """The whole of ``inference.json``."""
    start: Json = {
        "imports": ["$import glob", "$import os", "$import functools"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/predictions'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": network_definition(network, config.data),
        "network": "$@network_def.to(@device)",
        "checkpoint": "$@bundle_root + '/models/model.pt'",
        "initialize": [
            "$@network_def.load_state_dict(torch.load(@checkpoint, map_location=@device, weights_only=True))"
        ],
        "run": [SAY_CASES, "$@evaluator.run()"],
    }
    return start | (_monai_parts(config) if own_code_reason(config.data) is None else _own_parts())


def _own_parts() -> Json:
    """Images and labels by gcml_ray's code, the network by the bundle."""
    return {
        "card": {
            "_target_": "gcml_ray.files.model_card.read_card",
            "path": "$pathlib.Path(@bundle_root) / 'model.json'",
        },
        "imports": ["$import pathlib"],
        "cases": {"_target_": f"{RUNNER}.find_images", "folder": "@dataset_dir", "card": "@card"},
        "evaluator": {
            "_target_": f"{RUNNER}.BundleRunner",
            "card": "@card",
            "network": "@network",
            "dataset": "@cases",
            "output_dir": "@output_dir",
            "device": "@device",
        },
    }


# --- in MONAI's transforms -----------------------------------------------------------------------


def _monai_parts(config: Config) -> Json:
    evaluation = config.evaluation
    return {
        **_datalist(config.data),
        "preprocessing": {"_target_": "Compose", "transforms": preparation(config.data)},
        "dataset": {"_target_": "Dataset", "data": "@cases", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(config.window_size),
            "sw_batch_size": evaluation.window_batch,
            "overlap": evaluation.window_overlap,
            "mode": "gaussian",
        },
        "postprocessing": {"_target_": "Compose", "transforms": _decision(config.data)},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "amp": False,
        },
    }


def _datalist(data: DataConfig) -> Json:
    """The files of each case: by channel name, by number, or all channels in one file, as ``gcml predict`` does."""
    layouts = [[f"_{name}" for name in data.channels], [f"_{index:04d}" for index in range(len(data.channels))], [""]]
    return {
        "layouts": layouts,
        # Numbers are those of channels only if all are; else they are part of the cases' names.
        "numbers": "$[int(os.path.basename(name).partition('.nii')[0][-4:]) "
        "for name in glob.glob(os.path.join(@dataset_dir, '*_[0-9][0-9][0-9][0-9].nii*'))]",
        "layout": "$next((each for each in @layouts "
        "if glob.glob(os.path.join(@dataset_dir, '*' + each[0] + '.nii*')) "
        f"and (each[0] != '_0000' or max(@numbers) < {len(data.channels)})), [''])",
        "cases": "$[{'image': [name[:len(name) - len(@layout[0] + end)] + part + end for part in @layout]} "
        "for end in ('.nii.gz', '.nii') "
        "for name in sorted(glob.glob(os.path.join(@dataset_dir, '*' + @layout[0] + end)))]",
        # The case's name without its channel, as the name of the label file.
        "case_name": "$lambda meta, saver: {'subject': functools.reduce("
        "lambda name, end: name.removesuffix(@layout[0] + end) + end * name.endswith(@layout[0] + end), "
        "('.nii.gz', '.nii'), "
        "os.path.basename(str(meta['filename_or_obj'])))}",
    }


def preparation(data: DataConfig) -> list[Json]:
    """From a file to what the network sees: :func:`gcml_ray.data.loading.prepare_image`."""
    steps: list[Json] = [
        {
            "_target_": "LoadImaged",
            "keys": "image",
            "reader": "NibabelReader",
            "image_only": True,
            "ensure_channel_first": True,
        }
    ]
    if data.orientation is not None:
        labels = [list(pair) for pair in AXIS_CODES]
        steps.append({"_target_": "Orientationd", "keys": "image", "axcodes": data.orientation, "labels": labels})
    if data.target_spacing_mm is not None:
        pixdim = list(data.target_spacing_mm)
        steps.append({"_target_": "Spacingd", "keys": "image", "pixdim": pixdim, "mode": "bilinear"})
    nonzero = data.normalise == "nonzero"
    if nonzero and data.target_spacing_mm is not None:  # gcml_ray.data.loading.without_noise
        largest = "x.abs().amax(dim=tuple(range(1, x.ndim)), keepdim=True)"
        func = f"$lambda x: x.masked_fill(x.abs() <= {NOISE} * {largest}, 0)"
        steps.append({"_target_": "Lambdad", "keys": "image", "func": func})
    steps.append({"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": nonzero, "channel_wise": True})
    return steps


def _decision(data: DataConfig) -> list[Json]:
    """From logits (C, *grid) to label values (1, *source), written: the order of :mod:`gcml_ray.prediction.predict`."""
    steps: list[Json] = []
    interpolates = data.target_spacing_mm is not None
    if interpolates:  # probabilities are interpolated and decided afterwards
        kind = "sigmoid" if data.is_sigmoid else "softmax"
        steps.append({"_target_": "Activationsd", "keys": "pred", kind: True})
    if interpolates or data.orientation is not None:
        steps.append(
            {
                "_target_": "Invertd",
                "keys": "pred",
                "transform": "@preprocessing",
                "orig_keys": "image",
                "nearest_interp": False,
            }
        )
    steps.append(_labels(data, threshold=0.5 if interpolates else 0.0))
    steps.append(
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_postfix": "",
            "output_ext": ".nii.gz",
            "output_dtype": f"$np.{label_type(data).__name__}",
            "separate_folder": False,
            "resample": True,  # to where the labels lie already; False fails on swapped axes (MONAI 1.6.1)
            "mode": "nearest",
            "output_name_formatter": "@case_name",
        }
    )
    return steps


def _labels(data: DataConfig, *, threshold: float) -> Json:
    """Scores (C, *source) to label values (1, *source), as :func:`~gcml_ray.prediction.label_files.label_map` does."""
    values = list(data.labels.values())
    if data.regions is None:
        decide = f"torch.as_tensor({values}, device=x.device)[x.argmax(dim=0, keepdim=True).long()]"
        return {"_target_": "Lambdad", "keys": "pred", "func": f"$lambda x: {_with_meta(decide)}"}
    painted = region_values(data)
    assert painted is not None, "own_code_reason sends these to gcml_ray's code"
    names = list(data.regions)
    order = [(names.index(name), value) for name, value in painted.items()]
    decide = (
        f"functools.reduce(lambda labels, each: torch.where(x[each[0]:each[0] + 1] > {threshold}, each[1], labels), "
        f"{order}, torch.full_like(x[:1], {values[0]}))"
    )
    return {"_target_": "Lambdad", "keys": "pred", "func": f"$lambda x: {_with_meta(decide)}"}


def _with_meta(expression: str) -> str:
    """The expression's value with the affine and file name of ``x``."""
    return f"monai.utils.convert_to_dst_type({expression}, x)[0]"


def _plain(value: Any) -> Any:
    """An option for JSON: a name with its arguments, which MONAI takes as a tuple only, becomes an expression."""
    if isinstance(value, tuple) and any(isinstance(item, dict) for item in value):
        return f"${value!r}"
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
