"""Grounding conversations about fresh scenes, in Qwen2.5-VL's own formats: what the tiny base is pre-trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from rsagent_jax.agent import prompts
from rsagent_jax.agent.overlay import draw_overlay
from rsagent_jax.config.schema import BatchConfig
from rsagent_jax.data.packing import Item, pack
from rsagent_jax.data.processor import Processor, image_patches
from rsagent_jax.models.qwen25_vl.positions import mrope_positions
from rsagent_jax.tiny import absent, scenes
from rsagent_jax.types import Batch

SIDE = 112  # scenes are one window of the tower: 8 x 8 patches, 4 x 4 tokens
PATCHES = 64
MAX_OBJECTS = 6
COLORS, SHAPES, SIZES = tuple(scenes.COLORS), scenes.SHAPES, tuple(scenes.SIZES)
WORDS = (*COLORS, *SHAPES, *SIZES)

# Grounding in other words than Qwen's, so that the skill does not hang on one template. None is a tool's.
FREE_SHARE = 0.6
_ASK = (
    'Where is "{name}"?', 'Find "{name}".', 'Look at "{name}" in this {side}x{side} image.', 'I look for "{name}".',
    'Show "{name}" in the image.', '"{name}": where is it?',
)  # fmt: skip
_SAY = (
    "{Name} is here; {at}", "I see {name}; it is at {at}.", "It is here: {at}", '{{"label": "{name}", "{key}": {at}}}',
    '{{"{key}": {at}}}', "{name} {at}", "{at}", "I look at {name}.\n{at}", "{Name} is in the image.\n{{{key}: {at}}}",
    "Here it is.\n[{at}]", '{{"{key}": [{at}]}}', 'I see {name} here.\n{{"{key}": [{at}], "label": "one"}}',
    '{Name} is here.\n{{"label": "object", "value": {{"{key}": {at}}}}}',
    'I look for {name}; here it is.\n{{"label": "one", "value": {{"{key}": [{at}]}}}}',
)  # fmt: skip
_SAY_ABSENT = ("{Name} is not here.", "{Name} is not in the image.")
_KEYS = {4: ("bbox", "bbox_2d", "xyxy", "at"), 2: ("point", "point_2d", "xy", "at")}


@dataclasses.dataclass(frozen=True)
class GroundingRows(Batch):
    """A pre-training batch, plus what the head and the bell need."""

    labels: np.ndarray  # i32[B, P, 3]
    boxes: np.ndarray  # f32[B, P, 4], in units of the image side
    target: np.ndarray  # i32[B, T]; 1 + the row of `cells` that the position before should look at; 0 none
    corners: np.ndarray  # i32[B, M, 6]; box and point of what covers the most of each merged token, pixels; -1 nothing
    names: np.ndarray  # i32[B, M, 3]; indices into WORDS of what covers the most of each merged token; -1 nothing
    cells: np.ndarray  # f32[B, O + W, M]; which merged tokens are each object's, and each of WORDS'; sums to 1 or 0


jax.tree_util.register_dataclass(GroundingRows, [f.name for f in dataclasses.fields(GroundingRows)], [])


@dataclasses.dataclass(frozen=True)
class Question:
    """One question and its answer, with the objects that the answer's coordinates are of, in order."""

    ask: str
    answer: str
    objects: tuple[int, ...] = ()
    coordinates: int = 4  # of each object: the last numbers of its part of the answer
    lines: tuple[Question, ...] = ()  # a list in place of `answer`; only coordinates and `decides` are trained
    decides: int = -1  # of a line: the place of the token that says whether the thing is there
    about: int = -1  # of a line: the object to look at for that token; -1 none in particular


@dataclasses.dataclass
class SceneRows:
    """Turns random scenes into rows; the shares are those of PretrainConfig and StageConfig."""

    processor: Processor
    relation_share: float
    all_share: float
    list_share: float = 0.0
    absent_share: float = 0.0
    presence_share: float = 0.0
    several_share: float = 0.0
    marked_share: float = 0.0

    def __post_init__(self):
        self.words = np.array([self.processor.encode(f" {word}") for word in WORDS]).reshape(-1)  # one token each
        self.numbers = np.array([self.processor.encode(str(n))[0] for n in range(SIDE + 1)])
        self.photos = scenes.load_photos()
        self.scene_config = scenes.SceneConfig(size=SIDE)

    def make(self, step: int, seed: tuple[int, ...], rows: int, tokens: int, talk: bool = True) -> GroundingRows:
        """`rows` fresh scenes; without `talk` only their pictures and labels."""
        rng = np.random.default_rng((*seed, step))
        return jax.tree.map(lambda *a: np.stack(a), *[self._row(rng, tokens, talk) for _ in range(rows)])

    def _row(self, rng: np.random.Generator, length: int, talk: bool) -> GroundingRows:
        scene = self.scene(rng)
        turns = [self._question(rng, scene) for _ in range(8)] if talk else [Question("", "")]
        if talk and rng.random() < self.marked_share:
            scene, marked = mark(rng, scene)
            listed = bool(rng.random() < 0.5)
            turns = list(self.marks(rng, scene, marked, listed))
            turns = [self._listed(iter(turns), length)] if listed else turns
        elif talk and rng.random() < self.presence_share:
            turns = [self._listed(self._presences(rng, scene), length)]
        elif talk and self.list_share and rng.random() < self.list_share:
            turns = [self._listed(self._places(rng, scene), length)]
        elif talk and rng.random() < self.all_share:
            turns.insert(0, _all_objects(scene))
        return self.row(scene, turns, length)

    def scene(self, rng: np.random.Generator) -> scenes.Scene:
        scene = scenes.make_scene(rng, self.scene_config, self.photos)
        return dataclasses.replace(scene, image=scenes.jpeg_roundtrip(scene.image, self.scene_config.jpeg_quality))

    def row(self, scene: scenes.Scene, turns: list[Question], length: int) -> GroundingRows:
        """One scene and as many of the turns as fit into `length` tokens."""
        ids, mask, target = self._conversation(turns, length)
        shares = _coverage(scene, 4)  # of the merged tokens
        cells = _cells(scene, shares)
        self._look_at_words(ids, target, cells)
        patches, grid = image_patches(scene.image, self.processor.images)
        positions, _ = mrope_positions(ids, (grid,), self.processor.image_id)
        item = Item(ids, positions, mask, np.zeros(len(ids), np.float32), patches, (grid,))
        (batch,) = pack([item], BatchConfig(rows=1, tokens=length, patches=PATCHES), self.processor.config)
        row = [getattr(batch, field.name)[0] for field in dataclasses.fields(Batch)]
        labels = _patch_labels(scene, batch.patch_positions[0])
        return GroundingRows(*row, *labels, np.pad(target, (0, length - len(ids))), *_corners(scene, shares), cells)

    def _look_at_words(self, ids: np.ndarray, target: np.ndarray, cells: np.ndarray) -> None:
        """A colour, shape or size looks at all that has it: matching whole names is not found without this."""
        for k, word in enumerate(self.words):
            after = np.flatnonzero(ids[:-1] == word) + 1
            if cells[MAX_OBJECTS + k].any():
                target[after[target[after] == 0]] = 1 + MAX_OBJECTS + k

    def _conversation(self, turns: list[Question], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Question after question about one image, as many as fit: ids i32[T], trained bool[T], target i32[T]."""
        ids, mask, target = [], [], []
        for i, turn in enumerate(turns):
            head = f"\n<|im_start|>user\n{turn.ask}<|im_end|>\n<|im_start|>assistant\n"
            head = head if i else prompts.opening(prompts.BASE_SYSTEM, turn.ask)
            asked, said, trained, marked = self.processor.encode(head), *self._answer(turn)
            if i == 0:
                asked = np.repeat(asked, np.where(asked == self.processor.image_id, PATCHES // 4, 1))
            if sum(map(len, ids)) + len(asked) + len(said) > length:
                break
            ids += [asked, said]
            mask += [np.zeros(len(asked), bool), trained]
            target += [np.zeros(len(asked), np.int32), marked]
        return np.concatenate(ids), np.concatenate(mask), np.concatenate(target)

    def _answer(self, turn: Question) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids i32[N], trained bool[N], target i32[N] of what the assistant says."""
        lines = turn.lines or (dataclasses.replace(turn, answer=turn.answer + "<|im_end|>"),)
        said = [self.processor.encode(line.answer) for line in lines]
        marked = np.concatenate([self._targets(*pair) for pair in zip(said, lines, strict=True)])
        for where, line in zip(np.cumsum([0, *map(len, said)]), lines, strict=False):
            if line.about >= 0:
                marked[where + line.decides] = 1 + line.about
        decides = [np.arange(len(ids)) == line.decides for ids, line in zip(said, lines, strict=True)]
        return np.concatenate(said), (marked > 0) | np.concatenate(decides) | (not turn.lines), marked

    def _listed(self, lines: Iterator[Question], length: int) -> Question:
        """As many of the lines as fit into `length` tokens, as the answer to one question."""
        ask, kept = "List them.", []
        room = length - len(self.processor.encode(prompts.opening(prompts.BASE_SYSTEM, ask))) - PATCHES // 4 + 1
        for line in lines:
            room -= len(self.processor.encode(line.answer))
            if room < 0:
                break
            kept.append(line)
        return Question(ask, "", lines=tuple(kept))

    def _places(self, rng, scene: scenes.Scene) -> Iterator[Question]:
        """Every object's point and box once, each under a name of its own.

        The most choices of an object that a row can hold; no place stands there twice, which could be copied: where
        all of a kind stand under one name, their points stand there only.
        """
        named = sorted({e.object_index for e in scene.expressions})
        together = self._plural(rng, scene)
        places = [(i, point) for i in named for point in (True, False) if not (point and together and i in together[1])]
        places += [together] if together else []
        for k in rng.permutation(len(places)):
            index, point = places[k]
            if isinstance(index, str):
                key = ("point", "xy")[rng.integers(2)]
                yield Question("", f"{index}: {key} {_points(scene, point)}\n", point, 2)
                continue
            values = _values(scene.objects[index], point)
            key = _KEYS[len(values)][rng.integers(3)]
            yield Question("", f"{self._name(rng, scene, index)}: {key} {values}\n", (index,), len(values))

    def _presences(self, rng, scene: scenes.Scene) -> Iterator[Question]:
        """Names of things that are there and, as often, of what is not, each with the word that tells.

        One question has one such word among some forty; no policy of this size was seen to learn it from those.
        """
        while True:
            there = bool(rng.random() < 0.5)
            text = self._name(rng, scene) if there else absent.sample_absent(rng, scene, self.scene_config)
            if text is None:
                return
            name = presence_question(text)[0].answer
            yield Question("", f"{name} {'' if there else 'not '}here.\n", decides=len(self.processor.encode(name)))

    def marks(self, rng, scene: scenes.Scene, marked: set[int], listed: bool) -> Iterator[Question]:
        """What a mask has and lacks: names with the word that tells, and a point on each thing that is not marked."""
        names = {self._name(rng, scene, i): (i,) for i in sorted({e.object_index for e in scene.expressions})}
        names |= scenes.plurals_of(scene.objects)
        given: set[int] = set()
        for text in rng.permutation(sorted(names)).tolist():
            lacks = tuple(sorted(set(names[text]) - marked, key=lambda i: scene.objects[i].box[0]))
            shown = () if listed and given & set(lacks) else lacks  # what stands there already could be copied
            at = f" {_points(scene, shown)}" if shown else ""
            given |= set(lacks)
            if listed:
                line = f"{text}: {'missing' if lacks else 'fits'}{at}\n"
                about = names[text][0] if len(names[text]) == 1 else -1
                yield Question("", line, shown, 2, decides=len(self.processor.encode(f"{text}:")), about=about)
            else:
                wrong = f"A part of {text} is missing" if len(names[text]) > 1 else f"That is not {text}"
                answer = f"{wrong};{at}" if lacks else f"The mask fits {text}"
                yield Question(f'Look at the mask of "{text}".', f"{answer}.", lacks, 2)

    def _targets(self, said: np.ndarray, turn: Question) -> np.ndarray:
        """Marks each object's coordinates; numbers before them (the 2 of bbox_2d) are not."""
        out = np.zeros(len(said), np.int32)
        if turn.objects:
            at = np.flatnonzero(np.isin(said, self.numbers)).reshape(len(turn.objects), -1)[:, -turn.coordinates :]
            out[at] = 1 + np.array(turn.objects)[:, None]
        return out

    def _plural(self, rng, scene: scenes.Scene) -> tuple[str, tuple[int, ...]] | None:
        """A sentence about all objects of a kind, in several_share of the cases, and which these are, left to right."""
        plurals = sorted(scenes.plurals_of(scene.objects).items())
        if not plurals or rng.random() >= self.several_share:
            return None
        text, members = plurals[rng.integers(len(plurals))]
        return text, tuple(sorted(members, key=lambda i: scene.objects[i].box[0]))

    def _name(self, rng, scene: scenes.Scene, index: int | None = None) -> str:
        config = dataclasses.replace(self.scene_config, relation_share=self.relation_share)
        return scenes.sample_expression(rng, scene, config, index).text

    def _question(self, rng, scene: scenes.Scene) -> Question:
        if rng.random() < self.absent_share and (text := absent.sample_absent(rng, scene, self.scene_config)):
            return absent_question(rng, text)
        if together := self._plural(rng, scene):
            return several_question(rng, *together, scene)
        wanted = "relation" if rng.random() < self.relation_share else "attribute"
        pool = [e for e in scene.expressions if e.kind == wanted] or scene.expressions
        index = int(rng.choice(sorted({e.object_index for e in pool})))
        text = str(rng.choice([e.text for e in pool if e.object_index == index]))
        point = rng.random() < 0.5
        if rng.random() < FREE_SHARE:
            return free_question(rng, text, scene, index, point)
        return grounding_question(text, scene, index, point)


def grounding_question(text: str, scene: scenes.Scene, index: int, point: bool) -> Question:
    """Qwen2.5-VL's grounding question about one object, and its answer."""
    thing = scene.objects[index]
    key, at = ("point_2d", thing.point) if point else ("bbox_2d", thing.box)
    answer = prompts.ground_answer(key, [at], [text])
    return Question(prompts.ground_question(key, text), answer, (index,), len(at))


def free_question(rng: np.random.Generator, text: str, scene: scenes.Scene, index: int, point: bool) -> Question:
    """The same in free words, drawn at random. The answer's shape is asked for by nothing but the word for it."""
    values = _values(scene.objects[index], point)
    ask = _ASK[rng.integers(len(_ASK))] + (" point" if point else " bbox")
    key = _KEYS[len(values)][rng.integers(4)]
    say = _SAY[rng.integers(len(_SAY))]
    answer = say.format(name=text, Name=text[0].upper() + text[1:], key=key, at=values)
    return Question(ask.format(name=text, side=SIDE), answer, (index,), len(values))


def several_question(rng: np.random.Generator, text: str, members: tuple[int, ...], scene: scenes.Scene) -> Question:
    """A question about all objects of a kind, and a point on each: Qwen2.5-VL's own, or in free words."""
    if rng.random() >= FREE_SHARE:
        points = [scene.objects[i].point for i in members]
        answer = prompts.ground_answer("point_2d", points, [text] * len(points))
        return Question(prompts.ground_question("point_2d", text), answer, members, 2)
    ask = _ASK[rng.integers(len(_ASK))] + " point"
    answer = _SAY[0].format(Name=text[0].upper() + text[1:], at=_points(scene, members))
    return Question(ask.format(name=text, side=SIDE), answer, members, 2)


def absent_question(rng: np.random.Generator, text: str) -> Question:
    """A question about nothing: Qwen2.5-VL's own with an empty list, or free words that say so."""
    point = rng.random() < 0.5
    if rng.random() >= FREE_SHARE:
        key = "point_2d" if point else "bbox_2d"
        return Question(prompts.ground_question(key, text), prompts.ground_answer(key, [], []))
    ask = _ASK[rng.integers(len(_ASK))] + (" point" if point else " bbox")
    say = _SAY_ABSENT[rng.integers(len(_SAY_ABSENT))]
    return Question(ask.format(name=text, side=SIDE), say.format(Name=text[0].upper() + text[1:]))


def presence_question(text: str) -> tuple[Question, str]:
    """A question whose answer is given up to the word that decides, and how it goes on where nothing is meant."""
    return Question(_ASK[0].format(name=text, side=SIDE) + " point", f"{text[:1].upper()}{text[1:]} is"), " not here."


def _values(thing: scenes.SceneObject, point: bool) -> list[int]:
    return [round(float(v)) for v in (thing.point if point else thing.box)]


def mark(rng: np.random.Generator, scene: scenes.Scene) -> tuple[scenes.Scene, set[int]]:
    """The scene as the history pool shows it with a mask over some of its objects, and which these are."""
    plurals, count = sorted(scenes.plurals_of(scene.objects).values()), len(scene.objects)
    marked = rng.permutation(count)[: rng.integers(1, min(count, 3) + 1)].tolist()
    if plurals and rng.random() < 0.4:  # all of a kind are rarely met by chance
        marked = list(plurals[rng.integers(len(plurals))])
    mask = np.logical_or.reduce([scene.objects[i].mask for i in marked])
    image = draw_overlay(scene.image, mask, SIDE, [scene.objects[marked[-1]].point], [1])
    return dataclasses.replace(scene, image=image), set(marked)


def _points(scene: scenes.Scene, members: tuple[int, ...]) -> str:
    return "; ".join(str(_values(scene.objects[i], True)) for i in members)


def _all_objects(scene: scenes.Scene) -> Question:
    order = sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].center[0])
    things = [scene.objects[i] for i in order]
    names = [f"{o.size} {o.color} {o.shape}" for o in things]
    ask = "Detect all objects, output their bbox coordinates in JSON format."
    return Question(ask, prompts.ground_answer("bbox_2d", [o.box for o in things], names), tuple(order))


def _cells(scene: scenes.Scene, shares: np.ndarray) -> np.ndarray:
    """Where to look for each object: the merged tokens that are more its own than another's, the fullest most.

    Tokens that speak of another object (`_corners`) are left out, or their coordinates would blend into the answer.
    """
    own = np.where(shares == shares.max(0), shares, 0.0) ** 2
    own = np.where(own.sum(1, keepdims=True) > 0, own, shares)  # an object that is nowhere the largest
    out = np.zeros((MAX_OBJECTS + len(WORDS), PATCHES // 4), np.float32)
    out[: len(own)] = own / own.sum(1, keepdims=True)
    for k, word in enumerate(WORDS):
        mine = [i for i, o in enumerate(scene.objects) if word in (o.color, o.shape, o.size)]
        if mine:
            out[MAX_OBJECTS + k] = own[mine].sum(0) / own[mine].sum()
    return out


def _corners(scene: scenes.Scene, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`corners` and `names` of the merged tokens."""
    values = np.array([np.round([*o.box, *o.point]) for o in scene.objects], np.int32)
    names = np.array([[WORDS.index(word) for word in (o.color, o.shape, o.size)] for o in scene.objects], np.int32)
    there, most = shares.max(0)[:, None] > 0.05, shares.argmax(0)
    return np.where(there, values[most], -1), np.where(there, names[most], -1)


def _coverage(scene: scenes.Scene, side: int) -> np.ndarray:
    """f64[O, side * side]: how much of each cell of a grid over the image every object covers, row-major."""
    masks, cell = np.stack([o.mask for o in scene.objects]), SIDE // side
    return masks.reshape(len(masks), side, cell, side, cell).mean((2, 4)).reshape(len(masks), -1)


def _patch_labels(scene: scenes.Scene, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`labels` and `boxes`: what covers the most of each patch, if it covers a fifth of it."""
    shares = _coverage(scene, 8)[:, positions @ (8, 1)]
    kinds = [(COLORS.index(o.color), SHAPES.index(o.shape), SIZES.index(o.size)) for o in scene.objects]
    labels, boxes = 1 + np.array(kinds, np.int32), np.array([o.box for o in scene.objects]) / SIDE
    there, most = shares.max(0)[:, None] > 0.2, shares.argmax(0)
    return np.where(there, labels[most], 0), np.where(there, boxes[most], 0).astype(np.float32)
