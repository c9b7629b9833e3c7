"""The findings of all hosts: gathered, compared with each other, printed as one table."""

import collections
import dataclasses
import json
import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax._src import distributed  # its key-value store: no device takes part, so a wedged one does not stop the page

from rsagent_jax.fitness.finding import Finding, Verdict

FAR = 0.8  # of the hosts' median; below it a host is slow
KEY = "rsagent_jax/doctor"


@dataclasses.dataclass(frozen=True)
class Page:
    """What one host found."""

    host: int
    name: str
    findings: tuple[Finding, ...]


def gather_pages(findings: Sequence[Finding], wait_s: float) -> list[Page]:
    """Of all hosts on the lead, elsewhere this one's own. A host that says nothing in time has one finding, wrong."""
    own = Page(jax.process_index(), socket.gethostname(), tuple(findings))
    store = distributed.global_state.client
    if own.host:
        store.key_value_set(f"{KEY}/{own.host}", json.dumps(dataclasses.asdict(own)))
        return [own]
    pages, end = [own], time.monotonic() + wait_s
    for host in range(1, jax.process_count()):
        try:
            left_ms = max(1, int(1000 * (end - time.monotonic())))
            said = json.loads(store.blocking_key_value_get(f"{KEY}/{host}", left_ms))
            found = tuple(Finding(**one | {"verdict": Verdict(one["verdict"])}) for one in said["findings"])
            pages.append(Page(host, said["name"], found))
        except jax.errors.JaxRuntimeError:
            figure, remedy = f"host {host} did not answer within {wait_s:.0f} s", "see what the command said there"
            pages.append(Page(host, "?", (Finding("host", Verdict.WRONG, figure, "", remedy),)))
    return pages


def compare_hosts(pages: Sequence[Page]) -> list[Page]:
    """A host is slow whose figure is far from the median, and wrong whose versions, devices or segmenter are not those
    of most hosts."""
    values, words = collections.defaultdict(list), collections.defaultdict(collections.Counter)
    for finding in (finding for page in pages for finding in page.findings):
        words[finding.name][finding.alike] += 1
        if finding.value is not None:
            values[finding.name].append(finding.value)

    def compared(f: Finding) -> Finding:
        if f.alike != (usual := words[f.name].most_common(1)[0][0]) and f.alike and usual:
            against, remedy = f"most hosts: {usual}", "install and start the same on all"
            return dataclasses.replace(f, verdict=Verdict.WRONG, against=against, remedy=remedy)
        if f.verdict is Verdict.OK and f.value:
            ratio = f.value / statistics.median(values[f.name])
            ratio = ratio if f.higher_is_better else 1 / ratio
            if ratio < FAR:
                against, remedy = (
                    f"{ratio:.2f} of the hosts' median",
                    "see what else runs on this host; ask for another",
                )
                return dataclasses.replace(f, verdict=Verdict.SLOW, against=against, remedy=remedy)
        return f

    return [dataclasses.replace(page, findings=tuple(map(compared, page.findings))) for page in pages]


def pages_table(pages: Sequence[Page]) -> str:
    """A line per check and verdict: hosts that agree share one, with the figure of the middle one."""
    groups: dict[str, dict[Verdict, list]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for page in pages:
        for f in page.findings:
            groups[f.name][f.verdict].append((f.value or 0.0, page.host, page.name, f))
    lines, width = [], max(map(len, groups), default=0)
    for name, by_verdict in groups.items():
        for verdict, group in by_verdict.items():
            f = sorted(group, key=lambda one: one[:2])[len(group) // 2][3]
            hosts = "all" if len(group) == len(pages) else ", ".join(f"{host} {where}" for _, host, where, _ in group)
            who = f"[hosts: {hosts}]  " if len(pages) > 1 else ""
            lines.append(f"{verdict:7}  {name:{width}}  {who}{f.figure}" + (f"  ({f.against})" if f.against else ""))
            lines += [f"{'':{width + 9}}  -> {f.remedy}"] * bool(f.remedy)
    return "\n".join(lines)


def pages_json(pages: Sequence[Page], seconds: float) -> dict[str, Any]:
    counts = collections.Counter(finding.verdict.value for page in pages for finding in page.findings)
    ok, hosts = not counts[Verdict.WRONG], [dataclasses.asdict(page) for page in pages]
    return {"ok": ok, "counts": dict(counts), "seconds": round(seconds, 1), "hosts": hosts}
