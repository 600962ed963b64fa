"""Sections of tables and figures -> one HTML file that needs no network, nothing beside it and no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

from appo.reports.figures import Figure
from appo.reports.tables import Table, to_html


@dataclass(frozen=True, slots=True)
class Section:
    """blocks: finished HTML, in order."""

    key: str
    title: str
    blocks: tuple[str, ...]


def section(key: str, title: str, *blocks: Table | Figure | str | None) -> Section | None:
    """A section of whatever there is; None when nothing is left."""
    drawn = tuple(_block(block) for block in blocks if block is not None)
    return Section(key, title, drawn) if drawn else None


def _block(block: Table | Figure | str) -> str:
    if isinstance(block, Table):
        return to_html(block)
    if isinstance(block, Figure):
        return figure_html(block)
    return block


def figure_html(figure: Figure) -> str:
    return (
        f"<figure><h3>{escape(figure.title)}</h3>{figure.html}"
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def grid(figures: Sequence[Figure]) -> str | None:
    """Small figures beside one another where the screen is wide enough."""
    return f'<div class="grid2">{"".join(figure_html(f) for f in figures)}</div>' if figures else None


def callout(title: str, sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    name = escape(title, quote=True)
    return f'<aside class="limits" aria-label="{name}"><h3>{escape(title)}</h3><ul>{items}</ul></aside>'


def render(
    *,
    title: str,
    lead: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section | None],
    footer: Sequence[str] = (),
) -> str:
    """The page. `footer` lines are HTML; everything else is escaped here or where it was made."""
    import jinja2

    folder = resources.files("appo.reports") / "templates"
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
        (folder / "page.html").read_text(encoding="utf-8")
    )
    return template.render(
        title=title,
        lead=lead,
        facts=facts,
        sections=[s for s in sections if s is not None],
        footer=footer,
        style=(folder / "style.css").read_text(encoding="utf-8"),
    )
