"""The one function that turns a config file into dataclasses: everything that is wrong, in one message."""

import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from rsagent_jax.config import (
    DEFAULT_REWARD,
    AgentConfig,
    BatchConfig,
    CollectConfig,
    EvalConfig,
    MeshConfig,
    RewardGroup,
    RewardTerm,
    SegmentConfig,
    TrainConfig,
    build,
    template,
    to_dict,
)
from rsagent_jax.types import DataError

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
    with pytest.raises(DataError) as error:
        build(cls, values)
    return str(error.value).split("\n  - ")


@pytest.mark.parametrize("cls", ALL)
def test_a_template_with_its_required_fields_set_builds_the_defaults(cls):
    required = {"policy": {"weights": "w"}} if cls is not CollectConfig else {"processor": "p"}
    assert ordered(build(cls, filled(cls))) == ordered(build(cls, required))


@pytest.mark.parametrize("cls", ALL)
def test_a_saved_config_builds_itself_again(cls):
    config = build(cls, filled(cls))
    assert build(cls, json.loads(json.dumps(to_dict(config)))) == config


def test_the_papers_numbers_are_the_defaults():
    c = build(TrainConfig, filled(TrainConfig))
    assert (c.sft.epochs, c.sft.optim.lr, c.sft.trajectories_per_step) == (2.0, 2e-5, 128)
    assert (c.grpo.prompts, c.grpo.group, c.grpo.optim.lr, c.agent.max_turns, c.agent.history_size) == (
        16,
        4,
        1e-6,
        8,
        384,
    )
    assert {g.name: g.weight for g in c.grpo.reward} == {"final": 1.0, "process": 0.5, "format": 0.2}
    assert build(CollectConfig, filled(CollectConfig)).filter.min_iou == 0.9


def test_what_a_config_file_sets_arrives_with_its_type():
    config = filled(TrainConfig)
    config.grpo.steps = 7
    config.grpo.batch = dict(rows=1, tokens=64, patches=32)
    config.sft.optim.lr = 1  # a whole number where a fraction is wanted
    config.sft.optim.freeze = ["vision", "merger"]
    config.mesh.tensor = 2
    c = build(TrainConfig, config)
    assert c.grpo.steps == 7 and c.grpo.batch == BatchConfig(rows=1, tokens=64, patches=32)
    assert c.sft.optim.lr == 1.0 and isinstance(c.sft.optim.lr, float)
    assert c.sft.optim.freeze == ("vision", "merger") and c.mesh == MeshConfig(tensor=2)
    assert c.sft.batch == BatchConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.seed = 1


def test_every_error_is_in_one_message_with_the_closest_field():
    found = messages(
        TrainConfig,
        {
            "polcy": {},
            "policy": {"weigths": "w", "dtype": 3},
            "grpo": {"stepz": 1, "batch": {"rows": "two"}, "sampling": 5},
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
        "stages must be a list (tuple[str, ...]), got 'sft'",
        "mesh.data must be int, got 1.5 (float)",
        "sft.optim.freeze[0] must be str, got 1 (int)",
    ]
    assert found[0] == f"config has {len(wanted)} problems:" and sorted(found[1:]) == sorted(wanted)


def test_one_error_alone_is_one_line_and_a_field_without_relatives_lists_the_known_ones():
    assert messages(CollectConfig, {}) == ["config: missing field processor (str)"]
    (message,) = messages(MeshConfig, {"qqq": 1})
    assert message == "config: unknown field qqq; known fields: data, fsdp, tensor"


def test_problems_found_before_are_listed_with_the_rest():
    with pytest.raises(DataError) as error:
        build(MeshConfig, {"data": "x"}, ["unknown field --config.q"])
    assert str(error.value).split("\n  - ") == [
        "config has 2 problems:",
        "unknown field --config.q",
        "data must be int, got 'x' (str)",
    ]


def test_reward_terms_are_reached_and_removed_by_name():
    config = filled(TrainConfig)
    config.grpo.reward.final.terms.final_iou.function = "mine:better"
    config.grpo.reward.process.weight = 2.0
    config.grpo.reward.process.terms.overshoot = None
    config.grpo.reward.format = None
    final, process = ordered(build(TrainConfig, config)).grpo.reward
    assert final == RewardGroup("final", 1.0, (RewardTerm("mine:better"),))
    assert process.weight == 2.0 and process.clip == (-1.0, 1.0)
    kept = {t.function: t.weight for t in DEFAULT_REWARD[1].terms if "overshoot" not in t.function}
    assert {t.function: t.weight for t in process.terms} == kept and len(kept) == 4


def test_a_new_reward_term_is_added_by_name():
    config = filled(TrainConfig)
    config.grpo.reward.format.terms.short = ConfigDict({"function": "mine:short", "weight": -1})
    (group,) = (g for g in build(TrainConfig, config).grpo.reward if g.name == "format")
    assert sorted(group.terms, key=str) == [RewardTerm("mine:short", -1.0), RewardTerm("rsagent_jax.rewards:format_ok")]


def test_what_is_wrong_in_a_reward_term_is_named_by_its_path():
    config = filled(TrainConfig)
    config.grpo.reward.final.terms.final_iou = ConfigDict({"weight": "heavy"})
    found = messages(TrainConfig, config)
    assert found[0] == "config has 2 problems:"
    assert sorted(found[1:]) == [
        "grpo.reward.final.terms.final_iou.weight must be float, got 'heavy' (str)",
        "missing field grpo.reward.final.terms.final_iou.function (str)",
    ]


def test_none_is_the_default_and_a_missing_value_is_said():
    config = filled(EvalConfig)
    config.policy.weights = None
    assert messages(EvalConfig, config) == ["config: missing field policy.weights (str)"]
    assert build(AgentConfig, {"max_turns": None}).max_turns == 8


def test_every_default_of_every_field_is_overridable_from_the_template():
    def leaves(values, prefix=""):
        for key, value in values.items():
            yield from leaves(value, f"{prefix}{key}.") if hasattr(value, "items") else [f"{prefix}{key}"]

    def fields(config, prefix=""):
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            if dataclasses.is_dataclass(value):
                yield from fields(value, f"{prefix}{f.name}.")
            elif f.name not in ("reward", "mix"):  # reached by the names of their items
                yield prefix + f.name

    names = set(leaves(template(TrainConfig)))
    assert set(fields(build(TrainConfig, filled(TrainConfig)))) <= names
    assert "grpo.reward.process.terms.call_cost.weight" in names
