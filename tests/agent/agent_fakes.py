"""Segmenters without weights, and a policy without a model, for the tests of the agent."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np

from rsagent_jax.agent.environment import EnvState, apply_reply, propose, reset, run_tool
from rsagent_jax.agent.tools import Segment, render_call
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config.schema import AgentConfig
from sam_bridge.types import FailureKind, SegmenterError, SegmentReply, SegmentRequest

LIMITS = PixelLimits(28, 56 * 56, 448 * 448)


def disc(h: int, w: int, x: float, y: float, radius: float) -> np.ndarray:
    ys, xs = np.mgrid[:h, :w]
    return (xs - x) ** 2 + (ys - y) ** 2 <= radius**2


def make_image(h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


class DiscSegmenter:
    """A disc around the positive clicks (or filling the box), without discs around the negative ones."""

    def __init__(self, radius: float = 12.0, logits: bool = True, fail: list[FailureKind | None] | None = None):
        self.radius, self.logits, self.fail = radius, logits, list(fail or [])
        self.requests: list[SegmentRequest] = []
        self.kept: dict[str, np.ndarray] = {}

    def segment(self, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        self.requests.append(request)
        if self.fail and (kind := self.fail.pop(0)) is not None:
            raise SegmenterError(kind, "as the test asked")
        h, w = image.shape[:2]
        mask = self.kept[request.refine_logits_id].copy() if request.refine_logits_id else np.zeros((h, w), bool)
        if request.box is not None:
            x1, y1, x2, y2 = request.box
            mask |= disc(h, w, (x1 + x2 - 1) / 2, (y1 + y2 - 1) / 2, min(x2 - x1, y2 - y1) / 2)
        for (x, y), label in zip(request.points, request.labels, strict=True):
            spot = disc(h, w, x, y, self.radius)
            mask = mask | spot if label == 1 else mask & ~spot
        logits_id = f"logits-{len(self.requests)}" if self.logits else ""
        self.kept[logits_id] = mask
        return SegmentReply(mask, 0.875, logits_id, {"total": 0.001})


class HangingSegmenter(DiscSegmenter):
    """Its calls of these numbers, counted from 0, hang until `woken`; each of them counts twice."""

    def __init__(self, *numbers: int):
        super().__init__()
        self.numbers, self.woken = numbers, threading.Event()

    def segment(self, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        if len(self.requests) in self.numbers:
            self.requests.append(request)
            self.woken.wait(60)
        return super().segment(image, request)


class IdealSegmenter:
    """Knows every object: a prompt gives the object it points at; what it points at nothing gives a small disc."""

    def __init__(self, objects: list[np.ndarray], spoil: np.ndarray | None = None, logits: bool = True):
        self.objects, self.spoil, self.logits, self.calls = objects, spoil, logits, 0

    def segment(self, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        self.calls += 1
        first = not request.refine_logits_id and len(request.points) + (request.box is not None) == 1
        if request.box is not None:
            x1, y1, x2, y2 = (int(v) for v in request.box)
            inside = [o[y1:y2, x1:x2].sum() / o.sum() for o in self.objects]
            mask = self.objects[int(np.argmax(inside))] if max(inside) > 0.6 else disc(*image.shape[:2], x1, y1, 5)
        else:
            x, y = (round(v) for v in request.points[0])
            hit = [o for o in self.objects if o[y, x] or request.labels[0] == 0]
            mask = hit[0] if hit else disc(*image.shape[:2], x, y, 5)
        if first and self.spoil is not None:
            mask = mask ^ self.spoil  # the first try is imperfect; any further click mends it
        return SegmentReply(mask.copy(), 0.9, f"logits-{self.calls}" if self.logits else "")


def click(x: float, y: float, label: int = 1, refine: int | None = None) -> Segment:
    return Segment(points=((x, y),), labels=(label,), refine=refine)


def box(*corners: float) -> Segment:
    return Segment(box=corners)


def run(turns, segmenter=None, image=None, query="the disc", **config) -> EnvState:
    """Plays scripted turns, texts or calls, until they are used up or the trajectory ends."""
    image = make_image(112, 112) if image is None else image
    segmenter = segmenter or DiscSegmenter()
    state = reset(image, query, AgentConfig(**{"prompt": "brief", **config}), LIMITS)
    for turn in turns:
        if state.status is not None:
            break
        proposal = propose(state, turn if isinstance(turn, str) else render_call(turn))
        state = apply_reply(state, proposal, run_tool(segmenter, state, proposal))
    return state


def same_states(a: EnvState, b: EnvState) -> None:
    """Asserts that two states are equal, pixels of masks and observations included."""
    np.testing.assert_equal(dataclasses.asdict(a), dataclasses.asdict(b))
