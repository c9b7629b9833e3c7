"""Pages for people: jinja2 templates, pictures and charts, all inside one file that needs no network.

Templates escape whatever they are given, so a string of a model or of a data set cannot become markup, whatever it
says. The page also forbids the browser outside resources, and every script but its own, which it names by checksum.
"""

import base64
import functools
import hashlib
import importlib.resources
import io
import pathlib
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from rsagent_jax.agent.tools import call_json
from rsagent_jax.report.trajectory import LARGEST, play
from rsagent_jax.runtime.paths import make_directory, write_whole

GOOD_IOU = 0.5  # from here on a mask counts as found: the usual threshold of P@0.5
ACCENT, BAD, GREY = "#3f7fe8", "#d0453b", "#80868f"  # of charts; readable on a light page and on a dark one


def render_page(template: str, **values: Any) -> str:
    """The page that a file of report/templates makes of `values`; a name that it is not given raises.

    Characters that no UTF-8 page can hold become a replacement mark.
    """
    text = _environment().get_template(template).render(**values)
    return re.sub(r"[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f]", "\ufffd", text)


@functools.cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rsagent_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shell"] = lambda value: shlex.quote(str(value))
    shared = (data_uri, histogram, interval, span, call_json, thought_of, play, script)
    environment.globals |= {function.__name__: function for function in shared} | {"GOOD_IOU": GOOD_IOU}
    return environment


def script(*names: str) -> tuple[str, str]:
    """The text of these files of report/templates, and what a Content-Security-Policy calls it."""
    folder = importlib.resources.files("rsagent_jax.report") / "templates"
    text = "\n".join((folder / name).read_text(encoding="utf-8") for name in names)
    text = f"//<![CDATA[\n{text}//]]>"  # for whoever reads the page as XML
    return text, f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def save_page(text: str, workdir: pathlib.Path) -> pathlib.Path:
    """Puts a page where every command of this project leaves its report."""
    path = workdir / "report" / "index.html"
    make_directory(path.parent)
    write_whole(path, text)
    return path


def span(bounds: Sequence[float], form: str = ".3f") -> str:
    """An interval in words, such as `0.712 to 0.744`."""
    return " to ".join(format(float(v), form) for v in bounds)


def thought_of(text: str) -> str:
    """What a turn of a policy says inside <think></think>, or "" where there is none."""
    found = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    return found[1].strip() if found else ""


def data_uri(image: np.ndarray) -> str:
    """u8[h, w, 3] as the data URI of a JPEG of at most LARGEST pixels a side; the page enlarges a small one."""
    shown, data = Image.fromarray(image), io.BytesIO()
    shown.thumbnail((LARGEST, LARGEST))
    shown.save(data, "JPEG", quality=90, subsampling=0)
    return _data_uri("image/jpeg", data)


def _data_uri(kind: str, data: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"


def _chart(draw: Callable[[Any], object], size: tuple[float, float] = (3.6, 2.2)) -> str:
    """The data URI of an SVG of the axes that `draw` fills; the same bytes for the same figures. `size` in inches: as
    wide as the page shows it (96 pixels an inch), so that its words are a little smaller than the page's."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), GREY)
    style = {"font.size": 8.5, "axes.grid.axis": "y", "grid.alpha": 0.3, "axes.axisbelow": True, "axes.grid": True}
    fixed = {"svg.hashsalt": "rsagent", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    data = io.BytesIO()
    with matplotlib.rc_context(colours | style | fixed):
        figure = Figure(size, layout="constrained")
        draw(figure.subplots())
        figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    return _data_uri("image/svg+xml", data)


def histogram(values: Sequence[float], bad_below: float, low: float = 0.0, bins: int = 10) -> str:
    """How many of the values, all in `low`..1, fall into each of `bins` equal parts."""
    counts, edges = np.histogram(np.clip(values, low, 1), bins=bins, range=(low, 1))

    def draw(axes) -> None:
        colours = [BAD if high <= bad_below + 1e-9 else ACCENT for high in edges[1:]]
        bars = axes.bar(edges[:-1], counts, 0.9 * (1 - low) / bins, align="edge", color=colours)
        axes.bar_label(bars, [n or "" for n in counts.tolist()], fontsize=8)
        axes.set(xlabel="IoU", ylabel="samples", xlim=(low, 1), ylim=(0, max(1.0, 1.08 * counts.max())))
        axes.yaxis.get_major_locator().set_params(integer=True)

    return _chart(draw, (4.2, 2.4))


def line_chart(x: Sequence[float], y: Sequence[float], y_label: str) -> str:
    """One curve by step: pale raw points, and a smooth line over them."""

    def draw(axes) -> None:
        axes.plot(x, y, "o", color=ACCENT, alpha=0.4, markersize=2.5, markeredgewidth=0)
        axes.plot(x, smoothed(y), color=ACCENT, linewidth=1.4)
        axes.set(xlabel="step", ylabel=y_label)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _chart(draw)


def interval(value: float, low: float, high: float, axis: tuple[float, float]) -> str:
    """A dot with its confidence interval, on an axis that the rows of a table share; 0, which is on it, has a tick."""

    def draw(axes) -> None:
        axes.plot(axis, [0, 0], color=GREY, linewidth=0.5)
        axes.plot(0, 0, "|", color=GREY, markersize=12)
        axes.plot([low, high], [0, 0], color=ACCENT, linewidth=1.6)
        axes.plot(value, 0, "o", color=ACCENT, markersize=5)
        axes.axis("off")

    return _chart(draw, (1.7, 0.2))


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Mean over the neighbours of each value, about an eighth of the curve; at the ends over those there are."""
    window = np.ones(2 * (len(values) // 16) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
