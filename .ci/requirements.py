"""Writes requirements.txt and requirements-test.txt from the pins of pyproject.toml: make requirements."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
HEADS = {
    "requirements.txt": """\
# Written by `make requirements` from pyproject.toml: its dependencies and the extras demo, web, gcs and sidecar.
# sam2 builds from source against the torch that is there, so `make setup` installs torch first. Without torch: `pip
# install -e .[demo]`; on a TPU VM `.[demo,tpu]`.
""",
    "requirements-test.txt": "# Written by `make requirements` from pyproject.toml: for tests, docs and tools.\n"
    "-r requirements.txt\n",
}


def requirements() -> dict[str, str]:
    """File name -> its text. A range of versions becomes a pin of its first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    runtime = [*project["dependencies"], *extras["demo"], *extras["web"], *extras["gcs"], *extras["sidecar"]]
    lists = [runtime, [*extras["docs"], *extras["dev"]]]
    pins = ["".join(re.sub(r">=([\w.]+),.*", r"==\1", pin) + "\n" for pin in listed) for listed in lists]
    return {file: head + text for (file, head), text in zip(HEADS.items(), pins, strict=True)}


if __name__ == "__main__":
    for file, text in requirements().items():
        (ROOT / file).write_text(text)
