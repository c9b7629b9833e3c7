"""Continuous batching on the device: slots keep their KV cache for a whole trajectory and sample while others wait.

A call of `step` is one macro-step: every lane, a group of neighbouring slots, appends the next piece of one slot's
prompt, then all slots whose prompt is complete sample up to `sampling.chunk` tokens. Either half costs the same whether
one lane or slot has work or all have, so each waits until it pays: sampling until no prompt is left to append, and
appending while most slots sample and few lanes would be busy. What a call takes from the host are small arrays of fixed
shape. Per power of two of cache blocks that it reads there are three programs, with a piece, without, and with nothing
else; one more copies a shared opening, and the vision tower has one per rung of a short ladder. That makes
`Engine.programs_at_most`, all of which `warm_up` compiles.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from rsagent_jax.config.schema import SamplingConfig
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, VisionConfig
from rsagent_jax.models.qwen25_vl.model import Qwen25VL
from rsagent_jax.models.qwen25_vl.positions import Grid, fill_patch_buffer, padded_patches
from rsagent_jax.rollout.policy import Request, Task, join_texts
from rsagent_jax.rollout.programs import Images, Piece, RolloutPrograms, Turns
from rsagent_jax.rollout.weights import WeightLoader
from rsagent_jax.runtime import sharding
from rsagent_jax.types import Completion, DataError, Prompt

RUNGS = 3  # of the ladder of patch buffers: all of sampling.patches, a quarter, a sixteenth; one more for overlays
MOST = 0.75  # of the slots with work, of the lanes: see Engine._append_now


@dataclasses.dataclass
class _Slot:
    """What the host knows of a slot in use."""

    opening: Prompt  # what is read first: another slot of the lane may copy it
    rest: list[Prompt] = dataclasses.field(default_factory=list)  # to be read after `left`, before the turn
    request: Request | None = None  # the latest, with the rest below
    left: Prompt | None = None  # of its prompt, with image places; None when it is appended
    image_places: np.ndarray | None = None  # i32[T] of `left`
    budget: int = 0  # tokens that its turn may have
    length: int = 0  # tokens in the cache
    done: int = 0  # tokens of the turn so far
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    samples: bool = False  # a turn is under way

    @property
    def has_opening(self) -> bool:
        return self.length >= len(self.opening.tokens)


class Engine:
    """A Policy (rollout/policy.py) on this process's devices. `load` gives it weights; `begin` forgets all slots."""

    def __init__(
        self,
        model: Qwen25VL,
        sampling: SamplingConfig,
        terminator_id: int,
        dtype: str,
        key: jax.Array,
        mesh: jax.sharding.Mesh | None = None,
        overlay: Grid | None = None,
        local: Callable[[nnx.State], nnx.State] | None = None,
    ):
        """With a mesh, its rows share the slots and its tensor axis the heads; else everything is on one device.
        local: what makes the parameters arrays of this process, as WeightLoader asks for it.

        overlay: of the images that most turns bring; the ladder of patch buffers gets a rung that just holds one.
        """
        sampling = fill_sampling_defaults(sampling, model.config, mesh)
        self.config, self.sampling, self.mesh = model.config, sampling, mesh
        self.slots, self.context = sampling.slots, sampling.context
        self.max_new_tokens, self.patches = sampling.max_new_tokens, sampling.patches
        self.rungs = ladder(self.patches, overlay, model.config.vision)
        self.programs = RolloutPrograms(model, sampling, terminator_id, Compute(dtype, mesh=mesh))
        params = nnx.state(model, nnx.Param)
        self.loader = WeightLoader(self.programs, params, mesh, local)
        self._empty = jax.jit(self.programs.empty)
        self.seconds = {"weights": 0.0}
        self.load(params, key)
        self.begin()

    def load(self, params: nnx.State, key: jax.Array, *, greedy: bool = False) -> None:
        """New weights, cast and laid out for decoding, and the key that the next trajectories' keys are folded from.

        greedy: until the next `load` the likeliest token is taken, whatever sampling.temperature says.

        One resharding, from whatever layout `params` have; of a slice's, part after part. Of what is outside of the
        decoder's layers, parameters whose dtype and layout agree already are not copied: they share their memory with
        `params`, so whoever donates these calls `release_memory` or `load` before the next step. Everything else is
        new: a layer is cut out of its stack, and parameters in fp32 are cast for activations in bf16; neither can take
        over the old one's memory, so nothing is donated.
        `seconds["weights"]` includes the wait for a computation of `params` that is still under way.
        """
        start = time.perf_counter()
        self.weights = None  # freed before the new ones are made
        self.weights, self.key = jax.block_until_ready(self.loader.load(params)), key
        self.temperature = 0.0 if greedy else self.sampling.temperature
        self.seconds["weights"] = time.perf_counter() - start

    def release_memory(self) -> None:
        """Gives the memory of weights and cache away, until the next `load` and `begin`."""
        self.weights = self.state = None

    def begin(self) -> None:
        self.state = None  # freed before the new one is made
        # Committed to its device from the start, as what programs return is: else each would be compiled for both.
        self.state = self._empty() if self.mesh else jax.device_put(self._empty(), self.loader.device)
        self.used: dict[int, _Slot] = {}
        self.lanes: list[int | None] = [None] * self.sampling.lanes  # the slot whose prompt a lane appends
        self.queue: list[int] = []  # slots that wait for their lane, first come first served
        self.stats = collections.Counter()

    ############################## Policy ##############################

    def pick(self, task: Task, free: Sequence[int]) -> int:
        """A free slot: in a lane where the task's group has its opening already, else in the emptiest lane."""
        group = {self._lane(s) for s, x in self.used.items() if x.request.task.group_id == task.group_id}
        load = collections.Counter(self._lane(s) for s in self.used)
        return min(free, key=lambda s: (self._lane(s) not in group, load[self._lane(s)], s))

    def submit(self, request: Request) -> None:
        """ValueError for a prompt that does not fit; a driver looks before it asks."""
        prompts = [*request.context, request.prompt]
        x = self.used.get(request.slot) or _Slot(prompts[0])
        patches = max(padded_patches(prompt.grids, self.config.vision) for prompt in prompts)
        budget = min(request.budget or self.max_new_tokens, self.max_new_tokens)
        tokens = sum(len(prompt.tokens) for prompt in prompts)
        if patches > self.patches or x.length + tokens + budget > self.context:
            raise ValueError(
                f"slot {request.slot} has {x.length} of {self.context} tokens: no room for {tokens} more"
                f" and a turn, or {patches} patches are more than {self.patches}"
            )
        if request.begun is not None:
            prompts.append(self._text(request.begun.tokens, request.position))
        x.request, x.rest, x.budget = request, join_texts(prompts, self.config.image_token_id), budget
        self.used[request.slot] = x
        self._read_next(request.slot)

    def begun(self, slot: int) -> Completion | None:
        x = self.used[slot]
        if not x.samples:
            return x.request.begun
        return Completion(np.concatenate(x.tokens), np.concatenate(x.logprobs), False) if x.done else None

    def _text(self, tokens: np.ndarray, position: int) -> Prompt:
        """Sampled tokens to be read: text, whatever they say."""
        positions = np.broadcast_to(position + np.arange(len(tokens)), (3, len(tokens))).astype(np.int32)
        return Prompt(tokens, positions, np.zeros((0, self.config.vision.patch_dim), np.float32), ())

    def _read_next(self, slot: int) -> None:
        """Lets the slot wait for its lane with the first of what it has to read."""
        x, vision = self.used[slot], self.config.vision
        x.left = prompt = x.rest.pop(0)
        x.image_places = np.zeros(len(prompt.tokens), np.int32)
        if prompt.grids:
            is_image = prompt.tokens == self.config.image_token_id
            rung = self._rung(padded_patches(prompt.grids, vision))
            x.image_places = fill_patch_buffer(prompt.patches, prompt.grids, is_image, rung, vision).image_slots
        self.queue.append(slot)

    def release(self, slot: int) -> None:
        self.used.pop(slot, None)
        self.queue = [s for s in self.queue if s != slot]
        self.lanes = [None if s == slot else s for s in self.lanes]

    def step(self) -> list[tuple[int, Completion]]:
        start = time.perf_counter()
        started = self._start_lanes()
        by_rung = collections.defaultdict(list)  # a slot's own images decide: its embeddings depend on nobody else's
        for slot in started:
            if grids := self.used[slot].left.grids:
                by_rung[self._rung(padded_patches(grids, self.config.vision))].append(slot)
        for rung, slots in by_rung.items():
            self.state = self.programs.encode(self.weights, self.state, self._images(rung, slots))
        piece = self._piece() if self._append_now() else None
        if piece is None and not any(x.samples for x in self.used.values()):
            return []
        only = piece is not None and (bool(self.queue) or any(slot is not None for slot in self.lanes))
        turns = self._turns()
        reach = max(x.length + self.sampling.chunk * x.samples for x in self.used.values())
        call = dict(blocks=self._blocks(reach), steps=0 if only else None)
        self.state, out = self.programs.step(self.weights, self.state, self.key, piece, turns, **call)
        self.stats["macro_steps"] += 1
        if only:
            jax.block_until_ready(self.state.hidden)
        ended = [] if only else self._take(jax.device_get(out), np.asarray(jax.device_get(turns.open)))
        self.stats["decode_seconds" if piece is None else "prefill_seconds"] += time.perf_counter() - start
        return ended

    def _append_now(self) -> bool:
        """Whether a piece pays: not while most slots that have work sample and few lanes would be busy.

        A slot's own tokens come out the same: sampling always takes whole chunks from the start of its turn.
        """
        busy, sampling = sum(slot is not None for slot in self.lanes), sum(x.samples for x in self.used.values())
        few_sample = sampling < MOST * (sampling + busy + len(self.queue))
        return busy > 0 and (few_sample or busy >= MOST * len(self.lanes))

    ############################## What a call takes ##############################

    def _lane(self, slot: int) -> int:
        return slot * self.sampling.lanes // self.slots

    def _within(self, slot: int) -> int:
        return slot % (self.slots // self.sampling.lanes)

    def _start_lanes(self) -> list[int]:
        """Gives every idle lane its next slot; an opening that a neighbour has is copied, one that it reads awaited."""
        started, copies = [], {}
        for slot in list(self.queue):
            lane = self._lane(slot)
            if self.lanes[lane] is not None:
                continue
            source = self._source(slot)
            if source is not None and not self.used[source].has_opening:
                continue
            self.queue.remove(slot)
            self.lanes[lane] = slot
            if source is None:
                started.append(slot)
            else:
                copies[lane] = (source, slot)
        if copies:
            self._copy(copies)
        return started

    def _source(self, slot: int) -> int | None:
        """Another slot of the lane with the same opening, if this one is new: of several, one that has it whole."""
        mine = self.used[slot]
        if mine.length or len(mine.opening.tokens) < 2:
            return None
        neighbours = [s for s in self.used if s != slot and self._lane(s) == self._lane(slot)]
        readers = [s for s in neighbours if self.used[s].has_opening or s in self.lanes]
        same = [s for s in readers if _equal(self.used[s].opening, mine.opening)]
        return max(same, key=lambda s: self.used[s].has_opening) if same else None

    def _copy(self, copies: dict[int, tuple[int, int]]) -> None:
        """All but the opening's last token: it is read again, for its hidden state gives the first sampled token."""
        source, target = np.zeros((2, self.sampling.lanes), np.int32)
        wanted, longest = np.zeros(self.sampling.lanes, bool), 0
        for lane, (old, new) in copies.items():
            source[lane], target[lane], wanted[lane] = self._within(old), self._within(new), True
            x = self.used[new]
            x.length = len(x.opening.tokens) - 1
            x.left, x.image_places = _tail(x.left, x.length), x.image_places[x.length :]
            longest = max(longest, x.length)
            self.stats["copied_tokens"] += x.length
        blocks = np.int32(-(-longest // self.programs.block))
        self.state = self.programs.copy(self.state, *self._put((source, target, wanted)), blocks)

    def _images(self, rung: int, slots: list[int]) -> Images:
        """These slots' pictures in the first buffers of each row of the mesh; `rung`: of the ladder, holds each."""
        vision, lanes = self.config.vision, self.sampling.lanes
        a_row, ints = lanes // sharding.parts("rows", self.mesh), np.zeros((3, lanes, rung), np.int32)
        free = [iter(range(start, start + a_row)) for start in range(0, lanes, a_row)]
        patches = np.zeros((lanes, rung, vision.patch_dim), np.float32)
        images = Images(patches, ints[0], np.moveaxis(ints[1:], 0, -1), np.full(lanes, -1, np.int32))
        for slot in slots:
            prompt, (row, lane) = self.used[slot].left, divmod(self._lane(slot), a_row)
            i = next(free[row])
            is_image = prompt.tokens == self.config.image_token_id
            buffer = fill_patch_buffer(prompt.patches, prompt.grids, is_image, rung, vision)
            images.patches[i], images.segment_ids[i] = buffer.patches, buffer.segment_ids
            images.positions[i], images.lanes[i] = buffer.positions, lane
            self.stats["patches"] += len(prompt.patches)
        return self._put(images)

    def _piece(self) -> Piece:
        """The next tokens of every lane's slot; slots whose prompt is complete with them start to sample."""
        lanes, size = self.sampling.lanes, self.sampling.prefill
        ints = lambda *shape: np.zeros(shape, np.int32)  # noqa: E731
        slots, counts, lengths = ints(lanes), ints(lanes), ints(lanes)
        tokens, positions, places = ints(lanes, size), ints(lanes, 3, size), ints(lanes, size)
        for lane, slot in enumerate(self.lanes):
            if slot is None:  # padding is written: behind the tokens of the lane's first slot, where nobody looks
                first = self.used.get(lane * self.slots // lanes)
                lengths[lane] = first.length if first else 0
                continue
            x = self.used[slot]
            n = min(size, len(x.left.tokens))
            slots[lane], counts[lane], lengths[lane] = self._within(slot), n, x.length
            tokens[lane, :n], positions[lane, :, :n] = x.left.tokens[:n], x.left.positions[:, :n]
            places[lane, :n] = x.image_places[:n]
            x.length += n
            self.stats["prefill_tokens"] += n
            if n < len(x.left.tokens):
                x.left, x.image_places = _tail(x.left, n), x.image_places[n:]
                continue
            self.lanes[lane] = None
            if x.rest:
                self._read_next(slot)
                continue
            begun = x.request.begun
            x.tokens, x.logprobs = ([begun.tokens], [begun.logprobs]) if begun else ([], [])
            x.left, x.samples, x.done = None, True, len(begun.tokens) if begun else 0
        return Piece(*self._put((slots, tokens, positions, places, counts, lengths)))

    def _turns(self) -> Turns:
        ints = (np.zeros(self.slots, np.int32) for _ in range(6))
        out = Turns(np.zeros(self.slots, bool), *ints, np.zeros(self.slots, np.float32))
        for slot, x in self.used.items():
            r = x.request
            out.open[slot], out.lengths[slot], out.done[slot] = x.samples, x.length, x.done
            out.positions[slot] = r.position + x.done
            out.budget[slot], out.uids[slot], out.numbers[slot] = x.budget, r.task.uid, r.turn
            out.temperature[slot] = self.temperature if r.task.temperature is None else r.task.temperature
        return self._put(out)

    def _take(self, out, open_: np.ndarray) -> list[tuple[int, Completion]]:
        """Adds what was drawn to the slots' turns; returns those that have ended."""
        ended, steps = [], int(out.steps)
        self.stats.update(decode_steps=steps, slot_steps=steps * self.slots)
        for slot in np.flatnonzero(open_):
            x, n = self.used[int(slot)], int(out.counts[slot])
            x.tokens.append(out.tokens[slot, :n])
            x.logprobs.append(out.logprobs[slot, :n])
            x.done += n
            x.length += n - int(out.finished[slot])
            self.stats["decode_tokens"] += n
            if out.stopped[slot] or x.done >= x.budget:
                x.samples = False
                done = Completion(np.concatenate(x.tokens), np.concatenate(x.logprobs), bool(out.finished[slot]))
                ended.append((int(slot), done))
        return ended

    def _rung(self, patches: int) -> int:
        return next(rung for rung in self.rungs if rung >= patches)

    def _blocks(self, places: int) -> int:
        return next(n for n in self.programs.buckets if n * self.programs.block >= places)

    @property
    def programs_at_most(self) -> int:
        return len(self.rungs) + 1 + 3 * len(self.programs.buckets)

    @property
    def cache_bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.state.cache))

    def warm_up(self) -> None:
        """Runs every program once without work, so that none is compiled later."""
        self.begin()
        for rung in self.rungs:
            self.state = self.programs.encode(self.weights, self.state, self._images(rung, []))
        self._copy({})
        piece, turns = self._piece(), self._turns()
        kinds = ((piece, None), (piece, 0), (None, None))
        for blocks, (piece, steps) in itertools.product(self.programs.buckets, kinds):
            step = functools.partial(self.programs.step, blocks=blocks, steps=steps)
            self.state, _ = step(self.weights, self.state, self.key, piece, turns)
        self.begin()

    def _put(self, tree):
        return tree if self.mesh is None else jax.device_put(tree, sharding.rows(self.mesh))


def _tail(prompt: Prompt, start: int) -> Prompt:
    """The same prompt without its first tokens; its images are in the lane already."""
    return dataclasses.replace(prompt, tokens=prompt.tokens[start:], positions=prompt.positions[:, start:])


def _equal(a: Prompt, b: Prompt) -> bool:
    if a is b:
        return True
    same = a.grids == b.grids and np.array_equal(a.tokens, b.tokens) and np.array_equal(a.positions, b.positions)
    return same and np.array_equal(a.patches, b.patches)


def ladder(patches: int, overlay: Grid | None, vision: VisionConfig) -> list[int]:
    """Sizes of the vision tower's patch buffer, smallest first."""
    window = vision.window_patches
    sizes = {-(-patches // (4**i * window)) * window for i in range(RUNGS)}
    if overlay and (often := padded_patches((overlay,), vision)) < patches:
        sizes.add(often)
    return sorted(sizes)


def fill_sampling_defaults(
    sampling: SamplingConfig, policy: Qwen25VLConfig, mesh: jax.sharding.Mesh | None, name: str = "sampling"
) -> SamplingConfig:
    """With lanes = 0 filled in: one for four slots, but one for each row of the mesh.

    DataError for what the policy or the mesh cannot do; `name` is the config's group.
    """
    rows, tensor = (sharding.parts(axis, mesh) for axis in ("rows", "kv_heads"))
    if (heads := policy.text.num_key_value_heads) % tensor:
        # It would run, but with a whole cache on every device and its heads on the way in every layer and step.
        raise DataError(
            f"{name}.tensor = {tensor} must divide the policy's {heads} key-value heads, which a row's devices share"
        )
    window = policy.vision.window_patches
    lanes = sampling.lanes or max(rows, sampling.slots // 4 if sampling.slots % 4 == 0 else 1)
    for ok, message in (
        (
            sampling.patches % window == 0,
            f"patches must be a multiple of the vision tower's window of {window} patches",
        ),
        (sampling.slots % lanes == 0, f"lanes = {lanes} must divide slots"),
        (lanes % rows == 0, f"the {rows} rows of the rollout mesh must share the {lanes} lanes evenly"),
    ):
        if not ok:
            raise DataError(f"{name}: {message}, got {sampling}")
    return dataclasses.replace(sampling, lanes=lanes)
