"""Every command of README and docs, as its own program reads it: modules, flags, configs and fields are there."""

import importlib
import pathlib
import re
import shlex

import pytest

from rsagent_jax.runtime import command
from rsagent_jax.types import DataError

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = re.compile(
    r"(?<![\w/.-])(?:\S*/)?python (?:-m ((?:rsagent_jax|sam_bridge)[\w.]*)|(train|evaluate)\.py) ?([^|\n]*)"
)
# The vendor's commands that docs/tpu.md names, with the flags that its pages (listed there) give them.
GCLOUD = {
    "services enable": "project",
    "storage rsync": "recursive exclude",
    "storage buckets create": "project location uniform-bucket-level-access",
    "storage buckets add-iam-policy-binding": "role member",
    "compute tpus tpu-vm create": "zone project accelerator-type version",
    "compute tpus tpu-vm ssh": "zone project worker command",
    "compute tpus tpu-vm list": "zone project",
    "compute tpus queued-resources create": "node-id zone project accelerator-type runtime-version spot",
    "compute tpus queued-resources describe": "zone project",
    "compute tpus queued-resources delete": "zone project force quiet",
}


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
def test_our_commands_take_what_the_pages_give_them(page, module, script, text, monkeypatch, tmp_path):
    found, given = importlib.import_module(module or script), arguments(text)
    if module.startswith("sam_bridge"):
        found = importlib.import_module("sam_bridge.__main__") if module == "sam_bridge" else found
        monkeypatch.setattr("sys.argv", [module, *given])
        assert vars(found._arguments())
        return
    if "--config=…" in text or "my_" in text:  # a config or a function of the reader's own
        given = [word for word in given if not word.startswith("--config")]
        if "config" in command.inspect.signature(found.main).parameters:
            return
    _, flags = command.parse_arguments(found.main, given)
    assert flags is not None


def test_commands_of_most_pages_were_found():
    assert len(FOUND) >= 40 and len({page for page, *_ in FOUND}) >= 9
    with pytest.raises(DataError, match="wrokdir"):
        command.parse_arguments(importlib.import_module("evaluate").main, ["--config=configs/eval.py", "--wrokdir=x"])


def test_the_vendors_commands_have_flags_that_exist():
    lines = [line for page in PAGES for line in fenced(page).splitlines() if line.startswith("gcloud ")]
    assert len(lines) >= 10
    for line in lines:
        name = next(name for name in GCLOUD if line.startswith(f"gcloud {name} "))
        flags = set(re.findall(r" --([\w-]+)", re.sub(r"\s#.*", "", line)))
        assert flags <= set(GCLOUD[name].split()), line
        assert "tpus" not in name or {"zone", "project"} <= flags, line
