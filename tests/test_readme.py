"""What README and quickstart page tell a user to paste works, and what they say of commands and folders is true."""

import dataclasses
import pathlib
import re
import shlex
import sys
import types

import numpy as np
import pytest

from configs import collect_quickstart, eval_quickstart, quickstart, reproduce_quickstart
from configs.grpo_tpu import get_config as get_tpu_config
from rsagent_jax.agent.budget import image_sizes
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config.build import build_config, to_dict
from rsagent_jax.config.recipe import RecipeConfig, plan_steps
from rsagent_jax.config.schema import AgentConfig, TrainConfig
from rsagent_jax.rewards import make_scorer
from rsagent_jax.runtime import command
from rsagent_jax.tiny import scenes, synthetic
from rsagent_jax.train import run_identity
from rsagent_jax.types import Sample, Status, Trajectory

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")


def block(after: str, language: str, page: str = README) -> str:
    """The first fenced block of `language` after a heading."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page.split(after, 1)[1], re.DOTALL | re.MULTILINE)
    return next(text for found, text in fences if found == language)


def train_flags(argv: list[str]) -> dict:
    """What train.py is called with."""

    def main(config: TrainConfig, *, workdir: str = ""):
        pass

    return command.parse_arguments(main, argv)[1]


UPPER = np.arange(100).reshape(10, 10) < 50


def parts(groups, final: np.ndarray) -> dict[str, float]:
    """What the reward says of a mask where the upper half of 10 x 10 pixels is meant."""
    trajectory = Trajectory("s", 0, "it", (), (), final, None, Status.FINISHED, *[np.zeros(0)] * 5, ())
    (reward,) = make_scorer(groups)([[trajectory]], [Sample("s", np.zeros((10, 10, 3), np.uint8), "it", UPPER)])
    return reward.parts


def test_the_pasted_reward_of_the_readme_is_what_the_named_override_trains_with(tmp_path, monkeypatch):
    code = block("## Swap a reward", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.setattr(sys, "path", list(sys.path))
    argv = shlex.split(block("## Swap a reward", "").replace("\\\n", " "))
    override = next(a for a in argv if a.startswith("--config.grpo.reward"))
    config = f"--config={ROOT}/configs/quickstart.py"
    monkeypatch.chdir(tmp_path)
    groups = train_flags([config, override])["config"].grpo.reward
    assert "my_rewards.py:boundary_bonus" in str(groups)
    pixels = np.arange(100).reshape(10, 10)
    assert parts(groups, pixels < 49)["final"] == 1.0  # IoU 0.98, above the 0.95 of the example
    assert parts(groups, pixels < 40)["final"] == 0.0  # IoU 0.8


def test_the_segment_examples_ask_for_what_is_there_and_for_what_is_not():
    """By the scene's own truth: the first names one object, alone, and the second nothing."""
    makefile, recipe = ((ROOT / name).read_text() for name in ("Makefile", "configs/reproduce_quickstart.py"))
    command = block("## Try it on a picture", "", QUICKSTART).replace("\\\n", " ")
    asked = [shlex.split(line)[3:5] for line in command.splitlines()]
    assert " ".join(command.splitlines()[0].split()) in " ".join(README.replace("\\\n", " ").split())
    (present, absent), (image_id,) = [q for _, q in asked], {int(re.search(r"(\d+)\.jpg$", p)[1]) for p, _ in asked}
    number, index = divmod(image_id - 1, 10_000_000)
    split = synthetic.SPLITS[number]
    assert split != "train" and index < int(re.search(rf"--{split}=(\d+)", recipe)[1])
    assert re.search(r"^SEED \?= 0$", makefile, re.MULTILINE) and "scene of seed 0" in QUICKSTART
    config = scenes.SceneConfig()
    scene, references = synthetic.scene_at(0, split, index, 1, config, scenes.load_photos())
    texts = {text: list(reference.objects) for reference in references for text in reference.texts}
    assert scenes.objects_described(scene.objects, present) == texts[present]
    assert scenes.objects_described(scene.objects, absent) == [] and texts[absent] == []


def test_the_words_that_the_demos_page_lists_are_those_of_the_scenes():
    text = " ".join((ROOT / "docs" / "demo.md").read_text(encoding="utf-8").split())
    assert f"Six colours ({', '.join(scenes.COLORS)}), four shapes ({', '.join(scenes.SHAPES)})" in text
    assert (len(scenes.COLORS), len(scenes.SHAPES), tuple(scenes.SIZES)) == (6, 4, ("small", "large"))
    assert f"({', '.join(scenes.RELATIONS)}; {', '.join(scenes.SUPERLATIVES)})" in text
    config = scenes.SceneConfig()
    assert f"{config.size} x {config.size} pixels with {config.min_objects} to {config.max_objects} flat shapes" in text


REWARDS = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(text.replace("\\\n", " "))
    for text in re.findall(r"^```\n(python train.py.*?)^```", REWARDS, re.DOTALL | re.MULTILINE)
    if "boundary_bonus" in text
]


@pytest.mark.parametrize("argv", COMMANDS, ids=[argv[-1] for argv in COMMANDS])
def test_the_commands_of_the_rewards_page_make_a_reward(argv, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(block("## A term of your own", "python", REWARDS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    flags = train_flags(argv[2:])
    groups = flags["config"].grpo.reward
    assert flags["workdir"] and "my_rewards.py:boundary_bonus" in str(groups)
    assert [value for name, value in parts(groups, UPPER).items() if name.endswith("/boundary_bonus")] == [1.0]


def test_the_judge_of_the_rewards_page_is_a_term():
    flags = train_flags(shlex.split(block("## A term of a group", "", REWARDS).replace("\\\n", " "))[2:])
    groups = flags["config"].grpo.reward
    assert callable(make_scorer(groups)) and groups[-1].terms[0].deadline_s == 120.0
    assert flags["config"].grpo.on_reward_error == "drop"


def test_the_commands_of_the_readme_for_a_pod_can_be_run_one_after_the_other(tmp_path):
    """GRPO goes on from SFT's checkpoint, in a directory that belongs to no other run."""
    text = block("## Train on a TPU pod", "").replace("\\\n", " ")
    lines = [shlex.split(line.partition("#")[0]) for line in text.splitlines() if "--workdir" in line]
    sft, grpo = (train_flags([f"--config={ROOT}/{argv[2].partition('=')[2]}", *argv[3:]]) for argv in lines)
    there, here = ({"saved": {}, "config": to_dict(flags["config"])} for flags in (sft, grpo))
    assert run_identity.refused(there["config"], here["config"], ["sft"])  # what one directory for both would be told
    assert sft["workdir"] != grpo["workdir"]
    assert grpo["config"].policy.weights == f"{sft['workdir']}/checkpoints/sft"


def test_make_takes_the_pythons_that_the_readme_names():
    (condition,) = re.findall(r"sys\.exit\((.*)\)' ", (ROOT / "Makefile").read_text())
    refuses = lambda minor: eval(condition, {"sys": types.SimpleNamespace(version_info=(3, minor, 1))})  # noqa: E731
    assert "Python 3.11 to 3.13" in README
    assert [minor for minor in range(9, 16) if not refuses(minor)] == [11, 12, 13]


def test_what_the_pages_train_with_is_what_the_quickstart_leaves_behind():
    steps = plan_steps(
        build_config(RecipeConfig, reproduce_quickstart.get_config().to_dict()), pathlib.Path("runs/quickstart")
    )
    data, collected = (str(steps[name].directory) for name in ("data", "collect"))
    config = quickstart.get_config()
    assert (config.sft.trajectories, config.grpo.data.root) == (collected, data)
    assert eval_quickstart.get_config().data.root == collect_quickstart.get_config().data.root == data
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"=(runs/[\w-]+/(?:data|collect|train))\b", text))
    assert named <= {data, collected, str(steps["train"].directory)}, named


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_config_and_module_that_the_pages_name_exists():
    assert len(COMMANDS) == 3
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in set(re.findall(r"--config=(configs/\w+\.py)", text)):
        assert (ROOT / name).exists(), name
    for module in set(re.findall(r"python -m ((?:rsagent_jax|sam_bridge)[\w.]*\w)", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (page.parent / link).exists()]


def test_the_image_budgets_of_the_architecture_page_are_those_of_the_code():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    images = PixelLimits(factor=28, min_pixels=3_136, max_pixels=12_845_056)
    shown = [("1316 x 728", 1_222, (1080, 1920), 1_003_520), ("980 x 980", 1_225, (2000, 2000), 1_003_520)]
    for size, tokens, image, limit in shown:
        (h, w), (oh, ow) = image_sizes(AgentConfig(), image, dataclasses.replace(images, max_pixels=limit), images)
        assert f"{w} x {h}" == size in text and h * w // 784 == tokens and f"{tokens:,}" in text
        assert f"{ow} x {oh}" in text and str(oh * ow // 784) in text
    assert get_tpu_config().agent.max_pixels == 1_003_520 and "1,003,520" in text
    for image, tokens in (((1080, 1920), "2,691"), ((2000, 2000), "5,041")):
        (h, w), _ = image_sizes(AgentConfig(), image, images, images)
        assert f"{h * w // 784:,}" == tokens in text
