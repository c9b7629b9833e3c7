"""Hours of a stage against arithmetic by hand, and the page's table against the lines that it is made from."""

import pathlib

import pytest

from rsagent_jax.aot import costs
from rsagent_jax.aot.topology import CHIPS, parse_topology
from rsagent_jax.runtime import command
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parents[2]
PEAK = CHIPS["v6e"].bf16_flops
ASSUMED = costs.Assumptions(mfu=0.5, bandwidth=0.5)


def report(program: str, seconds: float, flops: float = 0.0, devices: int = 8, **decoding) -> dict:
    given = {"slots": 128, "devices": devices, "tensor": 2, "steps": 8} if program.startswith("rollout") else None
    common = dict(devices=devices, fits=True, decoding=given and given | decoding)
    return dict(common, program=program, projected_step_s=seconds, model_flops=flops)


def line(name: str, *reports: dict, tokens: int = 6144) -> dict:
    return {"name": name, "tokens": tokens, "arguments": [], "reports": list(reports)}


ROLLOUT = (
    report("rollout weights", 0.25),
    report("rollout encode", 2.0),
    report("rollout append", 0.5),
    report("rollout decode", 0.1),
)
SFT = line("7b:v6e-8:sft:full", report("sft gradients", 1.0, 4 * PEAK * 8), report("sft update", 0.5))


def test_a_training_step_is_its_micro_batches_and_one_update():
    """A micro-batch's FLOPs take 4 s at the peak of 8 chips and 8 s at half of it, its roofline 1 s; 3 of them, and an
    update of 0.5 s."""
    assert costs.step_seconds(SFT, parse_topology("v6e-8"), 3, ASSUMED) == pytest.approx(3 * 8 + 0.5)
    bound = line("7b:v6e-8:sft:full", report("sft gradients", 9.0, 4 * PEAK * 8), report("sft update", 0.5))
    assert costs.step_seconds(bound, parse_topology("v6e-8"), 3, ASSUMED) == pytest.approx(3 * 9 + 0.5)


def test_rollouts_encode_append_and_decode():
    """128 slots have 32 lanes. 256 trajectories: of 8,024 patches in 32 buffers of 6,144; of 3,277 tokens in 32 pieces
    of 64, 0.4 s each without the decoding in them; two rounds of 1,200 tokens, 0.1 s for 8. All at half the speed."""
    by_hand = 256 * 8024 / (32 * 6144) * 2.0 + 256 * 3277 / (32 * 64) * 0.4 + 2 * 1200 / 8 * 0.1
    assert costs.rollout_seconds(line("", *ROLLOUT), 256, ASSUMED) == pytest.approx(2 * by_hand)
    few = 32 * 8024 / (32 * 6144) * 2.0 + 32 * 3277 / (32 * 64) * 0.4 + 1200 / 8 * 0.1  # a round, however few
    assert costs.rollout_seconds(line("", *ROLLOUT), 32, ASSUMED) == pytest.approx(2 * few)


def test_hours_of_the_stages():
    """v6e-8 trains the 7B with a row per chip. SFT: 10,000 trajectories in 79 updates of 16 micro-batches. GRPO: 1,000
    steps of 8, new weights and 64 trajectories on its one host. Evaluation: 58,436 on the two hosts of a v6e-16."""
    grpo = line(
        "7b:v6e-8:grpo:full", report("grpo gradients", 2.0), report("grpo log-probs", 1.0), report("grpo update", 1.0)
    )
    lines = [SFT, grpo, line("7b:v6e-8:rollout:128", *ROLLOUT), line("7b:v6e-16:engine", *ROLLOUT)]
    found = {cost.stage: cost for cost in costs.costs(lines, ASSUMED)}
    assert list(found) == ["SFT", "GRPO", "evaluation", "collection"] and found["evaluation"].slice == "v6e-16"
    assert found["SFT"].hours == pytest.approx(79 * (16 * 8 + 0.5) / 3600)
    step = 8 * (2 + 1) + 1 + 0.25 / 0.5 + costs.rollout_seconds(line("", *ROLLOUT), 64, ASSUMED)
    assert found["GRPO"].unit_seconds == pytest.approx(step) and found["GRPO"].hours == pytest.approx(step / 3.6)
    played = costs.rollout_seconds(line("", *ROLLOUT), 58_436 / 2, ASSUMED)
    assert found["evaluation"].hours == pytest.approx(played / 3600)
    rows = costs.costs_table(list(found.values()), {"v6e": 2.0}).splitlines()
    assert [row.split(" | ")[1] for row in rows[2:]] == list(found)
    hours = found["SFT"].hours
    assert rows[2] == f"| 7B | SFT | v6e-8 | 128 | {hours:.3g} | {hours * 8:.3g} | {hours * 16:.0f} | remat full |"
    assert [row.split(" | ")[-1][:-2] for row in rows[3:]] == [
        "remat full, rollout of 128 slots", "engine of 128 slots", "engine of 128 slots"
    ]  # fmt: skip


def test_larger_slices_play_as_the_smaller_ones_of_their_kind():
    """v6e-64 has eight times the devices of the line, v6e-32 no preset."""
    update = report("grpo update", 1.0)
    names = ("7b:v6e-64:grpo:full", "7b:v6e-32:grpo:full")
    lines = [line("7b:v6e-8:rollout:64", *ROLLOUT), *(line(name, update) for name in names)]
    (found,) = costs.costs(lines, ASSUMED)
    step = 1 + 0.25 / 0.5 + costs.rollout_seconds(line("", *ROLLOUT), 64 / 8, ASSUMED)
    assert (found.slice, found.unit_seconds) == ("v6e-64", pytest.approx(step))
    assert found.programs == "remat full, rollout of 128 slots"


def test_what_does_not_fit_or_has_rows_of_another_length_is_left_out():
    tight = dict(report("sft update", 0.5), fits=False)
    lines = [
        line(SFT["name"], SFT["reports"][0], tight),
        SFT | {"tokens": 4096},
        line("7b:v6e-8:grpo:full", *SFT["reports"]),
    ]
    assert list(costs.costs(lines, ASSUMED)) == []  # GRPO has nobody to play for it


def test_the_page_has_the_table_of_its_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    before = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8")
    page.write_text(before, encoding="utf-8")
    costs.main(out=str(page))
    assert page.read_text(encoding="utf-8") == before


def test_bad_input_is_one_error(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert costs.parse_prices("v5e=1.5,tpu7x=12") == {"v5e": 1.5, "tpu7x": 12.0} and costs.parse_prices("") == {}
    for text in ("v5e", "v5e=free", "v9=1", "v5e=-1"):
        refused(f"{text!r} is no KIND=PRICE.*v5e", costs.parse_prices, text)
    refused("--mfu must be above 0 and at most 1", command.parse_arguments, costs.main, ["--mfu=1.5"])
    refused("has no line with rows of 6144", costs.main, results=str(tmp_path / "none.jsonl"))
    refused("no place for the table", costs.main, out=str(tmp_path / "none.md"))
