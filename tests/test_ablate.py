"""An ablation of cheap commands: what it runs, skips and says; what a broken variant leaves; the shipped ones."""

import importlib
import json
import pathlib

import pytest

from rsagent_jax.config.ablation import AblationConfig, AblationVariant, recipe_of, trains_itself
from rsagent_jax.config.build import build_config
from rsagent_jax.config.import_path import load_file
from rsagent_jax.config.recipe import RecipeStage, plan_steps
from rsagent_jax.evals.metrics import SampleResult
from rsagent_jax.runtime import command
from rsagent_jax.types import Status
from tests.refusals import refused
from tests.report.written import write_files

ROOT = pathlib.Path(__file__).parents[1]
# "Trains" by writing what it was told, "evaluates" by copying the figures of it; fails where it is told to.
FAKE = """
import pathlib, shutil, sys
what, out, *rest = sys.argv[1:]
with open(pathlib.Path(__file__).with_name("log"), "a") as log:
    print(what, pathlib.Path(out).name, *(pathlib.Path(r).name for r in rest), file=log)
if "--fail" in rest:
    sys.exit(4)
out = pathlib.Path(out)
out.mkdir(exist_ok=True)
if what == "train":
    (out / "made").write_text(rest[-1])
else:
    weights = pathlib.Path(next(r for r in rest if r.startswith("--weights=")).removeprefix("--weights="))
    source = rest[-1] if rest[-1].startswith("s") else (weights / "made").read_text()
    shutil.copytree(pathlib.Path(__file__).with_name("figures") / source, out, dirs_exist_ok=True)
"""
CONFIG = """
from ml_collections import ConfigDict
from rsagent_jax.config.ablation import AblationConfig
from rsagent_jax.config.build import template

def get_config():
    config = template(AblationConfig)
    config.title, config.benchmark = "Toy", "toy scenes"
    config.train_command = config.evaluate_command = {fake!r}
    config.train = ("train", "{{train}}", "{{data}}")
    config.evaluate = ("eval", "{{eval}}")
    config.stages = ConfigDict(dict(data=dict(command={fake!r}, arguments=("train", "{{data}}", "x"))))
    variants = dict(
        full=dict(says="all terms", train=("s50",), weights="{{train}}"),
        low=dict(says="no process reward", train=("s30",), weights="{{train}}"),
        short=dict(trained="full", evaluate=("s50-short",), weights="{{train}}"),
    )
    config.variants = ConfigDict(variants, sort_keys=False)
    return config
"""


@pytest.fixture
def ablation(tmp_path):
    for name, i, turns in (("s50", 50, 3), ("s30", 30, 3), ("s50-short", 50, 1)):
        results = [SampleResult(f"s{n}", i + n, 100, Status.FINISHED, turns, 0) for n in range(3)]
        write_files(tmp_path / "figures" / name, results, {"metric": {"unit": "sentence"}}, [])
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "ablation.py").write_text(CONFIG.format(fake=str(tmp_path / "fake.py")))
    return tmp_path


def ablate(ablation, *more) -> int:
    argv = [f"--config={ablation}/ablation.py", f"--workdir={ablation}/w", *more]
    return command.run_command("rsagent_jax.ablate", argv)


def log(ablation) -> list[str]:
    """What ran, and in which directory."""
    return [" ".join(line.split()[:2]) for line in (ablation / "log").read_text().splitlines()]


def test_variants_are_trained_evaluated_and_held_against_the_first(ablation, capfd):
    assert ablate(ablation) == 0
    made = ["train data", "train train-full", "eval eval-full", "train train-low", "eval eval-low", "eval eval-short"]
    assert log(ablation) == made
    head, _, full, low, short = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ablation / "w/table.md").read_text().splitlines()
        if line.startswith("|")
    ]
    assert head[:4] == ["variant", "what differs", "gIoU", "minus full, 95% interval"] and head[-1] == "n"
    assert full[:4] == ["full", "all terms", "0.510", ""]  # (50 + 51 + 52) / 300
    assert low[:4] == ["low", "no process reward", "0.310", "-0.200 [-0.200, -0.200] *"]
    assert short[2:4] == ["0.510", "+0.000 [+0.000, +0.000]"] and short[6:8] == ["1.00", "-2.000 [-2.000, -2.000] *"]
    said = capfd.readouterr().out
    assert "low minus full: gIoU -0.200 [-0.200, -0.200] (clear of zero)" in said
    assert "short minus full: gIoU +0.000 [+0.000, +0.000] (zero is inside: no difference shown)" in said
    variants = json.loads((ablation / "w/summary.json").read_text())["variants"]
    assert [v["giou_gain"] and round(v["giou_gain"]["value"], 3) for v in variants] == [None, -0.2, 0.0]
    page = (ablation / "w/report/index.html").read_text()
    assert "no process reward" in page and page.count("data:image/png") + page.count("data:image/svg") == 2
    assert ablate(ablation) == 0 and log(ablation) == made  # all of it is done
    assert ablate(ablation, "--only=report") == 0 and log(ablation) == made


def test_a_broken_variant_is_named_and_the_others_run(ablation, capfd):
    assert ablate(ablation, "--config.variants.low.train=('--fail',)") == 4
    assert "error: train-low failed with status 4; again: " in capfd.readouterr().err
    assert log(ablation)[-2:] == ["train train-low", "eval eval-short"]
    rows = json.loads((ablation / "w/summary.json").read_text())["variants"]
    assert [(row["name"], row["waits"]) for row in rows] == [
        ("full", ""), ("low", "train-low failed with status 4"), ("short", "")
    ]  # fmt: skip
    assert "train-low failed with status 4" in (ablation / "w/report/index.html").read_text()
    assert ablate(ablation) == 0  # mended: it alone is run
    assert log(ablation)[-2:] == ["train train-low", "eval eval-low"]


def test_without_the_first_nothing_is_held_against_anything(ablation, capfd):
    assert ablate(ablation, "--config.variants.full.evaluate=('--fail',)") == 4
    rows = json.loads((ablation / "w/summary.json").read_text())["variants"]
    assert [(row["giou"] is None, row["giou_gain"]) for row in rows] == [(True, None), (False, None), (False, None)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("settings.metric.unit", {"metric": {"unit": "reference"}}),
        ("segmenter", {"backend": "grabcut"}),
        ("row", "oracle: true box"),
    ],
)
def test_figures_by_other_rules_another_segmenter_or_player_are_not_compared(ablation, key, value):
    path = ablation / "figures/s30/results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key.partition(".")[0]: value}))
    assert ablate(ablation) == 0
    low = json.loads((ablation / "w/summary.json").read_text())["variants"][1]
    assert low["giou"] is None and low["giou_gain"] is None and f"differ in {key}" in low["waits"]


def built(*variants: AblationVariant, **more) -> AblationConfig:
    return build_config(AblationConfig, {"variants": variants, "train": ("{train}",), "evaluate": ("{eval}",), **more})


def test_lists_that_cannot_be_planned_are_refused():
    one, two = AblationVariant(name="one"), AblationVariant(name="two")
    refused("variants has 1; an ablation compares two or more", built, one)
    refused("'onne' is no earlier variant that is trained; did you mean one", built, one,
            AblationVariant(name="two", trained="onne"))  # fmt: skip
    refused("leave train empty", built, one, AblationVariant(name="two", trained="one", train=("--x",)))
    refused(r"\{nothing\} is neither a field nor", built, one, two, evaluate=("{nothing}",))
    refused("the name is taken", built, one, one)
    refused("stages.train: the name stands for", built, one, two, stages=(RecipeStage(name="train", command="x.py"),))


def test_a_variant_without_training_has_no_stage_of_it():
    config = built(AblationVariant(name="one"), AblationVariant(name="base", weights="{weights}"), weights="/base")
    steps = plan_steps(recipe_of(config), pathlib.Path("/w"))
    assert list(steps) == ["train-one", "eval-one", "eval-base"]
    assert steps["eval-one"].argv[-1] == "--weights=/w/train-one/checkpoints/grpo"
    assert steps["eval-base"].argv[-1] == "--weights=/base"


EVERYTHING = ROOT / "configs/ablations/all.py"
SHIPPED = sorted({*(ROOT / "configs/ablations").glob("[!_]*.py")} - {EVERYTHING})
VARIANTS = {"reward": 12, "turns": 5, "history": 3, "stages": 4, "group": 4, "objective": 7, "carry_over": 2}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_command_of_a_shipped_ablation_is_one_that_its_command_takes(path, tmp_path, monkeypatch):
    """Flags and overrides are parsed as the command would, with its config built and checked."""
    config = build_config(AblationConfig, load_file(path).get_config())
    assert len(config.variants) == VARIANTS[path.stem]
    monkeypatch.chdir(ROOT)
    for name, step in plan_steps(recipe_of(config), tmp_path).items():
        module, argv = (step.argv[1], step.argv[2:]) if step.argv[0] == "-m" else (step.argv[0], step.argv[1:])
        if name in ("data", "collect", "sft") and path.stem != "reward":
            continue  # the same in all
        assert not step.lacks, name
        main = (load_file(ROOT / module) if module.endswith(".py") else importlib.import_module(module)).main
        command.parse_arguments(main, argv)


def test_all_lists_at_once_train_the_recipe_once():
    config = build_config(AblationConfig, load_file(EVERYTHING).get_config())
    shared = ["reward", "turns", "history"]  # their recipe is a row, the others' is the first
    assert len(config.variants) == sum(VARIANTS.values()) - (len(VARIANTS) - len(shared))
    trained = [v for v in config.variants if trains_itself(v)]
    assert trained[0].name == "full" and sum(v.train == () for v in trained) == 1
    listed = [v for path in SHIPPED for v in build_config(AblationConfig, load_file(path).get_config()).variants]
    assert {v.train for v in trained} == {v.train for v in listed if trains_itself(v)}
    assert {v.trained for v in config.variants} == {"", "full"}


def test_the_help_names_the_shipped_ablations():
    known = {pathlib.Path(path).stem: cls for path, cls, _ in command.known_configs() if "ablations" in path}
    assert known == dict.fromkeys([*VARIANTS, EVERYTHING.stem], AblationConfig)
