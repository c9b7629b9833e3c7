"""finish(mask_id): the end, with a mask as the answer or with none."""

import dataclasses
from typing import ClassVar

from rsagent_jax.agent.tools.base import Proposal, Tool, unknown_mask


@dataclasses.dataclass(frozen=True)
class Finish(Tool):
    mask_id: int | None  # None: the target is absent

    name = "finish"
    description = "End with a mask as the answer; null when the target is not in the image."
    properties: ClassVar = {"mask_id": {"type": ["integer", "null"]}}
    required = ("mask_id",)
    ends = True

    def propose(self, view, masks) -> Proposal:
        error = None if self.mask_id is None else unknown_mask(self.mask_id, masks)
        return Proposal(self, error, action=("finish", self.mask_id))
