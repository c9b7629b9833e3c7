"""The variants of an ablation in one table, each held against the first: table.md, summary.json and a page.

Intervals are of the difference on the same samples. What has not been measured is an empty row, with what it waits for.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rsagent_jax.config.ablation import AblationConfig
from rsagent_jax.config.recipe import Step
from rsagent_jax.report import comparison as tables
from rsagent_jax.report.comparison import Comparison, check_comparable, compare
from rsagent_jax.report.evaluation import Evaluation, load_evaluation
from rsagent_jax.report.page import render_page, save_page
from rsagent_jax.report.reproduction import command_line, not_run_yet, seconds_of, waits_for
from rsagent_jax.runtime.paths import write_whole
from rsagent_jax.types import DataError

KEPT = ("giou", "ciou", "mean_turns", "n", "giou_ci95")  # of results.json, in summary.json
SAME = ("segmenter.", "row")  # of results.json, besides the rules


@dataclasses.dataclass(frozen=True)
class VariantRow:
    """What is known of a variant."""

    name: str
    says: str
    evaluation: Evaluation | None
    comparison: Comparison | None  # with the first; None of the first itself
    waits: str  # why there is no evaluation, or none that can be compared


def read_variants(config: AblationConfig, steps: Mapping[str, Step], failed: Mapping[str, int]) -> list[VariantRow]:
    """Of each variant, in their order, from what its stages have left. failed: status of those that failed just now."""
    rows: list[VariantRow] = []
    for variant in config.variants:
        step, evaluation, comparison, waits = steps[f"eval-{variant.name}"], None, None, ""
        if seconds_of(step) is None:
            waits = why_not(step, steps, failed)
        else:
            try:
                evaluation = dataclasses.replace(load_evaluation(step.directory), examples=())
                if rows and (first := rows[0].evaluation):
                    check_comparable([first, evaluation], *SAME)
                    comparison = compare(first, evaluation, variant.name)
            except DataError as error:
                evaluation, waits = None, str(error)
        rows.append(VariantRow(variant.name, variant.says, evaluation, comparison, waits))
    return rows


def why_not(step: Step, steps: Mapping[str, Step], failed: Mapping[str, int]) -> str:
    """Why a stage has not been done: what has just failed, or what is waited for."""
    broken = (name for name in (step.stage.name, *step.needs) if name in failed)
    said = "; ".join(f"{name} failed with status {failed[name]}" for name in broken)
    return said or waits_for(step, steps, failed) or not_run_yet(step)


def ablation_table(rows: Sequence[VariantRow]) -> list[list[str]]:
    """The head and a row of each variant; the last column is there if something is missing."""
    head = tables.comparison_head(rows[0].name)[1:]
    table = [["variant", "what differs", *head, "waits for"]]
    for row in rows:
        e = row.evaluation
        figures = tables.comparison_row(row.name, e, row.comparison)[1:] if e else [""] * len(head)
        table.append([row.name, row.says, *figures, row.waits.removeprefix("waits for ")])
    return table if any(row.waits for row in rows) else [cells[:-1] for cells in table]


def ablation_verdicts(rows: Sequence[VariantRow]) -> list[str]:
    """What each variant is worth beside the first."""
    return [
        f"{row.name} minus {rows[0].name}: gIoU {c.giou} ({c.giou.verdict}), cIoU {c.ciou}{c.caveat}"
        for row in rows
        if (c := row.comparison)
    ]


def summary_of(rows: Sequence[VariantRow]) -> list[dict[str, Any]]:
    """As summary.json has it."""
    out = []
    for row in rows:
        told = {"name": row.name, "says": row.says, "waits": row.waits}
        told |= {key: row.evaluation and row.evaluation.results.get(key) for key in KEPT}
        c = row.comparison
        told |= {f"{key}_gain": c and dataclasses.asdict(getattr(c, key)) for key in ("giou", "ciou", "turns")}
        out.append(told)
    return out


def write_ablation(
    config: AblationConfig, steps: Mapping[str, Step], workdir: pathlib.Path, failed: Mapping[str, int]
) -> None:
    """table.md, summary.json and report/index.html in `workdir`, and the table on the terminal."""
    rows = read_variants(config, steps, failed)
    table, verdicts = ablation_table(rows), ablation_verdicts(rows)
    text = [f"# {config.title}", f"{config.benchmark}, seed {config.seed}.", tables.markdown(table), *verdicts]
    write_whole(workdir / "table.md", "\n\n".join([*text, tables.MARKDOWN_NOTE]) + "\n")
    summary = {"benchmark": config.benchmark, "seed": config.seed, "variants": summary_of(rows)}
    write_whole(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    bounds = [value for row in rows if row.comparison for value in (*row.comparison.giou.ci95, 0.0)] or [0.0]
    stages = [(name, _state(step, steps, failed), command_line(step)) for name, step in steps.items()]
    page = render_page(
        "ablation.html",
        title=config.title,
        config=config,
        rows=rows,
        table=table,
        verdicts=verdicts,
        note=tables.NOTE,
        axis=(min(bounds), max(bounds)),
        stages=stages,
    )
    shown = save_page(page, workdir)
    print(tables.text_table(table, 2), "", *verdicts, tables.NOTE, sep="\n")
    print(f"\nTable: {workdir / 'table.md'}  Report: {shown}")


def _state(step: Step, steps: Mapping[str, Step], failed: Mapping[str, int]) -> str:
    seconds = seconds_of(step)
    return why_not(step, steps, failed) if seconds is None else f"{seconds:.0f} s"
