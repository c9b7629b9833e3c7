"""Compares evaluations of the same samples: paired differences with intervals, and the samples that differ most.

  python -m rsagent_jax.compare runs/eval-a runs/eval-b [runs/eval-c …] [--out=comparison.md] [--samples=8]

The first is the one the others are held against. Each is a work directory of evaluate.py. A paired interval is of the
difference on the same sample, so it is narrower than the two policies' own intervals suggest. Samples that the
convention of either drops are left out; settings that differ are named.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from rsagent_jax.config.ranges import CountOrZero
from rsagent_jax.report import comparison as tables
from rsagent_jax.report.comparison import Comparison, check_comparable, compare, differing
from rsagent_jax.report.evaluation import Evaluation, load_evaluation
from rsagent_jax.runtime.paths import absolute, write_whole, writing
from rsagent_jax.types import DataError


def sample_table(c: Comparison, base: str, queries: dict[str, str], shown: int) -> list[list[str]]:
    figures = ((id, there, here, here - there) for id, there, here in c.samples[:shown])
    rows = [[id, queries.get(id, ""), f"{a:.3f}", f"{b:.3f}", f"{gap:+.3f}"] for id, a, b, gap in figures]
    return [["sample", "query", base, c.name, "difference"], *rows]


def names_of(workdirs: Sequence[pathlib.Path]) -> list[str]:
    """The shortest tails of the paths that tell them apart."""
    parts = [absolute(path).parts for path in workdirs]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"the same directory is given twice: {', '.join(map(str, workdirs))}")


def marked(name: str, evaluation: Evaluation) -> str:
    """The name, with the row's own where it is none of a policy: an oracle must not pass for a model."""
    row = evaluation.results.get("row", "policy")
    return name if row == "policy" else f"{name} ({row})"


def main(
    *workdirs: pathlib.Path,  # work directories of evaluate.py, two or more
    out: pathlib.Path | None = None,  # a file for the tables, as Markdown
    samples: CountOrZero = 8,  # how many of the samples that differ most
) -> None:
    if len(workdirs) < 2:
        raise DataError("give at least two work directories of evaluate.py")
    command.check_out_file(out, "out")
    names = names_of(workdirs)
    evaluations = [load_evaluation(path) for path in workdirs]
    names = [marked(name, e) for name, e in zip(names, evaluations, strict=True)]
    check_comparable(evaluations)
    found = [compare(evaluations[0], e, n) for e, n in zip(evaluations[1:], names[1:], strict=True)]
    said = [  # of other segmenters, above all
        f"settings of {names[0]} and {name}: {differ}"
        for e, name in zip(evaluations[1:], names[1:], strict=True)
        if (differ := differing(evaluations[0], e, "settings."))
    ]
    said += [f"{names[0]} and {c.name}{c.caveat}" for c in found if c.caveat]
    queries = {example.id: example.query for e in evaluations for example in e.examples}
    rows = map(tables.comparison_row, names, evaluations, [None, *found])
    main_table = [tables.comparison_head(names[0]), *rows]
    print(tables.text_table(main_table), tables.NOTE, *said, sep="\n")
    text = [f"# {names[0]} and {', '.join(names[1:])}", tables.markdown(main_table), tables.MARKDOWN_NOTE, *said]
    for comparison in found:
        rows = sample_table(comparison, names[0], queries, samples)
        title = f"Samples on which {comparison.name} and {names[0]} differ most"
        print(f"\n{title}\n{tables.text_table(rows, 2)}")
        text += [f"## {title}", tables.markdown(rows)]
    if out:
        with writing(f"--out={out}"):
            write_whole(out, "\n\n".join(text) + "\n")
    gaps = {c.name: {k: dataclasses.asdict(getattr(c, k)) for k in ("giou", "ciou", "turns")} for c in found}
    for c in found:
        gaps[c.name]["left_out"] = c.left_out
    print("\n" + json.dumps({"base": names[0], "differences": gaps}))
