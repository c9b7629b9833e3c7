"""Writes problems: a vision-language model behind an endpoint makes reasoning queries for objects with known masks.

  python -m rsagent_jax.problems --config=configs/problems.py --workdir=DIR --config.data.root=REFER \
      --config.writer.url=http://host:8000/v1 --config.writer.model=Qwen/Qwen2.5-VL-72B-Instruct [--shard=0/4]
  python -m rsagent_jax.collect … --config.data.dataset=folder --config.data.root=DIR --config.data.split=train

The model sees the picture, and the picture with the object marked. <workdir>/<split>.jsonl is a data set of its own
(dataset=folder, docs/data.md) whose pictures are named by path. Answers are kept in <workdir>/answers as they come: a
stopped command goes on where it was, and what failed is tried again. Without this step `collect` uses the data set's
own expressions.
"""

from __future__ import annotations

import contextlib

import numpy as np
from absl import flags

from rsagent_jax.collecting import startup
from rsagent_jax.collecting.problem_writer import ANSWERS, ProblemWriter, write_set
from rsagent_jax.config.build import to_dict
from rsagent_jax.config.schema import ProblemsConfig
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.runtime import command, journal
from rsagent_jax.runtime.journal import Journal
from rsagent_jax.runtime.processes import parse_share
from rsagent_jax.types import DataError

EXAMPLES = 5  # failures told on the terminal


def main(config: ProblemsConfig) -> None:
    workdir, share = command.workdir(), parse_share(flags.FLAGS.shard, "--shard")
    startup.check_problems(config, workdir)
    samples = open_samples(config.data)
    order = np.random.default_rng(config.seed).permutation(len(samples))[: config.limit or None].tolist()
    ids, settings = samples.ids, problems_resume_fingerprint(config) | {"planned": len(order)}
    current = journal.fingerprints(samples, {ids[k]: k for k in order})
    with contextlib.closing(Journal(workdir / ANSWERS, share, settings, current)) as answers:
        for note in answers.notes:
            print(note)
        mine = list(enumerate(order))[share.index :: share.count]
        left = [(uid, k) for uid, k in mine if ids[k] not in answers.done]
        if len(left) < len(mine):
            print(f"goes on: {len(mine) - len(left)} of {len(mine)} objects are done")
        writer = ProblemWriter(config, samples, workdir, answers)
        writer.run(left, len(mine))
    for problem, count in sorted(writer.failed.items()):
        print(f"  no answer for {count}: {problem}")
    for detail in writer.examples[:EXAMPLES]:
        print(f"    {detail}")
    print(f"  endpoint: {writer.usage}")
    done = journal.survey(workdir / ANSWERS, settings, current)
    if writer.failed and not done:
        raise DataError(f"nothing could be written ({dict(writer.failed)}): {writer.examples[0]}")
    if (missing := len(order) - len(done) - sum(writer.failed.values())) > 0:
        print(f"shard {share.index} of {share.count} is done; {missing} objects are left to the others")
        return
    write_set(workdir, config, dict(writer.failed), settings, current)


def problems_resume_fingerprint(config: ProblemsConfig) -> dict:
    """What an answer depends on: work that is taken up again must agree in it."""
    resolved = to_dict(config)
    names = ("seed", "limit", "queries", "min_words", "max_words", "picture_size")
    writer = {key: resolved["writer"][key] for key in ("url", "model", "temperature", "max_tokens")}
    return {key: resolved[key] for key in names} | {"writer": writer, "data": journal.data_settings(config.data)}


if __name__ == "__main__":
    command.define_flags()
    flags.DEFINE_string("shard", "0/1", "i/n: every n-th object from the i-th on, counted from 0.")
    command.run_command(main, ProblemsConfig)
