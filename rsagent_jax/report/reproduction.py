"""What a recipe has reached: the paper's figure and ours in one table, on one page and in summary.json.

    write_report(title, steps, workdir, failed)      of rsagent_jax.reproduce, from what its stages left behind

Intervals of gains are paired: the same sample under both policies. What has not been measured is an empty cell, with
what it waits for.
"""

import dataclasses
import json
import math
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rsagent_jax.config.recipe import BOUNDS, POLICIES, Step
from rsagent_jax.config.schema import MetricConfig
from rsagent_jax.report.comparison import Comparison, check_comparable, compare, markdown, text_table
from rsagent_jax.report.evaluation import Evaluation, load_evaluation, read_objects, setting_rows
from rsagent_jax.report.page import line_chart, render_page, save_page, smoothed, span
from rsagent_jax.report.trajectory import Example
from rsagent_jax.runtime.paths import read_bytes, write_whole
from rsagent_jax.types import DataError

KEYS = ("giou", "ciou", "mean_turns", "tool_error_rate", "n", "giou_ci95")  # of results.json, kept per policy
ABSENT_KEYS = ("n_acc", "t_acc", "giou_target")  # kept as well where some samples have no target
BEHAVIOUR_KEYS = ("first_iou", "recovery", "harm", "calls", "agreement")  # of its `behaviour`
NAMES = POLICIES | BOUNDS
STAMP = "done.json"  # in a stage's directory, once its command has ended well
ABSENT_NOTE = (
    "N-acc: absent targets answered by an empty mask; T-acc: present ones answered by a mask. A policy that never makes"
    " a mask has N-acc 100% and IoU 1 on every absent target."
)
RECOVERED_NOTE = "recovered: of the trajectories whose first mask is below IoU 0.5, the share that ends at 0.8 or more."
SHOWN = 4  # samples shown among the best of the last policy, and as many among the worst

# The paper's figures of RSAgent-7B: (benchmark, who) -> (gIoU, cIoU, number of a note). The paper's tables could not
# be had: these are from published summaries of arXiv 2512.24023 and, for cIoU on ReasonSeg, from table 1 of SWiM
# (github.com/yancilin/SWiM). Of RefCOCO, RefCOCO+ and ReasonSeg val no figure was found.
PAPER: dict[tuple[str, str], tuple[float | None, float | None, int]] = {
    ("reasonseg/test", "grpo"): (0.665, 0.579, 1),
    ("reasonseg/test", "sft"): (None, 0.554, 2),
    ("reasonseg/test", "base"): (None, 0.301, 2),
    ("refcocog/umd/test", "grpo"): (None, 0.815, 3),
}
NOTES = (
    "arXiv 2512.24023 by published summaries; cIoU as table 1 of SWiM reports it.",
    "Called cIoU in the summary of the ablation; beside the final 0.665 gIoU and 0.579 cIoU it might be gIoU.",
    "One summary says test, a report on the paper says an average; the convention is not told.",
)
_WIDE = ("convention", "command")  # columns of table.md alone
_OPTIONAL = ("paper gIoU", "paper cIoU", "N-acc", "T-acc", "recovered", "waits for")  # columns of the table
# (stage, key of metrics.jsonl, title, label of the y axis); rewards' own parts are added as they come
_CURVES = (
    ("sft", "loss", "SFT loss", "nats per token"),
    ("grpo", "reward", "GRPO reward", "reward"),
    ("grpo", "giou", "IoU of the rollouts", "mean final IoU"),
    ("grpo", "endings/finished", "Finished", "share of rollouts"),
    ("grpo", "turns", "Turns", "per rollout"),
    ("grpo", "tool_errors", "Tool errors", "share of turns"),
    ("grpo", "kl_ref", "KL to the reference", "nats per token"),
    ("grpo", "entropy/drawn", "Entropy", "nats per token"),
    ("sft", "l2_grads", "SFT gradient", "norm"),
    ("grpo", "l2_grads", "GRPO gradient", "norm"),
    ("sft", "lr", "SFT learning rate", "learning rate"),
    ("grpo", "lr", "GRPO learning rate", "learning rate"),
    ("sft", "perf/throughput", "SFT speed", "tokens per second and chip"),
    ("grpo", "tokens_per_s", "GRPO speed", "sampled tokens per second of rollout"),
)


def seconds_of(step: Step) -> float | None:
    """How long the command took that ended well; None where this very command, on what it builds upon, has not."""
    if step.stage.given:
        return 0.0
    if any(seconds_of(need) is None for need in step.needs.values()):
        return None
    stamp = _stamp(step.directory)
    same = stamp.get("key") == step.key and stamp.get("nonces") == nonces_of(step)
    return float(stamp["seconds"]) if same else None


def nonces_of(step: Step) -> dict[str, str]:
    """Which making of each stage that it needs is there; "" where none says so."""
    return {name: _stamp(need.directory).get("nonce", "") for name, need in step.needs.items()}


def _stamp(directory: pathlib.Path) -> dict[str, Any]:
    """What is said of the command that ended well there; {} without it."""
    stamp = _written(directory)
    try:
        return stamp if float(stamp["seconds"]) >= 0 else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _written(directory: pathlib.Path) -> dict[str, Any]:
    try:
        stamp = json.loads(read_bytes(directory / STAMP))
    except (FileNotFoundError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def take_back(step: Step) -> None:
    """Its command is run anew. Whose files are there is still said, for it may be refused for them."""
    if "key" in (stamp := _written(step.directory)):
        write_whole(step.directory / STAMP, json.dumps({"key": stamp["key"]}) + "\n")


def waits_for(step: Step, steps: Mapping[str, Step], failed: Mapping[str, int]) -> str:
    """Why a stage has not been done; "" where nothing is in its way."""
    if step.stage.name in failed:
        return f"failed with status {failed[step.stage.name]}"
    fields = [f"--config.{name}" for name in step.lacks]
    undone = [*fields, *(name for name in step.needs if seconds_of(steps[name]) is None)]
    return f"waits for {', '.join(undone)}" if undone else ""


def not_run_yet(step: Step) -> str:
    """Of a stage that nothing keeps from being run."""
    again = "not run yet since its command, its config or what it builds upon was changed or made again"
    return again if _written(step.directory) else "not run yet"


def command_line(step: Step) -> str:
    """What a person types."""
    return f"given: {step.stage.given}" if step.stage.given else shlex.join(["python", *step.argv])


def table_row(step: Step, evaluation: Evaluation | None, waits: str) -> dict[str, Any]:
    """One player on one benchmark, as summary.json has it; `waits`: why there is no evaluation."""
    stage, results = step.stage, evaluation.results if evaluation else {}
    giou, ciou, note = PAPER.get((stage.benchmark, stage.row), (None, None, 0))
    row = {"benchmark": stage.benchmark, "row": stage.row, "paper_giou": giou, "paper_ciou": ciou, "note": note}
    row |= {key: results.get(key) for key in KEYS} | {key: results[key] for key in ABSENT_KEYS if key in results}
    behaviour = results.get("behaviour") or {}
    row |= {key: behaviour[key] for key in BEHAVIOUR_KEYS if key in behaviour}
    row |= {"ciou_ci95": evaluation and evaluation.ciou_ci95, "convention": evaluation and convention(results)}
    return row | {"waits": waits, "command": command_line(step)}


@dataclasses.dataclass(frozen=True)
class Summary:
    """Everything that is shown."""

    title: str
    rows: tuple[dict[str, Any], ...]  # of table_row
    benchmark: str  # the first that has an evaluation of a policy, "" = none
    shown: dict[str, Evaluation]  # of it: base, sft, grpo, as far as they are there
    gains: tuple[tuple[str, str, str, Comparison | str], ...]  # benchmark, after, before; why there is none
    steps: dict[str, tuple[dict[str, Any], ...]]  # metrics.jsonl, by stage of the recipe
    stages: tuple[tuple[str, str, str], ...]  # name, state, command
    seconds: float

    @property
    def absent(self) -> bool:
        """Whether some samples have no target."""
        return any("n_acc" in row for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """What summary.json holds: the policies on the benchmark shown, and every row."""
        out: dict[str, Any] = dict.fromkeys(POLICIES)
        for row in (row for row in self.rows if row["benchmark"] == self.benchmark and row["row"] in self.shown):
            out[row["row"]] = {key: row[key] for key in (*KEYS, *ABSENT_KEYS, *BEHAVIOUR_KEYS) if key in row}
        found = (c for where, after, _, c in self.gains if (where, after) == (self.benchmark, "grpo"))
        gain = None if isinstance(c := next(found, ""), str) else c.giou
        out |= {"gain_ci95": gain and list(gain.ci95), "gain": gain and gain.value, "seconds": self.seconds}
        return out | {"benchmark": self.benchmark, "rows": self.rows}


def summarize_recipe(title: str, steps: Mapping[str, Step], failed: Mapping[str, int]) -> Summary:
    """Reads what the stages that are done have left.

    failed: status by name of the stages whose command has just failed.
    """
    took = {name: seconds_of(step) for name, step in steps.items()}
    why = {name: waits_for(step, steps, failed) or not_run_yet(step) for name, step in steps.items()}
    state = {name: why[name] if s is None else _duration(s) for name, s in took.items()}
    rows, gains = [], []
    players: dict[str, dict[str, Evaluation]] = {}
    for name, step in ((name, step) for name, step in steps.items() if step.stage.row):
        where, who = step.stage.benchmark, step.stage.row
        evaluation, waits = None, "" if took[name] is not None else why[name]
        try:
            evaluation = None if waits else _evaluation_of(step)
        except DataError as error:
            waits = str(error)
        if evaluation and where != next(iter(players), where):  # not shown, and RefCOCO's trajectories are a gigabyte
            evaluation = dataclasses.replace(evaluation, examples=())
        if evaluation and who in POLICIES:
            players.setdefault(where, {})[who] = evaluation
        rows.append(table_row(step, evaluation, waits))
    for where, by in players.items():
        pairs = ((a, b) for a, b in (("grpo", "sft"), ("sft", "base")) if a in by and b in by)
        gains += [(where, a, b, _gain(by[b], by[a])) for a, b in pairs]
    told = tuple((name, state[name], command_line(step)) for name, step in steps.items())
    # Where a command of another key has ended well the log is that one's, until this one has ended.
    trained = {name: step for name, step in steps.items() if step.stage.command == "train.py"}
    its_own = lambda step: _written(step.directory).get("key", step.key) == step.key  # noqa: E731
    counted = {name: step for name, step in trained.items() if took[name] is not None or its_own(step)}
    logs = {name: _logged(step.directory / "metrics.jsonl") for name, step in counted.items()}
    benchmark, shown = next(iter(players.items()), ("", {}))
    seconds = sum(s or 0.0 for s in took.values())
    return Summary(title, tuple(rows), benchmark, shown, tuple(gains), logs, told, seconds)


def _evaluation_of(step: Step) -> Evaluation:
    """DataError where it is of another benchmark or another player than the stage's."""
    evaluation, stage = load_evaluation(step.directory), step.stage
    plays = (stage.row,) if stage.row in BOUNDS else ("", "untrained") if stage.row == "base" else ("",)
    played = evaluation.results.get("settings", {}).get("bound", {}).get("row", plays[0])
    if played not in plays or evaluation.results["benchmark"] != stage.benchmark:
        what = f"benchmark {evaluation.results['benchmark']!r} with bound.row {played!r}"
        raise DataError(f"{step.directory} is an evaluation of {what}, not of {stage.benchmark!r} and {stage.row}")
    return evaluation


def _gain(before: Evaluation, after: Evaluation) -> Comparison | str:
    """Or why the two cannot be compared."""
    try:
        check_comparable([before, after], "segmenter.")
        return compare(before, after, "")
    except DataError as error:
        return str(error)


def _logged(path: pathlib.Path) -> tuple[dict[str, Any], ...]:
    """The steps of this metrics.jsonl, if it is there; after a resume the later values of a step stand."""
    kept = {}
    objects = read_objects(path, f"python train.py --workdir={path.parent}") if path.exists() else ()
    for where, value in objects:
        if not isinstance(value.get("step"), int) or "stage" not in value:
            raise DataError(f"{where}: no step or stage; remove {path.parent} and run its stage again")
        key = value["stage"], value["step"]
        kept[key] = kept.get(key, {}) | value  # a start that only validates a step writes no more of it
    return tuple(kept[key] for key in sorted(kept))


def convention(results: Mapping[str, Any]) -> str:
    """By which rules the figures were counted: LISA's, and what differs from them."""
    rules = results.get("settings", {}).get("metric", {})
    defaults = {f.name: f.default for f in dataclasses.fields(MetricConfig)}
    own = [f"{name} {rules[name]}" for name, value in defaults.items() if rules.get(name, value) != value]
    said = [f"{name} {rules[name]}" for name in ("unit", "texts") if name in rules]
    return ", ".join(["LISA's rules", *said, *own])


def table(summary: Summary) -> list[list[str]]:
    """The head and a row of each player, without those of _OPTIONAL in which nobody has anything."""
    head = ["benchmark", "policy", "paper gIoU", "gIoU", "95% interval", "paper cIoU", "cIoU", "95% interval", "N-acc"]
    head += ["T-acc", "recovered", "turns", "tool errors", "samples", "convention", "waits for", "command"]
    rows = []
    for r in summary.rows:
        note = f" [{r['note']}]" if r["note"] else ""
        cells = [r["benchmark"], NAMES[r["row"]]]
        for name in ("giou", "ciou"):
            paper, interval = r[f"paper_{name}"], r[f"{name}_ci95"]
            cells += [f"{paper:.3f}{note}" if paper else "", _figure(r[name]), span(interval) if interval else ""]
        accuracies = [_percent(r[key]) if key in r else "" for key in ABSENT_KEYS[:2]]
        errors = _percent(r["tool_error_rate"]) if r["n"] else ""
        recovered = _percent(r["recovery"]) if r.get("recovery") is not None else ""
        cells += [*accuracies, recovered, _figure(r["mean_turns"], ".2f"), errors, _figure(r["n"], "d")]
        rows.append([*cells, r["convention"] or "", r["waits"].removeprefix("waits for "), r["command"]])
    kept = [k for k, name in enumerate(head) if name not in _OPTIONAL or any(row[k] for row in rows)]
    return [[row[k] for k in kept] for row in (head, *rows)]


def verdicts(summary: Summary) -> list[str]:
    """What training has gained, on each benchmark."""
    said = []
    for benchmark, after, before, c in summary.gains:
        names = f"{benchmark}: {NAMES[after]} over {NAMES[before]}"
        if isinstance(c, str):
            said.append(f"{names}: {c}")
            continue
        left = f"; {c.left_out} samples left out, which one of the two drops" * bool(c.left_out)
        gain = f"{c.giou.value:+.3f} gIoU, 95% interval {span(c.giou.ci95, '+.3f')} ({c.giou.verdict}{left}{c.caveat})"
        said.append(f"{names}: {gain}")
    return said


def _figure(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def remarks(summary: Summary) -> list[str]:
    """What stands under the table."""
    used = sorted({row["note"] for row in summary.rows} - {0})
    said = ["Intervals: 95%, bootstrap over pictures; gains are paired by sample."]
    said += [RECOVERED_NOTE] * any(row.get("recovery") is not None for row in summary.rows)
    said += [f"Counted by {rules}." for rules in sorted({row["convention"] or "" for row in summary.rows} - {""})]
    return [*said, *[ABSENT_NOTE] * summary.absent, *(f"[{k}] {NOTES[k - 1]}" for k in used)]


def _narrow(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """A table without _WIDE: of the page and the terminal."""
    return [[cell for cell, name in zip(row, rows[0], strict=True) if name not in _WIDE] for row in rows]


def summary_page(summary: Summary) -> str:
    """The page of all rows, and of trajectories of the policies on the first benchmark."""
    last = next(reversed(summary.shown.values()), None)
    kept = [(NAMES[n], e.workdir, {example.id: example for example in e.examples}) for n, e in summary.shown.items()]

    def tries(samples: list[Example]) -> list[tuple]:
        return [(s, [(name, workdir, by_id.get(s.id)) for name, workdir, by_id in kept]) for s in samples]

    chosen = map(tries, choose([e for e in last.examples if e.id not in last.absent] if last else ()))
    bounds = [value for row in summary.rows for value in row["giou_ci95"] or ()]
    return render_page(
        "reproduction.html",
        title=summary.title,
        names=NAMES,
        summary=summary,
        verdicts=verdicts(summary),
        rows=_narrow(table(summary)),
        axis=(min([0.0, *bounds]), max([0.0, *bounds])),
        remarks=remarks(summary),
        took=_duration(summary.seconds),
        curves=curves(summary.steps),
        last=last,
        sections=dict(zip(("Good: highest", "Bad: lowest"), chosen, strict=True)),
        settings=setting_rows(last.results.get("settings", {})) if last else [],
    )


def curves(logs: Mapping[str, Sequence[dict[str, Any]]]) -> list[tuple[str, str, str]]:
    """(title, smoothed ends, chart) of each metric that was logged, without values that are missing or not finite.

    logs: steps by stage of the recipe; where several have trained by SFT, or by GRPO, a title names its own.
    """
    runs = {kind: [n for n, log in logs.items() if any(s["stage"] == kind for s in log)] for kind in ("sft", "grpo")}
    terms = {k for log in logs.values() for step in log for k in step if k.startswith("reward/")}
    parts = sorted(terms, key=lambda k: (k.count("/"), k))
    rewards = [("grpo", key, ": ".join(key.split("/")[-2:]), "value of the term") for key in parts]
    wanted = [*_CURVES[:3], *rewards, *_CURVES[3:]]
    charts, drawn = [], []  # the same curve once: a reward of one term is that term's, and mostly the IoU's
    for (kind, key, title, label), name in ((curve, name) for curve in wanted for name in runs[curve[0]]):
        found = [(s["step"], s[key]) for s in logs[name] if s["stage"] == kind and isinstance(s.get(key), int | float)]
        points = [(step, value) for step, value in found if math.isfinite(value)]
        if points and (name, points) not in drawn:
            drawn.append((name, points))
            x, y = zip(*points, strict=True)
            ends = (format(v, ".3g" if abs(v) < 1000 else ",.0f") for v in smoothed(y)[[0, -1]])
            title += f", {name}" * (len(runs[kind]) > 1)
            charts.append((title, " → ".join(ends), line_chart(x, y, label)))
    return charts


def choose(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The best by IoU, best first, and the worst, worst first: at most SHOWN each, none in both."""
    ranked = sorted(examples, key=lambda e: (-e.iou, e.id))
    half = min(SHOWN, (len(ranked) + 1) // 2)
    return ranked[:half], ranked[half:][::-1][:SHOWN]


def write_report(title: str, steps: Mapping[str, Step], workdir: pathlib.Path, failed: Mapping[str, int]) -> None:
    """summary.json, table.md and report/index.html in `workdir`, and the table on the terminal."""
    summary = summarize_recipe(title, steps, failed)
    rows, said = table(summary), [*verdicts(summary), *remarks(summary)]
    text = [f"# {title}", markdown(rows), *said]
    write_whole(workdir / "table.md", "\n\n".join(text) + "\n")
    write_whole(workdir / "summary.json", json.dumps(summary.to_json(), indent=2) + "\n")
    shown = save_page(summary_page(summary), workdir)
    print(text_table(_narrow(rows), 2), "", *said, sep="\n")
    print(f"\nTook {_duration(summary.seconds)} in all. Table: {workdir / 'table.md'}  Report: {shown}")
