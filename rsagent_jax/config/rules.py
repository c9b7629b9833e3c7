"""What fields of a config ask of each other: a class names its rules as `conflicts`, and config/build.py lists them.

Each function is a method of one class of config.py, `c`. It yields what is wrong, beginning with the name of a field of
that class. What takes data, weights or devices to know is rsagent_jax/rollout/startup.py's.
"""

from collections.abc import Iterator

from rsagent_jax.config.ranges import DATASETS, REFER

ORDER = ("sft", "grpo")
SIDE_CAR = ("checkpoint", "model", "device", "dtype", "multimask")  # options of a back end of our own
# Of a validation, that a best checkpoint may be chosen by.
FIGURES = ("giou", "ciou", "turns", "tool_error_rate", "first_iou", "recovery", "harm", "calls", "agreement")
SECURITY = ("token_file", "tls", "tls_ca")  # of a connection


def agent(c) -> Iterator[str]:
    if 0 < c.max_pixels < c.min_pixels:
        yield f"max_pixels must be at least min_pixels = {c.min_pixels}, got {c.max_pixels}"


def segmenter(c) -> Iterator[str]:
    connect = c.mode == "connect"
    if connect and not c.addresses:
        yield "addresses is empty, but mode is connect"
    if given := [name for name in (SIDE_CAR if connect else SECURITY) if getattr(c, name) != getattr(type(c), name)]:
        why = "the side-car's own command line decides" if connect else "only connect uses"
        yield f"mode is {c.mode}: {why} {', '.join(given)}"
    elif not connect and c.backend != "sam2":
        if given := [name for name in SIDE_CAR if getattr(c, name) != getattr(type(c), name)]:
            yield f"backend is {c.backend}: only sam2 has {', '.join(given)}"
    elif not connect and not c.checkpoint:
        yield "checkpoint is empty, but backend is sam2: give its .pt file (docs/sidecar.md), or random for a test"


def data(c) -> Iterator[str]:
    if c.layout == "tfds" and c.dataset == "grefcoco":
        yield "layout tfds has no grefcoco; use refer"
    if c.mix and c.limit:
        yield "limit does not reach into a mix; give its parts their own: mix.NAME.data.limit"
    for part in c.mix:
        if part.data.mix:
            yield f"mix.{part.name}: a mix inside a mix is not read; list its parts in the outer one"
    for name in c.exclude:
        first, *words = name.split("/")
        if first not in DATASETS or len(words) != (2 if first in REFER else 1) or not all(words):
            yield f"exclude: {name!r} is not of the form refcoco/unc/val, reasonseg/test or folder/test"


def mesh(c) -> Iterator[str]:
    if c.data == c.fsdp == -1:
        yield "data and fsdp are both -1; one of them takes what is left"


def sampling(c) -> Iterator[str]:
    if c.max_new_tokens >= c.context:
        yield f"context must be above max_new_tokens = {c.max_new_tokens}, got {c.context}"
    if c.lanes and c.slots % c.lanes:
        yield f"lanes must divide slots = {c.slots}, got {c.lanes}"


def policy(c) -> Iterator[str]:
    if c.backend == "openai" and not (c.remote.url and c.remote.model):
        yield "remote.url and remote.model are needed where backend is openai, such as http://host:8000/v1 and policy"


def lora(c) -> Iterator[str]:
    if c.rank and not c.targets:
        yield "targets names nothing to adapt; name some, or set rank = 0"


def own(c) -> Iterator[str]:
    if c.weights and c.tries > 1 and not c.sampling.temperature:
        yield "sampling.temperature is 0, so all tries are the same; raise it, or set tries = 1"


def collect_rules(c) -> Iterator[str]:
    if c.data.mix:
        yield "data.mix: samples of a mix come up more than once; collect from its parts"


def problems_rules(c) -> Iterator[str]:
    if c.data.mix:
        yield "data.mix: samples of a mix come up more than once; write for its parts"
    if c.min_words > c.max_words:
        yield f"max_words must be at least min_words = {c.min_words}, got {c.max_words}"


def segmenting(c) -> Iterator[str]:
    """What the OpenAI API has no word for."""
    for name in ("top_k", "stop_ids"):
        if c.policy.backend == "openai" and getattr(c.sampling, name):
            yield f"sampling.{name} is not in the API of policy.backend openai; leave it out"


def evaluation(c) -> Iterator[str]:
    yield from segmenting(c)
    if c.policy.backend == "openai" and c.bound.row == "untrained":
        yield "bound.row is untrained, but nobody knows which weights are behind policy.backend openai; use engine"
    if c.data.mix:
        yield "data.mix: samples of a mix come up more than once; evaluate its parts"


def train_rules(c) -> Iterator[str]:
    if c.policy.backend != "engine":
        yield f"policy.backend must be engine, got {c.policy.backend}: training needs the tokens that were drawn"
    if not c.stages:
        yield f"stages is empty; known are {', '.join(ORDER)}"
    if list(c.stages) != sorted(set(c.stages), key=ORDER.index):
        yield f"stages must be in the order {', '.join(ORDER)}, each once; got {', '.join(c.stages)}"
    for stage in dict.fromkeys(c.stages):
        settings = getattr(c, stage)
        if c.policy.lora.rank and settings.optim.freeze:
            yield (
                f"{stage}.optim.freeze and policy.lora: adapters are trained alone, everything else is frozen anyway;"
                " leave optim.freeze empty, or set policy.lora.rank = 0"
            )
        updates = settings.steps * (settings.updates if stage == "grpo" else 1)
        if 0 < updates < settings.optim.warmup_steps:
            warmup = settings.optim.warmup_steps
            yield f"{stage}.optim.warmup_steps must be at most the stage's {updates} updates, got {warmup}"
    if "grpo" in c.stages:
        yield from _grpo(c.grpo)
    if c.grpo.mock.trajectories and c.validation.sets:
        yield "grpo.mock.trajectories plays stored turns, which validation would measure; leave validation.sets empty"


def _grpo(c) -> Iterator[str]:
    if not c.reward:
        yield "grpo.reward has no groups"
    names = [group.name for group in c.reward]
    for name in dict.fromkeys(n for n in names if names.count(n) > 1):
        yield f"grpo.reward: group {name!r} appears more than once"
    if not c.sampling.temperature:
        yield "grpo.sampling.temperature must be above 0, got 0.0: the samples of a group would all be the same"
    for name in c.turn_credit:
        if name not in names:
            yield f"grpo.turn_credit: {name!r} is no group of grpo.reward, which has {', '.join(names)}"
    for group in (group for group in c.reward if group.name in c.turn_credit):
        for term in (term for term in group.terms if term.scope == "group"):
            yield f"grpo.turn_credit: {group.name!r} has {term.function} of scope group, which has no value by turn"
    if bool(c.surplus) != bool(c.max_staleness):
        yield (
            f"grpo.surplus and grpo.max_staleness go together, got {c.surplus} and {c.max_staleness}: groups in flight"
            " beyond prompts, and how many steps a group may take; 0 and 0 wait for all"
        )
    if c.surplus and c.refill:
        yield "grpo.refill needs surplus = 0: its rounds wait for their groups"
    if c.minibatches > c.prompts * c.group:
        most = c.prompts * c.group
        yield f"grpo.minibatches must be at most the {most} trajectories of a step, got {c.minibatches}"
    if c.advantage_scale != "none" and c.advantage == "zscore":
        scale = f"grpo.advantage_scale = {c.advantage_scale}"
        yield f"{scale} would divide a zscore again; set grpo.advantage to mean or loo"
    if c.sampling.context > c.batch.tokens:
        yield (
            f"grpo.batch.tokens must be at least grpo.sampling.context = {c.sampling.context}, got {c.batch.tokens}:"
            " a trajectory never spans rows"
        )


def validation(c) -> Iterator[str]:
    names = [s.name for s in c.sets]
    for name in dict.fromkeys(n for n in names if names.count(n) > 1):
        yield f"sets: {name!r} appears more than once"
    for s in c.sets:
        if s.data.mix:
            yield f"sets.{s.name}.data.mix: samples of a mix come up more than once; make each part a set"
    _, *words = c.keep_best.split("/")
    if words and (words[-1] not in FIGURES or len(words) > 2):
        yield f"keep_best: {c.keep_best!r} is no figure; known are val/ and val/SET/ with {', '.join(FIGURES)}"
    elif len(words) == 2 and words[0] not in names:
        yield f"keep_best: {c.keep_best!r} names no set; there are {', '.join(names) or 'none'}"
    if c.early_stop and not (c.sets and c.keep_best):
        yield "early_stop needs sets and keep_best: it counts validations without a new best"
