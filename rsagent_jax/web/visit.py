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

from rsagent_jax.agent.correction import THOUGHT
from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.overlay import draw_overlay
from rsagent_jax.agent.replay import state_to_json
from rsagent_jax.report.terminal import describe_turn
from rsagent_jax.runtime.image_files import png
from rsagent_jax.tiny import scenes
from rsagent_jax.types import DataError
from sam_bridge.types import SegmentRequest

if TYPE_CHECKING:  # it brings jax, which the page does not wait for
    from rsagent_jax.api import Result, TurnStream

SMALLEST, LARGEST = 448, 1024  # longer side of a picture on the page, pixels
WORDS = " ".join((*scenes.COLORS, *scenes.SHAPES, *scenes.SIZES, *scenes.RELATIONS, *scenes.SUPERLATIVES)).split()
WORDS = frozenset((*WORDS, "the", "a", "every", "one", "object"))  # of the scenes that the tiny policy was trained on


@dataclasses.dataclass
class Visit:
    """Of one open page. A stream that is not None is under way."""

    stream: "TurnStream | None" = None
    state: EnvState | None = None  # after the latest turn
    result: "Result | None" = None  # of the latest trajectory, when it has ended
    turns: list[str] = dataclasses.field(default_factory=list)  # as HTML
    counted: bool = False  # a question or correction that was counted, and has not begun
    cancelled: bool = False
    folder: tempfile.TemporaryDirectory | None = None  # of the answer's files

    def cancel(self) -> None:
        self.cancelled = True
        if (stream := self.stream) is not None:
            stream.close()

    def leave(self) -> None:
        self.cancel()
        if self.folder is not None:
            self.folder.cleanup()


def turn_html(state: EnvState, seconds: float) -> str:
    """The newest turn in words; what a policy writes stays text."""
    turn = state.turns[-1]
    who = "you" if f"<think>{THOUGHT}</think>" in turn.text else "policy"
    _, *lines = describe_turn(state, seconds)
    rows = "".join(
        f"<dt>{name}</dt><dd>{html.escape(text)}</dd>"
        for name, text in (line.split(maxsplit=1) for line in lines)
        if not (who == "you" and name == "thought")
    )
    return f'<li class="{who}"><b>Turn {len(state.turns)}, {who}</b> {seconds:.1f} s<dl>{rows}</dl></li>'


def shown_picture(state: EnvState, mask_id: int) -> np.ndarray:
    """u8[a, b, 3]: the whole picture with that mask of the history pool and its clicks, 0: without any. As the policy
    is shown it, but of a size for people."""
    size = min(max(*state.image.shape[:2], SMALLEST), LARGEST)
    if mask_id == 0:
        return draw_overlay(state.image, np.zeros(state.image.shape[:2], bool), size)
    request = _requests(state)[mask_id]
    mask = state.masks[mask_id - 1].mask
    return draw_overlay(state.image, mask, size, request.points, request.labels, request.box)


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


def unknown_words(query: str) -> list[str]:
    """Words of a question that the tiny policy was never trained on."""
    return [word for word in dict.fromkeys(re.findall(r"[^\W\d_]+", query.lower())) if word not in WORDS]


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
