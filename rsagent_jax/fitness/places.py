"""Whether what the config names far away can be reached: a hub's repositories, and buckets."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from rsagent_jax.config.import_path import first_line
from rsagent_jax.fitness.finding import Examined, Finding, Verdict, not_run

REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
TIMEOUT_S = 10.0


def check_hub(examined: Examined) -> list[Finding]:
    """Weights and segmenter given as org/name or org/name@revision: whether this machine's token may read them."""
    names = {
        "policy.weights": examined.config.policy.weights,
        "segmenter.checkpoint": examined.config.segmenter.checkpoint,
    }
    names = {
        field: name for field, name in names.items() if REPOSITORY.fullmatch(name) and not pathlib.Path(name).exists()
    }
    if not names:
        return not_run("hub", "not used: no weights are given as org/name")
    return [
        _asked(f"hub, {field}", name, "HF_TOKEN, HF_ENDPOINT; accept its terms on its page", ask_hub)
        for field, name in names.items()
    ]


def ask_hub(name: str) -> str:
    """Where the repository answers: a HEAD of its config.json with the token of the environment. Raises if it may not
    be read."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT
    repository, revision = REPOSITORY.fullmatch(name).groups()
    url = huggingface_hub.hf_hub_url(repository, "config.json", revision=revision, endpoint=endpoint)
    with contextlib.suppress(EntryNotFoundError):  # a segmenter's repository has none; it may be read
        huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT_S, endpoint=endpoint)
    return f"{name} on {endpoint} may be read"


def check_buckets(examined: Examined) -> list[Finding]:
    """Everything in the config, and --workdir, that begins with gs://."""
    names = dict(_buckets(dataclasses.asdict(examined.config), ""))
    if str(examined.workdir).startswith("gs:/"):
        names["--workdir"] = str(examined.workdir)
    if not names:
        return not_run("bucket", "not used: no gs:// in the config")
    remedy = "pip install gcsfs; give this machine's service account roles/storage.objectAdmin on the bucket"
    return [_asked(f"bucket, {field}", name, remedy, ask_bucket) for field, name in names.items()]


def _buckets(value: Any, path: str) -> Iterator[tuple[str, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple | list) else ()
    for key, inner in items:
        yield from _buckets(inner, f"{path}.{key}".lstrip("."))
    if isinstance(value, str) and value.startswith("gs://"):
        yield path, value


def ask_bucket(name: str) -> str:
    """Raises where the bucket cannot be read; a directory that is not there yet is none of its faults."""
    from etils import epath

    bucket = epath.Path("/".join(name.split("/")[:3]))
    if not bucket.exists():
        raise FileNotFoundError(f"{bucket} does not exist, or may not be seen")
    return f"{bucket} can be read; {name} {'exists' if epath.Path(name).exists() else 'is not there yet'}"


def _asked(title: str, name: str, remedy: str, ask) -> Finding:
    try:
        return Finding(title, Verdict.OK, ask(name))
    except Exception as error:  # noqa: BLE001  whatever a client library raises is the answer
        return Finding(title, Verdict.WRONG, f"{type(error).__name__}: {first_line(error)}", name, remedy)
