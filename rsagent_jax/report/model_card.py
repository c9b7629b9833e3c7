"""README.md of an exported policy, as the Hugging Face hub has it: what it is, how it was trained and how well it does.

All of it is read from the run that made the checkpoint and from evaluations of these very weights, told by checksum.
What they do not say is written down as not known. Of paths only the last part is named.
"""

import importlib.resources
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import rsagent_jax
from rsagent_jax.config.build import build_config, to_dict
from rsagent_jax.config.ranges import REFER
from rsagent_jax.config.rules import ORDER
from rsagent_jax.config.schema import AgentConfig, OptimConfig, SamplingConfig, TrainConfig
from rsagent_jax.data.serving import PLACEHOLDERS
from rsagent_jax.models.qwen25_vl import tensor_files
from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.models.qwen25_vl.load import local_weights, policy_directory, weights_checksum
from rsagent_jax.models.qwen25_vl.steps import find_step, split_step
from rsagent_jax.report.evaluation import evaluation_title
from rsagent_jax.report.reproduction import convention
from rsagent_jax.runtime.journal import decisive_settings
from rsagent_jax.runtime.paths import open_path
from rsagent_jax.tiny.synthetic import STAMP
from rsagent_jax.types import DataError
from sam_bridge import hub

RESULTS = "results.json"  # of an evaluation
FIGURES = {"benchmark", "n", "giou", "giou_ci95", "ciou", "mean_turns", "tool_error_rate", "segmenter"}
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
    config = _run_config(run)
    base = _name(config.policy.weights if config else "" if stage else checkpoint)
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
            EvalResult("image-segmentation", r.get("samples", r["benchmark"]), evaluation_title(r), metric, r[metric])
            for r, metric in metrics
        ]
        or None,
    )
    values = dict(
        name=name,
        version=rsagent_jax.__version__,
        training=[*_training(config, path, split_step(checkpoint)[1])] if config else [],
        results=[(r, evaluation_title(r), _how(r)) for r in results],
        checksum=checksum,
        dtype=dtype,
        rounded=_rounded({"float32"} if stage else _dtypes(path), dtype),
        placeholders=" or ".join(f"`{token}`" for token in PLACEHOLDERS),
        licence=_licence(licence, base),
    )
    template = importlib.resources.files("rsagent_jax.report") / "templates" / "model_card.md"
    return str(ModelCard.from_template(data, template_str=template.read_text(encoding="utf-8"), **values))


def _dtypes(directory: pathlib.Path) -> set[str]:
    """Of the weights of a Hugging Face directory."""
    tensors = (t for file in tensor_files.find(directory)[0] for t in tensor_files.safetensors_header(file))
    return {tensor_files.DTYPES[t.dtype].name for t in tensors if t.dtype in tensor_files.DTYPES}


def _rounded(source: set[str], dtype: str) -> str:
    """`source`: dtypes of the weights before, all of which float32 holds exactly."""
    others = sorted(source - {dtype}) if dtype != "float32" else []
    return f", rounded from {' and '.join(others)}" if others else ""


def _run_config(run: pathlib.Path | None) -> TrainConfig | None:
    """What the run's config.json says, with the defaults of fields that it is too old for. None for one that this
    version cannot read."""
    if run is None or not (run / "config.json").exists():
        return None
    try:
        return build_config(TrainConfig, read_json(run / "config.json"))
    except DataError as error:
        print(f"note: the model card tells nothing of the training: {error}")
        return None


def _training(c: TrainConfig, path: pathlib.Path, step: str) -> Iterable[tuple[str, str]]:
    """Rows of a table."""
    stages = c.stages[: c.stages.index(path.name) + 1] if path.name in c.stages else c.stages
    yield "checkpoint", f"`{path.name}`, update {find_step(path, step)}, seed {c.seed}"
    yield "began with", f"`{_name(c.policy.weights)}`"
    made_up = bool(c.grpo.data.root) and (open_path(c.grpo.data.root) / STAMP).exists()
    if "sft" in stages:
        yield "SFT data", _collected(c.sft.trajectories, to_dict(c.grpo.data) if made_up else {})
        yield "SFT", f"{c.sft.epochs:g} epochs planned, {_optimiser(c.sft.optim)}"
    if "grpo" in stages:
        g = c.grpo
        yield "GRPO data", _data_set(to_dict(g.data), made_up)
        shape = f"{g.steps} steps planned, of {g.prompts} prompts x {g.group} samples and {g.updates} updates"
        rule = f"ratio {g.ratio}, advantage {g.advantage}, clip {g.clip_low:g}/{g.clip_high:g}, KL {g.kl:g}"
        yield "GRPO", f"{shape}, {rule}, {_optimiser(g.optim)}"
        yield "reward", " + ".join(f"{group.weight:g} {group.name}" for group in g.reward)
    if c.policy.lora.rank:
        yield "LoRA", f"rank {c.policy.lora.rank}, merged"
    limit = c.agent.max_pixels or "the weights' own"
    yield "prompt", f"{c.agent.prompt}; overlays of {c.agent.history_size} px, views of at most {limit} pixels"
    yield "segmenter", f"{c.segmenter.backend} ({c.segmenter.mode})"


def _collected(directory: str, made_up: dict[str, Any]) -> str:
    """Where SFT's trajectories are from. `made_up`: the data whose scenes are known to be made up."""
    try:
        stored = read_json(open_path(directory) / "collect.json")
        teacher, data = stored["config"]["teacher"], stored["config"]["data"]
        who = teacher.get("function") or f"a policy of its own, sha256 {teacher['weights_sha256'][:12]}"
        who += f" ({model})" if (model := teacher.get("remote", {}).get("model")) else ""
        data_set = _data_set(data, all(made_up.get(name) == data[name] for name in ("dataset", "split_by")))
        kept = f"of final IoU >= {stored['filter']['min_iou']:g}"
        return f"{stored['records']} trajectories on {data_set}, by `{who}`, {kept}"
    except (DataError, KeyError):  # gone, or of another version
        return f"trajectories of `{_name(directory)}`, of which nothing is known here"


def _data_set(data: dict[str, Any], made_up: bool) -> str:
    by = [data["split_by"]] if data["dataset"] in REFER else []
    mixed = [f"{part['weight']:g} x ({_data_set(part['data'], False)})" for part in data["mix"]]
    names = [" + ".join(mixed)] if mixed else [data["dataset"], *by, data["split"]]
    usual = {"unit": "sentence", "texts": "first"}
    names += [f"{k} {data[k]}" for k, v in usual.items() if data.get(k, v) != v] + _taken_of(data)
    return ", ".join(map(str, names)) + (" (scenes made by `rsagent_jax.tiny.synthetic`)" if made_up else "")


def _taken_of(data: dict[str, Any]) -> list[str]:
    """Which of a set's samples, and their words."""
    said = ["texts as written"] if data.get("raw") else []
    said += [f"without the pictures of {' and '.join(data['exclude'])}"] if data.get("exclude") else []
    return said + ([f"limit {data['limit']}"] if data.get("limit") else [])


def _optimiser(optim: OptimConfig) -> str:
    frozen = f", frozen: {', '.join(optim.freeze)}" if optim.freeze else ""
    return f"AdamW, lr {optim.lr:g} ({optim.schedule}){frozen}"


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
        try:
            results = read_json(file)
        except DataError as error:
            if file in asked:
                raise
            print(f"note: the model card leaves out what lies beside the run: {error}")
            continue
        is_policy = results.get("row", "policy") == "policy"  # else of a bound
        if is_policy and results.get("weights_sha256") == checksum and results.keys() >= FIGURES:
            out += [results] * (results not in out)
        elif file in asked:
            raise DataError(
                f"{file} is not an evaluation of {checkpoint}, whose weights_sha256 is {checksum}; its own is"
                f" {results.get('weights_sha256')}, its row {results.get('row', 'policy')!r}"
            )
    return out, checksum


def _how(results: dict[str, Any]) -> str:
    """What else tells two rows of one benchmark apart."""
    settings = results.get("settings", {})
    data, agent, sampling = (settings.get(group, {}) for group in ("data", "agent", "sampling"))
    said = [f"at most {agent['max_turns']} turns"] if "max_turns" in agent else []
    said += [f"temperature {sampling['temperature']:g}"] if sampling.get("temperature") else []
    said += [f"views of at most {agent['max_pixels']} pixels"] if agent.get("max_pixels") else []
    said += _unusual(agent, AgentConfig(), "max_turns", "max_pixels")
    said += _unusual(sampling, SamplingConfig(), "temperature")
    return ", ".join([*said, *_taken_of(data), convention(results)])


def _unusual(settings: dict[str, Any], usual: AgentConfig | SamplingConfig, *told: str) -> list[str]:
    """Of the settings that a trajectory depends on those that are not the defaults, without those that are `told`."""
    decisive = decisive_settings(usual).items()
    return [f"{k} {settings[k]}" for k, v in decisive if k not in told and settings.get(k, v) != v]


def _licence(licence: str, base: str) -> str:
    if licence:
        return licence
    source = f"`{base}`" if base else "the weights that it began with, which are not known here"
    return f"Not known here. These weights are made from {source}; their licence holds."


def _name(weights: str) -> str:
    """A hub's name as it is, the tiny base as such, else the last part of a path."""
    weights = split_step(weights)[0]
    words = weights.partition("@")[0].split("/")
    of_a_run = words[0] == "checkpoints" or words[-1] in ORDER  # from where that run's command was started
    if hub.is_repository(weights) and not of_a_run:
        return weights
    parts = open_path(weights).parts[-2:] if weights else ()
    return TINY if "/".join(parts) == TINY else "/".join(parts[-1:])
