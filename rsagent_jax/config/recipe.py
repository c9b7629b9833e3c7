"""The fields of configs/reproduce_*.py, and the stages that they plan (rsagent_jax/reproduce.py runs them).

A stage is a command of this project. Its arguments name what it needs: `{refer}` is a field of the recipe, `{sft}` the
directory of an earlier stage, so the order of the stages and what each waits for are read off the arguments.
"""

import dataclasses
import hashlib
import json
import pathlib
import string
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from rsagent_jax.config import schema
from rsagent_jax.config.build import load_config_file, template
from rsagent_jax.config.import_path import closest, shipped
from rsagent_jax.config.ranges import Form, Seed, Text
from rsagent_jax.runtime.paths import open_path
from rsagent_jax.types import DataError

POLICIES = {"base": "base", "sft": "after SFT", "grpo": "after GRPO"}
SHARED = ("train.py", "evaluate.py", "rsagent_jax.collect", "rsagent_jax.doctor")  # the hosts of a slice share the work
CONFIGS = {
    "train.py": schema.TrainConfig,
    "evaluate.py": schema.EvalConfig,
    "rsagent_jax.collect": schema.CollectConfig,
    "rsagent_jax.problems": schema.ProblemsConfig,
}
BOUNDS = {"box": "oracle: true box", "best_of_three": "oracle: best of three masks", "clicks": "oracle: clicks"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeStage:
    """A command; <workdir>/<name> is the directory of what it leaves behind."""

    name: Annotated[str, Form(r"[a-z][\w+-]*", "a name for a directory, such as eval-sft")]
    command: Text  # train.py, evaluate.py, or a module such as rsagent_jax.collect
    arguments: tuple[Text, ...] = ()  # of the command; {field} of the recipe, {stage} = that one's directory
    more: tuple[Text, ...] = ()  # of the command as well, after those above: your own changes
    needs: tuple[Text, ...] = ()  # stages that must be done before, besides those that the arguments name
    given: str = ""  # a directory (gs:// too) that takes the place of this stage's, which is not run then
    all_hosts: bool = False  # a command of your own that joins the hosts of a slice, as train.py does
    benchmark: str = ""  # of evaluate.py: the row of the table that it makes
    row: Literal["", *POLICIES, *BOUNDS] = ""  # who is evaluated

    @property
    def names(self) -> list[str]:
        """What stands in braces in its arguments."""
        texts = (*self.arguments, *self.more)
        return [name for text in texts for _, name, *_ in string.Formatter().parse(text) if name is not None]

    @property
    def everywhere(self) -> bool:
        """Whether each host of a slice runs it, and not the first alone."""
        return self.all_hosts or self.command in SHARED


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """configs/reproduce_*.py of rsagent_jax.reproduce. A stage whose arguments name a field that is empty waits."""

    title: Text = "RSAgent-JAX"  # of the page
    seed: Seed = 0  # of data, collection and training
    weights: str = ""  # the policy before training: a Hugging Face directory, gs://…, or org/name on a hub
    slice: str = ""  # the TPU slice that trains: v6e-8, v5p-8, …
    refer: str = ""  # root of RefCOCO, RefCOCO+ and RefCOCOg (docs/data.md)
    reasonseg: str = ""  # root of ReasonSeg
    endpoint: str = ""  # of the model that writes problems and of the teacher, such as http://host:8000/v1
    endpoint_model: str = ""  # its name there
    sidecars: tuple[Text, ...] = ()  # addresses of the segmenter's side-cars
    stages: tuple[RecipeStage, ...] = ()  # in this order

    def conflicts(self) -> Iterator[str]:
        if not self.stages:
            yield "stages is empty"
        known = {field.name for field in dataclasses.fields(self)} - {"stages"}
        rows: dict[tuple[str, str], str] = {}
        for stage in self.stages:
            try:
                names = {*stage.names, *stage.needs}
            except ValueError as error:
                yield f"stages.{stage.name}.arguments: {error}; a brace itself is written twice"
                continue
            if stage.name in known:
                yield f"stages.{stage.name}: the name is taken by a field, or by another stage"
            known.add(stage.name)
            if (first := rows.setdefault((stage.benchmark, stage.row), stage.name)) != stage.name and stage.row:
                same = f"row {stage.row!r} of benchmark {stage.benchmark!r} is that of stages.{first}"
                yield f"stages.{stage.name}: {same}; leave one out, or evaluate it under another benchmark"
            if any(text.startswith("--shard") for text in (*stage.arguments, *stage.more)):
                yield f"stages.{stage.name}: --shard leaves a part to others; here a stage is done as a whole"
            for name in sorted(names - known):
                said = f"is neither a field nor this or an earlier stage{closest(name, known)}"
                yield f"stages.{stage.name}.arguments: {{{name}}} {said}"


@dataclasses.dataclass(frozen=True)
class Step:
    """A stage of a run."""

    stage: RecipeStage
    directory: pathlib.Path
    argv: tuple[str, ...]  # after `python`
    needs: dict[str, Self]  # stages
    lacks: tuple[str, ...]  # fields of the recipe that it needs and that are empty
    key: str  # of the command, its config and those of all that it builds upon


def plan_steps(config: RecipeConfig, workdir: pathlib.Path) -> dict[str, Step]:
    """What every stage runs, by its name and in the order of the recipe."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "stages"}
    lacking = {name for name, value in values.items() if value in ("", ())}
    steps: dict[str, Step] = {}
    for stage in config.stages:
        directory = open_path(stage.given) if stage.given else workdir / stage.name
        values[stage.name] = directory
        command = (shipped(stage.command),) if stage.command.endswith(".py") else ("-m", stage.command)
        argv = (*command, *(text.format_map(values) for text in (*stage.arguments, *stage.more)))
        named = () if stage.given else dict.fromkeys((*stage.names, *stage.needs))
        needs, lacks = ([name for name in named if name in group] for group in (steps, lacking))
        config = None if stage.given else config_says(stage.command, argv)
        made_of = [str(directory), argv, config, *(steps[name].key for name in needs)]
        key = hashlib.sha256(json.dumps(made_of, default=str).encode()).hexdigest()
        needed = {name: steps[name] for name in needs}
        steps[stage.name] = Step(stage, directory, argv, needed, tuple(lacks), key)
    return steps


def config_says(command: str, argv: Sequence[str]) -> Any:
    """What the file of --config says otherwise than the defaults of the command's config, so that a field of a later
    version changes nothing. None without one, and for one that cannot be read: the command says why."""
    files = [text.removeprefix("--config=") for text in argv if text.startswith("--config=")]
    try:
        config = load_config_file(files[-1]).to_dict() if files else None
    except DataError:
        return None
    return _changed(template(CONFIGS[command]).to_dict() if command in CONFIGS else {}, config)


def _changed(default: Any, value: Any) -> Any:
    """Of nested settings those that are not the default's."""
    if not isinstance(value, dict) or not isinstance(default, dict):
        return value
    names = sorted(name for name in {*default, *value} if default.get(name) != value.get(name))
    return {name: _changed(default.get(name), value.get(name)) for name in names}
