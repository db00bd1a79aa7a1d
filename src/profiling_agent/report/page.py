"""The pieces that pages are made of; each page stands alone: no script, no request.

Every word that comes from a record passes ``cell``, ``below`` or ``words``, which escape it; markup
is only written in this room.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from profiling_agent.report.wording import printable


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page of sections that are markup already; the title is text."""
    style = files("profiling_agent.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{words(title)}</title><style>\n{style}</style></head>\n<body>\n"
        f"{''.join(section for section in sections if section)}</body></html>\n"
    )


def words(text: str, limit: int = 1000) -> str:
    """Text from a record, made visible and escaped."""
    return escape(printable(text, limit))


def cell(value: str, under: str = "", kind: str = "number") -> str:
    """One table cell, with smaller words under the value."""
    return f'<td class="{kind}">{words(value)}{below(under)}</td>'


def below(text: str) -> str:
    return f'<span class="below">{words(text)}</span>' if text else ""


def as_table(titles: Sequence[str], rows: Iterable[str], num_words: int = 1) -> str:
    """The first ``num_words`` columns hold words, the others numbers."""
    heads = "".join(_head(title, i >= num_words) for i, title in enumerate(titles))
    body = "\n".join(rows)
    return (
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n'
        "</tbody></table></div>\n"
    )


def _head(title: str, is_number: bool) -> str:
    """A second line of a title stands smaller under the first."""
    name, _, under = title.partition("\n")
    kind = ' class="number"' if is_number else ""
    return f"<th{kind}>{escape(name)}{below(under)}</th>"


def as_definitions(pairs: Iterable[tuple[str, str]]) -> str:
    body = "".join(f"<dt>{escape(k)}</dt><dd>{words(v)}</dd>" for k, v in pairs if v)
    return f"<dl>{body}</dl>\n"


def as_list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{words(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>\n' if items else ""
