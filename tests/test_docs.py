"""Every command of README and docs, as its own program reads it: modules, flags, configs and fields are there."""

import ast
import importlib
import pathlib
import re
import shlex
import tomllib

import pytest

from rsagent_jax.aot.stages import fill_topology_defaults
from rsagent_jax.aot.topology import parse_topology
from rsagent_jax.config.recipe import RecipeConfig, Step, plan_steps
from rsagent_jax.config.schema import TrainConfig
from rsagent_jax.models.qwen25_vl.config import size_config
from rsagent_jax.runtime import command
from rsagent_jax.types import DataError
from tests.gcloud_stand_in import GCLOUD

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = re.compile(
    r"(?<![\w/.-])(?:\S*/)?python (?:-m ((?:rsagent_jax|sam_bridge)[\w.]*)|(train|evaluate)\.py) ?([^|\n]*)"
)


def fenced(page: pathlib.Path) -> str:
    """All code blocks of a page, a command to a line; commands for other machines lose their quotes."""
    text = "".join(re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
    return re.sub(r"--command='\n?(.*?)'$", r"--command=there\n\1", re.sub(r"\\\n\s*", "", text), flags=re.S | re.M)


FOUND = [(page.name, *match) for page in PAGES for match in OURS.findall(fenced(page))]


def arguments(text: str) -> list[str]:
    """Of a command line: what is optional is given, what is left to the reader (…) is not."""
    text = re.sub(r"(?: [<>] ?\S+)? ?(?:2>&1)? ?&? *$", "", re.sub(r"\s+#.*", "", text).strip())
    words = shlex.split(re.sub(r" \[([^\]]*)\]", r" \1", text))
    return [word.replace("i/n", "0/4") for word in words if "…" not in word and word not in ("<", "/dev/null", ">")]


@pytest.mark.parametrize(("page", "module", "script", "text"), FOUND, ids=[f"{f[0]}-{f[1] or f[2]}" for f in FOUND])
def test_our_commands_take_what_the_pages_give_them(page, module, script, text, monkeypatch):
    given = arguments(text)
    own = "--config=…" in text or "my_" in text  # a config or a function of the reader's own
    if own and not module.startswith("sam_bridge"):
        given = [word for word in given if not word.startswith("--config")]
        if "config" in command.inspect.signature(importlib.import_module(module or script).main).parameters:
            return
    check_command(["python", *(["-m", module] if module else [f"{script}.py"]), *given], monkeypatch)


def check_command(words: list[str], monkeypatch) -> None:
    """That a program takes its flags, and one that starts another the other's. DataError or AssertionError if not."""
    assert words[0].endswith("python")
    module, given = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    found = importlib.import_module("sam_bridge.__main__" if module == "sam_bridge" else module)
    if module.startswith("sam_bridge"):
        monkeypatch.setattr("sys.argv", [module, *given])
        assert vars(found._arguments())
        return
    started, flags = command.parse_arguments(found.main, given)
    assert can_start(flags.get("config"))
    if module == "rsagent_jax.launch":
        check_command(started, monkeypatch)


def can_start(config) -> bool:
    """Whether a slice that training names has a preset for it, and every stage of a recipe has all that it needs.
    DataError or AssertionError where not."""
    if isinstance(config, RecipeConfig):
        steps = plan_steps(config, pathlib.Path("w"))
        for step in steps.values():
            if step.argv[0].endswith((train := "train.py", "evaluate.py")):
                assert not lacking(step, steps), f"{step.stage.name} waits for --config.{lacking(step, steps)}"
            if step.argv[0].endswith(train):
                can_start(command.parse_arguments(importlib.import_module("train").main, step.argv[1:])[1]["config"])
    elif isinstance(config, TrainConfig) and config.slice:
        policy = size_config((re.search(r"\d+b", config.policy.weights.lower()) or ["7b"])[0])
        fill_topology_defaults(config, parse_topology(config.slice), policy)
    return True


def lacking(step: Step, steps: dict[str, Step]) -> set[str]:
    """Fields of the recipe that are empty, of what it builds upon as well."""
    return {*step.lacks}.union(*(lacking(steps[name], steps) for name in step.needs))


def test_a_recipe_that_cannot_train_is_no_command_for_a_page():
    def recipe(*given):
        flags = ["--config=configs/reproduce_7b.py", "--config.refer=A", *given]
        return command.parse_arguments(importlib.import_module("rsagent_jax.reproduce").main, flags)[1]["config"]

    with pytest.raises(AssertionError, match="sft waits for --config.*endpoint"):
        can_start(recipe())
    with pytest.raises(DataError, match="'v6e-16' has no preset"):
        can_start(recipe("--config.reasonseg=B", "--config.stages.collect.given=C", "--config.slice=v6e-16"))


def test_commands_of_most_pages_were_found():
    assert len(FOUND) >= 40 and len({page for page, *_ in FOUND}) >= 9
    with pytest.raises(DataError, match="wrokdir"):
        command.parse_arguments(importlib.import_module("evaluate").main, ["--config=configs/eval.py", "--wrokdir=x"])


PYTHON = [
    (page.name, text)
    for page in PAGES
    for text in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
]


@pytest.mark.parametrize(("page", "text"), PYTHON, ids=[f"{page}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_snippets_are_python_and_import_what_is_there(page, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), {})
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "rsagent_jax":
            assert hasattr(importlib.import_module("rsagent_jax"), node.attr)


def test_make_targets_and_console_scripts_of_the_pages_are_there():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    targets = set(re.findall(r"(?:^|`)make (?:-C \S+ )?([a-z][\w-]*)", text, re.MULTILINE))
    assert targets and targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    scripts = set(re.findall(r"(?:^|`)(rsagent-[a-z-]+)(?=[` ])", text, re.MULTILINE)) - {"rsagent-jax"}
    assert scripts and scripts <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])


def test_the_vendors_commands_have_flags_that_exist():
    lines = [line for page in PAGES for line in fenced(page).splitlines() if line.startswith("gcloud ")]
    assert len(lines) >= 8
    for line in lines:
        name = next(name for name in GCLOUD if line.startswith(f"gcloud {name} "))
        flags = set(re.findall(r" --([\w-]+)", re.sub(r"\s#.*", "", line)))
        assert flags <= set(GCLOUD[name].split()), line
        assert "tpus" not in name or {"zone", "project"} <= flags, line
