"""The package as it would be published and as pip installs it, used from a folder without the repository."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
SHIPPED = ("train.py", "evaluate.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """call(script, *arguments) runs a console script of the wheel. It is built from the sdist, and that from a copy of
    the sources."""
    root = tmp_path_factory.mktemp("installed")
    source, site, empty, dist = (root / name for name in ("source", "site", "empty", "dist"))
    empty.mkdir()
    for name in ("rsagent_jax", "sam_bridge", "configs", "assets", "tests/golden"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(__file__, source / "tests")
    for name in (*SHIPPED, "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", f"--outdir={dist}", source], check=True)
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-compile", f"--target={site}")
    subprocess.run([sys.executable, *pip, *dist.glob("*.whl")], check=True)

    def call(script, *arguments):
        code = f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv[0] = {script!r}; "
        code += "import rsagent_jax.runtime.command as c; c.console_script()"
        command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=280)

    call.site, call.empty, call.source, call.dist = site, empty, source, dist
    return call


def test_what_would_be_published_is_whole_and_has_no_tests(installed):
    (wheel,), (sdist,) = installed.dist.glob("*.whl"), installed.dist.glob("*.tar.gz")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], check=True)
    files = [p for name in ("rsagent_jax", "sam_bridge", "configs") for p in (installed.source / name).rglob("*")]
    files += (installed.source / "assets").glob("*/*")
    wanted = {str(p.relative_to(installed.source)) for p in files if p.is_file()} | {"train.py", "evaluate.py"}
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert in_wheel == wanted and {"rsagent_jax/py.typed", "sam_bridge/py.typed"} <= wanted
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted | {*SHIPPED} <= in_sdist and not [name for name in in_sdist if name.startswith(("tests", "runs"))]


def test_the_version_stands_in_one_place():
    import rsagent_jax

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"] and "urls" not in project
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == rsagent_jax.__version__
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text()


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
