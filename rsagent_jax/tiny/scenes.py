"""Procedural scenes: coloured shapes on photographs, with every short sentence that names exactly one of them.

They stand in for RefCOCO where no download is wanted (quickstart, tests): masks are exact, sentences are unambiguous by
construction, and one generator seeded by `rng` makes the same scene everywhere. Lengths below are pixels at `size=112`
and scale with `size`. Frame: original pixels, y down, boxes XYXY with x2/y2 exclusive.
"""

import dataclasses
import importlib.util
import itertools
import math
import pathlib
import re

import cv2
import numpy as np

from rsagent_jax.types import DataError

COLORS = {
    "red": (212, 38, 40),
    "green": (44, 158, 62),
    "blue": (38, 84, 214),
    "yellow": (242, 206, 38),
    "purple": (142, 54, 178),
    "white": (242, 242, 240),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": (20.0, 26.0), "large": (34.0, 44.0)}  # extent of the longer side, px at size 112
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # direction from the anchor
SUPERLATIVES = {"leftmost": (-1, 0), "rightmost": (1, 0), "topmost": (0, -1), "bottommost": (0, 1)}

# Photographs inside the scikit-image wheel. Reading them by path, and not through skimage.data, can never download.
PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg",
)  # fmt: skip
_PHOTO_SIDE = 224  # shorter side kept in memory: crops shrink by 2 at most, so plain bilinear does not alias
_SUPERSAMPLE = 4


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    size: int = 112  # side of the square image, px
    min_objects: int = 3  # at least 2
    max_objects: int = 5  # at most 6
    occlusion: float = 0.25  # probability that one pair overlaps
    twins: float = 0.35  # probability that two objects share colour and shape
    min_visible: float = 0.6  # visible share of the hidden object of a pair
    relation_share: float = 0.18  # where an object has both kinds; with those that need one, 25% of all sentences
    relation_margin: float = 0.15  # of `size`: distance along the axis that a stated relation has at least
    margin_px: float = 3.0  # to the border, at size 112
    gap_px: float = 3.0  # between objects, at size 112
    jpeg_quality: int = 90

    def __post_init__(self):
        if self.size < 64:
            raise DataError(f"scenes need size >= 64 px, got {self.size}")


@dataclasses.dataclass(frozen=True)
class SceneObject:
    color: str
    shape: str
    size: str  # "small" | "large"
    mask: np.ndarray  # bool[h, w], the visible part
    box: tuple[float, float, float, float]  # of the visible part
    point: tuple[int, int]  # (x, y), the pixel of `mask` farthest from its edge

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the visible box. What sentences mean by left, right, above and below."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclasses.dataclass(frozen=True)
class Expression:
    text: str
    object_index: int
    kind: str  # "attribute" | "relation"


@dataclasses.dataclass(frozen=True)
class Scene:
    image: np.ndarray  # u8[h, w, 3], before JPEG
    objects: tuple[SceneObject, ...]
    expressions: tuple[Expression, ...]


def load_photos() -> tuple[np.ndarray, ...]:
    """The background photographs as u8[h, w, 3] RGB, shorter side 224 px. Raises DataError where one is missing."""
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        raise DataError("synthetic scenes take their backgrounds from scikit-image: pip install scikit-image")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
    photos = []
    for name in PHOTOS:
        # A missing one is an error, not a shorter list: the same seed must give the same scene on every machine.
        photo = cv2.imread(str(folder / name), cv2.IMREAD_COLOR)
        if photo is None:
            raise DataError(f"{folder / name} is missing: reinstall scikit-image (its wheel carries this photograph)")
        scale = _PHOTO_SIDE / min(photo.shape[:2])
        photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        photos.append(np.ascontiguousarray(photo[:, :, ::-1]))
    return tuple(photos)


def encode_jpeg(image: np.ndarray, quality: int = 90) -> bytes:
    """image: u8[h, w, 3] RGB -> JPEG bytes."""
    return cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def jpeg_roundtrip(image: np.ndarray, quality: int = 90) -> np.ndarray:
    """The pixels that a reader of the written file sees: u8[h, w, 3] RGB."""
    data = np.frombuffer(encode_jpeg(image, quality), np.uint8)
    return np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1])


def make_scene(rng: np.random.Generator, config: SceneConfig, photos: tuple[np.ndarray, ...]) -> Scene:
    """Draws one scene. Same generator state, config and photos: same scene, bit for bit."""
    planes = np.ascontiguousarray(_background(rng, photos[rng.integers(len(photos))], config.size).transpose(2, 0, 1))
    while (placed := _place(rng, _choose_shapes(rng, config), config)) is None:
        pass  # a crowded draw is thrown away whole: patching it would favour small objects at the border
    masks = []
    for one in placed:
        for mask in masks:
            mask[one.window] &= one.alpha < 0.5
        masks.append(_paint(rng, planes, one))
    objects = tuple(_finish_object(p.shape, m) for p, m in zip(placed, masks, strict=True))
    image = cv2.merge([cv2.convertScaleAbs(np.maximum(plane, 0)) for plane in planes])
    return Scene(image, objects, expressions_of(objects, config))


def sample_expression(
    rng: np.random.Generator, scene: Scene, config: SceneConfig, object_index: int | None = None
) -> Expression | None:
    """One sentence of the scene, a relation with probability `relation_share` where the object has both kinds.

    The object comes first (uniform among those that have a sentence, or the given one), so that an object with many
    sentences is not asked for more often. None: there is no sentence that names the object (or any) alone.
    """
    if object_index is None:
        named = sorted({e.object_index for e in scene.expressions})
        if not named:
            return None
        object_index = int(rng.choice(named))
    mine = [e for e in scene.expressions if e.object_index == object_index]
    wanted = "relation" if rng.random() < config.relation_share else "attribute"
    pool = [e for e in mine if e.kind == wanted] or mine
    return pool[rng.integers(len(pool))] if pool else None


# ---------------------------------------------------------------------------------------------------- drawing


def _background(rng: np.random.Generator, photo: np.ndarray, size: int) -> np.ndarray:
    """Random crop, flip, tint and brightness -> f32[size, size, 3]; duller than the objects, which must stand out."""
    h, w = photo.shape[:2]
    side = int(rng.uniform(0.45, 1.0) * min(h, w))
    y, x = int(rng.random() * (h - side + 1)), int(rng.random() * (w - side + 1))
    crop = cv2.resize(photo[y : y + side, x : x + side], (size, size), interpolation=cv2.INTER_LINEAR)
    mirrored, upside_down = rng.random() < 0.5, rng.random() < 0.15
    if mirrored or upside_down:
        crop = cv2.flip(crop, -1 if mirrored and upside_down else int(mirrored))
    saturation, contrast, level = rng.uniform(0.25, 0.6), rng.uniform(0.5, 0.8), rng.uniform(65, 140)
    tint = rng.uniform(0.9, 1.1, 3)
    # One affine map of the colours does it all: pull towards grey, flatten around the mean, shift, tint.
    mix = contrast * (saturation * np.eye(3) + (1 - saturation) / 3)
    offset = level - contrast * np.mean(cv2.mean(crop)[:3])
    return cv2.transform(crop.astype(np.float32), np.c_[mix, np.full(3, offset)] * tint[:, None])


def _ring(count: int, start: float, inner: float = 1.0) -> np.ndarray:
    """`count` points on the unit circle, every second one at radius `inner`: f64[count, 2], xy."""
    angles = start + np.arange(count) * (2 * np.pi / count)
    return np.where(np.arange(count) % 2, inner, 1.0)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


_UP = -np.pi / 2
_UNIT_OUTLINES = {
    "circle": _ring(48, 0.0),
    "square": _ring(4, np.pi / 4),
    "triangle": _ring(3, _UP),
    "star": _ring(10, _UP, inner=0.45),
}


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A shape before placement, around (0, 0). Lengths in pixels."""

    color: str
    shape: str
    size: str
    outline: np.ndarray  # f64[n, 2], xy
    bounds: tuple[float, float, float, float]  # x1, y1, x2, y2
    radius: float  # of the circumscribed circle


@dataclasses.dataclass(frozen=True)
class _Placed:
    shape: _Shape
    x: float
    y: float
    window: tuple[slice, slice]  # rows, columns
    alpha: np.ndarray  # f32[window], coverage


def _outline(rng: np.random.Generator, shape: str, extent: float) -> np.ndarray:
    """Polygon around (0, 0) whose longer side measures `extent`."""
    turn = math.radians(rng.uniform(-18, 18))
    c, s = math.cos(turn), math.sin(turn)
    points = _UNIT_OUTLINES[shape] @ np.array([[c, s], [-s, c]])
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) * (extent / (high - low).max())


def _choose_shapes(rng: np.random.Generator, config: SceneConfig) -> list[_Shape]:
    """Colours, shapes, sizes: the second object shares with the first, later ones often share with an earlier one."""

    def pick(options):
        return options[int(rng.random() * len(options))]

    count = config.min_objects + int(rng.random() * (config.max_objects - config.min_objects + 1))
    colors = tuple(COLORS)
    kinds = [(pick(colors), pick(SHAPES))]
    if rng.random() < config.twins:
        kinds.append(kinds[0])
    while len(kinds) < count:
        other, color, shape = pick(kinds), pick(colors), pick(SHAPES)
        if len(kinds) == 1 or rng.random() < 0.6:
            color, shape = (other[0], shape) if rng.random() < 0.5 else (color, other[1])
        if (color, shape) not in kinds:
            kinds.append((color, shape))
    shapes = []
    for k in rng.permutation(count):  # the order is the drawing order: twins must not always lie underneath
        size = "large" if rng.random() < (0.5 if count <= 4 else 0.4) else "small"
        outline = _outline(rng, kinds[k][1], rng.uniform(*SIZES[size]) * config.size / 112)
        bounds = (*outline.min(0).tolist(), *outline.max(0).tolist())
        shapes.append(_Shape(*kinds[k], size, outline, bounds, float(np.hypot(*outline.T).max())))
    return shapes


def _place(rng: np.random.Generator, shapes: list[_Shape], config: SceneConfig) -> list[_Placed] | None:
    """Places all shapes, in the same order; None where they do not fit."""
    pair: tuple[int, ...] = ()
    if rng.random() < config.occlusion:  # (hidden, occluder): of different colours, or the edge could not be seen
        pairs = [(i, j) for j in range(len(shapes)) for i in range(j) if shapes[i].color != shapes[j].color]
        pair = pairs[int(rng.random() * len(pairs))] if pairs else ()
    rest = sorted(set(range(len(shapes))) - set(pair), key=lambda k: -shapes[k].radius)
    placed: dict[int, _Placed] = {}
    for k in (*pair, *rest):
        hidden = placed[pair[0]] if pair and k == pair[1] else None
        others = [p for p in placed.values() if p is not hidden]
        spots = (_try_spot(rng, shapes[k], hidden, others, config) for _ in range(40))
        if (spot := next(filter(None, spots), None)) is None:
            return None
        placed[k] = spot
    return [placed[k] for k in range(len(shapes))]


def _try_spot(
    rng: np.random.Generator, shape: _Shape, hidden: _Placed | None, others: list[_Placed], config: SceneConfig
) -> _Placed | None:
    """One random centre: inside the image, clear of `others`, and partly over `hidden` if there is one."""
    unit = config.size / 112  # plain floats below: numpy would cost ten times as much on pairs of numbers
    x1, y1, x2, y2 = shape.bounds
    near, far = config.margin_px * unit, config.size - config.margin_px * unit
    if hidden is None:
        x = near - x1 + rng.random() * (far - near - (x2 - x1))
        y = near - y1 + rng.random() * (far - near - (y2 - y1))
    else:
        angle, reach = 2 * math.pi * rng.random(), (0.5 + 0.4 * rng.random()) * (shape.radius + hidden.shape.radius)
        x, y = hidden.x + reach * math.cos(angle), hidden.y + reach * math.sin(angle)
        if x + x1 < near or y + y1 < near or x + x2 > far or y + y2 > far:
            return None
    gap = config.gap_px * unit + 1  # + 1: coverage is rounded to whole pixels
    for other in others:
        if math.hypot(x - other.x, y - other.y) >= shape.radius + other.shape.radius + gap:
            continue
        u1, v1, u2, v2 = other.shape.bounds
        dx, dy = x - other.x, y - other.y
        if max(dx + x1 - u2, u1 - dx - x2, dy + y1 - v2, v1 - dy - y2) < gap:
            return None
    window, alpha = _coverage(shape.outline + (x, y), config.size)
    if hidden is not None:
        full = np.zeros((config.size, config.size), bool)
        full[hidden.window] = hidden.alpha >= 0.5
        share = 1 - np.count_nonzero(full[window] & (alpha >= 0.5)) / np.count_nonzero(full)
        if not config.min_visible <= share <= 0.93:
            return None
    return _Placed(shape, x, y, window, alpha)


def _coverage(outline: np.ndarray, size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Anti-aliased polygon: its window (rows, columns) and the covered share of each pixel, f32."""
    x0, y0 = np.maximum(np.floor(outline.min(0)).astype(int) - 1, 0).tolist()
    x1, y1 = np.minimum(np.ceil(outline.max(0)).astype(int) + 1, size).tolist()
    fine = np.zeros(((y1 - y0) * _SUPERSAMPLE, (x1 - x0) * _SUPERSAMPLE), np.uint8)
    # Pixel k covers [k, k + 1), so its centre k + 0.5 is OpenCV's integer coordinate k. 4 fractional bits.
    points = np.round(((outline - (x0, y0)) * _SUPERSAMPLE - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(fine, [points], 255, shift=4)
    alpha = cv2.resize(fine, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
    return (slice(y0, y1), slice(x0, x1)), alpha.astype(np.float32) / 255


def _paint(rng: np.random.Generator, planes: np.ndarray, placed: _Placed) -> np.ndarray:
    """Blends the shape into f32[3, h, w] (in place), shaded and a little grainy; returns its own mask, bool[h, w]."""
    rows, cols = placed.window
    angle, strength = 2 * math.pi * rng.random(), rng.uniform(0.04, 0.12) / placed.shape.radius
    down = strength * math.sin(angle) * (np.arange(rows.start, rows.stop, dtype=np.float32) - np.float32(placed.y))
    right = strength * math.cos(angle) * (np.arange(cols.start, cols.stop, dtype=np.float32) - np.float32(placed.x))
    shade = np.float32(1) + down[:, None] + right[None]
    grain = 3.5 * rng.standard_normal(shade.shape, dtype=np.float32)
    color = np.array(COLORS[placed.shape.color]) * rng.uniform(0.9, 1.03) + rng.uniform(-8, 8, 3)
    for plane, value in zip(planes, color.tolist(), strict=True):
        under = plane[rows, cols]
        under += placed.alpha * (shade * np.float32(value) + grain - under)
    mask = np.zeros(planes.shape[1:], bool)
    mask[rows, cols] = placed.alpha >= 0.5
    return mask


def _finish_object(shape: _Shape, mask: np.ndarray) -> SceneObject:
    x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
    # The border of zeros makes the image's edge count as an edge of the object.
    inside = cv2.copyMakeBorder(mask[y : y + h, x : x + w].view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    row, column = divmod(int(np.argmax(cv2.distanceTransform(inside, cv2.DIST_L2, 5))), w + 2)
    box = (float(x), float(y), float(x + w), float(y + h))
    return SceneObject(shape.color, shape.shape, shape.size, mask, box, (x + column - 1, y + row - 1))


# ---------------------------------------------------------------------------------------------------- sentences


def expressions_of(objects: tuple[SceneObject, ...], config: SceneConfig) -> tuple[Expression, ...]:
    """Every short sentence that names exactly one object.

    A relation is stated with a clear margin, along its dominant axis, and only if no other object of that kind lies on
    that side of the anchor at all: people disagree about "left of" for diagonals, so those never decide.
    """
    kinds = [(o.color, o.shape) for o in objects]
    anchors = [i for i, kind in enumerate(kinds) if kinds.count(kind) == 1]
    margin = config.relation_margin * config.size

    def along(i: int, origin: int, direction: tuple[int, int]) -> float:
        """How far object `i` lies from another in a direction, pixels."""
        (x, y), (x0, y0) = objects[i].center, objects[origin].center
        return (x - x0) * direction[0] + (y - y0) * direction[1]

    out: list[Expression] = []
    for k, target in enumerate(objects):
        size, color, shape = target.size, target.color, target.shape
        groups = {
            f"{color} {shape}": [i for i, kind in enumerate(kinds) if kind == kinds[k]],
            shape: [i for i, o in enumerate(objects) if o.shape == shape],
            f"{color} one": [i for i, o in enumerate(objects) if o.color == color],
        }
        for head, members in groups.items():
            sized = [i for i in members if objects[i].size == size]
            if members == [k]:
                out.append(Expression(f"the {head}", k, "attribute"))
                if head == f"{color} one":
                    out.append(Expression(f"the {color} object", k, "attribute"))
            if sized == [k]:
                out.append(Expression(f"the {size} {head}", k, "attribute"))
        for head, members in groups.items():
            rivals = [i for i in members if i != k]
            for word, direction in SUPERLATIVES.items():
                if rivals and all(along(k, i, direction) >= margin for i in rivals):
                    out.append(Expression(f"the {word} {head}", k, "relation"))
            # "the circle above ..." is said only if there are more circles; "the red one above ..." is left out.
            if head == f"{color} one" or (head == shape and not rivals):
                continue
            for a, (word, direction) in itertools.product(anchors, RELATIONS.items()):
                across = abs(along(k, a, direction[::-1]))
                is_clear = a != k and along(k, a, direction) >= max(margin, 1.2 * across)
                if is_clear and all(along(i, a, direction) <= 0 for i in rivals):
                    text = f"the {head} {word} the {objects[a].color} {objects[a].shape}"
                    out.append(Expression(text, k, "relation"))
    return tuple(out)


def plurals_of(objects: tuple[SceneObject, ...], most: int = 3) -> dict[str, tuple[int, ...]]:
    """Every sentence that names all objects of one kind, two to `most` of them, and their indices."""
    heads: dict[str, list[int]] = {}
    for k, o in enumerate(objects):
        for head in (f"{o.color} {o.shape}", o.shape, f"{o.color} one"):
            heads.setdefault(head, []).append(k)
    return {f"every {head}": tuple(members) for head, members in heads.items() if 2 <= len(members) <= most}


SENTENCE = re.compile(
    r"the (?:(?P<extreme>\w+most) )?(?P<head>[a-z]+(?: [a-z]+){0,2}?)"
    rf"(?: (?P<relation>{'|'.join(RELATIONS)}) the (?P<anchor>\w+ \w+))?"
)


def objects_described(objects: tuple[SceneObject, ...], text: str) -> list[int]:
    """Indices of the objects that a sentence may mean, read word by word and with the widest meaning of each relation.

    Independent of `expressions_of` on purpose: tests hold one against the other. Raises DataError for other sentences.
    """
    match = SENTENCE.fullmatch(text.strip().lower())
    words = set() if match is None else {*match["head"].split(), *(match["anchor"] or "").split()}
    if match is None or words - {*COLORS, *SHAPES, *SIZES, "one", "object"}:
        raise DataError(f"not a sentence about a scene: {text!r}")

    def named(phrase: str) -> list[int]:
        asked = [w for w in phrase.split() if w not in ("one", "object")]
        return [i for i, o in enumerate(objects) if all(w in (o.color, o.shape, o.size) for w in asked)]

    def along(i: int, direction: tuple[int, int]) -> float:
        return objects[i].center[0] * direction[0] + objects[i].center[1] * direction[1]

    found = named(match["head"])
    if match["anchor"]:
        side, anchors = RELATIONS[match["relation"]], named(match["anchor"])
        found = [i for i in found for a in anchors if i != a and along(i, side) > along(a, side)]
    if match["extreme"] and found:
        side = SUPERLATIVES[match["extreme"]]
        farthest = max(along(i, side) for i in found)
        found = [i for i in found if along(i, side) == farthest]
    return sorted(set(found))


_WORDS = " ".join((*COLORS, *SHAPES, *SIZES, *RELATIONS, *SUPERLATIVES)).split()
WORDS = frozenset((*_WORDS, "the", "a", "every", "one", "object"))  # of the questions about scenes


def unknown_words(query: str) -> str:
    """A sentence about the words of a question that a policy trained on scenes has never seen; "" for none."""
    words = [word for word in dict.fromkeys(re.findall(r"[^\W\d_]+", query.lower())) if word not in WORDS]
    return f"The tiny policy was never trained on {', '.join(f'“{word}”' for word in words)}." if words else ""
