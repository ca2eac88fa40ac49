"""The ``wire`` section of a configuration: what a push looks like while it travels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gcml_ray.config.section import Section

Encoding = Literal["float32", "float16", "bfloat16", "int8", "topk"]


class WireConfig(Section):
    """Encoding and signature of pushes.

    ``encoding`` other than ``float32`` sends fewer bytes and loses some of the weights' precision; what one push
    loses is added to the next. ``topk`` sends the ``topk_share`` of the values that differ most from what the
    receiver has of this sender, and the first push whole. ``sign``: pushes carry an Ed25519 signature of the process
    that sends them; null: where each site has a node of its own (``resources.placement: label``).
    """

    encoding: Encoding = "float32"
    topk_share: Annotated[float, Field(gt=0, le=1)] | None = None
    sign: bool | None = None

    @model_validator(mode="after")
    def _share_only_for_topk(self) -> WireConfig:
        if self.encoding == "topk" and self.topk_share is None:
            raise ValueError("encoding topk needs topk_share, the share of the values to send, e.g. 0.05")
        if self.encoding != "topk" and self.topk_share is not None:
            raise ValueError(f"topk_share would be ignored by encoding {self.encoding}: only topk has it")
        return self
