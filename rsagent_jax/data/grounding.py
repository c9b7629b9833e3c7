"""Grounding conversations about fresh scenes, in Qwen2.5-VL's own formats: what the tiny base is pre-trained on."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from rsagent_jax.agent import prompts
from rsagent_jax.data import scenes
from rsagent_jax.data.processor import Processor, image_patches
from rsagent_jax.models.qwen25_vl.positions import fill_patch_buffer, mrope_positions

SIDE = 112  # scenes are one window of the tower: 8 x 8 patches, 4 x 4 tokens
PATCHES = 64
COLORS, SHAPES, SIZES = tuple(scenes.COLORS), scenes.SHAPES, tuple(scenes.SIZES)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A pre-training batch; arrays as in types.Batch, plus what the head and the bell need."""

    tokens: np.ndarray  # i32[B, T]
    positions: np.ndarray  # i32[B, 3, T]
    segment_ids: np.ndarray  # i32[B, T]
    loss_mask: np.ndarray  # bool[B, T]
    patches: np.ndarray  # f32[B, P, C]
    patch_segment_ids: np.ndarray
    patch_positions: np.ndarray
    image_slots: np.ndarray
    labels: np.ndarray  # i32[B, P, 3]
    boxes: np.ndarray  # f32[B, P, 4], in units of the image side


jax.tree_util.register_dataclass(Rows, [f.name for f in dataclasses.fields(Rows)], [])


class SceneRows:
    """Turns random scenes into rows."""

    def __init__(self, processor: Processor, relation_share: float):
        self.processor, self.relation_share = processor, relation_share
        self.photos = scenes.load_photos()
        self.scene_config = scenes.SceneConfig(size=SIDE)

    def make(self, seed: tuple[int, ...], rows: int, tokens: int, talk: bool = True) -> Rows:
        """`rows` fresh scenes; without `talk` only their pictures and labels."""
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda *a: np.stack(a), *[self._row(rng, tokens, talk) for _ in range(rows)])

    def _row(self, rng: np.random.Generator, length: int, talk: bool) -> Rows:
        scene = self.scene(rng)
        turns = [self._question(rng, scene) for _ in range(6 if talk else 1)]
        if talk and rng.random() < 0.7:
            turns.insert(0, _all_objects(scene))
        return self.row(scene, turns if talk else [("", "")], length)

    def scene(self, rng: np.random.Generator) -> scenes.Scene:
        scene = scenes.make_scene(rng, self.scene_config, self.photos)
        return dataclasses.replace(scene, image=scenes.jpeg_roundtrip(scene.image, self.scene_config.jpeg_quality))

    def row(self, scene: scenes.Scene, turns: list[tuple[str, str]], length: int) -> Rows:
        """One scene and as many of the (question, answer) turns as fit into `length` tokens."""
        ids, mask = self._conversation(turns, length)
        patches, grid = image_patches(scene.image, self.processor.images)
        is_image = ids == self.processor.image_id
        positions, _ = mrope_positions(ids, (grid,), self.processor.image_id)
        pad = length - len(ids)
        buffer = fill_patch_buffer(patches, (grid,), np.pad(is_image, (0, pad)), PATCHES, self.processor.config.vision)
        labels, boxes = _patch_labels(scene, buffer.positions)
        return Rows(
            np.pad(ids, (0, pad)),
            np.pad(positions, ((0, 0), (0, pad))),
            np.pad(np.ones(len(ids), np.int32), (0, pad)),
            np.pad(mask, (0, pad)),
            buffer.patches,
            buffer.segment_ids,
            buffer.positions,
            buffer.image_slots,
            labels,
            boxes,
        )

    def _conversation(self, turns: list[tuple[str, str]], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Question after question about one image, as many as fit. Returns ids i32[T] and the trained mask bool[T]."""
        ids, mask = [], []
        for i, (ask, answer) in enumerate(turns):
            head = (
                prompts.opening(prompts.BASE_SYSTEM, ask)
                if i == 0
                else (f"\n<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n")
            )
            asked, said = self.processor.encode(head), self.processor.encode(answer + "<|im_end|>")
            if i == 0:
                asked = np.repeat(asked, np.where(asked == self.processor.image_id, PATCHES // 4, 1))
            if sum(map(len, ids)) + len(asked) + len(said) > length:
                break
            ids += [asked, said]
            mask += [np.zeros(len(asked), bool), np.ones(len(said), bool)]
        return np.concatenate(ids), np.concatenate(mask)

    def _question(self, rng, scene: scenes.Scene) -> tuple[str, str]:
        wanted = "relation" if rng.random() < self.relation_share else "attribute"
        pool = [e for e in scene.expressions if e.kind == wanted] or scene.expressions
        objects = sorted({e.object_index for e in pool})
        index = int(rng.choice(objects))
        text = rng.choice([e.text for e in pool if e.object_index == index])
        thing = scene.objects[index]
        return question(text, thing, point=rng.random() < 0.5)


def question(text: str, thing: scenes.SceneObject, point: bool) -> tuple[str, str]:
    """Qwen2.5-VL's grounding question about one object, and its answer."""
    if point:
        return prompts.ground_point_question(text), prompts.ground_point_answer([thing.point], [text])
    return prompts.ground_box_question(text), prompts.ground_box_answer([thing.box], [text])


def _all_objects(scene: scenes.Scene) -> tuple[str, str]:
    things = sorted(scene.objects, key=lambda o: o.center[0])
    names = [f"{o.size} {o.color} {o.shape}" for o in things]
    ask = "Detect all objects, output their bbox coordinates in JSON format."
    return ask, prompts.ground_box_answer([o.box for o in things], names)


def _patch_labels(scene: scenes.Scene, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What covers the most of each patch, if it covers a fifth of it."""
    labels, boxes = np.zeros((PATCHES, 3), np.int32), np.zeros((PATCHES, 4), np.float32)
    best = np.full(PATCHES, 0.2)
    for o in scene.objects:
        share = o.mask.reshape(8, 14, 8, 14).mean((1, 3))[positions[:, 0], positions[:, 1]]
        here = share > best
        best[here] = share[here]
        labels[here] = 1 + COLORS.index(o.color), 1 + SHAPES.index(o.shape), 1 + SIZES.index(o.size)
        boxes[here] = np.asarray(o.box) / SIDE
    return labels, boxes
