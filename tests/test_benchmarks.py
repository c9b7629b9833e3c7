"""The benchmarks run at a toy size: the two sides agree, attention by blocks is linear in memory. No timing here."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]


def last_line(script: str, *arguments: str) -> dict:
    """What a benchmark prints at its end."""
    command = [sys.executable, f"benchmarks/{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_training_step_computes_what_transformers_computes():
    pytest.importorskip("torch")
    result = last_line("train_step.py", "--toy", "--sequences=2", "--steps=1")
    assert result["vs_torch"] > 0
    assert result["seconds"] > 0
    assert result["torch_seconds"] > 0
    for ours, theirs in zip(result["losses"], result["torch_losses"], strict=True):
        assert abs(ours - theirs) < 1e-4
    assert result["losses"][0] - result["losses"][2] > 0.1  # it learns, so the update is compared too
    assert result["largest_difference"] < 1e-4  # of the gradients' norms as well
    # 16 x 16 patches fill 4 windows of 8 x 8; 12 x 20 of them are 2 windows, 2 x 1/2 beside and 1/2, 1/2, 1/4 below, in
    # 4 bins: of 2 x 256 places 256 + 240 are used.
    assert result["patch_waste"] == pytest.approx(1 - (256 + 240) / (2 * 256))
    assert result["token_waste"] == 0


def test_the_bridge_encodes_each_picture_once_and_gives_the_predictors_masks():
    pytest.importorskip("sam2")
    result = last_line("bridge.py", "--toy", "--parts=path,throughput")
    assert result["encodes"] == result["pictures"] == 4
    assert result["most_pixels_different"] < 1e-4  # of 307,200: logits of batches are equal within rounding


def test_memory_is_linear_by_blocks_and_quadratic_with_whole_scores():
    result = last_line("memory.py", "--toy", "--lengths=1024,2048,4096")
    assert result["exponent_blocks"] < 1.2
    assert result["exponent_plain"] > 1.5
    for name in ("blocks", "plain"):
        assert len(result["temp"][name]) == 3


def test_a_soak_tells_what_grows(monkeypatch, capsys):
    """Of the second start: the trainer gains 0.1 MiB a step, which is 3 of 103 MiB from step 30 to step 60."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    soak = importlib.import_module("soak")
    flat = {"uss": 50.0, "fds": 10, "threads": 7}

    def row(start, step, more=0.1):
        seen = {
            "trainer": flat | {"rss": 100 + more * step, "cpu": 2.0 * step},
            "side-car": flat | {"rss": 70, "cpu": 0},
        }
        return {"start": start, "step": step, "seconds": 3.0, "compiles": float(step == 5), "processes": seen}

    rows = [row(0, n, more=9.0) for n in range(1, 21)] + [row(1, n) for n in range(17, 61)]
    steps = list(range(1, 61))
    assert soak.report(rows, [30, 60], steps) == {}
    assert "trainer rss                  102.55     105.55     2.9%  OK" in capsys.readouterr().out
    grown = soak.report([row(1, n, more=0.2) for n in steps], [30, 60], steps)
    assert grown == {"trainer rss": pytest.approx(6 / 105.1)}
    twice = soak.report([*rows, row(1, 61) | {"compiles": 2.0}], [30, 60], [*range(1, 21), *range(17, 61)])
    assert twice == {"compiles": 2.0, "TensorBoard": 1.0}
    assert soak.figures(os.getpid())["rss"] > soak.figures(os.getpid())["uss"] > 1


def test_the_metrics_are_those_of_lisa():
    pytest.importorskip("torch")
    result = last_line("metrics.py", "--masks=100", "--side=64x48")
    assert result["largest_difference"] < 1e-6  # LISA divides in float32
    assert result["vs_reference"] > 0


def test_sides_that_differ_end_a_benchmark(monkeypatch):
    pytest.importorskip("torch")
    for folder in (ROOT, ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(folder)
    metrics, memory = (importlib.import_module(name) for name in ("metrics", "memory"))
    monkeypatch.setattr(sys, "argv", ["metrics.py", "--masks=8", "--side=64x48"])
    monkeypatch.setattr(metrics, "ours", lambda masks, count: (0.5, 0.5))
    with pytest.raises(SystemExit, match="do not compute the same"):
        metrics.main()
    compiled = types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(temp_size_in_bytes=1))
    lowered = types.SimpleNamespace(compile=lambda options: compiled)
    monkeypatch.setattr(memory, "lower", lambda *_: (lowered, None))
    losses = iter((7.0, float("nan")))
    monkeypatch.setattr(memory, "run_once", lambda *_: next(losses))
    with pytest.raises(SystemExit, match="do not compute the same"):
        memory.measure([1024, 2048], None)


def test_the_input_path_is_measured_part_by_part():
    result = last_line("input.py", "--images=2", "--seconds=0.05", "--step_seconds=2", "--batch=10")
    assert len(result["rows"]) >= 3 and min(result["rows"].values()) > 0
    # 10 trajectories of 4 images every 2 s
    assert result["cores"] == pytest.approx(20 / result["images_per_s_core"])


def test_the_rollouts_sides_sample_the_same_tokens():
    pytest.importorskip("torch")
    result = last_line("rollout.py", "--toy", "--parts=turns")
    assert result["agree"] == {"reprefill": 1.0, "transformers": 1.0}
    rows = result["turns"]
    assert {row["tokens"] for row in rows.values()} == {3 * 3 * 4}  # trajectories, turns, tokens a turn
    assert len({row["context"] for row in rows.values()}) == 1
    assert result["vs_reprefill"] > 0 and result["vs_generate"] > 0


def test_the_points_of_a_kill_are_spread_over_what_a_run_does_and_all_but_times_is_compared(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    kill = importlib.import_module("kill")
    counts = {"update file": 40, "update work": 12, "reward work": 9}
    points = kill.spread(counts, "update", 4)
    assert [(p.kind, p.at) for p in points] == [("file", 11), ("work", 4), ("file", 31), ("work", 10)]
    assert [p.signal for p in points] == ["SIGKILL"] * 3 + ["SIGTERM"]
    assert [p.at for p in kill.spread(counts, "reward", 3)] == [2, 5, 8]
    row = {"loss": 0.5, "seconds": 1.0, "turns": [{"record": '{"timings_s": {"call": 1}, "status": "finished"}'}]}
    one = kill._leaves(row)
    assert one == {"/loss": 0.5, "/turns/0/records/status": "finished"}
    assert kill.difference(one, one | {"/loss": 0.5 + 2**-20}) == (2**-20, "/loss")
    assert kill.difference(one, one | {"/turns/0/records/status": "invalid"})[0] == float("inf")
    assert kill.difference(one, {"/loss": 0.5})[0] == float("inf")
    lost = one | {"/loss": float("nan")}
    assert kill.difference(one, lost) == kill.difference(lost, one) == (float("inf"), "/loss")
    assert kill.difference(lost, lost) == (0.0, "")


def test_a_device_run_goes_on_where_it_stopped_and_one_cell_that_fails_costs_only_itself(monkeypatch, tmp_path, capsys):
    """By hand: 231 TFLOP in 0.77 s are 300 TFLOP/s, of 989 and of 800; 18 GB in 9 ms are 2 TB/s, of 3.35 and 3."""
    from benchmarks import device

    limits = dict(backend="gpu", device="NVIDIA H100", runtime="cuda", dtype="bfloat16", toy=False)
    limits |= dict(flops_per_s=8e14, bytes_per_s=3e12, nominal_flops_per_s=9.89e14, nominal_bytes_per_s=3.35e12)
    rate, started = dict(rate=1.0, unit="tokens/s"), []
    said = {
        ("limits", "ours"): limits,
        ("train-3b", "ours"): dict(seconds=0.77, flops=231e12, peak_gb=66.8, **rate),
        ("train-3b", "torch"): dict(seconds=3.85, peak_gb=40.7, **rate),
        ("decode-7b-1k", "ours"): dict(seconds=0.009, bytes=18e9, **rate),
    }

    def last_words(command, env, seconds):
        key = tuple(word.partition("=")[2] for word in command[2:4])
        started.append(key)
        assert "--toy" not in command and 0 < seconds <= device.CELL_S
        return (json.dumps(said[key]), "") if key in said else ("", "Traceback\nModuleNotFoundError: no module 'peft'")

    monkeypatch.setattr(device, "last_words", last_words)
    argv = ["device.py", f"--out={tmp_path}", "--pieces=train-3b,decode-7b-1k", "--seconds=500"]
    monkeypatch.setattr(sys, "argv", argv)
    for again in (False, True):
        device.main()
        lines = capsys.readouterr().out.splitlines()
        summary = json.loads(lines[-1])
        assert summary["failed"].keys() == {"decode-7b-1k torch"} and not summary["not_begun"]
        train, decode = (line.split(" | ") for line in lines if line.startswith(("| SFT", "| decode")))
        assert train[1:] == ["0.77 s, 1 tokens/s", "3.85 s, 1 tokens/s", "5.00", "30.3%", "37.5%", "66.8, 40.7 |"]
        assert decode[1:5] == ["9.0 ms, 1 tokens/s", "failed: ModuleNotFoundError: no module 'peft'", "", "59.7%"]
        assert started == ([("decode-7b-1k", "torch")] if again else [*said, ("decode-7b-1k", "torch")])
        started.clear()
        with (tmp_path / "results.jsonl").open("a") as file:
            file.write('{"piece": "tower", "si')  # a kill
    monkeypatch.setattr(sys, "argv", [*argv[:3], "--seconds=1"])
    device.main()
    assert "not begun, for want of time: decode-7b-1k torch" in capsys.readouterr().out and not started


def test_a_row_of_the_device_runs_as_a_toy():
    """The tower's two pictures of 16 x 16 patches; a profile names what ran."""
    from benchmarks import _device_ours, _device_pieces

    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of its time
    found = _device_ours.tower(_device_pieces.PIECES["tower"].toy(), True)
    assert found["unit"] == "pictures/s" and found["rate"] == pytest.approx(2 / found["seconds"])
    assert found["kernels"]["busy_ms"] > 0 and "error" not in found["kernels"]
    # By hand, hidden size 32 and an inner size of 128: a block multiplies each of 512 patches with 4 x 32 x 32 and 3 x
    # 32 x 128 numbers, scores and values cost it 64 others of its window or, in one block of four, 256 of its picture.
    blocks = 4 * 2 * 512 * (4 * 32 * 32 + 3 * 32 * 128) + 2 * 2 * 512 * 32 * (3 * 64 + 256)
    # The patches are embedded, and each four of them merged by 128 x 128 and 128 x 64 numbers.
    assert found["flops"] == blocks + 2 * 512 * 1176 * 32 + 2 * 128 * (128 * 128 + 128 * 64)
