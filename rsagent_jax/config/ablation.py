"""The fields of configs/ablations/*.py, and the recipe that they make (rsagent_jax/ablate.py runs it).

Stages that all variants share come first; then each variant is trained (`train-NAME`) and evaluated (`eval-NAME`).
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated

from rsagent_jax.config.import_path import closest
from rsagent_jax.config.ranges import Form, Seed, Text
from rsagent_jax.config.recipe import RecipeConfig, RecipeStage

OWN = ("train", "eval")  # {train} and {eval} are the variant's own directories


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationVariant:
    """A row of the table. The first variant is the one the others are held against."""

    name: Annotated[str, Form(r"[a-z0-9][\w+-]*", "a name for a directory, such as no-process")]
    says: str = ""  # what differs, in words
    train: tuple[Text, ...] = ()  # added to the arguments of its training
    evaluate: tuple[Text, ...] = ()  # added to those of its evaluation
    trained: str = ""  # an earlier variant whose training is evaluated, in place of one of its own
    weights: Text = "{train}/checkpoints/grpo"  # what is evaluated; without {train} nothing is trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """configs/ablations/*.py of rsagent_jax.ablate. {field}, {stage}, {train} and {eval} stand for what they name."""

    title: Text = "Ablation"  # of the page
    seed: Seed = 0  # of data, collection and training
    weights: str = ""  # the policy before training
    benchmark: Text = "test"  # its name in the table
    stages: tuple[RecipeStage, ...] = ()  # of all variants: data, collection, what they start from
    train_command: Text = "train.py"  # trains a variant
    train: tuple[Text, ...] = ()  # its arguments
    evaluate_command: Text = "evaluate.py"  # evaluates a variant
    evaluate: tuple[Text, ...] = ()  # its arguments, but for --weights
    variants: tuple[AblationVariant, ...] = ()  # in this order

    def conflicts(self) -> Iterator[str]:
        if len(self.variants) < 2:
            yield f"variants has {len(self.variants)}; an ablation compares two or more"
            return
        if taken := sorted({stage.name for stage in self.stages} & {*OWN}):
            yield f"stages.{taken[0]}: the name stands for a variant's own directory; give the stage another"
            return
        trains: list[str] = []
        for variant in self.variants:
            if variant.trained and variant.trained not in trains:
                said = f"is no earlier variant that is trained{closest(variant.trained, trains)}"
                yield f"variants.{variant.name}.trained: {variant.trained!r} {said}"
                return
            if variant.trained and variant.train:
                yield f"variants.{variant.name}: it is evaluated as {variant.trained} was trained; leave train empty"
            if trains_itself(variant):
                trains.append(variant.name)
        yield from recipe_of(self).conflicts()


def trains_itself(variant: AblationVariant) -> bool:
    return "{train}" in variant.weights and not variant.trained


def recipe_of(config: AblationConfig) -> RecipeConfig:
    """The stages of all variants."""
    stages = list(config.stages)
    for variant in config.variants:
        own = {"train": f"train-{variant.trained or variant.name}", "eval": f"eval-{variant.name}"}

        def named(*texts: str, own: dict[str, str] = own) -> tuple[str, ...]:
            for name in OWN:
                texts = tuple(text.replace(f"{{{name}}}", f"{{{own[name]}}}") for text in texts)
            return texts

        if trains_itself(variant):
            arguments = named(*config.train, *variant.train)
            stages.append(RecipeStage(name=own["train"], command=config.train_command, arguments=arguments))
        arguments = named(*config.evaluate, f"--weights={variant.weights}", *variant.evaluate)
        how = dict(command=config.evaluate_command, arguments=arguments, benchmark=config.benchmark)
        stages.append(RecipeStage(name=own["eval"], **how))
    return RecipeConfig(title=config.title, seed=config.seed, weights=config.weights, stages=tuple(stages))
