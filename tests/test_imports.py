"""The shape of the tree: imports only go down the ladder, torch stays in one file, files stay short.

Sources are parsed, not imported, so that an import inside a function counts as well. What parsing cannot see (what an
import drags in) is asked of a fresh interpreter.
"""

import ast
import functools
import graphlib
import importlib.metadata
import os
import pathlib
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator

import pytest

import rsagent_jax

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("rsagent_jax", "sam_bridge")
TORCH = {"torch", "torchvision", "sam2"}
TORCH_FILE = "sam_bridge/backends/sam2.py"
MAX_LINES = 450

# Lower rungs first: a unit may import those below it, and what is in itself. The longest prefix names the unit.
COMMANDS = "collect compare data_check demo doctor export launch problems refilter reproduce segment show_tokens view"
COMMANDS = tuple(COMMANDS.split())
RUNGS = (
    ("array_types",),
    ("types",),
    ("masks",),
    ("runtime.paths",),  # what a flag that is a path is read as
    ("config",),
    ("runtime",),
    ("models", "rewards", "agent"),
    ("data",),
    ("rollout", "tiny"),
    ("evals",),
    ("train",),
    ("aot", "report"),
    ("collecting", "fitness", "api"),
    ("web",),
    COMMANDS,
    ("ablate",),  # runs its stages as reproduce does
)
RUNG = {f"rsagent_jax.{unit}": rung for rung, units in enumerate(RUNGS) for unit in units}
ENTRY = len(RUNGS) - 1
SCRIPTS = ("train.py", "evaluate.py")  # entry points outside the package


def sources(*tops: str) -> list[str]:
    """Python files under the given folders (or the files themselves) that exist, relative to the root."""
    found = [path for top in tops for path in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in found if path.is_file())


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def imports(file: str) -> frozenset[tuple[str, int]]:
    """(module, line) of every import, wherever it stands. `from a import b` is a.b where a.b is a module of ours."""
    return imports_of((ROOT / file).read_text(), module_name(file))


def imports_of(text: str, module: str, lazy=True) -> frozenset[tuple[str, int]]:
    """With `lazy=False` only those that run when the module is imported, not those inside functions."""
    found = set()
    for node in _nodes(ast.parse(text), lazy):
        if isinstance(node, ast.Import):
            found.update((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}, line {node.lineno}: imports are absolute"
            found.update((_submodule(node.module, alias.name), node.lineno) for alias in node.names)
    return frozenset(found)


def _nodes(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _nodes(node, lazy)


def _submodule(base: str, name: str) -> str:
    path = ROOT / base.replace(".", "/") / name
    ours = base.split(".")[0] in PACKAGES and (path.with_suffix(".py").is_file() or path.is_dir())
    return f"{base}.{name}" if ours else base


def top_level(file: str) -> dict[str, int]:
    return {module.split(".")[0]: line for module, line in imports(file)}


def unit_of(module: str) -> str | None:
    """rsagent_jax.models.qwen25_vl.vision -> rsagent_jax.models; None for what has no place on the ladder."""
    parts = module.split(".")
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in RUNG), None)


def ladder_problem(unit: str, rung: int, target: str) -> str | None:
    """Why `unit` may not import the module `target` of ours, or None."""
    other = unit_of(target)
    if other is None:
        return f"{target} has no place on the ladder" if target != "rsagent_jax" else None
    if other == unit or RUNG[other] < rung:
        return None
    return f"{unit} (rung {rung}) imports {target} (rung {RUNG[other]})"


def test_every_module_has_a_place_on_the_ladder_and_imports_only_go_down():
    problems = []
    for file in sources("rsagent_jax", *SCRIPTS):
        script = file in SCRIPTS
        unit = module_name(file) if script else unit_of(module_name(file))
        if unit is None and file != "rsagent_jax/__init__.py":
            problems.append(f"{file}: give it a rung in RUNGS, or move it")
        for target, line in imports(file):
            if unit and target.split(".")[0] == "rsagent_jax":
                problem = ladder_problem(unit, ENTRY if script else RUNG[unit], target)
                problems += [f"{file}:{line}: {problem}"] if problem else []
    assert not problems, "\n".join(sorted(problems))


def test_the_rule_itself_catches_what_it_should():
    def problem(module: str, text: str) -> str | None:
        unit = unit_of(module)
        found = [ladder_problem(unit, RUNG[unit], target) for target, _ in imports_of(text, module)]
        return next(filter(None, found), None)

    assert problem("rsagent_jax.config.build", "def f():\n  from rsagent_jax.config import schema") is None  # its own
    assert "imports rsagent_jax.config" in problem("rsagent_jax.types", "def f():\n  from rsagent_jax import config")
    assert "imports rsagent_jax.data" in problem("rsagent_jax.agent.tools", "def f():\n  from rsagent_jax import data")
    assert "imports rsagent_jax.rewards" in problem("rsagent_jax.agent.tools", "import rsagent_jax.rewards")
    with pytest.raises(AssertionError, match="imports are absolute"):
        problem("rsagent_jax.agent.tools", "from ..rewards import final_iou")
    assert "imports rsagent_jax.train" in problem("rsagent_jax.evals.metrics", "from rsagent_jax.train import losses")
    assert problem("rsagent_jax.compare", "from rsagent_jax.evals import metrics") is None
    assert "imports rsagent_jax.compare" in problem("rsagent_jax.evals.x", "import rsagent_jax.compare")
    assert "no place" in problem("rsagent_jax.train.x", "import rsagent_jax.helpers")


def test_the_root_holds_the_commands_and_what_everybody_reads():
    root = {path.stem for path in (ROOT / "rsagent_jax").glob("*.py")} - {"__init__"}
    assert root == {"array_types", "types", "masks", "rewards", "api", *COMMANDS, "ablate"}


def test_public_names_are_unique():
    """One public name, one thing, in both packages; a command's entry is `main`."""
    owners: dict[str, list[str]] = {}
    for file in sources(*PACKAGES):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        for node in ast.parse((ROOT / file).read_text()).body:
            if isinstance(node, kinds) and not node.name.startswith("_") and "_pb2" not in file:
                owners.setdefault(node.name, []).append(file)
    assert {name: files for name, files in owners.items() if len(files) > 1 and name != "main"} == {}


def test_no_cycles():
    """Among imports that run at import time; sam_bridge.backends loads its back ends by name, when asked."""
    files = {module_name(file): file for file in sources(*PACKAGES)}
    graph = {}
    for module, file in files.items():
        targets = {target for target, _ in imports_of((ROOT / file).read_text(), module, lazy=False)}
        graph[module] = targets & files.keys() - {module}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names them


def test_sam_bridge_never_imports_jax():
    forbidden = {"jax", "jaxlib", "flax", "rsagent_jax"}
    assert not [file for file in sources("sam_bridge") if top_level(file).keys() & forbidden]


def test_torch_and_sam2_are_in_one_file():
    users = [file for file in sources(*PACKAGES, "configs", *SCRIPTS) if top_level(file).keys() & TORCH]
    assert set(users) <= {TORCH_FILE}


INDIRECT = {  # not imported by name
    "importlib-resources",  # by tensorflow-datasets, which does not say so
    "google-cloud-storage",  # by Orbax, for gs://
    "hydra-core", "iopath", "torchvision",  # by sam2
    "scikit-image",  # only its photographs
    "transformers",  # where weights are opened: models/qwen25_vl/config.py, hugging_face
}  # fmt: skip


def test_what_runs_is_in_the_requirements_and_nothing_else():
    pinned = {_normal(name) for name in _pins("requirements.txt")}
    owners = importlib.metadata.packages_distributions()
    ours = {*PACKAGES, "configs"} | sys.stdlib_module_names
    used = {
        (file, name): {_normal(owner) for owner in owners.get(name, [name])}
        for file in sources(*PACKAGES, "configs", *SCRIPTS)
        for name in top_level(file).keys() - ours
    }
    assert not sorted(f"{file}: {name}" for (file, name), found in used.items() if not found & pinned)
    assert not pinned - set().union(*used.values()) - INDIRECT
    card = "jax flax optax orbax-checkpoint transformers sam2 tensorflow-datasets grain numpy pycocotools"
    assert set(card.split()) <= pinned


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def loaded_after(code: str, *names: str) -> list[str]:
    """Which of the names are in sys.modules of a fresh interpreter that ran `code`."""
    script = f"{code}\nimport sys\nprint('LOADED', *[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def test_importing_all_of_rsagent_jax_leaves_torch_out():
    modules = [module_name(file) for file in sources("rsagent_jax", *SCRIPTS)]
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    assert loaded_after(code, *sorted(TORCH), "jax", "flax") == ["jax", "flax"]


@pytest.mark.parametrize("module", ["sam_bridge.client", "sam_bridge.spawn", "sam_bridge.__main__"])
def test_the_bridge_leaves_torch_and_jax_out(module):
    heavy = (*sorted(TORCH), "jax", "flax", "cv2", "rsagent_jax")
    assert loaded_after(f"import {module}", *heavy, "grpc") == ["grpc"]


def test_the_package_itself_imports_nothing_until_it_is_asked():
    heavy = ("jax", "numpy", "PIL", "rsagent_jax.api", "rsagent_jax.types")
    assert loaded_after("import rsagent_jax; dir(rsagent_jax); hasattr(rsagent_jax, 'x')", *heavy, "rsagent_jax") == [
        "rsagent_jax"
    ]
    assert {*rsagent_jax.__all__} == {"Agent", "Result", "TurnStream", "DataError"} < {*dir(rsagent_jax)}
    tree = ast.parse((ROOT / "rsagent_jax/__init__.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names - {"TYPE_CHECKING", "Any"} == {*rsagent_jax.__all__}  # what editors see
    assert all(getattr(rsagent_jax, name).__name__ == name for name in rsagent_jax.__all__)


def test_data_and_scenes_are_read_without_jax():
    code = "import rsagent_jax.data.sets.refcoco, rsagent_jax.tiny.synthetic"
    assert loaded_after(code, *sorted(TORCH), "jax", "skimage") == []


def test_files_are_short_and_named_for_what_they_hold():
    files = [file for file in sources(*PACKAGES, "configs", "benchmarks", "tests", *SCRIPTS) if "_pb2" not in file]
    lengths = {file: len((ROOT / file).read_text().splitlines()) for file in files}
    assert not {file: n for file, n in lengths.items() if n > MAX_LINES}
    assert not [file for file in files if re.search(r"(^|/)(utils?|helpers?|misc|common)(\.py|/)", file)]


def test_readme_lists_the_folders():
    """A line `name/   what is in it` in a code block of the README for every top-level folder, and no others."""
    readme = ROOT / "README.md"
    ignored = {line.strip("/\n ") for line in (ROOT / ".gitignore").read_text().splitlines()}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.iterdir())}
    folders = {name for name in folders - ignored if not name.startswith(".") and not name.endswith(".egg-info")}
    listed = set(re.findall(r"^[-*|` ]*(\w[\w-]*)/`?(?:\s{2,}|\s*\||:)", readme.read_text(), flags=re.MULTILINE))
    assert listed == folders


def test_pins_are_those_of_pyproject():
    for file, text in runpy.run_path(ROOT / ".ci/requirements.py")["requirements"]().items():
        assert (ROOT / file).read_text() == text, "run: make requirements"
        names = [line for line in text.splitlines() if not line.startswith(("#", "-r"))]
        assert all(re.fullmatch(r"[A-Za-z0-9_-]+==[\w.]+", pin) for pin in names), names
    pins = _pins("requirements.txt")
    assert _pins("sam_bridge/requirements.txt").items() <= pins.items()


def _pins(file: str) -> dict[str, str]:
    return {_normal(n): v for n, v in re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / file).read_text(), flags=re.MULTILINE)}
