"""The filter of collected trajectories: what is kept, what is dropped and why, and the page that shows both."""

import base64
import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from rsagent_jax.config.build import to_dict
from rsagent_jax.config.schema import FilterConfig
from rsagent_jax.data import trajectories
from rsagent_jax.data.npz import pack_record, read_arrays
from rsagent_jax.report.evaluation import setting_rows
from rsagent_jax.report.page import render_page, save_page
from rsagent_jax.report.trajectory import collected_example
from rsagent_jax.rollout.play import UNREADABLE
from rsagent_jax.runtime import journal
from rsagent_jax.runtime.paths import write_whole, writing
from rsagent_jax.types import DataError, Status

ATTEMPTS = "attempts"  # the journal's folder in a work directory of collect
RULES = "filter.json"  # in it: the collection's own filter
NOT_YET = "not played yet"
SHOWN = 6  # kept, and as many dropped trajectories on the page


@dataclasses.dataclass(frozen=True)
class Filtered:
    """What the filter did."""

    kept: int
    dropped: dict[str, int]  # by reason
    iou: float  # means over what was kept
    turns: float
    tokens: float
    not_collected: dict[str, int]  # by reason; part of no share

    @property
    def total(self) -> int:
        return self.kept + sum(self.dropped.values())


def write_rules(workdir: pathlib.Path, rules: FilterConfig) -> None:
    """Keeps a collection's own filter, for `rsagent_jax.refilter`."""
    write_whole(workdir / ATTEMPTS / RULES, json.dumps(to_dict(rules), indent=2) + "\n")


def read_rules(workdir: pathlib.Path) -> FilterConfig:
    """The filter of the collection's last start. DataError where there is none."""
    path = workdir / ATTEMPTS / RULES
    try:
        return FilterConfig(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error!r}); run the collection's command again") from None


def verdict(row: dict[str, Any], rules: FilterConfig) -> str:
    """ "kept", or the first reason why not."""
    if row["status"] != Status.FINISHED.value:
        return row["status"]
    if row["malformed"] and not rules.malformed:
        return "malformed or refused call"
    if row["repeats"] and not rules.repeats:
        return "repeated action"
    if row["turns"] > rules.max_turns:
        return f"more than {rules.max_turns} turns"
    if row["iou"] < rules.min_iou:
        return f"final IoU below {rules.min_iou}"
    return "kept"


def write_kept_set(
    workdir: pathlib.Path,
    out: pathlib.Path,
    rules: FilterConfig,
    per_file: int = 1000,
    *,
    settings: dict[str, Any] | None = None,
    current: Mapping[str, str] | None = None,
    moved: tuple[str, str] | None = None,
) -> Filtered:
    """Writes the kept set of a collection to `out`; the journal stays as it is. `settings`, `current`: of
    `journal.read_journal`; what was not collected is counted with the rest."""
    described = settings or journal.settings_of(workdir / ATTEMPTS)
    counts: Counter[str] = Counter()
    failed: Counter[str] = Counter()  # what was not collected, by kind
    unreadable: dict[str, str] = {}  # why, by sample
    kept_of: Counter[str] = Counter()  # by sample
    kept: list[dict] = []
    stayed = 0  # of those, how many were written as they were
    shown: dict[bool, list[tuple[dict, str]]] = {True: [], False: []}
    with writing(out):
        writer = trajectories.RecordWriter(out, per_file)
        for where, row in journal.read_journal(workdir / ATTEMPTS, settings, current, by="uid"):
            try:
                if lost := row.get("failed"):
                    failed[lost["kind"]] += 1
                    if lost["kind"] == UNREADABLE:
                        unreadable[row["sample"]] = lost["why"]
                    continue
                why, sample = verdict(row, rules), row.get("sample", row["id"])
                if why == "kept" and kept_of[sample] >= rules.per_sample:
                    why = f"{rules.per_sample} of the sample kept already"
                kept_of[sample] += why == "kept"
                record = base64.b64decode(row["record"], validate=True)
            except (KeyError, TypeError, ValueError) as error:
                raise journal.damaged(where, error) from None
            counts[why] += 1
            if len(shown[why == "kept"]) < SHOWN:
                shown[why == "kept"].append((row, why))
            if why == "kept":
                there = _moved(record, *moved) if moved else record
                stayed += there == record
                writer.write(there)
                kept.append({key: value for key, value in row.items() if key not in ("record", "gt", "ious", "query")})
        if moved and kept and stayed == len(kept):
            raise DataError(f"--root={'='.join(moved)}: none of the {len(kept)} pictures lies below {moved[0]}")
        lines = (json.dumps({key: row[key] for key in ("id", "iou", "turns", "status")}) + "\n" for row in kept)
        write_whole(out / "trajectories.jsonl", "".join(lines))
        seen = counts.total() + failed.total()
        if (left := described.get("planned", seen) - seen) > 0:  # an older collection does not say what was planned
            failed[NOT_YET] = left
        dropped = {why: count for why, count in sorted(counts.items()) if why != "kept"}
        means = [float(np.mean([row[key] for row in kept])) if kept else 0.0 for key in ("iou", "turns", "tokens")]
        found = Filtered(len(kept), dropped, *means, dict(sorted(failed.items())))
        save_page(filter_page(found, kept, shown, rules, described, workdir), out)
        stamp = {"verdicts": dict(counts), "not_collected": found.not_collected, "unreadable": unreadable}
        writer.close(stamp | {"filter": to_dict(rules), "config": described})
    print(f"kept {found.kept} of {found.total} trajectories: mean IoU {found.iou:.3f}, {found.turns:.2f} turns")
    for why, count in dropped.items():
        print(f"  dropped {count}: {why}")
    for why, count in found.not_collected.items():
        print(f"  not collected {count}: {why}")
    return found


def _moved(record: bytes, old: str, new: str) -> bytes:
    """The record with its picture's path below `new` where it was below `old`."""
    values = read_arrays(record)
    header = json.loads(values["header"].tobytes())
    path = header["picture"]["path"]
    if path.startswith(old):
        header["picture"]["path"] = new + path.removeprefix(old)
    return pack_record(header, values)


def filter_page(found: Filtered, kept, shown, rules: FilterConfig, settings, workdir) -> str:
    tools = sum((Counter(row["tools"]) for row in kept), Counter())
    figures = [
        ("kept", str(found.kept), f"of {found.total} trajectories"),
        ("IoU", f"{found.iou:.3f}", "mean of the final masks"),
        ("turns", f"{found.turns:.2f}", "mean"),
        ("tokens", f"{found.tokens:.0f}", "mean of a whole trajectory"),
        ("trained tokens", str(sum(row["sampled_tokens"] for row in kept)), "in all"),
    ]
    return render_page(
        "collected.html",
        title="Collected trajectories",
        found=found,
        figures=figures,
        ious=[row["iou"] for row in kept],
        turns=sorted(Counter(row["turns"] for row in kept).items()),
        tools=tools.most_common(),
        settings=setting_rows({**to_dict(rules), **settings}),
        min_iou=rules.min_iou,
        workdir=workdir,
        shown={
            word: [(why, collected_example(row)) for row, why in shown[word == "kept"]] for word in ("kept", "dropped")
        },
    )
