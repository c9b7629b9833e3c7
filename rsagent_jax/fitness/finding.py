"""What a check looks at, and what it says."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import pathlib

import jax

from rsagent_jax.aot.remat import AUTO, KINDS, device_limit
from rsagent_jax.aot.stages import policy_config
from rsagent_jax.aot.topology import parse_topology
from rsagent_jax.config.schema import EvalConfig, SamplingConfig, SegmentConfig, TrainConfig
from rsagent_jax.config.slices import fill_engine_defaults, fill_slice_defaults
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig


class Verdict(enum.StrEnum):
    OK = "OK"
    SLOW = "slow"  # works, but far below what it is compared with
    WRONG = "wrong"  # a run would fail, or give other results
    NOT_RUN = "not run"  # the config does not use it, or it cannot be looked at here


@dataclasses.dataclass(frozen=True)
class Finding:
    """A line of the page, of one host."""

    name: str
    verdict: Verdict
    figure: str
    against: str = ""  # what the figure is compared with
    remedy: str = ""
    value: float | None = None  # to compare the hosts by; None: there is nothing to compare
    higher_is_better: bool = True  # of `value`
    alike: str = ""  # what must be the same on all hosts

    @classmethod
    def judged(cls, name: str, good: bool, fault: Verdict, figure: str, against: str, remedy: str, **more) -> Finding:
        """OK where it is good, without a remedy; else `fault`. `more`: other fields."""
        return cls(name, Verdict.OK if good else fault, figure, against, "" if good else remedy, **more)


def not_run(name: str, why: str) -> list[Finding]:
    return [Finding(name, Verdict.NOT_RUN, why)]


@dataclasses.dataclass(frozen=True)
class Examined:
    """The config on this machine, and where it would write (None: not told)."""

    config: TrainConfig | EvalConfig | SegmentConfig
    policy: Qwen25VLConfig  # the shape alone: no weights are read
    workdir: pathlib.Path | None = None

    @classmethod
    def of(cls, config: TrainConfig | EvalConfig | SegmentConfig, workdir: pathlib.Path | None = None) -> Examined:
        """DataError for weights of no known shape (a published size is known by its name), and for an unknown slice."""
        if getattr(config, "slice", ""):
            parse_topology(config.slice)
        return cls(config, policy_config(config.policy.weights), workdir)

    @functools.cached_property
    def settled(self) -> TrainConfig | EvalConfig | SegmentConfig:
        """With what is left to the slice filled in for the devices that there are. DataError where they do not fit."""
        config = self.config
        if config.policy.remat == AUTO:  # train.py may choose a faster one: it compiles them all
            config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, remat=KINDS[-1]))
        if not isinstance(config, TrainConfig):
            return config
        return fill_slice_defaults(config, self.policy.text.hidden_size, len(jax.devices()))

    @property
    def sampling(self) -> SamplingConfig | None:
        """Of the rollouts; None where there are none."""
        if isinstance(self.config, TrainConfig):
            return self.settled.grpo.sampling if self.config.plays else None
        return fill_engine_defaults(self.config.sampling, self.policy.text.hidden_size, jax.local_devices())

    @functools.cached_property
    def numbers(self) -> int:
        """Parameters of the policy."""
        return sum(math.prod(x.shape) for x in convert.flat_params(convert.abstract_model(self.policy)).values())


def device_memory() -> int | None:
    """Bytes that a program may use on each of this process's devices; on a CPU what is free, shared by its devices."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        try:
            lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        free = dict(line.split()[:2] for line in lines)["MemAvailable:"]
        return 1024 * int(free) // len(devices)
    return device_limit()
