"""The recipe: what a stage runs, what is skipped, what a failure or a kill leaves, and that the table is the same."""

import dataclasses
import importlib
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from rsagent_jax.config.build import build_config
from rsagent_jax.config.recipe import RecipeConfig, RecipeStage, plan_steps
from rsagent_jax.evals.metrics import SampleResult
from rsagent_jax.report.reproduction import PAPER
from rsagent_jax.runtime import command
from rsagent_jax.runtime.hosts import Hosts
from rsagent_jax.types import Status
from tests.refusals import refused
from tests.report.written import write_files, write_lines

ROOT = pathlib.Path(__file__).parents[1]
# Does what the real commands do: it leaves files, goes on with those that are missing, and can be killed in between.
FAKE = """
import os, pathlib, shutil, signal, sys
source, out, *needed = (pathlib.Path(text) for text in sys.argv[1:] if text[:2] != "--")
if not all((path / "a").exists() for path in needed) or not source.exists():
    sys.exit(3)
out.mkdir(exist_ok=True)
for path in sorted(source.iterdir()):
    if not (out / path.name).exists():
        shutil.copy(path, out)
        with open(source.parent / "log", "a") as log:
            print(out.name, path.name, file=log)
        kill = source.parent / f"kill-{out.name}"
        if kill.exists():
            kill.unlink()
            os.killpg(0, signal.SIGKILL)
"""
STAGES = ("data", "sft", "eval-base", "eval-sft", "eval-box")
RECIPE = """
from ml_collections import ConfigDict
from rsagent_jax.config.build import template
from rsagent_jax.config.recipe import RecipeConfig

FAKE = {fake!r}
def get_config():
    config = template(RecipeConfig)
    stages = dict(
        data=dict(command=FAKE, arguments=("{src}/data", "{{data}}")),
        sft=dict(command=FAKE, arguments=("{src}/train", "{{sft}}", "{{data}}")),
    )
    for row, needed in dict(base="data", sft="sft", box="data").items():
        arguments = (f"{src}/{{row}}", f"{{{{eval-{{row}}}}}}", f"{{{{{{needed}}}}}}")
        stages[f"eval-{{row}}"] = dict(command=FAKE, arguments=arguments, benchmark="reasonseg/test", row=row)
    config.stages = ConfigDict(stages, sort_keys=False)
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe of stages that copy files, as a config file."""
    source = tmp_path / "src"
    for name in ("data", "train"):
        (source / name).mkdir(parents=True)
        write_lines(source / name / "a", [{}])
    write_lines(source / "train" / "metrics.jsonl", [{"stage": "sft", "step": 1, "loss": 1.0}])
    for name, i in (("base", 10), ("sft", 40), ("box", 80)):
        results = [SampleResult(f"s{n}", i + n, 100, Status.FINISHED, 2, 0) for n in range(3)]
        write_files(source / name, results, {"metric": {"unit": "sentence"}}, [], benchmark="reasonseg/test")
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "recipe.py").write_text(RECIPE.format(fake=str(tmp_path / "fake.py"), src=source))
    return tmp_path


def argv(recipe, *more):
    return [f"--config={recipe}/recipe.py", f"--workdir={recipe}/w", *more]


def reproduce(recipe, *more) -> int:
    return command.run_command("rsagent_jax.reproduce", argv(recipe, *more))


def log(recipe) -> list[str]:
    """(stage, file) of every file that a stage has made, in their order."""
    return (recipe / "src/log").read_text().splitlines()


@pytest.mark.slow
def test_a_kill_in_any_stage_and_the_same_command_again_give_the_same_table(recipe):
    assert reproduce(recipe) == 0
    names = ("table.md", "summary.json", "report/index.html")
    whole, made = [(recipe / "w" / name).read_text() for name in names], sorted(log(recipe))
    for killed in STAGES:
        (recipe / "w").rename(recipe / f"before-{killed}")
        (recipe / "src/log").unlink()
        (recipe / f"src/kill-{killed}").touch()
        start = [sys.executable, "-m", "rsagent_jax.reproduce", *argv(recipe)]
        done = subprocess.run(start, cwd=ROOT, start_new_session=True, capture_output=True)
        assert done.returncode == -9 and not (recipe / "w/table.md").exists()
        assert reproduce(recipe) == 0
        assert sorted(log(recipe)) == made  # nothing lost, nothing done twice
        table, summary, page = ((recipe / "w" / name).read_text() for name in names)
        assert table == whole[0]
        assert {**json.loads(summary), "seconds": 0} == {**json.loads(whole[1]), "seconds": 0}
        assert len(page) == pytest.approx(len(whole[2]), abs=100)  # it says how long it took


def test_a_finished_stage_is_skipped_and_only_runs_what_it_names(recipe, capfd):
    assert reproduce(recipe) == 0
    out = capfd.readouterr().out
    line = f"python {recipe}/fake.py {recipe}/src/sft {recipe}/w/eval-sft {recipe}/w/sft"
    assert f"\n== 4/5 eval-sft\n{line}\n" in out and out.count("\npython ") == 5
    assert subprocess.run([sys.executable, *line.split()[1:]]).returncode == 0  # by hand
    made = log(recipe)
    assert reproduce(recipe) == 0 and log(recipe) == made
    assert [part.split("\n")[0] for part in capfd.readouterr().out.split("== ")[1:]] == [
        *(f"{k}/5 {name}: done" for k, name in enumerate(STAGES, 1)), "report"
    ]  # fmt: skip
    before = json.loads((recipe / "w/sft/done.json").read_text())["seconds"]
    assert reproduce(recipe, "--only=eval-box, sft") == 0
    assert json.loads((recipe / "w/sft/done.json").read_text())["seconds"] > before > 0  # both times
    assert [s.split()[1] for s in capfd.readouterr().out.split("== ")[1:-1]] == ["sft", "eval-box"]
    assert reproduce(recipe, "--only=report") == 0 and "fake.py" not in capfd.readouterr().out
    # another command, and what builds upon it
    assert reproduce(recipe, f"--config.stages.sft.more=('{recipe}/w/data',)") == 0
    assert [s.split()[1] for s in capfd.readouterr().out.split("== ")[1:-1] if "done" not in s] == ["sft", "eval-sft"]
    assert reproduce(recipe, "--only=evl-box") == 2
    assert "there is no stage 'evl-box'; did you mean eval-box?" in capfd.readouterr().err


def remade(capfd) -> list[str]:
    return [s.split()[1] for s in capfd.readouterr().out.split("== ")[1:-1] if ": done" not in s]


def test_what_builds_upon_a_stage_that_was_made_again_is_made_again(recipe, capfd):
    assert reproduce(recipe) == 0
    shutil.rmtree(recipe / "w/sft")
    capfd.readouterr()
    assert reproduce(recipe, "--only=sft") == 0 and remade(capfd) == ["sft"]
    rows = json.loads((recipe / "w/summary.json").read_text())["rows"]
    assert [(row["row"], row["n"]) for row in rows] == [("base", 3), ("sft", None), ("box", 3)]
    assert rows[1]["waits"].startswith("not run yet since its command")
    assert reproduce(recipe) == 0 and remade(capfd) == ["eval-sft"]
    shutil.rmtree(recipe / "w/data")  # two stages before the evaluation of what was trained on it
    assert reproduce(recipe, "--only=data") == 0
    rows = json.loads((recipe / "w/summary.json").read_text())["rows"]
    assert [row["n"] for row in rows if row["row"] == "sft"] == [None]


def test_a_stage_whose_config_file_says_something_else_is_made_again(recipe, capfd):
    (recipe / "own.py").write_text(
        "import pathlib\nfrom ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'lr': pathlib.Path(__file__).with_name('lr').read_text()})"
    )
    (recipe / "lr").write_text("1")
    more = f"--config.stages.eval-box.more=('{recipe}/w/data','--config={recipe}/own.py')"
    assert reproduce(recipe, more) == 0 and "eval-box" in remade(capfd)
    assert reproduce(recipe, more) == 0 and remade(capfd) == []
    (recipe / "lr").write_text("2")
    assert reproduce(recipe, more) == 0 and remade(capfd) == ["eval-box"]


def test_the_table_holds_the_papers_figure_and_ours(recipe, capfd):
    reproduce(recipe)
    head, _, base, sft, box = [line.split(" | ") for line in (recipe / "w/table.md").read_text().splitlines()[2:7]]
    assert (head[0], head[1:8]) == (
        "| benchmark", "policy|gIoU|95% interval|paper cIoU|cIoU|95% interval|turns".split("|")
    )  # fmt: skip
    assert base[1:3] + base[4:6] == ["base", "0.110", "0.301 [2]", "0.110"]  # (10 + 11 + 12) / 300
    assert sft[1:3] + sft[4:6] == ["after SFT", "0.410", "0.554 [2]", "0.410"]
    assert box[1:3] + box[4:6] == ["oracle: true box", "0.810", "", "0.810"]
    assert base[-2] == "LISA's rules, unit sentence, failure_policy zero" and base[-1].startswith(
        f"python {recipe}/fake.py "
    )
    assert "after SFT over base: +0.300 gIoU, 95% interval +0.300 to +0.300 (clear of zero)" in capfd.readouterr().out


def change_results(recipe, stage, change) -> dict:
    """The summary after results.json of a stage's source was changed."""
    path = recipe / "src" / stage / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert reproduce(recipe) == 0
    return json.loads((recipe / "w/summary.json").read_text())


def test_evaluations_with_other_segmenters_or_rules_have_no_gain(recipe, capfd):
    (recipe / "src/base").rename(recipe / "src/grpo")  # of two trainings, one
    settings = {"metric": {"unit": "all"}}
    text = (recipe / "recipe.py").read_text().replace('dict(base="data"', 'dict(grpo="data"')
    (recipe / "recipe.py").write_text(text)
    summary = change_results(recipe, "sft", {"segmenter": {"backend": "grabcut"}, "settings": settings})
    assert summary["grpo"] and summary["sft"] and summary["gain"] is summary["gain_ci95"] is None
    said = capfd.readouterr().out
    assert "after GRPO over after SFT: " in said and "differ in settings.metric.unit" in said
    assert "segmenter.backend: 'grabcut' and None" in said and "such figures cannot be compared" in said


@pytest.mark.parametrize("change", [{"benchmark": "toy"}, {"settings": {"bound": {"row": "box"}}}])
def test_an_evaluation_of_something_else_is_no_row(recipe, change):
    rows = change_results(recipe, "sft", change)["rows"]
    assert [row["n"] for row in rows] == [3, None, 3] and "is an evaluation of benchmark" in rows[1]["waits"]


def test_a_stage_that_fails_leaves_its_row_empty_and_the_others_go_on(recipe, capfd):
    (recipe / "src/train").rename(recipe / "src/lost")
    assert reproduce(recipe) == 3
    said = capfd.readouterr()
    again = f"python {recipe}/fake.py {recipe}/src/train {recipe}/w/sft {recipe}/w/data"
    assert said.err == f"error: sft failed with status 3; again: {again}\n"
    assert "== eval-sft: waits for sft\n" in said.out
    rows = json.loads((recipe / "w/summary.json").read_text())["rows"]
    assert [(row["row"], row["n"], row["waits"]) for row in rows] == [
        ("base", 3, ""), ("sft", None, "waits for sft"), ("box", 3, "")
    ]  # fmt: skip
    page = (recipe / "w/report/index.html").read_text()
    assert "failed with status 3" in page and ">oracle: true box</td>" in page
    (recipe / "src/lost").rename(recipe / "src/train")
    assert reproduce(recipe) == 0
    assert [row["n"] for row in json.loads((recipe / "w/summary.json").read_text())["rows"]] == [3, 3, 3]


def stages(*items: RecipeStage) -> RecipeConfig:
    return build_config(RecipeConfig, {"stages": items})


def test_what_a_stage_names_must_be_there():
    one = RecipeStage(name="one", command="x.py", arguments=("{two}", "{one}", "{{}}"))
    refused(r"stages.one.arguments: \{two\} is neither a field nor this or an earlier stage", stages, one)
    two = RecipeStage(name="two", command="x.py", arguments=("{on}/a",))
    refused(r"\{on\} is .*; did you mean one\?", stages, dataclasses.replace(one, arguments=()), two)
    refused("a brace itself is written twice", stages, dataclasses.replace(one, arguments=("{",)))
    refused("stages.seed: the name is taken", stages, dataclasses.replace(two, name="seed", arguments=()))
    refused("stages is empty", stages)
    rows = [RecipeStage(name=name, command="x.py", benchmark="b", row="grpo") for name in ("eval-a", "eval-b")]
    refused("stages.eval-b: row 'grpo' of benchmark 'b' is that of stages.eval-a", stages, *rows)


def test_a_stage_is_done_as_a_whole():
    part = RecipeStage(name="a", command="evaluate.py", more=("--shard=0/4",))
    refused("stages.a: --shard leaves a part to others", stages, part)


def test_empty_fields_are_waited_for_and_given_directories_are_not_made(tmp_path):
    a = RecipeStage(name="a", command="x.py", arguments=("{refer}",))
    b = RecipeStage(name="b", command="x.py", arguments=("{a}/c", "{b}"), needs=("a",))
    steps = plan_steps(stages(a, b), tmp_path)
    assert (steps["a"].lacks, (*steps["b"].needs,), steps["b"].argv) == (
        ("refer",), ("a",), ("x.py", f"{tmp_path}/a/c", f"{tmp_path}/b")
    )  # fmt: skip
    given = plan_steps(stages(dataclasses.replace(a, given="/there"), b), tmp_path)
    assert given["a"].lacks == () and given["b"].argv[1] == "/there/c" and given["b"].key != steps["b"].key


def test_a_recipe_whose_stages_all_wait_for_what_is_not_given_is_refused(tmp_path, capfd):
    """And where some can be run, the others take a line for each reason."""
    flags = ["--config=configs/reproduce_7b.py", f"--workdir={tmp_path}"]
    assert command.run_command("rsagent_jax.reproduce", flags) == 2
    said = capfd.readouterr()
    lacking = "--config.endpoint, --config.endpoint_model, --config.reasonseg, --config.refer"
    assert said.err.startswith(f"error: nothing can be run: every stage waits for {lacking}") and not said.out
    echo = RecipeStage(name="a", command="-V")
    lame = [RecipeStage(name=name, command="x.py", arguments=("{refer}",)) for name in "bc"]
    steps = plan_steps(stages(echo, *lame), tmp_path)
    steps["a"] = dataclasses.replace(steps["a"], argv=("-V",))
    reproduce = importlib.import_module("rsagent_jax.reproduce")
    assert reproduce.run_steps(steps, {*steps}, Hosts(), again=False) == {}
    assert "\n== b, c: waits for --config.refer\n" in capfd.readouterr().out


GIVEN = ("--config.refer=R", "--config.reasonseg=S", "--config.endpoint=http://h/v1", "--config.endpoint_model=m")


@pytest.mark.parametrize("name", ["quickstart", "7b"])
def test_every_stage_of_the_recipes_is_a_command_line_that_its_command_takes(name, tmp_path):
    reproduce = importlib.import_module("rsagent_jax.reproduce")
    flags = [f"--config=configs/reproduce_{name}.py", *GIVEN]
    steps = plan_steps(command.parse_arguments(reproduce.main, flags)[1]["config"], tmp_path)
    for step in steps.values():
        module = step.argv[1] if step.argv[0] == "-m" else step.argv[0].removesuffix(".py")
        main = importlib.import_module(module).main
        taken = command.parse_arguments(main, step.argv[2 if step.argv[0] == "-m" else 1 :])[1]
        assert not step.lacks and str(tmp_path / step.stage.name) in (taken.get("workdir"), str(taken.get("out")))
        if step.stage.row:
            asked, named = (
                taken["config"],
                step.stage.benchmark.split("/"),
            )  # as the samples are, where no name is given
            assert (
                asked.benchmark == step.stage.benchmark
                or [asked.data.dataset, asked.data.split] == named[:: len(named) - 1]
            )
    players = {(step.stage.benchmark, step.stage.row) for step in steps.values() if step.stage.row}
    assert name == "quickstart" or players >= {*PAPER}
    assert len(players) == {"quickstart": 3, "7b": 50}[name]
