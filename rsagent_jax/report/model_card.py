"""README.md of an exported policy, as the Hugging Face hub has it: what it is, how it was trained and how well it does.

All of it is read from the run that made the checkpoint and from evaluations of these very weights, told by checksum.
What they do not say is written down as not known. Of paths only the last part is named.
"""

import importlib.resources
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import rsagent_jax
from rsagent_jax.data.serving import PLACEHOLDERS
from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.models.qwen25_vl.load import local_weights, policy_directory, weights_checksum
from rsagent_jax.models.qwen25_vl.steps import find_step, split_step
from rsagent_jax.runtime.paths import open_path
from rsagent_jax.tiny.synthetic import STAMP
from rsagent_jax.types import DataError
from sam_bridge import hub

RESULTS = "results.json"  # of an evaluation
TINY = "assets/tiny-base"


def model_card(checkpoint: str, name: str, dtype: str, licence: str, evaluations: Sequence[str]) -> str:
    """The text of README.md. `name`: of the export; `dtype`: of its weights; `licence`: an identifier of the hub's,
    "" = as far as it is known; `evaluations`: work directories of evaluate.py, beside those found next to the run.

    DataError where an evaluation is of other weights.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    path = local_weights(checkpoint)
    stage = policy_directory(checkpoint) != path
    run = path.parent.parent if stage else None
    config = read_json(run / "config.json") if run and (run / "config.json").exists() else None
    base = _name(config["policy"]["weights"] if config else "" if stage else checkpoint)
    licence = licence or ("apache-2.0" if base == TINY else "")
    results, checksum = _results(checkpoint, run, evaluations)
    metrics = [(r, metric) for r in results for metric in ("giou", "ciou")]
    data = ModelCardData(
        base_model=base if base != TINY and hub.is_repository(base) else None,
        license=licence or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["rsagent", "image-segmentation", "agent"],
        model_name=name,
        eval_results=[
            EvalResult("image-segmentation", r["benchmark"], r["benchmark"], metric, r[metric]) for r, metric in metrics
        ]
        or None,
    )
    values = dict(
        name=name,
        version=rsagent_jax.__version__,
        training=[*_training(config, path, split_step(checkpoint)[1])] if config else [],
        results=results,
        checksum=checksum,
        dtype=dtype,
        rounded=", rounded from float32" if stage and dtype != "float32" else "",
        placeholders=" or ".join(f"`{token}`" for token in PLACEHOLDERS),
        licence=_licence(licence, base),
    )
    template = importlib.resources.files("rsagent_jax.report") / "templates" / "model_card.md"
    return str(ModelCard.from_template(data, template_str=template.read_text(encoding="utf-8"), **values))


def _training(config: dict[str, Any], path: pathlib.Path, step: str) -> Iterable[tuple[str, str]]:
    """Rows of what the run's config.json says."""
    stages, last, grpo = config["stages"], path.name, config["grpo"]
    stages = stages[: stages.index(last) + 1] if last in stages else stages
    yield "checkpoint", f"`{last}`, update {find_step(path, step)}, seed {config['seed']}"
    yield "began with", f"`{_name(config['policy']['weights'])}`"
    made_up = (open_path(grpo["data"]["root"] or ".") / STAMP).exists()
    if "sft" in stages:
        yield "SFT data", _collected(config["sft"]["trajectories"], grpo["data"] if made_up else {})
        yield "SFT", f"{config['sft']['epochs']:g} epochs planned, {_optimiser(config['sft'])}"
    if "grpo" in stages:
        yield "GRPO data", _data_set(grpo["data"], made_up)
        shape = f"{grpo['steps']} steps planned, of {grpo['prompts']} prompts x {grpo['group']} samples"
        shape += f" and {grpo['epochs'] * grpo['minibatches']} updates"
        rule = f"ratio {grpo['ratio']}, advantage {grpo['advantage']}, clip {grpo['clip_low']:g}/{grpo['clip_high']:g}"
        yield "GRPO", f"{shape}, {rule}, KL {grpo['kl']:g}, {_optimiser(grpo)}"
        yield "reward", " + ".join(f"{group['weight']:g} {group['name']}" for group in grpo["reward"])
    if rank := config["policy"]["lora"]["rank"]:
        yield "LoRA", f"rank {rank}, merged"
    agent, limit = config["agent"], config["agent"]["max_pixels"] or "the weights' own"
    yield "prompt", f"{agent['prompt']}; overlays of {agent['history_size']} px, views of at most {limit} pixels"
    yield "segmenter", f"{config['segmenter']['backend']} ({config['segmenter']['mode']})"


def _collected(directory: str, made_up: dict[str, Any]) -> str:
    """Where SFT's trajectories are from. `made_up`: the data whose scenes are known to be made up."""
    stamp = open_path(directory) / "collect.json"
    if not directory or not stamp.exists():
        return f"trajectories of `{_name(directory)}`, of which nothing is known here"
    stored = read_json(stamp)
    config = stored["config"]
    teacher, data = config["teacher"], config["data"]
    who = teacher.get("function") or f"a policy of its own, sha256 {teacher['weights_sha256'][:12]}"
    who = f"{who} ({teacher['remote']['model']})" if teacher.get("remote", {}).get("model") else who
    same = all(made_up.get(name) == data[name] for name in ("dataset", "split_by"))
    kept = f"of final IoU >= {stored['filter']['min_iou']:g}"
    return f"{stored['records']} trajectories on {_data_set(data, same)}, by `{who}`, {kept}"


def _data_set(data: dict[str, Any], made_up: bool) -> str:
    names = [part["name"] for part in data["mix"]] or [data["dataset"], data["split_by"], data["split"]]
    return ", ".join(map(str, names)) + (" (scenes made by `rsagent_jax.tiny.synthetic`)" if made_up else "")


def _optimiser(stage: dict[str, Any]) -> str:
    optim = stage["optim"]
    frozen = f", frozen: {', '.join(optim['freeze'])}" if optim["freeze"] else ""
    return f"AdamW, lr {optim['lr']:g} ({optim['schedule']}){frozen}"


def _results(checkpoint: str, run: pathlib.Path | None, given: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """The results of these weights, and their sha256, which is only computed where there are any."""
    asked = [open_path(directory) / RESULTS for directory in given]
    if missing := [file for file in asked if not file.exists()]:
        raise DataError(f"{missing[0]} does not exist; --evaluation is a work directory of evaluate.py")
    near = sorted({*run.parent.glob(f"*/{RESULTS}"), *run.glob(f"*/{RESULTS}")} - {*asked}) if run else []
    if not asked and not near:
        return [], ""
    checksum, out = weights_checksum(checkpoint), []
    for file in (*asked, *near):
        results = read_json(file)
        if results.get("weights_sha256") == checksum and not results.get("sees_the_truth"):
            out.append(results)
        elif file in asked:
            raise DataError(f"{file} is not of {checkpoint}: it says weights_sha256 {results.get('weights_sha256')}")
    return out, checksum


def _licence(licence: str, base: str) -> str:
    if licence:
        return licence
    source = f"`{base}`" if base else "the weights that it began with, which are not known here"
    return f"Not known here. These weights are made from {source}; their licence holds."


def _name(weights: str) -> str:
    """A hub's name as it is, the tiny base as such, else the last part of a path."""
    weights = split_step(weights)[0]
    if hub.is_repository(weights) and not pathlib.Path(weights).exists():
        return weights
    parts = open_path(weights).parts[-2:] if weights else ()
    return TINY if "/".join(parts) == TINY else "/".join(parts[-1:])
