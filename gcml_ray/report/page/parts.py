"""What a report page is made of: sections of words, tables, charts and pictures, and the template that sets them.

Every text goes through Jinja2's escaping. A chart's own texts are read by plotly as a kind of HTML, so names that
come from users pass :func:`chart_text` first.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

# Okabe and Ito; their black and yellow are left out, one is lost on a dark page and the other on a light one.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down", "cross", "pentagon", "hourglass")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
HATCHES = ("", "/", "x", ".", "-", "\\", "+")
PICTURE_WIDTH = 900  # pixels: sharp on a phone, and a page with many pictures stays small


@dataclass(frozen=True)
class Words:
    """Paragraphs, or a list of sentences."""

    lines: tuple[str, ...]
    is_list: bool = False
    is_warning: bool = False
    kind: ClassVar[str] = "words"


@dataclass(frozen=True)
class Table:
    """A table; its first ``num_names`` columns are names, all others numbers."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int = 1
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Chart:
    """A plotly figure. ``alternative`` says in words what it shows, for those who cannot see it."""

    title: str
    alternative: str
    figure: go.Figure
    kind: ClassVar[str] = "chart"

    @property
    def specification(self) -> Markup:
        """The figure as JSON that may stand inside a script element."""
        text = self.figure.to_json()
        for mark, escaped in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("\u2028", ""), ("\u2029", "")):
            text = text.replace(mark, escaped)
        return Markup(text)  # noqa: S704 - JSON without any mark of HTML

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.figure.layout.height or 420)


@dataclass(frozen=True)
class Picture:
    """An image, inside the page itself. ``alternative`` says in words what it shows."""

    title: str
    alternative: str
    data_uri: str


@dataclass(frozen=True)
class Pictures:
    """Images beside each other."""

    pictures: tuple[Picture, ...]
    is_wide: bool = False
    kind: ClassVar[str] = "pictures"


@dataclass(frozen=True)
class Folded:
    """Text or tables that a reader opens by a click."""

    summary: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    kind: ClassVar[str] = "folded"


@dataclass(frozen=True)
class Figures:
    """A few numbers to see first: (number, what it is)."""

    numbers: tuple[tuple[str, str], ...]
    kind: ClassVar[str] = "figures"


Block = Words | Table | Chart | Pictures | Folded | Figures


@dataclass(frozen=True)
class Section:
    """A heading, one or two sentences that say how to read what follows, and its blocks."""

    name: str
    title: str
    lead: str
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    notices: tuple[str, ...] = field(default=())


def render(page: Page) -> str:
    """The page as one HTML document that needs nothing else, plotly.js included."""
    environment = Environment(
        loader=PackageLoader("gcml_ray"), autoescape=select_autoescape(default=True), trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    has_chart = any(isinstance(block, Chart) for section in page.sections for block in section.blocks)
    plotly_js = Markup(get_plotlyjs()) if has_chart else ""  # noqa: S704 - the library itself
    return environment.get_template("report.html.j2").render(page=page, plotly_js=plotly_js)


# --- looks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """How a site or method is drawn in every chart: never by colour alone."""

    colour: str
    symbol: str
    dash: str
    hatch: str


def look(index: int) -> Look:
    """The look of the n-th site, method or stage."""
    return Look(
        COLOURS[index % len(COLOURS)],
        SYMBOLS[index % len(SYMBOLS)],
        DASHES[index % len(DASHES)],
        HATCHES[index % len(HATCHES)],
    )


def looks(names: Sequence[str]) -> dict[str, Look]:
    """One look a name."""
    return {name: look(index) for index, name in enumerate(names)}


def new_figure(*, height: int, x_title: str = "", y_title: str = "") -> go.Figure:
    """A figure without colours of its own: the page gives text and grid those of its light or dark side."""
    figure = go.Figure(layout_template="none")
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": 12, "t": 16, "b": 8},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(title=x_title, automargin=True, zeroline=False, showgrid=False)
    figure.update_yaxes(title=y_title, automargin=True, zeroline=False)
    return figure


def hatched(colour: str, hatch: str) -> dict[str, Any]:
    """The marker of a bar that is told from others by its hatch too."""
    return {"color": colour, "pattern": {"shape": hatch, "fillmode": "overlay", "fgcolor": "#fff", "solidity": 0.25}}


def whole_numbers(figure: go.Figure, last: int) -> None:
    """Whole numbers (rounds, trials) along x."""
    figure.update_xaxes(dtick=1 if last <= 12 else None, tickformat="d", rangemode="normal")


# --- texts -------------------------------------------------------------------------------------


def chart_text(text: str) -> str:
    """A user's text for a chart: plotly would read ``<b>`` as bold."""
    return html.escape(text, quote=False)


def picture_uri(source: Path | BinaryIO) -> str:
    """An image file as a data URI, at most ``PICTURE_WIDTH`` wide.

    Raises:
        OSError: the file cannot be read as an image.
    """
    with Image.open(source) as image:
        picture = image.convert("RGB")
    picture.thumbnail((PICTURE_WIDTH, 4 * PICTURE_WIDTH))
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=86)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
