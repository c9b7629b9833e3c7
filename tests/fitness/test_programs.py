"""The checks that compile programs: the engine against the trainer, a training step weighed and timed."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rsagent_jax.aot.topology import CHIPS
from rsagent_jax.fitness import decoding, parity, training
from rsagent_jax.fitness.finding import Examined, Finding, Verdict
from rsagent_jax.models.qwen25_vl import attention
from tests.fitness.test_checks import only, told

pytestmark = pytest.mark.slow

OK, SLOW, WRONG, NOT_RUN = Verdict


def test_log_probs_of_engine_and_trainer_that_part_are_found(examined, monkeypatch):
    assert only(decoding.check_engine(examined))[0] is NOT_RUN
    both, items, play, ours = (
        dataclasses.replace(examined, config=dataclasses.replace(examined.config, stages=("sft", "grpo"))),
        [],
        parity._play,
        parity.batch_logprobs,
    )
    monkeypatch.setattr(parity, "_play", lambda engine: items or items.extend(play(engine)) or items)
    agree, decode = told(decoding.check_engine(both))
    assert agree[0] is OK and "sampled tokens" in agree[1] and decode[0] is OK and "tokens/s" in decode[1]
    monkeypatch.setattr(decoding, "_decoding", lambda engine: Finding("", OK, ""))
    monkeypatch.setattr(parity, "batch_logprobs", lambda *args: ours(*args) - 0.01)
    (verdict, said), _ = told(decoding.check_engine(both))
    assert verdict is WRONG and "1.0e-02 nats at most" in said and "0.001" in said and "do not train GRPO" in said
    monkeypatch.setattr(decoding, "device_memory", lambda: 1 << 20)
    verdict, said = only(decoding.check_engine(both))
    assert verdict is WRONG and "there are 0.00" in said and "sampling.slots" in said


def test_a_wrong_kernel_is_found_in_the_log_probs(examined, monkeypatch):
    """One that sees what is to come, and one that gives no number."""
    ours = attention._blocks
    for wrong in (lambda ids, causal, *qkv: ours(ids, False, *qkv), lambda *args: ours(*args) * jnp.nan):
        monkeypatch.setattr(attention, "_blocks", wrong)
        found = {f.name: f.verdict for f in parity.check_numbers(examined)}
        bad = {name for name, verdict in found.items() if verdict is not OK}
        assert bad == {"policy, blocks and plain, float32", "policy, blocks and plain, bfloat16"}
        assert "policy, bfloat16 and float32" in found


def test_a_training_step_is_weighed_and_timed(examined, monkeypatch):
    judge, kept = training.judge_step, []
    monkeypatch.setattr(training, "judge_step", lambda *args: kept.extend(args) or judge(*args))
    (memory, weighed), (step, timed) = told(training.check_training(examined))
    assert memory is OK and "sft gradients" in weighed
    assert step is OK and "MFU" in timed and "128 full micro-batches" in timed and "not judged" in timed
    *same, times = kept
    assert times.update_s > 0 and 5 < times.loss < 10  # ln(512) is 6.2
    verdict, said = only([judge(*same, dataclasses.replace(times, l2_grads=float("nan")))])
    assert verdict is WRONG and "gradients nan" in said and "finite" in said
    monkeypatch.setattr(training, "matmul_flops", lambda dtype: (1e9,))
    flops = same[3]["gradients"][0].model_flops
    with monkeypatch.context() as patch:  # a device for which nothing is projected
        patch.setattr(jax, "default_backend", lambda: "gpu")
        verdict, said = only([judge(*same, dataclasses.replace(times, gradients_s=flops / 1e9))])
        assert verdict is OK and "MFU 100%" in said
        verdict, said = only([judge(*same, dataclasses.replace(times, gradients_s=flops / 1e8))])
        assert verdict is SLOW and "MFU 10%" in said and "15% at least" in said and "remat" in said
    monkeypatch.setattr(training, "chip_of", lambda device: CHIPS["v5e"])
    verdict, said = only([judge(*same, times)])
    assert verdict is SLOW and "a micro-batch projected" in said and "of the nominal" in said
    assert only([judge(*same, dataclasses.replace(times, gradients_s=1e-9))])[0] is OK


def test_the_seconds_of_a_step_are_of_all_that_it_runs(examined, monkeypatch):
    """Each program takes a second: log-probs twice for 4 micro-batches, gradients in 2 epochs, 4 updates."""
    monkeypatch.setattr(training, "fastest", lambda run: (jax.block_until_ready(run()), 1.0)[1])
    grpo = dataclasses.replace(examined.config.grpo, epochs=2, minibatches=2)
    both = dataclasses.replace(examined.config, grpo=grpo, stages=("grpo",))
    _, (step, said) = told(training.check_training(Examined.of(both)))
    assert step is OK and said.startswith("20.00 s without rollouts, 4 full micro-batches of 1.000, 4 updates; MFU")


def test_a_step_that_does_not_fit_is_not_run(examined, monkeypatch):
    monkeypatch.setattr(training, "device_memory", lambda: 1 << 10)
    verdict, said = only(training.check_training(examined))
    assert verdict is WRONG and "parameters and gradients alone" in said and "larger slice" in said


def test_a_program_that_the_compiler_refuses_is_wrong(examined, monkeypatch):
    class Refused:
        program = "sft gradients"

        def trace(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 17.44G of 15.75G hbm.\nmore")

    monkeypatch.setattr(training, "stage_jobs", lambda *args: [Refused()])
    verdict, said = only(training.check_training(examined))
    assert verdict is WRONG and "sft gradients: RESOURCE_EXHAUSTED: Used 17.44G of 15.75G" in said and "remat" in said
