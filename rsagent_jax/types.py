"""The types on the arrows of the data flow: one frozen dataclass each, arrays in numpy on the host.

Axis letters, used in names and comments everywhere:
  B rows   T tokens   S slots   P patches   D model   N query heads   K key/value heads   H head dim   V vocabulary
  G samples per group;   h w original pixels;   h' w' resized pixels.

Frames: a name ends in `_original` (pixels of the image file, float, XYXY, y down) or `_view` (pixels of the
smart-resized view that the model was last shown). `agent/views.py` holds the only conversion between the two.
"""

import dataclasses
import enum
from typing import ClassVar

import numpy as np

from rsagent_jax.array_types import Array, Bool, Float, Float32, Int32, UInt8
from sam_bridge.frozen import freeze


class DataError(ValueError):
    """The user's file, directory or config is wrong. The message says what, where and how to mend it.

    Entry points print the message without a traceback and exit with `status`.
    """

    status = 2


class StorageError(DataError):
    """Nobody's mistake: a disk is full or fails, or a bucket does not answer. The same command, started again when it
    is mended, goes on (EX_IOERR)."""

    status = 74


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question about one picture."""

    id: str  # unique inside its split, stable across runs
    image: UInt8[np.ndarray, "h w 3"]  # RGB; frozen (sam_bridge/frozen.py), so that it is hashed once
    query: str
    gt_mask: Bool[np.ndarray, "h w"]
    ignore_mask: Bool[np.ndarray, "h w"] | None = None  # True = neither right nor wrong (ReasonSeg)
    path: str = ""  # the picture's file, for records that refer to it

    def __post_init__(self):
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            raise DataError(
                f"sample {self.id}: image must be u8[h, w, 3], got {self.image.dtype}{list(self.image.shape)}"
            )
        object.__setattr__(self, "image", freeze(self.image))
        for name in ("gt_mask", "ignore_mask"):
            mask = getattr(self, name)
            if mask is not None and (mask.dtype != bool or mask.shape != self.image.shape[:2]):
                raise DataError(
                    f"sample {self.id}: {name} must be bool{list(self.image.shape[:2])} like its image,"
                    f" got {mask.dtype}{list(mask.shape)}"
                )


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Tokens to append to a context, with the images they show.

    `positions` are absolute M-RoPE positions (temporal, height, width) inside the trajectory, continued from the
    context. `patches` are in the image processor's own order (merge blocks of 2 x 2, row-major), several images
    concatenated.
    """

    tokens: Int32[np.ndarray, " T"]
    positions: Int32[np.ndarray, "3 T"]
    patches: Float32[np.ndarray, "P patch_dim"]
    grids: tuple[tuple[int, int, int], ...]  # (t, h, w) in patches, one per image


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the policy sampled in one turn. The terminator is part of `tokens` when `finished`."""

    tokens: Int32[np.ndarray, " n"]
    logprobs: Float32[np.ndarray, " n"]  # of the distribution sampled from
    finished: bool  # False: the token budget ended the turn, or another stop id, which is the last of `tokens` then


class ToolCall:
    """What a turn asks for; one frozen dataclass a tool, in agent/tools. Equal calls are equal values."""

    name: ClassVar[str]
    ends: ClassVar[bool] = False  # commits its `mask_id` as the answer
    changes_view: ClassVar[bool] = False
    resets_view: ClassVar[bool] = False  # to the view that the trajectory began with


@dataclasses.dataclass(frozen=True)
class ParseError:
    """`reason` is one of a fixed set of words that can be counted; `detail` is shown to the model."""

    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the environment answers. `image` is None when only text comes back."""

    text: str
    image: UInt8[np.ndarray, "h w 3"] | None = None


class Status(enum.StrEnum):
    """How a trajectory ended."""

    FINISHED = "finished"
    MAX_TURNS = "max_turns"
    MAX_CONTEXT = "max_context"  # not finished in the last turn that its budget of tokens allowed
    INVALID = "invalid"  # k malformed calls in a row
    REPEATED = "repeated"  # the same action three times
    ENV_FAILED = "env_failed"  # the tool is broken, not the policy: dropped from its group
    POLICY_FAILED = "policy_failed"  # no turn could be had, as from an endpoint that is away: dropped as well
    CANCELLED = "cancelled"  # by the caller: dropped as well

    @property
    def judged(self) -> bool:
        """Whether the policy is to answer for the trajectory: it gets a reward and an advantage."""
        return self not in (Status.ENV_FAILED, Status.POLICY_FAILED, Status.CANCELLED)


@dataclasses.dataclass(frozen=True)
class MaskRecord:
    """A mask in the history pool."""

    id: int  # 1, 2, … inside its trajectory
    mask: Bool[np.ndarray, "h w"]  # original pixels
    score: float  # the segmenter's own estimate of IoU
    logits_id: str  # names the low-resolution logits kept by the segmenter; "" if it keeps none


@dataclasses.dataclass(frozen=True)
class Turn:
    """One assistant turn and what came back. Text is kept for people; ids are what training uses."""

    text: str  # the assistant's text without the terminator
    call: ToolCall | None  # None when malformed
    error: ParseError | None  # parse error, or a call that the environment refused
    observation: Observation | None  # None after the last turn
    mask_id: int | None = None  # the mask this turn made
    clipped: int = 0  # coordinates that were outside the view and were clipped
    repeated: bool = False  # same action as the turn before
    last: bool = False  # it was known to be the last one when it was asked for


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One episode. `tokens` is the whole context as the engine saw it: prompt, turns and observations.

    `loss_mask` is True exactly on ids the policy sampled (terminators included); log-probs are 0 elsewhere.
    """

    sample_id: str
    group_id: int
    query: str
    turns: tuple[Turn, ...]
    masks: tuple[MaskRecord, ...]
    final_mask: Bool[np.ndarray, "h w"]  # the committed one, else the latest valid one, else empty
    final_mask_id: int | None
    status: Status
    tokens: Int32[np.ndarray, " T"]
    positions: Int32[np.ndarray, "3 T"]
    loss_mask: Bool[np.ndarray, " T"]
    logprobs: Float32[np.ndarray, " T"]
    patches: Float32[np.ndarray, "P patch_dim"]
    grids: tuple[tuple[int, int, int], ...]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # where the time went: tool, policy
    versions: Int32[np.ndarray, " T"] | None = None  # Driver.version of the weights that drew each token; None: unknown


@dataclasses.dataclass(frozen=True)
class Reward:
    """`total` is the weighted sum of `parts`; every part is logged on its own."""

    total: float
    parts: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step takes, in fixed shapes. Several trajectories share a row, told apart by `segment_ids`; 0 is padding.

    Targets are the next token of the same segment; `loss_mask[b, t]` says that token t itself is trained (it was
    sampled), so the loss at position t - 1 predicts it. Images of a row live in that row's patch buffer.
    """

    tokens: Int32[Array, "B T"]
    positions: Int32[Array, "B 3 T"]
    segment_ids: Int32[Array, "B T"]  # 1.. per trajectory, 0 padding
    loss_mask: Bool[Array, "B T"]
    advantages: Float32[Array, "B T"]  # constant over a trajectory, with grpo.turn_credit over a turn; 0 in SFT
    old_logprobs: Float32[Array, "B T"]  # of the engine; 0 in SFT
    patches: Float[Array, "B P dim"]  # in window order; of a frozen tower its output, after train.step's `embed`
    patch_segment_ids: Int32[Array, "B P"]  # image 1.. inside the row, 0 padding
    patch_positions: Int32[Array, "B P 2"]  # (row, column) inside its image: rotary angles, and which window of a bin
    image_slots: Int32[Array, "B T"]  # 0 = text, else 1 + index of the merged patch that stands at this token
