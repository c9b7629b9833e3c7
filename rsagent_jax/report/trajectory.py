"""A trajectory that was kept, played again to be shown: what every page of this project shows it from.

    film = play(example, workdir)       the very observations of the policy, by agent/replay.py

Two outlines lie over a picture, and the page switches them on and off: the mask's, solid and filled, and the truth's,
dashed. Each has the colour of COLOURS that stands out most from the picture under it.
"""

import base64
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from rsagent_jax.agent.environment import EnvState, final_mask
from rsagent_jax.agent.overlay import TINT
from rsagent_jax.agent.replay import read_source, replay
from rsagent_jax.data.npz import read_arrays
from rsagent_jax.masks import decode_segmentation
from rsagent_jax.runtime.image_files import read_image
from rsagent_jax.runtime.paths import open_path
from rsagent_jax.types import DataError, Status

SMALLEST, LARGEST = 320, 640  # longer side of outlines on a page, pixels; no picture is larger than LARGEST
# Of outlines; no yellow, which is that of the policy's own overlays.
COLOURS = ("#ff2d95", "#00e5ff", "#39ff14", "#ff7a00", "#7a3cff", "#ffffff")
_NEAR = 0.02  # how far from an outline the picture counts for its colour, of the picture's longer side


@dataclasses.dataclass(frozen=True)
class Example:
    """A trajectory that was kept to be looked at; a line of an evaluation's trajectories.jsonl has these fields."""

    id: str  # of its sample
    query: str
    iou: float | None  # of the final mask; None = not known
    status: Status
    ious: tuple[float, ...]  # of each mask, in the order of their ids
    gt: dict[str, Any] | None  # COCO RLE; None = not kept
    image: str | bytes  # a path, or the picture's file itself
    record: str  # of agent.replay.state_to_json

    @property
    def texts(self) -> list[str]:
        """What the policy said, by turn: all there is of a trajectory that cannot be played again."""
        try:
            return [str(turn["text"]) for turn in json.loads(self.record)["turns"]]
        except (ValueError, KeyError, TypeError):
            return []


def evaluated_example(line: Mapping[str, Any]) -> Example:
    """Of a line of an evaluation's trajectories.jsonl. ValueError, KeyError or TypeError for what is none."""
    fields = {field.name: line[field.name] for field in dataclasses.fields(Example)}
    return Example(**fields | {"status": Status(line["status"]), "ious": tuple(line["ious"])})


def stored_example(record: bytes, more: Mapping[str, Any]) -> Example:
    """Of a stored trajectory (data/trajectories.py). more: in front of what its header says.

    ValueError, KeyError or TypeError for a damaged one.
    """
    arrays = read_arrays(record)
    about = json.loads(arrays["header"].tobytes())
    replayed, picture, about = about["replay"], about["picture"]["path"], about | more
    return Example(
        id=about.get("id", ""),
        query=json.loads(replayed)["query"],
        iou=about.get("iou"),
        status=Status(about.get("status", Status.FINISHED)),
        ious=tuple(about.get("ious", ())),
        gt=about.get("gt"),
        image=arrays["source"].tobytes() if "source" in arrays else picture,
        record=replayed,
    )


def collected_example(row: Mapping[str, Any]) -> Example:
    """Of a line of a collection's journal; errors as above."""
    return stored_example(base64.b64decode(row["record"], validate=True), row)


class Layer(NamedTuple):
    """An outline over a picture, as SVG has it: a path in units of `size` (width, height)."""

    path: str
    size: tuple[int, int]
    colour: str


class Film(NamedTuple):
    """A trajectory played again."""

    state: EnvState
    answer_id: int | None  # the id of its final mask; None = there is none
    answer: Layer
    masks: tuple[Layer, ...]  # in the order of their ids
    truth: Layer | None  # None = not kept


def play(example: Example, workdir: pathlib.Path) -> Film | str:
    """The trajectory, or why it cannot be played again. A path is relative to here, or to `workdir`."""
    try:
        if isinstance(example.image, bytes):
            image = read_image(example.image, where=f"the picture of {example.id}")
        else:
            paths = (open_path(example.image), workdir / example.image)
            if not example.image or (path := next((p for p in paths if p.is_file()), None)) is None:
                raise DataError(f"its picture {example.image or '(no file of its own)'} is missing")
            image = read_source(example.record, path)
        state, gt = replay(example.record, image), example.gt
        truth = gt and decode_segmentation(gt, *image.shape[:2], f"the ground truth of {example.id}")
    except DataError as e:
        return str(e)
    answer, answer_id = final_mask(state)
    outlines = [_outline(m) for m in (answer, *(record.mask for record in state.masks))]
    colour = _contrasting(image, [answer, *([] if truth is None else [truth])], ())
    layers = [Layer(*outline, colour) for outline in outlines]
    shown = None if truth is None else Layer(*_outline(truth), _contrasting(image, [truth], (colour,)))
    return Film(state, answer_id, layers[0], tuple(layers[1:]), shown)


def _outline(mask: np.ndarray) -> tuple[str, tuple[int, int]]:
    """bool[h, w] -> the SVG path of its borders, holes too, and the (width, height) that it is drawn in.

    The path is empty only where the mask is: what is too thin or small to cover half a pixel there is drawn all the
    same, and one pixel as a square, since a line from a point to itself is none.
    """
    longer = max(mask.shape)
    scale = min(max(longer, SMALLEST), LARGEST) / longer
    size = tuple(max(1, round(n * scale)) for n in mask.shape[::-1])
    cover = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    drawn = cover >= 0.5
    _, part_of = cv2.connectedComponents((cover > 0).astype(np.uint8))
    drawn |= (cover > 0) & ~np.isin(part_of, part_of[drawn])  # all of a part that would vanish
    found, _ = cv2.findContours(drawn.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_TC89_L1)
    return "".join(map(_closed, (contour[:, 0].tolist() for contour in found))), size


def _closed(points: list[list[int]]) -> str:
    """A closed line through the middles of these pixels."""
    if len(points) == 1:
        return "M{} {}h1v1h-1Z".format(*points[0])
    return f"M{'L'.join(f'{x + 0.5:g} {y + 0.5:g}' for x, y in points)}Z"


def _contrasting(image: np.ndarray, masks: Sequence[np.ndarray], taken: Sequence[str]) -> str:
    """The colour farthest, in CIELAB, from the nearest tenth of what lies along the borders of the masks (all of the
    picture where they have none), from the tint of the policy's own overlays, and from the colours that are taken."""
    side = 160
    scale = min(1.0, side / max(image.shape[:2]))
    size = tuple(max(1, round(n * scale)) for n in image.shape[1::-1])
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    reach = np.ones((2 * max(1, round(_NEAR * max(size))) + 1,) * 2, np.uint8)
    near = np.zeros(small.shape[:2], np.uint8)
    for mask in masks:
        near |= cv2.morphologyEx(cv2.resize(mask.astype(np.uint8), size), cv2.MORPH_GRADIENT, reach)
    under = _lab(small[near > 0] if near.any() else small.reshape(-1, 3))
    avoided = _lab(np.array([TINT, *map(_rgb, taken)], np.uint8))

    def distance(colour: str) -> float:
        own = _lab(np.array([_rgb(colour)], np.uint8))
        apart = np.quantile(np.linalg.norm(under - own, axis=1), 0.1)
        return min(apart, *np.linalg.norm(avoided - own, axis=1))

    return max((c for c in COLOURS if c not in taken), key=distance)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def _lab(pixels: np.ndarray) -> np.ndarray:
    """u8[n, 3] RGB -> f32[n, 3] CIELAB."""
    return cv2.cvtColor(pixels[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
