"""Write the table of gains that the package ships, from benchmarks/results/methods.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "conservtl" / "report" / "text" / "gains.json"


def gains(markdown: str) -> dict[str, object]:
    """Return benchmark, date, settings and the rows of the first table, as the file has them."""
    first = markdown.split("\n## ", maxsplit=1)[0]
    lines = [line.strip("|").split("|") for line in first.splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line] for line in lines)
    date = re.search(r"\d{4}-\d{2}-\d{2}", markdown)
    return {
        "benchmark": "benchmarks/results/methods.md",
        "date": date[0] if date else "",
        "what": head[0],
        "settings": head[1:],
        "rows": {name: values for name, *values in rows},
    }


if __name__ == "__main__":
    found = gains((ROOT / "benchmarks" / "results" / "methods.md").read_text(encoding="utf-8"))
    SHIPPED.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
