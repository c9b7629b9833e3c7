"""docs/python.md and docs/notebooks: their code runs as it stands there, with the tiny base for the trained policy."""

import ast
import json
import pathlib
import re
import shlex

import jax
import PIL.Image
import PIL.ImageDraw
import pytest

from rsagent_jax import api
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.open import open_policy
from tests.test_docs import check_command

jax.config.update("jax_disable_most_optimizations", True)  # compiled fast rather than well

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


def run_code(text: str, names: dict) -> object:
    """Runs a cell; the value of the expression that it ends with, which a notebook shows."""
    tree = ast.parse(text)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    return last and eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


def run_notebook(name: str, monkeypatch) -> list:
    """What the code cells show, in their order; started in the folder of the notebook."""
    cells = json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    for text in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"):
        for link in re.findall(r"\]\(([^)]+)\)", text):
            assert (DOCS / "notebooks" / link).exists(), link
        for command in re.findall(r"^(python .*)\n```", text.replace("\\\n", " "), re.MULTILINE):
            check_command(shlex.split(command), monkeypatch)
    names = {"__name__": "__main__"}
    return [run_code("".join(cell["source"]), names) for cell in code]


@pytest.fixture(scope="module", autouse=True)
def one_engine():
    """All agents here have the tiny base: it is read and compiled once."""
    opened = []

    def open_once(*arguments):
        opened[:] = opened or [open_policy(*arguments)]
        return opened[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "open_policy", open_once)
        patch.setattr(Engine, "release_memory", lambda engine: None)
        yield


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder like the repository, where a run has left a checkpoint: of the tiny base, since nothing is trained."""
    stage = tmp_path / "runs/quickstart/train/checkpoints"
    stage.mkdir(parents=True)
    (stage / "grpo").symlink_to(ROOT / "assets/tiny-base")
    (tmp_path / "docs/notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "docs/notebooks")
    return tmp_path


def test_the_snippets_of_the_page(there, monkeypatch):
    monkeypatch.chdir(there)
    picture = PIL.Image.new("RGB", (112, 90), "gray")
    PIL.ImageDraw.Draw(picture).ellipse((12, 20, 52, 60), fill="red")
    picture.save("photo.jpg")
    shown, names = [], {}
    monkeypatch.setattr(PIL.Image.Image, "show", lambda image, title: shown.append(title))
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    for text in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        run_code(text, names)
    assert shown == ["the red circle"] and names["result"].mask.shape == (90, 112)
    assert [r.state.query for r in names["results"]] == ["the red circle", "the blue square"]
    assert (there / "runs/mine/mask.png").exists() and len(names["drawn"].state.turns) <= 4
    wanted, found = names["result"].state, names["results"][0].state
    assert [turn.text for turn in wanted.turns] == [turn.text for turn in found.turns]


@pytest.mark.parametrize("name", ["try_it", "swap_a_reward"])
def test_a_notebook_runs(name, there, imports_restored, monkeypatch, capsys):
    shown = [thing for thing in run_notebook(name, monkeypatch) if thing is not None]
    results = [thing for thing in shown if isinstance(thing, list)]
    assert [len(found) for found in results] == {"try_it": [2, 3], "swap_a_reward": [4]}[name]
    assert all(hasattr(thing, "_repr_png_") for thing in shown if thing not in results)
    assert ("pixels {'size': [112, 112]" if name == "try_it" else " turns: ") in capsys.readouterr().out
