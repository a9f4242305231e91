"""Time of the import, of a plan and of README's first command. Results: results/start.json.

    python benchmarks/start.py

Each number is the median over several new processes, in seconds.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from conservtl import __version__

HERE = Path(__file__).parent
IMPORT = "import time, torch; t = time.perf_counter(); import conservtl; print(time.perf_counter() - t)"
PLAN = """
import time, torch, torchvision, conservtl as ctl
with torch.device("meta"):
    source = torchvision.models.vit_b_16().state_dict()
model = torchvision.models.vit_b_16(num_classes=10)
source = {name: torch.zeros(tensor.shape) for name, tensor in source.items()}
layers = [ctl.L2SP(), ctl.DiscriminativeLR(decay=0.8), ctl.GradualUnfreezing(by="layer")]
from conservtl.plan.plan import Plan
from conservtl.methods import apply_all
t = time.perf_counter()
found = ctl.find_layers(model)
plan = apply_all(Plan.draw(found, {name: tuple(x.shape) for name, x in source.items()}, {}), layers)
print(time.perf_counter() - t)
"""


def seconds(code: str, runs: int = 5) -> float:
    """Return the median over new processes of the number that the code prints."""
    command = [sys.executable, "-c", code]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(runs)]
    return round(statistics.median(float(out) for out in outputs), 3)


def first_command() -> str:
    """Return code that runs README's first command after the installation, with an empty cache."""
    spec = HERE.parent / "examples" / "speech" / "spec.yaml"
    with tempfile.TemporaryDirectory() as folder:
        words = ["conservtl", "run", str(spec), "--out", f"{folder}/out", "--set", f"source.cache={folder}/cache"]
    return (
        f"import subprocess, sys, time; t = time.perf_counter(); "
        f"subprocess.run([sys.executable, '-m', 'conservtl.cli', *{words[1:]}], check=True, capture_output=True); "
        f"import shutil; shutil.rmtree({folder!r}); print(time.perf_counter() - t)"
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    times = {
        "import conservtl, beyond import torch": seconds(IMPORT),
        "plan of ViT-B/16 with L2-SP, layer decay and gradual unfreezing": seconds(PLAN),
        "README's first command after installation, nothing cached": seconds(first_command(), 3),
    }
    report = {
        "seconds": times,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} cores, no GPU used",
        "versions": {"conservtl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "start.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
