"""Links of pages that stand elsewhere in the repository than on the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

__all__ = ["with_links"]

_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def with_links(text: str, place: str, page: str, pages: Mapping[str, str], repository: str) -> str:
    """Return a page whose links lead to pages of the site, or else to the repository.

    Args:
        text: Markdown.
        place: path of the file in the repository.
        page: path of the page on the site, as of its Markdown file.
        pages: path in the repository -> path on the site.
        repository: address of the repository; without one, a link to a file that is no page is left as text.
    """

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        path, mark, anchor = target.partition("#")
        if not path or ":" in path:
            return found[0]
        whole = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
        if whole in pages:
            return f"{picture}[{words}]({posixpath.relpath(pages[whole], posixpath.dirname(page))}{mark}{anchor})"
        if repository and not picture:
            return f"[{words}]({repository}/blob/main/{whole})"
        return "" if picture else words

    parts = _FENCE.split(text)
    return "".join(part if number % 2 else _LINK.sub(link, part) for number, part in enumerate(parts))
