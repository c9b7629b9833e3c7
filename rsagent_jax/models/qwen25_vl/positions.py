"""Integer geometry of Qwen2.5-VL, on the host in numpy: M-RoPE positions, window order, patch buffers.

The device sees fixed shapes only. Hugging Face computes the same positions and windows in `get_rope_index` and
`get_vision_window_index`, with the windows in another order.
"""

import dataclasses
import functools

import numpy as np

from rsagent_jax.array_types import Bool, Float32, Int, Int32
from rsagent_jax.models.qwen25_vl.config import VisionConfig

Grid = tuple[int, int, int]  # (t, h, w) in patches


def merged_tokens(grid: Grid, merge: int = 2) -> int:
    """Decoder tokens of one image."""
    return grid[0] * (grid[1] // merge) * (grid[2] // merge)


def mrope_positions(
    tokens: Int[np.ndarray, " T"], grids: tuple[Grid, ...], image_id: int, start: int = 0, merge: int = 2
) -> tuple[Int32[np.ndarray, "3 T"], int]:
    """Positions of `tokens` when the context before them ended at `start`.

    Text advances all three axes together; an image of (h, w) merged rows and columns has temporal position `start`, its
    own rows and columns added to `start`, and the text after it goes on at start + max(h, w).
    Returns (positions, the next free position). ValueError when placeholders and grids disagree.
    """
    is_image, pieces, at, position = np.asarray(tokens) == image_id, [], 0, start
    for number, (t, rows, columns) in enumerate(grids):
        h, w = rows // merge, columns // merge
        places = np.flatnonzero(is_image[at:])
        if not len(places):
            raise ValueError(f"{len(grids)} images were given, but image tokens for {number}")
        text, size = int(places[0]), t * h * w
        if not is_image[at + text : at + text + size].sum() == size:
            raise ValueError(f"image {number} needs {size} image tokens, fewer stand at {at + text}")
        index = np.indices((t, h, w)).reshape(3, -1)
        index[0] = 0  # a still image does not advance in time, whatever its grid says
        pieces += [np.tile(position + np.arange(text), (3, 1)), position + text + index]
        position += text + max(h, w)
        at += text + size
    if is_image[at:].any():
        raise ValueError(f"image token at {at + int(is_image[at:].argmax())}, but only {len(grids)} images were given")
    rest = len(is_image) - at
    pieces.append(np.tile(position + np.arange(rest), (3, 1)))
    return np.concatenate(pieces, axis=1).astype(np.int32), position + rest


@functools.lru_cache(maxsize=4096)
def _bins(rows: int, columns: int, side: int) -> np.ndarray:
    """Merged tokens of one frame in window order, i32[bins, side * side]; -1 is padding.

    Windows at the right and lower edge are not full. Several of them share a bin, first fit with the largest first:
    padding each to full size (as first built) leaves 23% of an overlay's places empty, 28 x 28 patches; so it is 6%.
    """
    merged = np.arange(rows * columns).reshape(rows, columns)
    tops, lefts = range(0, rows, side), range(0, columns, side)
    windows = [merged[top : top + side, left : left + side].reshape(-1) for top in tops for left in lefts]
    bins: list[list[np.ndarray]] = []
    room: list[int] = []
    for window in sorted(windows, key=len, reverse=True):  # stable: full windows stay in reading order
        at = next((i for i, left in enumerate(room) if left >= len(window)), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(side * side)
        bins[at].append(window)
        room[at] -= len(window)
    return np.stack([np.pad(np.concatenate(b), (0, r), constant_values=-1) for b, r in zip(bins, room, strict=True)])


def patch_layout(
    grid: Grid, config: VisionConfig
) -> tuple[Int32[np.ndarray, " P"], Int32[np.ndarray, "P 2"], Int32[np.ndarray, " M"]]:
    """Where one image's patches go, in window order, in bins of a full window's size: (source, coords, merged_place).

    `source[j]` is the index in the processor's order of the patch at buffer place j, -1 for padding; `coords` its
    (row, column), for the rotary angles and to tell the windows of a bin apart; `merged_place[m]` is the place of
    merged token m in the merged buffer.
    """
    t, h, w = grid
    merge, unit = config.spatial_merge_size, config.merge_unit
    mh, mw = h // merge, w // merge
    bins = _bins(mh, mw, config.window_side).reshape(-1)
    order = np.concatenate([np.where(bins >= 0, bins + frame * mh * mw, -1) for frame in range(t)])
    source = np.where(order[:, None] >= 0, order[:, None] * unit + np.arange(unit), -1).reshape(-1)
    rows, cols = np.divmod(np.arange(h * w), w)
    blocks = (mh, merge, mw, merge)  # the processor lists patches merge block by merge block
    coords = np.stack([a.reshape(blocks).transpose(0, 2, 1, 3).reshape(-1) for a in (rows, cols)], axis=-1)
    coords = np.tile(coords, (t, 1))
    merged_place = np.empty(t * mh * mw, np.int32)
    merged_place[order[order >= 0]] = np.flatnonzero(order >= 0)
    coords = np.where(source[:, None] >= 0, coords[source], 0)
    return source.astype(np.int32), coords.astype(np.int32), merged_place


@dataclasses.dataclass(frozen=True)
class PatchBuffer:
    """The images of one row, ready for the vision tower."""

    patches: Float32[np.ndarray, "P patch_dim"]
    segment_ids: Int32[np.ndarray, " P"]  # image 1.., 0 padding
    positions: Int32[np.ndarray, "P 2"]
    image_slots: Int32[np.ndarray, " T"]  # 0 text, else 1 + place of the merged token in the merged buffer


def padded_patches(grids: tuple[Grid, ...], config: VisionConfig) -> int:
    """Buffer places that these images take, padding of their windows included."""
    side, merge = config.window_side, config.spatial_merge_size
    return sum(t * len(_bins(h // merge, w // merge, side)) for t, h, w in grids) * config.window_patches


def fill_patch_buffer(
    patches: Float32[np.ndarray, "N dim"],
    grids: tuple[Grid, ...],
    is_image: Bool[np.ndarray, " T"],
    capacity: int,
    config: VisionConfig,
) -> PatchBuffer:
    """Lays several images' patches out in `capacity` places; `is_image` marks their tokens.

    ValueError when the images do not fit, or when image tokens != merged patches (invariant d).
    """
    need, tokens = padded_patches(grids, config), sum(merged_tokens(g, config.spatial_merge_size) for g in grids)
    if need > capacity:
        raise ValueError(f"images need {need} patch places, the buffer has {capacity}")
    if tokens != int(is_image.sum()):
        raise ValueError(f"{int(is_image.sum())} image tokens for {tokens} merged patches")
    if len(patches) != (wanted := sum(int(np.prod(g)) for g in grids)):
        raise ValueError(f"{len(patches)} patches were given, the grids hold {wanted}")
    out = np.zeros((capacity, config.patch_dim), np.float32)
    segments, coords = np.zeros(capacity, np.int32), np.zeros((capacity, 2), np.int32)
    slots, places, at, read = np.zeros(len(is_image), np.int32), [], 0, 0
    for number, grid in enumerate(grids, start=1):
        source, own_coords, merged_place = patch_layout(grid, config)
        here, real = slice(at, at + len(source)), source >= 0
        out[here][real] = patches[read + source[real]]
        segments[here] = np.where(real, number, 0)
        coords[here] = own_coords
        places.append(merged_place + at // config.merge_unit + 1)
        at += len(source)
        read += int(np.prod(grid))
    if places:
        slots[is_image] = np.concatenate(places)
    return PatchBuffer(out, segments, coords, slots)
