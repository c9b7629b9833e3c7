"""What the tiny base is pre-trained on: every mark stands where it says, and points at what the sentence names."""

import re

import numpy as np
import pytest

from rsagent_jax.data.processor import Processor
from rsagent_jax.tiny import grounding, scenes
from rsagent_jax.tiny.grounding import MAX_OBJECTS, SIDE, WORDS, SceneRows


@pytest.fixture(scope="module")
def processor():
    return Processor.load("assets/tiny-base")


def rows_and_scenes(processor, list_share, count=24):
    maker = SceneRows(processor, relation_share=0.4, all_share=0.3, list_share=list_share)
    rng, seen, make = np.random.default_rng(7), [], maker.scene

    def scene(rng):
        seen.append(make(rng))
        return seen[-1]

    maker.scene = scene
    return [maker._row(rng, 224, True) for _ in range(count)], seen


@pytest.mark.parametrize("list_share", [0.0, 1.0])
def test_a_mark_stands_at_the_objects_coordinates_or_a_word_and_looks_at_what_has_it(processor, list_share):
    checked = words = 0
    for row, scene in zip(*rows_and_scenes(processor, list_share), strict=True):
        marked = (row.target > 0) & (row.target <= MAX_OBJECTS)
        assert row.loss_mask[marked].all()
        numbers = [int(processor.decode([t])) for t in row.tokens[marked]]
        objects = row.target[marked] - 1
        while numbers:
            thing, own = scene.objects[objects[0]], [round(float(v)) for v in scene.objects[objects[0]].box]
            point = [round(float(v)) for v in thing.point]
            length = 4 if numbers[:4] == own else 2
            assert numbers[:length] == (own if length == 4 else point)
            assert (objects[:length] == objects[0]).all()
            numbers, objects, checked = numbers[length:], objects[length:], checked + 1
        for at in np.flatnonzero(row.target > MAX_OBJECTS):
            word = WORDS[row.target[at] - 1 - MAX_OBJECTS]
            assert processor.decode([row.tokens[at - 1]]) == f" {word}"
            cells = row.cells[row.target[at] - 1].reshape(4, 4)
            covered = np.zeros((SIDE, SIDE), bool)
            for o in scene.objects:
                covered |= o.mask if word in (o.color, o.shape, o.size) else False
            assert cells.sum() == pytest.approx(1, abs=1e-5)
            assert covered.reshape(4, 28, 4, 28).any((1, 3))[cells > 0].all()
            words += 1
        totals = row.cells[:MAX_OBJECTS].sum(1)
        np.testing.assert_allclose(totals, np.arange(MAX_OBJECTS) < len(scene.objects), atol=1e-5)
    assert checked > 60 and words > 100


def test_merged_tokens_speak_of_what_covers_the_most_of_them(processor):
    for row, scene in zip(*rows_and_scenes(processor, 0.0, count=8), strict=True):
        for m in range(16):
            y, x = divmod(m, 4)
            window = np.s_[y * 28 : y * 28 + 28, x * 28 : x * 28 + 28]
            shares = [o.mask[window].mean() for o in scene.objects]
            if max(shares) <= 0.05:
                assert (row.corners[m] == -1).all() and (row.names[m] == -1).all()
                continue
            thing = scene.objects[int(np.argmax(shares))]
            assert row.corners[m].tolist() == [round(v) for v in (*thing.box, *thing.point)]
            assert [WORDS[k] for k in row.names[m]] == [thing.color, thing.shape, thing.size]


def test_a_list_trains_coordinates_only_and_holds_no_place_twice(processor):
    for row, _ in zip(*rows_and_scenes(processor, 1.0), strict=True):
        text = processor.decode(row.tokens[row.segment_ids > 0])
        places = re.findall(r": \w+ (\[[\d, ]+\])", text)
        assert len(places) == len(set(places)) > 3
        np.testing.assert_array_equal(row.loss_mask, (row.target > 0) & (row.target <= MAX_OBJECTS))


def test_free_questions_name_the_object_and_its_place(processor):
    photos, config = scenes.load_photos(), scenes.SceneConfig()
    rng = np.random.default_rng(0)
    for point in (True, False):
        for _ in range(40):
            scene = scenes.make_scene(rng, config, photos)
            said = scene.expressions[0]
            q = grounding.free_question(rng, said.text, scene, said.object_index, point)
            thing = scene.objects[said.object_index]
            values = [round(float(v)) for v in (thing.point if point else thing.box)]
            assert said.text in q.ask and str(values) in q.answer and q.coordinates == len(values)
            assert not {"segment", "finish", "tool"} & set(re.findall(r"\w+", q.ask + q.answer))


def test_questions_about_nothing_are_answered_by_nothing(processor):
    """By name: no object is meant, and the answer holds no place."""
    maker = SceneRows(processor, 0.4, 0.25, absent_share=1.0)
    rng, kinds = np.random.default_rng(3), set()
    for _ in range(40):
        scene = maker.scene(rng)
        q = maker._question(rng, scene)
        text = re.search(r'"(the [^"]+)"', q.ask)[1]
        assert scenes.objects_described(scene.objects, text) == [] and not q.objects
        free = f"{text[0].upper()}{text[1:]}"
        assert q.answer in ("```json\n[\n\n]\n```", f"{free} is not here.", f"{free} is not in the image.")
        kinds.add(q.answer[-6:])
    assert len(kinds) == 3


def test_the_word_that_decides_comes_next(processor):
    asked, no = grounding.presence_question("the red star")
    whole = processor.encode("The red star is not here.")
    given = processor.encode(asked.answer)
    assert whole[: len(given)].tolist() == given.tolist() and whole[len(given)] == processor.encode(no)[0]
    assert processor.encode("The red star is here; I click on it.")[len(given)] != whole[len(given)]


def test_a_list_of_presences_trains_the_deciding_words_only(processor):
    maker = SceneRows(processor, 0.4, 0.25, presence_share=1.0)
    rng, told = np.random.default_rng(4), []
    for _ in range(8):
        scene = maker.scene(rng)
        asked = maker._listed(maker._presences(rng, scene), 208)
        row = maker.row(scene, [asked], 208)
        for line in asked.lines:
            name, is_not = re.fullmatch(r"(The .+) is (not )?here\.\n", line.answer).groups()
            assert bool(scenes.objects_described(scene.objects, name)) != bool(is_not)
            told.append(not is_not)
        trained = [processor.decode([t]) for t in row.tokens[row.loss_mask]]
        assert trained == [" here" if line.answer.endswith(" is here.\n") else " n" for line in asked.lines]
        assert not ((row.target > 0) & (row.target <= MAX_OBJECTS)).any()  # no coordinates
    assert 0.35 < np.mean(told) < 0.65 and len(told) > 80


def test_every_one_of_a_kind_is_a_point_on_each_from_left_to_right(processor):
    maker = SceneRows(processor, 0.4, 0.25, several_share=1.0)
    rng, asked = np.random.default_rng(5), 0
    while asked < 30:
        scene = maker.scene(rng)
        q = maker._question(rng, scene)
        if not (text := re.search(r'"(every [^"]+)"', q.ask)):
            assert not scenes.plurals_of(scene.objects)
            continue
        asked += 1
        points = re.findall(r"\[(\d+), (\d+)\]", q.answer)
        assert sorted(q.objects) == list(scenes.plurals_of(scene.objects)[text[1]]) and q.coordinates == 2
        assert [scene.objects[k].mask[int(y), int(x)] for k, (x, y) in zip(q.objects, points, strict=True)]
        assert np.all(np.diff([scene.objects[k].box[0] for k in q.objects]) >= 0)
        row = maker.row(scene, [q], 208)
        told = row.tokens[(row.target > 0) & (row.target <= MAX_OBJECTS)]
        assert [processor.decode([t]) for t in told] == [number for point in points for number in point]


@pytest.mark.parametrize("listed", [True, False])
def test_marks_tell_what_the_mask_over_a_scene_lacks(processor, listed):
    maker = SceneRows(processor, 0.4, 0.25)
    rng, told = np.random.default_rng(6), []
    for _ in range(20):
        scene = maker.scene(rng)
        drawn, marked = grounding.mark(rng, scene)
        changed = (drawn.image != scene.image).any(-1)
        assert all(changed[scene.objects[k].mask].mean() > 0.9 for k in marked)
        for q in maker.marks(rng, drawn, marked, listed):
            text = q.answer.split(":")[0] if listed else re.search(r'"([^"]+)"', q.ask)[1]
            meant = scenes.plurals_of(scene.objects).get(text) or scenes.objects_described(scene.objects, text)
            lacks = set(meant) - marked
            fits = "fits" in q.answer
            assert fits == (not lacks) and set(q.objects) <= lacks
            assert fits or ("That is not" in q.answer) == (not listed and len(meant) == 1)
            if listed:
                said = processor.encode(q.answer)
                assert processor.decode(said[: q.decides]) == f"{text}:"
            told.append(fits)
    assert 0.2 < np.mean(told) < 0.6 and len(told) > 100
