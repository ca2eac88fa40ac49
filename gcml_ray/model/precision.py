"""In which precision forward passes run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Precision:
    """How forward passes run: full precision, or autocast on a GPU."""

    device_type: str
    amp: str

    def autocast(self) -> Any:
        """The context of a forward pass."""
        if self.amp == "none" or self.device_type == "cpu":
            return nullcontext()
        dtype = torch.bfloat16 if self.amp == "bf16" else torch.float16
        return torch.autocast(self.device_type, dtype=dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """A new scaler of losses, which does nothing but with fp16."""
        enabled = self.amp == "fp16" and self.device_type != "cpu"
        return torch.amp.GradScaler(self.device_type, enabled=enabled)
