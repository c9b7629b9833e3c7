"""A work directory belongs to one run: what may differ from one start to the next, and what is refused.

    <workdir>/config_history.jsonl    a line per start: time, config, inputs, steps done, devices, versions
    <workdir>/config.json             the config of the last line, for people

Both are written only when everything has been checked, so they always describe what made the checkpoints. A setting
counts from the first checkpoint that it had a part in: before there is one, anything may change.
"""

import contextlib
import datetime
import fnmatch
import hashlib
import json
import pathlib
from collections.abc import Collection, Iterable
from importlib.metadata import version
from typing import Any

import jax
import orbax.checkpoint as ocp

import rsagent_jax
from rsagent_jax.config.build import to_dict
from rsagent_jax.config.schema import PolicyConfig, TrainConfig
from rsagent_jax.models.qwen25_vl.load import policy_directory, weight_files
from rsagent_jax.runtime.journal import ChangedField, flatten_settings
from rsagent_jax.runtime.json_lines import keep_lines, parse_object
from rsagent_jax.runtime.paths import AppendFile, file_size, open_path, read_lines, write_whole
from rsagent_jax.types import DataError

HISTORY = "config_history.jsonl"
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")  # whose versions it names
STAGES = ("sft", "grpo")
# What may differ between two starts: where and how fast it runs, not what is learnt. Paths are here because what they
# lead to is compared instead (`check_inputs`).
FREE = (
    *("cache_dir", "profiler_port", "slice", "mesh.*", "alarms.*"),
    *("policy.weights", "policy.remat", "policy.attention", "policy.scan_layers"),
    *("sft.trajectories", "grpo.data.root", "grpo.data.exclude_root"),
    *("grpo.data.mix*.data.root", "grpo.data.mix*.data.exclude_root"),
    *(f"{stage}.{name}" for stage in STAGES for name in ("checkpoint_every", "read.*", "batch.rows", "optim.offload")),
    *(f"grpo.sampling.{name}" for name in ("slots", "chunk", "prefill", "lanes", "encode", "tensor")),
    *("grpo.max_env_failed", "grpo.on_reward_error", "grpo.reward*.deadline_s", "agent.tool_deadline_s"),
    *(f"segmenter.{name}" for name in ("addresses", "token_file", "tls", "tls_ca", "timeout_s", "wait_s", "workers")),
    *("segmenter.device", "validation.*", "loggers", "grpo.dump_every", "grpo.dump_keep"),
    *("checkpoint_minutes", "keep_last", "keep_every", "preemption_s", "hang_minutes"),
)
LENGTHS = ("sft.steps", "sft.epochs", "grpo.steps")  # may grow, where nothing depends on them yet
ROLLOUTS = ("agent.", "segmenter.")  # SFT has its own check of what its trajectories were collected with


def saved_steps(workdir: pathlib.Path) -> dict[str, int]:
    """Stage -> TrainState.step of its newest finished checkpoint, for stages that have one."""
    steps = {stage: ocp.utils.checkpoint_steps(workdir / "checkpoints" / stage) for stage in STAGES}
    return {stage: max(found) for stage, found in steps.items() if found}


def is_followed(workdir: pathlib.Path, stage: str) -> bool:
    """Whether a later stage has checkpoints: it was trained from what `stage` had become, which has to stay so."""
    return any(STAGES.index(saved) > STAGES.index(stage) for saved in saved_steps(workdir))


def refused(old: dict[str, Any], new: dict[str, Any], saved: Collection[str]) -> list[ChangedField]:
    """What differs between two resolved configs and must not, as the stages `saved` have checkpoints."""
    if not saved:
        return []
    last = max(map(STAGES.index, saved))
    counts = {stage for stage in STAGES[: last + 1] if stage in old["stages"]} | set(saved)
    differ = []
    if len({tuple(s for s in config["stages"] if s in STAGES[: last + 1]) for config in (old, new)}) > 1:
        differ.append(ChangedField("stages", old["stages"], new["stages"], f"{STAGES[last]} has checkpoints"))
    was, now = flatten_settings(old), flatten_settings(new)
    was = {name: value for name, value in flatten_settings(_DEFAULTS).items() if "[" not in name} | was
    for name in sorted({*was, *now} - {"stages"}):
        if name not in now and "[" not in name:
            continue  # a field that this version does not have
        there, here, stage = was.get(name), now.get(name), name.partition(".")[0]
        if there == here or any(fnmatch.fnmatchcase(name, pattern) for pattern in FREE):
            continue
        if (stage in STAGES and stage not in counts) or (name.startswith(ROLLOUTS) and "grpo" not in counts):
            continue
        why = _why_not_longer(name, old, new, last) if name in LENGTHS else ""
        if why is not None:
            differ.append(ChangedField(name.replace("[", ".").replace("]", ""), there, here, why))
    return differ


def _why_not_longer(name: str, old: dict[str, Any], new: dict[str, Any], last: int) -> str | None:
    """Why a stage's length may not change so, or None."""
    stage, field = name.split(".")
    there, here = old[stage], new[stage]
    if field == "epochs" and there["steps"] and here["steps"]:
        return None  # steps count instead
    if stage != STAGES[last]:
        return f"{STAGES[last]} was trained from what {stage} had become"
    if there["optim"]["schedule"] != "constant":
        return f"the {there['optim']['schedule']} schedule follows from it"
    if here[field] < there[field] or bool(there.get("steps")) != bool(here.get("steps")):
        return "it can only grow"
    return None


# What a run stands for that was begun before a field was there: another version may go on with it.
_DEFAULTS = json.loads(json.dumps(to_dict(TrainConfig(policy=PolicyConfig(weights="")))))


def weights_fingerprint(weights: str) -> str:
    """Of the files that load_policy reads."""
    directory = policy_directory(weights)
    names = ("config", "tokenizer", "tokenizer_config", "preprocessor_config", "processor_config", "generation_config")
    files = [directory / f"{name}.json" for name in (*names, "model.safetensors.index")]
    return fingerprint([*weight_files(weights), *files])


def trajectories_fingerprint(directory: str) -> str:
    path = open_path(directory)
    return fingerprint([path / "collect.json", *path.glob("*.array_record")])


def samples_fingerprint(ids: Iterable[str]) -> str:
    """Which samples in which order: the position in the data is a place among them."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def fingerprint(files: Iterable[pathlib.Path], piece: int = 1 << 16) -> str:
    """Of names, sizes and 64 KiB each at the beginning, the middle and the end: other weights differ everywhere."""
    digest = hashlib.sha256()
    for path in sorted(p for p in files if p.is_file()):
        size = file_size(path)
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for offset in (0, size // 2, max(0, size - piece)):
                file.seek(offset)
                digest.update(file.read(piece))
    return digest.hexdigest()[:16]


def check_config(workdir: pathlib.Path, config: TrainConfig) -> None:
    """DataError if the directory holds checkpoints of other settings. Nothing is written."""
    saved, last = saved_steps(workdir), last_start(workdir)
    if saved and last is None:
        raise DataError(
            f"{workdir}/checkpoints is there, but not what made it: {HISTORY} is missing; put it back, or give another"
            " --workdir"
        )
    if saved:
        _refuse(workdir, saved, refused(last["config"], _plain(config), saved))


def check_same_inputs(workdir: pathlib.Path, inputs: dict[str, str]) -> None:
    """The same for what the paths lead to: field -> fingerprint."""
    saved, last = saved_steps(workdir), last_start(workdir)
    there = (last or {}).get("inputs", {})
    used = {"policy.weights": bool(saved), "sft.trajectories": bool(saved)}  # the rest is GRPO's
    why = "other content; what it is called and where it lies may change"
    known = {name: new for name, new in inputs.items() if name in there and used.get(name, "grpo" in saved)}
    differ = [ChangedField(name, there[name], new, why) for name, new in known.items()]
    _refuse(workdir, saved, [d for d in differ if d.old != d.new])


def _refuse(workdir: pathlib.Path, saved: dict[str, int], differ: list[ChangedField]) -> None:
    if differ:
        have = ", ".join(f"{stage} after update {step}" for stage, step in saved.items())
        raise DataError(
            f"{workdir} holds checkpoints of a run with other settings ({have}): {'; '.join(map(str, differ))}. Nothing"
            " was touched. Give another --workdir (to train on from these weights there:"
            f" --config.policy.weights={workdir}/checkpoints/{list(saved)[-1]}), or the settings in"
            f" {workdir}/config.json; docs/tpu.md lists what may change"
        )


def last_start(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The last whole line of the history."""
    history = workdir / HISTORY
    for line in reversed(read_lines(history).splitlines() if history.exists() else []):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if _is_start(start := parse_object(line)):
                return start
    return None


def _is_start(line: dict[str, Any]) -> bool:
    """ValueError for the line of something else."""
    if not isinstance(line["config"]["stages"], list):
        raise ValueError("no config of a start")
    return True


def record_start(workdir: pathlib.Path, config: TrainConfig, inputs: dict[str, str], remat: str = "") -> None:
    """Writes this start down. The lead alone calls it, when nothing can be refused any more. `remat`: as asked."""
    entry = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "saved": saved_steps(workdir),  # updates, by stage, that it goes on from
        "devices": _devices(),
        "remat": remat,
        "versions": {"rsagent_jax": rsagent_jax.__version__} | {name: version(name) for name in LIBRARIES},
        "inputs": inputs,
        "config": _plain(config),
    }
    keep_lines(workdir / HISTORY, _is_start)
    AppendFile(workdir / HISTORY).add(json.dumps(entry) + "\n")
    write_whole(workdir / "config.json", json.dumps(entry["config"], indent=2) + "\n")


def last_remat(workdir: pathlib.Path, config: TrainConfig) -> str:
    """What policy.remat = "auto" became at the last start, where nothing else and no device has changed; else ""."""
    last = last_start(workdir) if saved_steps(workdir) else None
    if last is None or last.get("remat") != config.policy.remat:
        return ""
    policy = last["config"]["policy"]
    again = last["config"] | {"policy": policy | {"remat": config.policy.remat}}
    return policy["remat"] if (again, last.get("devices")) == (_plain(config), _devices()) else ""


def _devices() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _plain(config: TrainConfig) -> dict[str, Any]:
    """As it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(to_dict(config)))
