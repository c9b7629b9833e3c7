"""Sentences about nothing in a scene: what an empty mask is right for (`finish(null)`)."""

import numpy as np

from rsagent_jax.tiny import scenes

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def near_misses(objects: tuple[scenes.SceneObject, ...], text: str) -> list[str]:
    """A true sentence with one word changed so that it is certainly about nothing.

    Either no object has the colour and shape of the new sentence, whatever its size and place (sizes and places never
    decide: a large object that is half hidden may look small), or a relation is turned into its opposite, which is
    false by the margin that the relation is true by.
    """
    match = scenes.SENTENCE.fullmatch(text)
    head, relation, misses = match["head"], match["relation"], []
    words = head.split()
    for k, word in enumerate(words):
        for other in next((group for group in (scenes.COLORS, scenes.SHAPES) if word in group), ()):
            changed = [*words[:k], other, *words[k + 1 :]]
            if not scenes.objects_described(objects, " ".join(["the", *(w for w in changed if w not in scenes.SIZES)])):
                misses.append(text.replace(head, " ".join(changed), 1))
    if relation:
        turned = text.replace(relation, OPPOSITE[relation])
        misses += [] if scenes.objects_described(objects, turned) else [turned]
    return misses


def sample_absent(rng: np.random.Generator, scene: scenes.Scene, config: scenes.SceneConfig) -> str | None:
    """A sentence about nothing in the scene, one word away from one about an object; None where none was found."""
    for _ in range(20):  # nearly every sentence has near misses; those of a scene full of twins may not
        expression = scenes.sample_expression(rng, scene, config)
        misses = near_misses(scene.objects, expression.text) if expression else []
        if misses:
            return misses[rng.integers(len(misses))]
    return None
