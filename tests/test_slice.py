"""Commands that join the processes of a slice: two of them against one."""

import json

import pytest

from tests.simulated import run_simulated

pytestmark = pytest.mark.slow
QUICK = "--xla_backend_optimization_level=0"  # most of the time is compilation
TIMES = ("seconds_per_sample",)


def results(workdir):
    found = json.loads((workdir / "results.json").read_text())
    return {k: v for k, v in found.items() if k not in TIMES}, (workdir / "predictions.jsonl").read_text()


def test_evaluation_and_collection_of_two_processes_equal_those_of_one(dataset, tmp_path):
    data, cache = f"--config.data.root={dataset}", f"--config.cache_dir={tmp_path / 'compiled'}"
    evaluate = ["evaluate.py", "--config=configs/eval_quickstart.py", data, cache, "--config.data.limit=3"]
    evaluate += ["--config.agent.max_turns=1", "--config.sampling.slots=2"]
    collect = ["-m", "rsagent_jax.collect", "--config=configs/collect_quickstart.py", data, "--config.limit=5"]
    for count in (1, 2):
        workdir = tmp_path / str(count)
        said = run_simulated([*evaluate, f"--workdir={workdir}/eval"], 1, count, QUICK)
        assert said.count("gIoU") == 1  # by one of them
        run_simulated([*collect, f"--workdir={workdir}/collect"], 1, count)
    assert results(tmp_path / "1/eval") == results(tmp_path / "2/eval")
    assert len(list((tmp_path / "2/eval").glob("**/0000?-of-00002.jsonl"))) == 2
    one, two = ((tmp_path / n / "collect/trajectories.jsonl").read_text() for n in "12")
    assert one == two and one.count("\n") > 0


def test_one_process_answers_for_the_slice(dataset, tmp_path):
    image = next(dataset.rglob("*.jpg"))
    command = ["-m", "rsagent_jax.segment", str(image), "the red circle", f"--out={tmp_path}"]
    said = run_simulated([*command, "--config.agent.max_turns=1", "--config.sampling.tensor=1"], 2, 2)
    assert said.count("the red circle") == 1 and (tmp_path / "mask.png").exists()


def test_a_shard_is_for_machines_that_do_not_know_of_each_other(dataset, tmp_path):
    command = ["evaluate.py", "--config=configs/eval_quickstart.py", f"--config.data.root={dataset}", "--shard=0/2"]
    with pytest.raises(AssertionError, match=r"--shard=0/2 is for machines .* 2 processes"):
        run_simulated([*command, f"--workdir={tmp_path}"], 1, 2)
