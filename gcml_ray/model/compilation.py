"""The networks of training steps by ``torch.compile`` (``resources.compile``).

Models of one architecture share what was compiled, so a site compiles once for its own model and for whatever comes
in. Validation, tests and predictions, whose windows have other sizes, run as they are.

Legend: B batch, C channels.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from gcml_ray.errors import ConfigError
from gcml_ray.networks.registry import forward_heads

Forward = Callable[[nn.Module, Tensor], list[Tensor]]


@functools.cache
def compiled_forward() -> Forward:
    """:func:`gcml_ray.networks.registry.forward_heads`, compiled anew for each architecture and size of patch."""
    return torch.compile(forward_heads, dynamic=False)


def compile_ahead(module: nn.Module, image: Tensor, *, autocast: AbstractContextManager[None]) -> None:
    """Forward and backward pass of a copy, so that no round waits for the compiler.

    Args:
        module: the network; neither its weights and statistics nor any random numbers change.
        image: (B, C, *spatial), patches like those of training.
        autocast: the precision of the forward pass.

    Raises:
        ConfigError: it cannot be compiled here.
    """
    if image.device.type == "cpu":
        _compile_in_this_process()
    with torch.random.fork_rng(devices=[image.device] if image.device.type == "cuda" else []):
        try:
            with autocast:
                heads = compiled_forward()(copy.deepcopy(module), image)
            torch.stack([head.float().mean() for head in heads]).sum().backward()  # type: ignore[no-untyped-call]
        except Exception as error:
            words = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(
                f"resources.compile: {type(module).__name__} cannot be compiled here ({words[0]}). It takes a C++ "
                "compiler (g++ or clang++) and Python's headers on a CPU, Triton on a GPU: install them, or set "
                "resources.compile false"
            ) from error


def _compile_in_this_process() -> None:
    """Without PyTorch's own worker processes: every site would have some, each as large as itself."""
    from torch._inductor import config  # noqa: PLC0415 - loads the compiler

    config.compile_threads = 1
