"""The policies that benchmarks/rollout.py plays beside the engine."""

import dataclasses
import pathlib
import time

import numpy as np


class Around:
    """Another policy, but for what the classes below change; its counts are not the driver's."""

    def __init__(self, policy):
        self.policy, self.stats = policy, {}

    def __getattr__(self, name: str):
        return getattr(self.policy, name)


class Reprefill(Around):
    """Every turn is a new context."""

    def begin(self) -> None:
        self.policy.begin()
        self.contexts = {}

    def submit(self, request) -> None:
        whole = self.contexts[request.slot] = _joined(self.contexts.get(request.slot), request.prompt)
        self.policy.release(request.slot)
        self.policy.submit(dataclasses.replace(request, prompt=whole))

    def step(self):
        ended = self.policy.step()
        for slot, done in ended:
            n = len(done.tokens)
            turn = np.broadcast_to(self.policy.used[slot].request.position + np.arange(n), (3, n)).astype(np.int32)
            old = self.contexts[slot]
            tokens, positions = np.append(old.tokens, done.tokens), np.concatenate([old.positions, turn], 1)
            self.contexts[slot] = dataclasses.replace(old, tokens=tokens, positions=positions)
        return ended

    def release(self, slot: int) -> None:
        self.policy.release(slot)
        self.contexts.pop(slot, None)


class Synchronous(Around):
    """Works only when every live trajectory has asked for its turn, and until all of them have it."""

    def begin(self) -> None:
        self.policy.begin()
        self.live, self.asked, self.ended = set(), set(), []

    def pick(self, task, free) -> int:
        slot = self.policy.pick(task, free)
        self.live.add(slot)
        return slot

    def submit(self, request) -> None:
        self.policy.submit(request)
        self.asked.add(request.slot)

    def step(self):
        if self.asked != self.live:
            time.sleep(0.002)
            return []
        while len(self.ended) < len(self.asked):
            self.ended += self.policy.step()
        self.asked, out, self.ended = set(), self.ended, []
        return out

    def release(self, slot: int) -> None:
        self.policy.release(slot)
        self.live.discard(slot)


def _joined(old, new):
    if old is None:
        return new
    parts = ((old.tokens, new.tokens, 0), (old.positions, new.positions, 1), (old.patches, new.patches, 0))
    tokens, positions, patches = (np.concatenate([a, b], axis) for a, b, axis in parts)
    return dataclasses.replace(new, tokens=tokens, positions=positions, patches=patches, grids=old.grids + new.grids)


class Transformers:
    """generate() over all turns that wait, left-padded; its cache lives for the turn."""

    def __init__(self, directory: pathlib.Path, *, slots: int, context: int, patches: int, new_tokens: int):
        import torch
        from transformers import Qwen2_5_VLForConditionalGeneration

        load = Qwen2_5_VLForConditionalGeneration.from_pretrained
        self.model = load(directory, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.slots, self.context, self.patches = slots, context, patches
        self.max_new_tokens, self.stats = new_tokens, {}
        self.begin()

    def begin(self) -> None:
        self.contexts = {}

    def pick(self, task, free) -> int:
        return min(free)

    def submit(self, request) -> None:
        self.contexts[request.slot] = _joined(self.contexts.get(request.slot), request.prompt)

    def release(self, slot: int) -> None:
        self.contexts.pop(slot, None)

    def step(self):
        import torch

        from rsagent_jax.types import Completion

        image, longest = self.model.config.image_token_id, max(len(c.tokens) for c in self.contexts.values())
        tokens = np.zeros((len(self.contexts), longest), np.int64)
        mask = np.zeros_like(tokens)
        for row, context in enumerate(self.contexts.values()):
            tokens[row, longest - len(context.tokens) :] = context.tokens
            mask[row, longest - len(context.tokens) :] = 1
        patches = np.concatenate([c.patches for c in self.contexts.values()])
        grids = np.array([grid for c in self.contexts.values() for grid in c.grids])
        n = self.max_new_tokens
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(mask),
                pixel_values=torch.from_numpy(patches),
                image_grid_thw=torch.from_numpy(grids),
                mm_token_type_ids=torch.from_numpy((tokens == image).astype(np.int32)),
                do_sample=False,
                max_new_tokens=n,
                min_new_tokens=n,
                pad_token_id=0,
            )
        ended = []
        for slot, new in zip(self.contexts, out[:, -n:].numpy().astype(np.int32), strict=True):
            old = self.contexts[slot]
            self.contexts[slot] = dataclasses.replace(old, tokens=np.append(old.tokens, new))
            ended.append((slot, Completion(new, np.zeros(n, np.float32), False)))
        return ended
