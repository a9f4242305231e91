"""MkDocs hooks: pages from the code, from benchmarks/results and from the repository's other files."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from formulas import with_mathml
from links import with_links
from method_pages import method_page
from mkdocs.structure.files import File, Files

import conservtl as ctl
from conservtl import errors
from conservtl.methods import builtin_strategies

ROOT = Path(__file__).parents[2]
STRATEGIES = builtin_strategies()
KINDS = {name: cls.model_fields["kind"].default for name, cls in STRATEGIES.items()}
ELSEWHERE = {  # path in the repository -> path on the site
    "README.md": "index.md",
    **{name: name.lower() for name in ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")},
    **{
        f"benchmarks/results/{path.name}": f"results/{path.name}" for path in (ROOT / "benchmarks/results").glob("*.md")
    },
    **{
        f"examples/{path.parent.name}/README.md": f"examples/{path.parent.name}.md"
        for path in ROOT.glob("examples/*/README.md")
    },
}
API = {
    "Functions": [name for name in ctl.__all__ if name.islower()],
    "Classes": [
        name
        for name in ctl.__all__
        if not name.islower() and name not in STRATEGIES and not issubclass(getattr(ctl, name), BaseException)
    ],
    "Extensions": [
        "conservtl.plan.penalty.Penalty",
        "conservtl.plan.update.Update",
        "conservtl.plan.term.Term",
        "conservtl.plan.decision.Measure",
        "conservtl.plan.decision.Search",
        "conservtl.plan.decision.After",
        "conservtl.tasks.base.Task",
        "conservtl.data.Domains",
        "conservtl.data.Examples",
        "conservtl.testing.check_strategy",
        "conservtl.testing.check_layer_map",
    ],
    "Integrations": [
        "conservtl.integrations.lightning.Conserve",
        "conservtl.integrations.transformers.ConservingTrainer",
        "conservtl.integrations.transformers.ConservingCallback",
        "conservtl.integrations.peft.adapt",
    ],
    "Errors": [name for name in errors.__all__ if name[0].isupper()],
}


def on_config(config: Any) -> Any:
    """Complete the navigation: a page for each method and each part of the API, no page that there is no result for."""
    made = {**_made(), **dict.fromkeys(ELSEWHERE.values(), "")}

    def complete(entry: Any) -> Any:
        ((title, inside),) = entry.items()
        if title == "Methods":
            return {title: [*inside, *({name: f"methods/{kind}.md"} for name, kind in KINDS.items())]}
        if title == "API":
            return {title: [{name: f"api/{name.lower()}.md"} for name in API]}
        if isinstance(inside, list):
            return {
                title: [
                    one
                    for one in inside
                    if (path := next(iter(one.values()))) in made or (ROOT / "docs" / path).is_file()
                ]
            }
        return entry

    listed = re.findall(r"[\w/-]+\.md", str(config.nav))
    others = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in listed)
    config.nav = [*(complete(entry) for entry in config.nav), *others]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    for path, text in _made().items():
        files.append(File.generated(config, path, content=text))
    for place, path in ELSEWHERE.items():
        files.append(File.generated(config, path, content=(ROOT / place).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to where they are on the site, and names of methods to their pages."""
    path = page.file.src_uri
    pages = {**{f"docs/{file.src_uri}": file.src_uri for file in files}, **ELSEWHERE}
    place = next((place for place, at in ELSEWHERE.items() if at == path), f"docs/{path}")
    if path == "index.md":
        markdown = re.sub(r"^\[!\[ci\].*\n", "", markdown, flags=re.MULTILINE)  # badges are for the repository
    if path == "methods.md":
        markdown = re.sub(r"^\| (`\w+` \(`.*?) \|", lambda row: f"| {_linked(row[1])} |", markdown, flags=re.MULTILINE)
    if path == "choosing.md":
        markdown = re.sub(r"`(\w+)\(.*?\)`(?=,| \|)", _linked_call, markdown)
    return with_links(markdown, place, path, pages, config.repo_url or "")


def on_page_content(html: str, **_: Any) -> str:
    """Draw formulas."""
    return with_mathml(html)


def _linked(cell: str) -> str:
    return re.sub(
        r"`(\w+)`", lambda word: f"[{word[0]}](methods/{KINDS[word[1]]}.md)" if word[1] in KINDS else word[0], cell
    )


def _linked_call(call: re.Match[str]) -> str:
    return f"[{call[0]}](methods/{KINDS[call[1]]}.md)" if call[1] in KINDS else call[0]


def _made() -> dict[str, str]:
    """Pages from the code: path on the site -> Markdown."""
    pages = {f"methods/{KINDS[name]}.md": method_page(cls) for name, cls in STRATEGIES.items()}
    for title, names in API.items():
        parts = [f"::: {_path(name, title)}" for name in names]
        if title == "Classes":
            parts.insert(0, "Strategies have [pages of their own](../methods.md).")
        pages[f"api/{title.lower()}.md"] = "\n\n".join([f"# {title}", *parts]) + "\n"
    return pages


def _path(name: str, title: str) -> str:
    """Return the path of the module that defines a name, for mkdocstrings."""
    if "." in name:
        module, _, name = name.rpartition(".")
        if title == "Integrations":  # their libraries need not be installed
            return f"{module}.{name}"
        found = getattr(importlib.import_module(module), name)
    else:
        found = getattr(errors if title == "Errors" else ctl, name)
    return f"{found.__module__}.{found.__qualname__}"
