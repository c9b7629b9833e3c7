"""finish(mask_id): the end, with a mask as the answer or with none."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from rsagent_jax.agent.tools.base import Proposal, Tool, unknown_mask
from rsagent_jax.agent.views import View
from rsagent_jax.types import MaskRecord


@dataclasses.dataclass(frozen=True)
class Finish(Tool):
    mask_id: int | None  # None: the target is absent

    name = "finish"
    description = "End with a mask as the answer; null when the target is not in the image."
    properties: ClassVar = {"mask_id": {"type": ["integer", "null"]}}
    required = ("mask_id",)
    ends = True

    def propose(self, view: View, masks: Sequence[MaskRecord]) -> Proposal:
        error = None if self.mask_id is None else unknown_mask(self.mask_id, masks)
        return Proposal(self, error, action=("finish", self.mask_id))
