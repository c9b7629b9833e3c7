"""Whether what the config names far away can be reached. What a client library raises is the line on the page."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import huggingface_hub

from rsagent_jax.config.import_path import first_line
from rsagent_jax.fitness.finding import Examined, Finding, Verdict, not_run
from rsagent_jax.types import DataError
from sam_bridge.hub import REPOSITORY, is_repository

TIMEOUT_S = 10.0


def check_hub(examined: Examined) -> list[Finding]:
    """Whether this machine's token may read the weights and the segmenter given as org/name or org/name@revision."""
    given = (examined.config.policy.weights, examined.config.segmenter.checkpoint)
    names = [name for name in given if is_repository(name)]
    if not names:
        return not_run("hub", "not used: no weights are given as org/name")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return not_run("hub", "HF_HUB_OFFLINE is set: it is not asked")
    return [Finding("hub", Verdict.OK, "; ".join(map(ask_hub, names)))]


def ask_hub(name: str) -> str:
    """A HEAD of its config.json, as a download begins. Raises where it may not be read."""
    endpoint = os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT
    repository, revision = REPOSITORY.fullmatch(name).groups()
    url = huggingface_hub.hf_hub_url(repository, "config.json", revision=revision, endpoint=endpoint)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT_S, endpoint=endpoint)
    except huggingface_hub.errors.EntryNotFoundError:
        pass  # a segmenter's repository may have none, and is readable
    except Exception as error:  # of half a dozen libraries; what it says is to stand on the page with the name
        raise DataError(f"{name} on {endpoint}: {type(error).__name__}: {first_line(error)}") from error
    return f"{name} on {endpoint} may be read"


def check_buckets(examined: Examined) -> list[Finding]:
    """All that begins with gs:// in the config, and --workdir."""
    names = [*_strings(dataclasses.asdict(examined.config)), str(examined.workdir).replace("gs:/", "gs://", 1)]
    names = [name.replace("gs:///", "gs://") for name in names if name.startswith("gs://")]
    if not names:
        return not_run("bucket", "not used: no gs:// in the config")
    return [Finding("bucket", Verdict.OK, "; ".join(map(ask_bucket, names)))]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    for one in inner:
        yield from _strings(one)


def ask_bucket(name: str) -> str:
    """Raises where the bucket cannot be read; a directory in it may be still to come."""
    from etils import epath

    bucket = "/".join(name.split("/")[:3])
    if not epath.Path(bucket).exists():
        raise FileNotFoundError(f"{bucket} (of {name}) does not exist, or may not be seen")
    return f"{name} {'exists' if epath.Path(name).exists() else 'is not there yet, its bucket is'}"
