"""The one function that turns a config file into dataclasses: everything that is wrong, in one message."""

import dataclasses
import json
import re
import typing

import pytest

from rsagent_jax.config import overrides, ranges
from rsagent_jax.config.build import build_config, template, to_dict
from rsagent_jax.config.data import MixPart
from rsagent_jax.config.ranges import hints
from rsagent_jax.config.reward import DEFAULT_REWARD, RewardGroup, RewardTerm
from rsagent_jax.config.schema import (
    AgentConfig,
    BatchConfig,
    CollectConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    PolicyConfig,
    ProblemsConfig,
    SegmentConfig,
    TrainConfig,
)
from tests.refusals import refused

ALL = [TrainConfig, EvalConfig, CollectConfig, SegmentConfig]


def filled(cls):
    """The template with its required fields set."""
    config = template(cls)
    if "policy" in config:
        config.policy.weights = "w"
    if "processor" in config:
        config.processor = "p"
    return config


def ordered(config):
    """Reward groups and terms by name: a ConfigDict lists its fields in alphabetical order."""
    if not isinstance(config, TrainConfig):
        return config
    groups = [dataclasses.replace(g, terms=tuple(sorted(g.terms, key=str))) for g in config.grpo.reward]
    reward = tuple(sorted(groups, key=lambda g: g.name))
    return dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, reward=reward))


def messages(cls, values) -> list[str]:
    return refused(".", build_config, cls, values).split("\n  - ")


@pytest.mark.parametrize("cls", ALL)
def test_a_template_with_its_required_fields_set_builds_the_defaults(cls):
    required = {"policy": {"weights": "w"}} if cls is not CollectConfig else {"processor": "p"}
    assert ordered(build_config(cls, filled(cls))) == ordered(build_config(cls, required))


@pytest.mark.parametrize("cls", ALL)
def test_a_saved_config_builds_itself_again(cls):
    config = build_config(cls, filled(cls))
    assert build_config(cls, json.loads(json.dumps(to_dict(config)))) == config


def test_the_papers_numbers_are_the_defaults():
    c = build_config(TrainConfig, filled(TrainConfig))
    assert (c.sft.epochs, c.sft.optim.lr, c.sft.trajectories_per_step) == (2.0, 2e-5, 128)
    assert (c.grpo.prompts, c.grpo.group, c.grpo.optim.lr) == (16, 4, 1e-6)
    assert (c.agent.max_turns, c.agent.history_size) == (8, 384)
    assert {g.name: g.weight for g in c.grpo.reward} == {"final": 1.0, "process": 0.5, "format": 0.2}
    assert build_config(CollectConfig, filled(CollectConfig)).filter.min_iou == 0.9


def test_what_a_config_file_sets_arrives_with_its_type():
    config = filled(TrainConfig)
    config.grpo.steps = 7
    config.grpo.batch = dict(rows=1, tokens=8192, patches=32)
    config.sft.optim.lr = 1  # a whole number where a fraction is wanted
    config.sft.optim.freeze = ["vision", "merger"]
    config.mesh.tensor = 2
    c = build_config(TrainConfig, config)
    assert c.grpo.steps == 7 and c.grpo.batch == BatchConfig(rows=1, tokens=8192, patches=32)
    assert c.sft.optim.lr == 1.0 and isinstance(c.sft.optim.lr, float)
    assert c.sft.optim.freeze == ("vision", "merger") and c.mesh == MeshConfig(tensor=2)
    assert c.sft.batch == BatchConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.seed = 1


def test_every_error_is_in_one_message_with_the_closest_field():
    reward = {"f": {"weight": 1.0, "terms": {"final_iou": {"weight": "heavy"}}}}
    found = messages(
        TrainConfig,
        {
            "polcy": {},
            "policy": {"weigths": "w", "dtype": 3},
            "grpo": {"stepz": 1, "batch": {"rows": "two"}, "sampling": 5, "reward": reward},
            "agent": {"max_turns": True},
            "stages": "sft",
            "mesh": {"data": 1.5},
            "sft": {"optim": {"freeze": [1]}},
        },
    )
    wanted = [
        "unknown field polcy; did you mean policy?",
        "unknown field policy.weigths; did you mean policy.weights?",
        "missing field policy.weights (str)",
        "policy.dtype must be str, got 3 (int)",
        "unknown field grpo.stepz; did you mean grpo.steps?",
        "grpo.batch.rows must be int, got 'two' (str)",
        "grpo.sampling must be a group of fields (SamplingConfig), got 5",
        "agent.max_turns must be int, got True (bool)",
        "stages must be a list (tuple[str, ...]), got 'sft'; write ('sft',)",
        "mesh.data must be int, got 1.5 (float)",
        "sft.optim.freeze[0] must be str, got 1 (int)",
        "grpo.reward.f.terms.final_iou.weight must be float, got 'heavy' (str)",
        "missing field grpo.reward.f.terms.final_iou.function (str)",
    ]
    assert found[0] == f"config has {len(wanted)} problems:" and sorted(found[1:]) == sorted(wanted)


def test_one_error_alone_is_one_line_and_a_field_without_relatives_lists_the_known_ones():
    assert messages(CollectConfig, {}) == ["config: missing field processor (str)"]
    assert messages(EvalConfig, {"policy": {"weights": None}}) == ["config: missing field policy.weights (str)"]
    (message,) = messages(MeshConfig, {"qqq": 1})
    assert message == "config: unknown field qqq; known fields: data, fsdp, tensor"


def test_every_default_of_every_field_is_overridable_from_the_template():
    def leaves(values, prefix=""):
        for key, value in values.items():
            yield from leaves(value, f"{prefix}{key}.") if hasattr(value, "items") else [f"{prefix}{key}"]

    def fields(config, prefix=""):
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            if dataclasses.is_dataclass(value):
                yield from fields(value, f"{prefix}{f.name}.")
            elif f.name not in ("reward", "mix", "sets"):  # reached by the names of their items
                yield prefix + f.name

    names = set(leaves(template(TrainConfig)))
    assert set(fields(build_config(TrainConfig, filled(TrainConfig)))) <= names
    assert "grpo.reward.process.terms.call_cost.weight" in names


def command_line(*argv: str, cls: type = TrainConfig, **fields):
    """The config of a template with `fields`, and the overrides of a command line."""
    config = filled(cls)
    config.update(fields)
    values = config.to_dict()
    pairs, rest = overrides.split_arguments(
        [f"--config.{a}" for a in argv], lambda name: ranges.field_type(cls, name.partition(".")[2]) is bool
    )
    assert not rest
    problems = overrides.put_overrides(pairs, {"config": values})
    return build_config(cls, values, problems)


# What was accepted, or met after hours, and what is said of it now: (overrides, the message).
BAD = [
    ("grpo.optim.learning_rate=1e-5", "unknown field --config.grpo.optim.learning_rate; known fields: b1, b2,"),
    ("lr=1e-5", "unknown field --config.lr; did you mean"),
    ("sft.optim.lr=abc", "sft.optim.lr must be a number, got 'abc'"),
    ('sft.optim.lr="1e-5"', "sft.optim.lr must be a number"),
    ("sft.optim.lr=nan", "sft.optim.lr must be above 0, got nan"),
    ("grpo.steps=2.5", "grpo.steps must be a whole number, got '2.5'"),
    ("grpo.steps=0", "grpo.steps must be at least 1, got 0"),
    ("sft.steps=-3", "sft.steps must be at least 0, got -3"),
    ("grpo.group=1", "grpo.group must be at least 2, got 1"),
    ("grpo.surplus=4", "grpo.surplus and grpo.max_staleness go together, got 4 and 0"),
    ("grpo.surplus=4 grpo.max_staleness=1 grpo.refill=2", "grpo.refill needs surplus = 0"),
    ("grpo.mock.trajectories=d validation.sets.v.data.split=val", "grpo.mock.trajectories plays stored turns"),
    ("grpo.minibatches=65", "grpo.minibatches must be at most the 64 trajectories of a step, got 65"),
    (
        "grpo.turn_credit=('proces',)",
        "grpo.turn_credit: 'proces' is no group of grpo.reward, which has final, format, process",
    ),
    ("grpo.advantage_scale=rewards", "grpo.advantage_scale = rewards would divide a zscore again"),
    ("grpo.sampling.temperature=0.0", "grpo.sampling.temperature must be above 0, got 0.0"),
    ("grpo.sampling.top_p=0.0", "grpo.sampling.top_p must be above 0 and at most 1, got 0.0"),
    ("grpo.batch.tokens=400", "grpo.batch.tokens must be at least grpo.sampling.context = 8192, got 400"),
    ("grpo.clip_low=2.0", "grpo.clip_low must be at least 0 and below 1, got 2.0"),
    ("grpo.kl=nan", "grpo.kl must be at least 0, got nan"),
    ("grpo.ratio=ppo", "grpo.ratio must be one of grpo, gspo, cispo, sapo, got 'ppo'"),
    ("grpo.ddof=5", "grpo.ddof must be at least 0 and at most 1, got 5"),
    ("sft.optim.warmup_steps=9 sft.steps=4", "sft.optim.warmup_steps must be at most the stage's 4 updates, got 9"),
    ("grpo.optim.warmup_steps=101", "grpo.optim.warmup_steps must be at most the stage's 100 updates, got 101"),
    ("agent.min_pixels=9 agent.max_pixels=8", "agent.max_pixels must be at least min_pixels = 9, got 8"),
    ("segmenter.backend=grabcat", "segmenter.backend must be grabcut, sam2 or module:factory"),
    ("segmenter.backend=sam2", "segmenter.checkpoint is empty, but backend is sam2"),
    ("segmenter.backend=sam2 segmenter.checkpoint=random segmenter.multimask=some", "segmenter.multimask must be one"),
    ("segmenter.checkpoint=x.pt", "segmenter.backend is grabcut: only sam2 has checkpoint"),
    ("segmenter.mode=connect", "segmenter.addresses is empty, but mode is connect"),
    ("segmenter.device=gpu", "segmenter.device must be cpu, cuda, cuda:1"),
    ("seed=99999999999999", "seed must be at least 0 and at most 4294967295"),  # jax folds it to 32 bits in silence
    ("stages=()", "stages is empty"),
    ("stages=sft", "stages must be a list, such as ('sft',)"),
    ("stages=('grpo','sft')", "stages must be in the order sft, grpo, each once; got grpo, sft"),
    ("stages=('sft','dpo')", "stages[1] must be one of sft, grpo, got 'dpo'"),
    ("policy.dtype=float8", "policy.dtype must be one of float32, bfloat16, got 'float8'"),
    ("policy.remat=maybe", "policy.remat must be auto, none, full, attention, selective, dots, save:NAMES or offload:"),
    ("policy.remat=save:qkv,mlp", "policy.remat must be"),
    ("policy.weights=", "policy.weights must be a text that is not empty, got ''"),
    ("agent.prompt=ful", "agent.prompt must be one of full, brief, got 'ful'; did you mean full?"),
    ("sft.optim.freeze=('visual',)", "sft.optim.freeze[0] must be one of vision, merger, decoder, embed, head"),
    ("sft.optim.freeze=vision", "sft.optim.freeze must be a list, such as ('vision',)"),
    (
        "policy.lora.targets=('gat',)",
        "targets[0] must be one of q, k, v, o, gate, up, down, got 'gat'; did you mean gate?",
    ),
    ("policy.lora.rank=2 policy.lora.targets=()", "policy.lora.targets names nothing to adapt"),
    (
        "policy.lora.rank=2 grpo.optim.freeze=('vision',)",
        "grpo.optim.freeze and policy.lora: adapters are trained alone",
    ),
    ("policy.lora.rank=2 sft.optim.freeze=('vision',)", "sft.optim.freeze and policy.lora: adapters are trained alone"),
    ("grpo.sampling.lanes=5", "grpo.sampling.lanes must divide slots = 64, got 5"),
    ("grpo.sampling.context=8", "grpo.sampling.context must be above max_new_tokens = 512, got 8"),
    ("grpo.sampling.kv_dtype=int3", "grpo.sampling.kv_dtype must be one of \"\", int8, bfloat16, float32, got 'int3'"),
    ("grpo.mask_overlong=yes", "grpo.mask_overlong must be true or false, got 'yes'"),
    ("grpo.data.dataset=refcoco2", "grpo.data.dataset must be one of refcoco,"),
    ("grpo.data.dataset=grefcoco grpo.data.layout=tfds", "grpo.data.layout tfds has no grefcoco"),
    ("grpo.data.exclude=('refcoco/val',)", "grpo.data.exclude: 'refcoco/val' is not of the form refcoco/unc/val"),
    ("mesh.data=0", "mesh.data must be -1 or at least 1, got 0"),
    ("mesh.data=-1", "mesh.data and fsdp are both -1"),
    ("profiler_port=70000", "profiler_port must be at least 0 and at most 65535, got 70000"),
    ("grpo.reward.final.weight=nan", "final.weight must be at least -1000000.0 and at most 1000000.0, got nan"),
    ("grpo.reward.final.clip=(1.0,-1.0)", "grpo.reward.final.clip must be (low, high) with low <= high"),
    ("grpo.reward.final.terms.final_iou=None", "grpo.reward.final.terms has no term"),
]


BAD_EVALUATION = [
    ("metric.ignore_policy=drop", "metric.ignore_policy must be one of excluded, target, background, got 'drop'"),
    *((f"metric.epsilon={e}", f"metric.epsilon must be at least 0 and at most 1, got {e}") for e in ("nan", "inf")),
    ("bound.row=circle", "bound.row must be one of \"\", box, best_of_three, clicks, untrained, got 'circle'"),
    ("data.mix.a.data.split=val", "data.mix: samples of a mix come up more than once; evaluate its parts"),
]  # fmt: skip
CASES = [(TrainConfig, *case) for case in BAD] + [(EvalConfig, *case) for case in BAD_EVALUATION]


@pytest.mark.parametrize(("cls", "overrides", "message"), CASES, ids=[overrides for _, overrides, _ in CASES])
def test_what_cannot_be_right_is_refused_with_its_field_and_range(cls, overrides, message):
    assert "problems" not in refused(re.escape(message), command_line, *overrides.split(" "), cls=cls)


def test_what_is_right_is_taken():
    c = command_line("sft.optim.lr=1e-5", "grpo.steps=1e3", "grpo.mask_overlong", "policy.remat=offload:qkv, mlp_up")
    assert (c.sft.optim.lr, c.grpo.steps, c.grpo.mask_overlong) == (1e-5, 1000, True)
    c = command_line(
        "policy.scan_layers=false", "stages=('grpo',)", "sft.optim.clip_norm=0", "mesh.fsdp=4", "mesh.data=-1"
    )
    assert (c.policy.scan_layers, c.stages, c.sft.optim.clip_norm, c.mesh.fsdp) == (False, ("grpo",), 0.0, 4)
    # what only a stage that is not run would mind
    assert command_line("stages=('sft',)", "grpo.minibatches=65").grpo.updates == 65
    assert command_line("agent.max_turns=None").agent.max_turns == 8
    assert build_config(AgentConfig, {"max_turns": None}).max_turns == 8


def test_all_problems_of_a_command_line_and_its_file_are_one_message():
    wrong = ("grpo.stpes=3", "sft.optim.lr=abc", "grpo.group=1")
    assert sorted(refused(".", command_line, *wrong, agent=dict(max_turns=0)).split("\n  - ")) == [
        "--config.sft.optim.lr=abc: sft.optim.lr must be a number, got 'abc'",
        "agent.max_turns must be at least 1, got 0",
        "config has 4 problems:",
        "grpo.group must be at least 2, got 1",
        "unknown field --config.grpo.stpes; did you mean --config.grpo.steps?",
    ]


def test_reward_terms_and_parts_of_a_mix_are_added_and_removed_on_the_command_line():
    terms = "grpo.reward.process.terms"
    c = command_line(
        f"{terms}.mine.function=my_rewards.py:f", f"{terms}.mine.weight=0.3", f"{terms}.mine.arguments.low=1",
        f"{terms}.mine.arguments.words=('a','b')", f"{terms}.call_cost=None", "grpo.reward.format=None",
        "grpo.reward.bonus.weight=2", "grpo.reward.bonus.terms.b.function=m:b",
        "grpo.data.mix.one.data.dataset=reasonseg", "grpo.data.mix.one.weight=2", "grpo.reward.process.weight=2",
        "grpo.reward.final.terms.final_iou.function=mine:better",
    )  # fmt: skip
    groups = {g.name: g for g in c.grpo.reward}
    assert set(groups) == {"final", "process", "bonus"}
    process = {t.name: t for t in groups["process"].terms}
    mine = RewardTerm("my_rewards.py:f", 0.3, (("low", 1), ("words", ("a", "b"))))
    assert process["mine"] == mine and "call_cost" not in process and len(process) == 5
    assert all(process[t.short] == t for t in DEFAULT_REWARD[1].terms if t.short != "call_cost")
    assert groups["process"].weight == 2.0 and groups["process"].clip == (-1.0, 1.0)
    assert groups["final"] == RewardGroup("final", 1.0, (RewardTerm("mine:better"),))
    assert groups["bonus"] == RewardGroup("bonus", 2.0, (RewardTerm("m:b"),))
    assert [(p.name, p.weight, p.data.dataset, p.data.split) for p in c.grpo.data.mix] == [
        ("one", 2.0, "reasonseg", "train")
    ]
    assert build_config(TrainConfig, json.loads(json.dumps(to_dict(c)))) == c


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("final.terms.final_iuo.weight=2", "did you mean grpo.reward.final.terms.final_iou?"),
        ("final.terms.final_iuo=None", "unknown field --config.grpo.reward.final.terms.final_iuo; did you mean"),
        ("proces.weight=2", "did you mean grpo.reward.process?"),
        ("final.terms.mine.functon=m:f", "did you mean --config.grpo.reward.final.terms.mine.function?"),
        ("final.terms.final_iou.arguments.x={}", "final_iou.arguments.x must be a number, text, bool or a list"),
        ("final.terms.final_iou.function=mine", "must be module:function or file.py:function"),
    ],
)
def test_a_misspelt_item_is_no_new_one(override, message):
    refused(re.escape(message), command_line, f"grpo.reward.{override}")


def test_every_number_and_word_of_every_config_has_its_range():
    """A field that is declared as a bare int or float has none. Free texts are paths, names and addresses."""
    free = {"str", "bool"}

    def bare(cls):
        for name, hint in hints(cls).items():
            item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
            if dataclasses.is_dataclass(item):
                yield from bare(item) if item is not cls and (cls, item) != (MixPart, DataConfig) else ()
            elif hint != ranges.Arguments and item in (int, float):
                yield f"{cls.__name__}.{name}"
            else:
                assert typing.get_origin(item) or item.__name__ in free or hint == ranges.Arguments, name

    assert [name for cls in (*ALL, ProblemsConfig) for name in bare(cls)] == []


def test_the_words_of_the_config_are_those_of_the_code():
    from rsagent_jax.agent.prompts import STYLES
    from rsagent_jax.evals import bounds
    from rsagent_jax.models.qwen25_vl.compute import NAMES, REMAT
    from rsagent_jax.train.state import PARTS
    from sam_bridge.spawn import MODES

    def words(path: str) -> set[str]:
        hint = TrainConfig if not path.startswith("bound") else EvalConfig
        for part in path.split("."):
            hint = hints(hint)[part]
        hint = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        return set(typing.get_args(hint))

    for path, known in {
        "agent.prompt": STYLES, "sft.optim.freeze": PARTS, "segmenter.mode": MODES,
        "bound.row": ("", *bounds.ORACLES, bounds.UNTRAINED),
    }.items():  # fmt: skip
        assert words(path) == set(known), path
    (remat,) = typing.get_type_hints(PolicyConfig, include_extras=True)["remat"].__metadata__
    assert all(
        policy in remat for policy in (*REMAT, *(f"save:{name}" for name in NAMES), f"offload:{','.join(NAMES)}")
    )
    assert "save:" not in remat and "save:nothing" not in remat


def test_arguments_are_given_by_name_and_no_number_is_too_long_to_be_refused():
    for wrong in (5, (1, 2)):
        config = filled(TrainConfig).to_dict()
        config["grpo"]["reward"]["final"]["terms"]["final_iou"]["arguments"] = wrong
        refused(r"arguments are given by name, as in .*arguments\.NAME=value", build_config, TrainConfig, config)
    config = filled(TrainConfig).to_dict() | {"seed": 10**400}
    refused("seed must be at least 0 and at most 4294967295", build_config, TrainConfig, config)
