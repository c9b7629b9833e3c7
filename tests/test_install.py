"""The package as pip installs it, used from a folder where nothing of the repository is."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """call(script, *arguments) runs a console script of a wheel that was built from a copy of the sources."""
    root = tmp_path_factory.mktemp("installed")
    source, site, empty = (root / name for name in ("source", "site", "empty"))
    empty.mkdir()
    for name in ("rsagent_jax", "sam_bridge", "configs", "assets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "evaluate.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-compile", f"--target={site}")
    subprocess.run([sys.executable, *pip, source], check=True)

    def call(script, *arguments):
        code = f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv[0] = {script!r}; "
        code += "import rsagent_jax.runtime.command as c; c.console_script()"
        command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=120)

    call.site, call.empty = site, empty
    return call


def test_every_script_has_its_help(installed):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {(installed.site / "bin" / script).is_file() for script in scripts} == {True}
    for script in ("rsagent-train", "rsagent-synthetic", "rsagent-show-tokens"):
        done = installed(script, "--help")
        assert done.returncode == 0 and done.stdout.count("--") > 3, done.stderr


def test_configs_and_the_tiny_policy_come_with_it(installed):
    import rsagent_jax

    assert f"Version: {rsagent_jax.__version__}\n" in next(installed.site.glob("*.dist-info/METADATA")).read_text()
    done = installed("rsagent-synthetic", "--out=data", "--train=2", "--val=1", "--test=1")
    assert done.returncode == 0, done.stderr
    image = sorted(installed.empty.glob("data/images/**/*.jpg"))[0]
    done = installed("rsagent-segment", image, "the red circle", "--out=out", "--config.agent.max_turns=1")
    assert done.returncode == 0 and "ended: " in done.stdout, done.stderr
    assert (installed.empty / "out/mask.png").is_file()
    done = installed("rsagent-evaluate", "--config=configs/eval_quikstart.py", "--workdir=x")
    assert done.returncode == 2 and "does not exist; did you mean" in done.stderr, done.stderr
