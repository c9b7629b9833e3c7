"""Trajectories -> batches of fixed shape: several per row, told apart by segment ids, with the row's images."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rsagent_jax.array_types import Bool, Float32, Int32
from rsagent_jax.config.schema import BatchConfig
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig
from rsagent_jax.models.qwen25_vl.positions import Grid, fill_patch_buffer, padded_patches
from rsagent_jax.runtime.processes import Share, allgather_max
from rsagent_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Item:
    """One trajectory as training sees it. `loss_mask` marks the ids that are trained."""

    tokens: Int32[np.ndarray, " T"]
    positions: Int32[np.ndarray, "3 T"]
    loss_mask: Bool[np.ndarray, " T"]
    logprobs: Float32[np.ndarray, " T"]
    patches: Float32[np.ndarray, "P C"]
    grids: tuple[Grid, ...]
    advantage: float | Float32[np.ndarray, " T"] = 0.0  # of the trajectory, or of each token


def fits(item: Item, batch: BatchConfig, config: Qwen25VLConfig) -> bool:
    """Whether a trajectory has room in a row of its own."""
    return len(item.tokens) <= batch.tokens and padded_patches(item.grids, config.vision) <= batch.patches


def pack(items: Sequence[Item], batch: BatchConfig, config: Qwen25VLConfig) -> list[Batch]:
    """First fit, longest first; as many batches of `batch.rows` rows as it takes, the last one padded with empty rows.

    ValueError for an item that does not fit into a row: callers count and drop those first (`fits`).
    """
    rows: list[list[Item]] = []
    room: list[tuple[int, int]] = []  # (tokens, patches) left in each row
    for item in sorted(items, key=lambda i: -len(i.tokens)):
        tokens, patches = len(item.tokens), padded_patches(item.grids, config.vision)
        if not fits(item, batch, config):
            raise ValueError(
                f"{tokens} tokens and {patches} patches do not fit a row of {batch.tokens} and {batch.patches}"
            )
        row = next((i for i, (t, p) in enumerate(room) if t >= tokens and p >= patches), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append((batch.tokens, batch.patches))
        rows[row].append(item)
        room[row] = room[row][0] - tokens, room[row][1] - patches
    packed = [_row(row, batch, config) for row in rows]
    packed += [_row([], batch, config)] * (-len(packed) % batch.rows)
    return [_stack(packed[i : i + batch.rows]) for i in range(0, len(packed), batch.rows)]


def empty_batch(batch: BatchConfig, config: Qwen25VLConfig) -> Batch:
    """A batch of padding only: what a process with nothing left feeds to a program that the others still need."""
    return _stack([_row([], batch, config)] * batch.rows)


def _stack(rows: Sequence[Batch]) -> Batch:
    return Batch(*(np.stack([getattr(row, field.name) for row in rows]) for field in dataclasses.fields(Batch)))


def pack_evenly(
    items: Sequence[Item], batch: BatchConfig, config: Qwen25VLConfig, share: Share, minibatches: int = 1
) -> list[Batch]:
    """This process's part of every micro-batch: `batch.rows` / share.count rows each, equally many on every process.

    They are so many equal runs, one for each of `minibatches`: trajectories are dealt out by length, so that the runs
    are alike and little of them is padding. Where there are fewer trajectories than that on every process, they are one
    run, of fewer micro-batches than `minibatches` (step.Stage.minibatch_slices reads it so).
    """
    own = dataclasses.replace(batch, rows=share.of(batch.rows, "batch.rows"))
    longest = sorted(items, key=lambda i: -len(i.tokens))
    if minibatches > 1 and allgather_max(len(items)) < minibatches:
        minibatches = 1
    runs = [pack(longest[i::minibatches], own, config) for i in range(minibatches)]
    length = allgather_max(max(map(len, runs)))
    return [b for run in runs for b in (*run, *[empty_batch(own, config)] * (length - len(run)))]


def _row(items: list[Item], batch: BatchConfig, config: Qwen25VLConfig) -> Batch:
    """One row; every array without its leading axis."""
    pad = batch.tokens - sum(len(i.tokens) for i in items)

    def join(parts: list[np.ndarray], dtype) -> np.ndarray:
        return np.concatenate([*parts, np.zeros(pad, dtype)]).astype(dtype)

    tokens = join([i.tokens for i in items], np.int32)
    segments = join([np.full(len(i.tokens), n) for n, i in enumerate(items, 1)], np.int32)
    positions = np.concatenate([*[i.positions for i in items], np.zeros((3, pad))], axis=1).astype(np.int32)
    patches = np.concatenate([*[i.patches for i in items], np.zeros((0, config.vision.patch_dim), np.float32)])
    grids = tuple(grid for i in items for grid in i.grids)
    loss_mask = join([i.loss_mask for i in items], bool)
    # A policy may sample the image token: that is text to the engine, and must be text here.
    is_image = (tokens == config.image_token_id) & (segments > 0) & ~loss_mask
    buffer = fill_patch_buffer(patches, grids, is_image, batch.patches, config.vision)
    images = buffer.patches, buffer.segment_ids, buffer.positions, buffer.image_slots
    advantages = join([np.full(len(i.tokens), i.advantage) for i in items], np.float32)
    old_logprobs = join([i.logprobs for i in items], np.float32)
    return Batch(tokens, positions, segments, loss_mask, advantages, old_logprobs, *images)
