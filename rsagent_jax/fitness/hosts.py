"""The findings of all hosts: gathered, compared with each other, and printed as one table."""

from __future__ import annotations

import collections
import dataclasses
import json
import socket
import statistics
from collections.abc import Sequence

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
    """Of all hosts on the lead, this one's own elsewhere. A host that says nothing in time has one finding, wrong."""
    own = Page(jax.process_index(), socket.gethostname(), tuple(findings))
    if jax.process_count() == 1:
        return [own]
    store = distributed.global_state.client
    if own.host:
        store.key_value_set(f"{KEY}/{own.host}", json.dumps(dataclasses.asdict(own)))
        return [own]
    pages = [own]
    for host in range(1, jax.process_count()):
        try:
            said = json.loads(store.blocking_key_value_get(f"{KEY}/{host}", int(1000 * wait_s)))
            found = tuple(Finding(**f | {"verdict": Verdict(f["verdict"])}) for f in said["findings"])
            pages.append(Page(host, said["name"], found))
        except jax.errors.JaxRuntimeError:
            remedy = "see what the command said there; start it on all hosts at the same time"
            silent = Finding("host", Verdict.WRONG, f"host {host} did not answer within {wait_s:.0f} s", "", remedy)
            pages.append(Page(host, "?", (silent,)))
    return pages


def compare_hosts(pages: Sequence[Page]) -> list[Page]:
    """With a host slow whose figure is far from the median, and wrong whose versions, devices or masks are not those
    of most hosts."""
    values, words = collections.defaultdict(list), collections.defaultdict(collections.Counter)
    for finding in (f for page in pages for f in page.findings):
        if finding.value is not None:
            values[finding.name].append(finding.value)
        if finding.alike:
            words[finding.name][finding.alike] += 1

    def judged(f: Finding) -> Finding:
        if f.alike and f.alike != (usual := words[f.name].most_common(1)[0][0]):
            remedy = "install and start the same on all hosts"
            return dataclasses.replace(f, verdict=Verdict.WRONG, against=f"most hosts have {usual}", remedy=remedy)
        if f.verdict is Verdict.OK and f.value is not None:
            median = statistics.median(values[f.name])
            ratio = f.value / median if f.higher_is_better else median / max(f.value, 1e-12)
            if median > 0 and ratio < FAR:
                against = f"{ratio:.2f} of the speed of the hosts' median"
                remedy = "look what else runs on this host; leave it out, or ask for another"
                return dataclasses.replace(f, verdict=Verdict.SLOW, against=against, remedy=remedy)
        return f

    return [dataclasses.replace(page, findings=tuple(map(judged, page.findings))) for page in pages]


def pages_table(pages: Sequence[Page]) -> str:
    """A line per check and verdict: hosts that say the same share one, with the figure of the middle one."""
    groups: dict[tuple[str, Verdict], list[tuple[Page, Finding]]] = {}
    names = list(dict.fromkeys(f.name for page in pages for f in page.findings))
    for page in pages:
        for f in page.findings:
            groups.setdefault((f.name, f.verdict), []).append((page, f))
    lines, width = [], max(map(len, names), default=0)
    for (name, verdict), group in sorted(groups.items(), key=lambda item: names.index(item[0][0])):
        middle = sorted(group, key=lambda one: one[1].value or 0.0)[len(group) // 2][1]
        hosts = "" if len(pages) == 1 else f" [{_hosts([page for page, _ in group], len(pages))}]"
        against = f"  ({middle.against})" if middle.against else ""
        lines.append(f"{verdict:7}  {name:{width}}{hosts}  {middle.figure}{against}")
        lines += [f"{'':7}  {'':{width}}  -> {middle.remedy}"] * bool(middle.remedy)
    return "\n".join(lines)


def _hosts(pages: Sequence[Page], count: int) -> str:
    if len(pages) == count:
        return f"all {count} hosts"
    return ", ".join(f"{page.host} {page.name}" for page in pages)


def pages_json(pages: Sequence[Page], seconds: float) -> dict:
    counts = collections.Counter(f.verdict for page in pages for f in page.findings)
    return {
        "ok": not counts[Verdict.WRONG],
        "counts": {verdict.value: counts[verdict] for verdict in Verdict},
        "seconds": round(seconds, 1),
        "hosts": [dataclasses.asdict(page) for page in pages],
    }
