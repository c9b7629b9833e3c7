"""What a command could not play: counted by kind, named, and an end to it where the segmenter stays away."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.views import check_shape
from rsagent_jax.types import DataError, Sample, Status

Failure = tuple[str, str]  # (kind, which is counted by; why)
UNREADABLE = "unreadable sample"
SHOWN = 3  # of each kind, on the terminal


def readable_sample(samples: Sequence[Sample], place: int) -> Sample:
    """DataError for a sample that cannot be read, or whose picture no view can show."""
    sample = samples[place]
    try:
        check_shape(*sample.image.shape[:2])
    except DataError as error:
        raise DataError(f"{sample.path or sample.id}: {error}") from None
    return sample


def failure_of(state: EnvState) -> Failure | None:
    """Why a trajectory measures nothing: no answer of the segmenter, or no turn to be had. None for another ending."""
    if state.status is Status.POLICY_FAILED:
        return state.failure.kind, state.failure.detail
    if state.status is not Status.ENV_FAILED:
        return None
    if state.failure is None:
        return "segmenter, timeout", "a tool call went past its deadline"
    return f"segmenter, {state.failure.kind.value}", state.failure.detail


def is_segmenters(kind: str) -> bool:
    """Whether another start can mend it: the tool's failure, not the sample's or the teacher's."""
    return kind.startswith("segmenter, ")


class Failures:
    """Of one start of a command. `give_up_after`: trajectories in a row that the segmenter may fail; 0 = any number."""

    def __init__(self, give_up_after: int):
        self.give_up_after, self.in_a_row = give_up_after, 0
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)  # the first few of each kind

    def add(self, kind: str, id: str, why: str) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < SHOWN:
            self.examples[kind].append(f"{id}: {why}")

    def played(self, id: str, failure: Failure | None) -> None:
        """To be told of every trajectory once it is kept. DataError where the segmenter failed too many in a row."""
        if failure is None:
            self.in_a_row = 0
            return
        self.add(failure[0], id, failure[1])
        if not is_segmenters(failure[0]):
            return
        self.in_a_row += 1
        if self.in_a_row == self.give_up_after:
            raise DataError(
                f"the segmenter failed {self.in_a_row} trajectories in a row, the last with: {failure[0]}:"
                f" {failure[1]}. What was done is kept: mend the side-car and run the same command again"
                " (segmenter.give_up_after says how many are borne with)"
            )

    def tell(self) -> None:
        """On the terminal: every kind with its count, and the first few by name."""
        for kind, count in sorted(self.counts.items()):
            print(f"  not done {count}: {kind}")
            for example in self.examples[kind]:
                print(f"    {example}")


def unmeasured(failed: Iterable[str], total: int) -> DataError:
    """What to say when there is no result because of these kinds of failures."""
    counts = Counter(failed)
    said = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
    return DataError(
        f"{counts.total()} of {total} samples are not measured ({said}), so there is no result yet. The others are"
        " kept: run the same command again"
    )
