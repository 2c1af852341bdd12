"""HTML pages with figures: each page is one file, for any browser and for paper."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

# Colours of Okabe and Ito, which readers with colour blindness can distinguish.
BLUE, ORANGE, GREEN, PINK, SKY, GREY = (
    *["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#6B6B6B"],
)
LINES = [(color, dash) for dash in ("-", "--", ":") for color in (BLUE, ORANGE, GREEN, PINK, SKY)]
"""Pairs of colour and dash for lines in one panel, such as one line per loop."""
FIGURE_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "svg.fonttype": "none",  # keeps text searchable and readable for screen readers
    "svg.hashsalt": "report",  # makes pages reproducible
    "text.parse_math": False,  # names may contain a $
}
WIDTH = 9.6
"""Width in inches of a figure that fills the page."""
DPI = 110
"""Resolution of maps, which are stored as pictures: they have too many cells for SVG."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin: 2.2rem 0 0.3rem; font-size: 1.2rem; }
p { margin: 0.3rem 0; max-width: 52rem; }
dl { display: flex; flex-wrap: wrap; gap: 0.6rem; margin: 1.2rem 0; }
dl div { border: 1px solid #ccc; border-radius: 4px; padding: 0.4rem 0.8rem; }
dt { font-size: 0.8rem; color: #555; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
dd small { font-size: 0.8rem; color: #555; }
figure { margin: 0.5rem 0; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: 0.2rem 1.2rem 0.2rem 0; text-align: left; }
pre { font-size: 0.8rem; white-space: pre-wrap; } footer { margin-top: 2rem; color: #555; }
@media print { body { margin: 0; max-width: none; font-size: 11px; }
               section { break-inside: avoid; } details { display: none; } }
"""


class Section(NamedTuple):
    """A figure with its title and explanation, ready for a page."""

    title: str
    text: str
    """What the figure shows, and which signs in it are bad."""
    svg: str


class Drawn(NamedTuple):
    """A figure with its title and explanation, before it is converted to SVG."""

    title: str
    text: str
    figure: Figure


def draw_all(draws: Iterable[Callable[[], Drawn | None]]) -> list[Section]:
    """Draws figures in the style of the pages; functions that return None are left out."""
    with matplotlib.rc_context(FIGURE_STYLE):
        return [
            Section(drawn.title, drawn.text, to_svg(drawn.figure))
            for draw in draws
            if (drawn := draw()) is not None
        ]


def to_svg(figure: Figure) -> str:
    """A figure as an SVG element, which a page can contain several of."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=DPI, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # The ids of groups repeat in every figure, and nothing refers to them.
    return re.sub(r'<g id="[^"]*"', "<g", text)


def compose_page(title: str, lines: Sequence[str], parts: Sequence[str]) -> str:
    """An HTML page.

    Args:
      title: title and heading; it is escaped.
      lines: paragraphs below the heading; they are escaped.
      parts: HTML.
    """
    name = html.escape(title)
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>",
            *(f"<p>{html.escape(line)}</p>" for line in lines),
            *parts,
            "</body>\n</html>\n",
        ]
    )


def section_html(section: Section) -> str:
    """The HTML of a section: title, text and figure."""
    title = html.escape(section.title)
    svg = section.svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return (
        f"<section><h2>{title}</h2>\n<p>{html.escape(section.text)}</p>\n"
        f"<figure>{svg}</figure></section>"
    )


def table_html(rows: Sequence[Sequence[str]]) -> str:
    """The HTML of a table whose first row holds the titles; cells are escaped."""
    titles, *lines = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        for tag, cells in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True)
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><tr>{titles}</tr>{body}</table>"
