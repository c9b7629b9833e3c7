"""What one visitor of the demo has, and what is shown of it: masks on the picture, the turns in words, the files."""

import dataclasses
import html
import json
import pathlib
import re
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.overlay import draw_overlay
from rsagent_jax.agent.replay import state_to_json
from rsagent_jax.report.terminal import describe_turn
from rsagent_jax.runtime.image_files import png, read_image
from rsagent_jax.types import DataError, MaskRecord
from sam_bridge.images import stored_size
from sam_bridge.types import SegmentRequest

if TYPE_CHECKING:  # it brings jax, which the page does not wait for
    from rsagent_jax.api import Result, TurnStream

SMALLEST, LARGEST = 448, 1024  # longer side of a picture on the page, pixels


@dataclasses.dataclass
class Visit:
    """Of one open page. A stream that is not None is under way."""

    asked: tuple[str, str] = ("", "")  # the picture's file, the question
    stream: "TurnStream | None" = None
    state: EnvState | None = None  # after the latest turn
    result: "Result | None" = None  # of the latest trajectory, when it has ended
    turns: list[str] = dataclasses.field(default_factory=list)  # as HTML
    counted: bool = False  # a question or correction that was counted, and has not begun
    cancelled: bool = False
    gone: bool = False  # the page was closed, or has asked anew
    folder: tempfile.TemporaryDirectory | None = None  # of the answer's files

    @property
    def ended(self) -> bool:
        return self.state is not None and self.stream is None

    def cancel(self) -> None:
        self.cancelled = True
        if (stream := self.stream) is not None:
            stream.close()

    def leave(self) -> None:
        self.gone = True
        self.cancel()
        if self.folder is not None:
            self.folder.cleanup()


def turn_html(state: EnvState, number: int, seconds: float, who: str) -> str:
    """A new turn (from 0) of the policy, or of "you", in words; what a policy writes stays text."""
    newest = dataclasses.replace(state, turns=state.turns[: number + 1], replies=state.replies[: number + 1])
    _, *lines = describe_turn(newest, seconds)
    rows = "".join(
        f"<dt>{name}</dt><dd>{html.escape(text)}</dd>"
        for name, text in (line.split(maxsplit=1) for line in lines)
        if not (who == "you" and name == "thought")
    )
    return f'<li class="{who}"><b>Turn {number + 1}, {who}</b> {seconds:.1f} s<dl>{rows}</dl></li>'


def check_size(file: str, max_megapixels: int) -> None:
    """DataError for a picture with more pixels. Nothing is decoded; `read_upload` says what no picture is."""
    w, h = stored_size(file)
    if w * h > max_megapixels * 1e6:
        raise DataError(f"the picture has {w} x {h} pixels; {max_megapixels} megapixels are the most here: shrink it")


def read_upload(file: str) -> np.ndarray:
    """u8[h, w, 3]. DataError, which does not tell the path, for what is no picture."""
    try:
        data = pathlib.Path(file).read_bytes()
    except OSError:
        raise DataError("the picture is no longer there: upload it again") from None
    return read_image(data, "choose another picture", upright=True, where="the picture")


def find_mask(state: EnvState, mask_id: float | None) -> MaskRecord | None:
    """The mask of the history pool with that id, None for 0. DataError where there is none."""
    if not mask_id:
        return None
    found = [mask for mask in state.masks if mask.id == mask_id]
    if not found:
        raise DataError(f"there is no mask {mask_id} in the history pool")
    return found[0]


def shown_picture(state: EnvState, mask_id: float) -> np.ndarray:
    """u8[a, b, 3]: the whole picture with that mask of the history pool and its clicks, 0: without any. As the policy
    is shown it, but of a size for people."""
    size = min(max(*state.image.shape[:2], SMALLEST), LARGEST)
    mask = find_mask(state, mask_id)
    if mask is None:
        return draw_overlay(state.image, np.zeros(state.image.shape[:2], bool), size)
    request = _requests(state)[mask.id]
    return draw_overlay(state.image, mask.mask, size, request.points, request.labels, request.box)


def _requests(state: EnvState) -> dict[int, SegmentRequest]:
    """What the segmenter was asked for each mask, in original pixels."""
    view, found = state.view.reset(), {}
    for turn in state.turns:
        if turn.call is None or turn.error is not None:
            continue
        proposal = turn.call.propose(view, state.masks)
        view = proposal.view or view
        if turn.mask_id is not None:
            found[turn.mask_id] = proposal.request
    return found


def to_original(state: EnvState, place_shown: Iterable[float]) -> tuple[int, int]:
    """(x, y) of a pixel of `shown_picture` -> the pixel of the picture that lies under it."""
    h, w = state.image.shape[:2]
    shown = shown_picture(state, 0).shape[:2]
    x, y = place_shown
    return min(w - 1, int((x + 0.5) * w / shown[1])), min(h - 1, int((y + 0.5) * h / shown[0]))


def read_places(text: str) -> list[float]:
    """The numbers of `x, y` or `x1, y1, x2, y2`. DataError for anything else."""
    words = re.split(r"[\s,;]+", text.strip())
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 4):
        raise DataError(
            f"{text!r} is no place: give x, y of a point, or x1, y1, x2, y2 of a box, in pixels of the picture"
        )
    return numbers


def answer_files(result: "Result", folder: pathlib.Path) -> list[str]:
    """mask.png, mask.json (COCO RLE), trajectory.json and the picture that it belongs to; without the masks where there
    is no answer."""
    files = {"trajectory.json": state_to_json(result.state, "image.png").encode(), "image.png": png(result.state.image)}
    if not result.failure:
        mask = {"mask.png": png(result.mask.astype(np.uint8) * 255), "mask.json": json.dumps(result.rle).encode()}
        files = mask | files
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in files]
