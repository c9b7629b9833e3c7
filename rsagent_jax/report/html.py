"""The parts of a report page: escaped markup, tables, pictures and charts, all inside one file that needs no network.

Markup is built only by `tag`, which escapes every child and attribute that is not already `Html`. So a string of a
model or of a data set cannot become markup, whatever it says. The page also forbids the browser scripts and outside
resources.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

SMALLEST, LARGEST = 320, 640  # longer side of a picture on the page, pixels
_VOID = ("img", "meta", "br")
_CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


# --- Markup ---


class Html(str):
    """Text that is markup already."""


def escape(value: object) -> Html:
    """Any value as markup; `Html` as it is. Characters that no UTF-8 page can hold become a replacement mark."""
    if isinstance(value, Html):
        return value
    text = re.sub(r"[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f]", "\ufffd", str(value))
    return Html(html.escape(text, quote=True))


def html_join(parts: Sequence[object]) -> Html:
    return Html("".join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """One element. `class_` stands for class, `_` for `-` in attribute names; what is None is left out."""
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    given = "".join(f' {key}="{escape(value)}"' for key, value in named.items())
    return Html(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{html_join(children)}</{name}>")


def html_page(title: str, *body: object) -> str:
    """A whole document."""
    view_box = tag("meta", name="viewport", content="width=device-width, initial-scale=1")
    policy = tag("meta", http_equiv="Content-Security-Policy", content=_CSP)
    head = tag("head", tag("meta", charset="utf-8"), policy, view_box, tag("title", title), tag("style", Html(_CSS)))
    return "<!doctype html>\n" + tag("html", head, tag("body", tag("main", tag("h1", title), *body)), lang="en") + "\n"


def html_table(head: Sequence[object], rows: Sequence[Sequence[object]], text_columns: int = 1) -> Html:
    """The first `text_columns` columns are words, the rest are numbers."""

    def row(kind: str, cells: Sequence[object]) -> Html:
        return tag("tr", *(tag(kind, c, class_="number" if i >= text_columns else None) for i, c in enumerate(cells)))

    body = tag("tbody", *(row("td", cells) for cells in rows))
    return tag("div", tag("table", tag("thead", row("th", head)), body), class_="scroll")


def tiles(figures: Sequence[tuple[str, str, str]]) -> Html:
    """Headline figures: (name, value, what stands under it)."""
    return tag(
        "dl",
        *(tag("div", tag("dt", n), tag("dd", v), tag("dd", note, class_="note")) for n, v, note in figures),
        class_="tiles",
    )


def picture(image: np.ndarray, alt: str) -> Html:
    """u8[h, w, 3] as an inline JPEG, brought to a size that can be looked at. Small ones grow by whole factors."""
    longer = max(image.shape[:2])
    scale = math.ceil(SMALLEST / longer) if longer < SMALLEST else min(1.0, LARGEST / longer)
    size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
    data = io.BytesIO()
    shown = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC if scale != 1 else Image.Resampling.NEAREST)
    shown.save(data, "JPEG", quality=86, subsampling=0)
    source = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
    return tag("img", src=source, alt=alt, width=size[0], height=size[1], loading="lazy")


# --- Charts ---

_WIDTH, _HEIGHT = 320, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 36  # margins


def histogram(values: Sequence[float], bins: int = 20, bad_below: float = 0.5) -> Html:
    """How many of the values, all in 0..1, fall into each of `bins` equal parts."""
    counts, edges = np.histogram(np.clip(values, 0, 1), bins=bins, range=(0, 1))
    ticks = _ticks(0, max(1, int(counts.max())), whole=True)
    to_x, to_y = _scales((0, 1), (0, ticks[-1]))
    bars = []
    for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        label = tag("title", f"IoU {low:.2f} to {high:.2f}: {count}")
        kind = "bad" if high <= bad_below + 1e-9 else "good"
        top, width = to_y(count), to_x(high) - to_x(low) - 2
        height = to_y(0) - top
        bars.append(tag("rect", label, class_=kind, x=_n(to_x(low) + 1), y=_n(top), width=_n(width), height=_n(height)))
    axes = _axes(to_x, to_y, [0, 0.2, 0.4, 0.6, 0.8, 1.0], ticks, "IoU", "samples")
    return _svg([*axes, *bars], "Histogram of IoU")


def line_chart(title: str, x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> Html:
    """One curve: pale raw points, a smooth line over them, and its two ends in the caption."""
    smooth = smoothed(y)
    low, high = min(y), max(y)
    if high - low < 1e-9:
        low, high = low - max(abs(low), 1e-3) * 0.5, high + max(abs(high), 1e-3) * 0.5
    y_ticks = _ticks(low, high)
    first, last = min(x), max(x)
    x_ticks = [t for t in _ticks(first, last, whole=True) if first <= t <= last] if last > first else [first]
    to_x, to_y = _scales((first, last if last > first else first + 1), (y_ticks[0], y_ticks[-1]))
    points = "".join(f"M{_n(to_x(a))} {_n(to_y(b))}h0" for a, b in zip(x, y, strict=True))
    line = " ".join(f"{_n(to_x(a))},{_n(to_y(b))}" for a, b in zip(x, smooth, strict=True))
    shapes = [tag("path", d=points, class_="raw"), tag("polyline", points=line, class_="line")]
    svg = _svg([*_axes(to_x, to_y, x_ticks, y_ticks, x_label, y_label), *shapes], f"{title} by {x_label}")
    ends = tag("span", f"{_short(smooth[0])} → {_short(smooth[-1])}", class_="note")
    return tag("figure", tag("figcaption", tag("b", title), " ", ends), svg, class_="chart")


def interval(value: float, low: float, high: float, axis: tuple[float, float]) -> Html:
    """A dot with its confidence interval, on an axis that the rows of a table share."""

    def to_x(v: float) -> float:
        return 6 + 148 * (v - axis[0]) / max(axis[1] - axis[0], 1e-9)

    shapes = [
        tag("line", x1=6, x2=154, y1=9, y2=9, class_="grid"),
        tag("line", x1=_n(to_x(low)), x2=_n(to_x(high)), y1=9, y2=9, class_="line"),
        tag("circle", cx=_n(to_x(value)), cy=9, r=4.5, class_="good"),
    ]
    label = f"{value:.3f}, from {low:.3f} to {high:.3f}"
    return tag("svg", *shapes, viewBox="0 0 160 18", class_="interval", role="img", aria_label=label)


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over the neighbours of each value, about an eighth of the curve; at the ends over those there are."""
    array, reach = np.asarray(values, np.float64), len(values) // 16
    return [float(array[max(0, i - reach) : i + reach + 1].mean()) for i in range(len(array))]


def _svg(shapes: Sequence[Html], label: str) -> Html:
    return tag("svg", *shapes, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)


def _scales(x: tuple[float, float], y: tuple[float, float]):
    """Values -> pixels of the drawing, for both axes."""
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    return (
        lambda v: _LEFT + wide * (v - x[0]) / (x[1] - x[0]),
        lambda v: _HEIGHT - _BOTTOM - high * (v - y[0]) / (y[1] - y[0]),
    )


def _axes(to_x, to_y, x_ticks, y_ticks, x_label: str, y_label: str) -> list[Html]:
    right, bottom, middle = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, (_TOP + _HEIGHT - _BOTTOM) / 2
    shapes = []
    for tick in y_ticks:
        at = to_y(tick)
        shapes.append(tag("line", x1=_LEFT, x2=right, y1=_n(at), y2=_n(at), class_="grid"))
        shapes.append(tag("text", _short(tick), x=_LEFT - 6, y=_n(at + 4), text_anchor="end"))
    shapes += [tag("text", _short(t), x=_n(to_x(t)), y=bottom + 15, text_anchor="middle") for t in x_ticks]
    shapes.append(tag("text", x_label, x=_n((_LEFT + right) / 2), y=_HEIGHT - 5, text_anchor="middle", class_="label"))
    turn = f"translate(11 {_n(middle)}) rotate(-90)"
    shapes.append(tag("text", y_label, transform=turn, text_anchor="middle", class_="label"))
    return shapes


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers 1, 2 or 5 x 10^k apart, at most five or so, that reach from below `low` to above `high`."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _short(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


_CSS = """
:root { color-scheme: light dark; --ground: #f7f7f5; --sheet: #fff; --ink: #1d1f23; --soft: #666b73; --rule: #e1e2e4;
  --accent: #2f6fde; --good: #17804a; --good-ground: #e2f4ea; --bad: #c0342b; --bad-ground: #fdeae8;
  --warn: #8a5a00; --warn-ground: #fdf1d8; }
@media (prefers-color-scheme: dark) { :root { --ground: #131417; --sheet: #1c1e22; --ink: #e6e7ea; --soft: #9ba1ab;
  --rule: #33363c; --accent: #7aa7ff; --good: #6fd39b; --good-ground: #16362a; --bad: #ff8a80; --bad-ground: #43201f;
  --warn: #f0c060; --warn-ground: #3b2e14; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem clamp(0.8rem, 3vw, 2rem) 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 0.5rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 0.7rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1.02rem; margin: 0; overflow-wrap: anywhere; unicode-bidi: isolate; }
p { margin: 0.5rem 0; max-width: 46rem; }
.note, .id { color: var(--soft); font-size: 0.85rem; }
.lead { font-size: 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.7rem; margin: 1.2rem 0; }
.tiles div, .card, .chart, .plot { background: var(--sheet); border: 1px solid var(--rule); border-radius: 8px; }
.tiles div { padding: 0.7rem 0.9rem; }
.tiles dt { color: var(--soft); font-size: 0.85rem; }
.tiles dd { margin: 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles dd.note { font-size: 0.8rem; font-weight: 400; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.93rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 1.1rem 0.35rem 0; text-align: left; border-bottom: 1px solid var(--rule);
  vertical-align: middle; overflow-wrap: anywhere; min-width: 4rem; }
td:first-child { min-width: 6.5rem; }
th { color: var(--soft); font-weight: 500; font-size: 0.85rem; }
th.number, td.number { text-align: right; white-space: nowrap; }
details { margin: 0.8rem 0; }
summary { cursor: pointer; color: var(--soft); }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-family: inherit; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line { stroke: var(--accent); stroke-width: 2; fill: none; stroke-linejoin: round; }
svg .raw { stroke: var(--accent); stroke-width: 3; stroke-linecap: round; opacity: 0.35; fill: none; }
svg .good { fill: var(--accent); }
svg .bad { fill: var(--bad); opacity: 0.75; }
svg.interval { width: 160px; }
.plot { max-width: 34rem; padding: 0.8rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 0.8rem; }
.chart { margin: 0; padding: 0.7rem 0.7rem 0.4rem; }
.chart figcaption { font-size: 0.88rem; margin-bottom: 0.3rem; display: flex; justify-content: space-between;
  gap: 0.5rem; overflow-wrap: anywhere; }
.chart figcaption .note { white-space: nowrap; }
.card { padding: 0.9rem 1rem 1rem; margin: 0 0 1.1rem; }
.card header { display: flex; flex-wrap: wrap; gap: 0.35rem 0.6rem; align-items: baseline; margin-bottom: 0.7rem; }
.id { overflow-wrap: anywhere; }
.badge { font-size: 0.78rem; font-weight: 600; padding: 0.08rem 0.5rem; border-radius: 99px; white-space: nowrap; }
.badge.good { color: var(--good); background: var(--good-ground); }
.badge.warn { color: var(--warn); background: var(--warn-ground); }
.badge.bad { color: var(--bad); background: var(--bad-ground); }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(12.5rem, 100%), 1fr)); gap: 0.9rem; }
.strip figure { margin: 0; }
.strip img { display: block; width: 100%; height: auto; max-width: 26rem; border-radius: 5px; }
.strip figcaption { font-size: 0.8rem; color: var(--soft); margin-top: 0.25rem; }
.turn { min-width: 0; border-top: 2px solid var(--rule); padding-top: 0.35rem; }
.turn.failed { border-top-color: var(--bad); }
.turn h4 { margin: 0 0 0.2rem; font-size: 0.8rem; color: var(--soft); font-weight: 500; display: flex; flex-wrap: wrap;
  gap: 0.2rem 0.4rem; align-items: baseline; }
.thought { margin: 0 0 0.4rem; font-size: 0.88rem; max-height: 12rem; overflow: auto; overflow-wrap: anywhere;
  white-space: pre-wrap; unicode-bidi: isolate; }
.call { margin: 0 0 0.5rem; padding: 0.35rem 0.5rem; background: var(--ground); border-radius: 5px; font: 0.76rem/1.45
  ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 14rem; overflow: auto; unicode-bidi: isolate; }
.fault { margin: 0 0 0.4rem; padding: 0.3rem 0.5rem; border-radius: 5px; font-size: 0.82rem; color: var(--bad);
  background: var(--bad-ground); overflow-wrap: anywhere; }
.policy { display: flex; flex-wrap: wrap; gap: 0.3rem 0.6rem; align-items: baseline; margin: 1.1rem 0 0.5rem;
  padding-top: 0.7rem; border-top: 1px solid var(--rule); }
@media (max-width: 34rem) { .strip { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0.6rem; }
  th, td { padding-right: 0.7rem; } }
"""
