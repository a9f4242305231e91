"""Formulas: from docstrings to Markdown, and from TeX to MathML, which browsers draw without a script."""

from __future__ import annotations

import re
from html import unescape
from textwrap import indent
from typing import Any

from griffe import Extension
from latex2mathml.converter import convert

__all__ = ["Formulas", "markdown_of", "with_mathml"]

_BLOCK = re.compile(r"^([ ]*)\.\. math::[ ]*(.*)\n((?:\1[ ]+\S.*\n?)*)", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")
_EXAMPLE = re.compile(r"^Example:", re.MULTILINE)  # griffe takes it for a note
_BARE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # an example without a heading
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def markdown_of(docstring: str) -> str:
    """Return a docstring with its formulas and code as Markdown writes them."""

    def block(found: re.Match[str]) -> str:
        indent, first, more = found.groups()
        return f"{indent}$$\n{indent}{' '.join([first, *more.split()])}\n{indent}$$\n"

    text = _BLOCK.sub(block, f"{docstring}\n")
    return _INLINE.sub(r"$\1$", text).replace("``", "`").rstrip()


def with_mathml(html: str) -> str:
    """Return a page with each formula that arithmatex marked as MathML."""

    def formula(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(unescape(found[2]).strip(), display=display)

    return _MATH.sub(formula, html)


class Formulas(Extension):
    """Rewrites the docstrings that mkdocstrings shows."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub("Examples:", markdown_of(obj.docstring.value))
            obj.docstring.value = _BARE.sub(lambda found: f"Examples:\n{indent(found[0], '    ')}", text)
