"""Write the expected layers of the architectures in maps/ anew: all, or those whose names contain an argument."""

from __future__ import annotations

import sys
import warnings

import maps

from conservtl.layers import find_layers


def main(*parts: str) -> None:
    warnings.simplefilter("ignore")
    for name in maps.ARCHITECTURES:
        if not parts or any(part in name for part in parts):
            maps.file(name).write_text(maps.table(find_layers(*maps.build(name))))


if __name__ == "__main__":
    main(*sys.argv[1:])
