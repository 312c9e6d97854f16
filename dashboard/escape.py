"""Escaping of text that a run wrote: the browser shows it as it is, and never reads it as markup.

Streamlit reads labels, captions, boxes, badges and help texts as Markdown, and Plotly reads names, ticks and hover
texts as HTML. What a run wrote (its name, model, task, configuration, alerts, prompts) may look like either. So such
text must be a value of a template, and never a part of the template itself:

    st.caption(markdown("{task} · step {step:d}", task=task, step=step))
    st.html(html("<b>{name}</b>", name=name))
    go.Scatter(name=plotly(name))

tests/dashboard/test_escape.py finds a call that shows anything else.
"""

from __future__ import annotations

import re
from string import Formatter, punctuation
from typing import Any, LiteralString

from markupsafe import Markup, escape

# A character reference is never markup in CommonMark. No backslashes: st.badge puts its own before brackets.
_REFERENCES = str.maketrans({character: f"&#{ord(character)};" for character in punctuation})
# Streamlit and GFM find these in the finished text, after references are read. A zero-width joiner splits them.
_REWRITTEN = re.compile(r"(?<=:)(?=streamlit:|//)|(?<=www)(?=\.)|(?=@[-\w]+\.)|(?<=[<>~-])(?=[->=])", re.IGNORECASE)
_JOINER = "\u2060"


class _MarkdownFormatter(Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        text = re.sub(r"\s+", " ", format(value, format_spec))  # a line break could begin a list or a block of code
        return _REWRITTEN.sub(_JOINER, text).translate(_REFERENCES)


def markdown(template: LiteralString, /, *values: Any, **named: Any) -> str:
    """`template`, which is Markdown, with values that are plain text. Fields are written as for `str.format`."""
    return _MarkdownFormatter().format(template, *values, **named)


def html(template: LiteralString, /, *values: Any, **named: Any) -> Markup:
    """`template`, which is HTML, with values that are plain text or the Markup of another call."""
    return Markup(template).format(*values, **named)  # noqa: S704 - of a literal


def plotly(text: Any) -> str:
    """Plain text as a name, tick or hover text of a Plotly figure. A figure's title is plain text already."""
    return str(escape(text))
