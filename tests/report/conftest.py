"""Results as compare, sweep and tune return them, and the checks that every page must pass."""

import random
import re
import statistics
from html.parser import HTMLParser

import pytest

# Target and source accuracy of each, about as measured on spoken digits.
MEANS = {
    "source as it is": (0.81, 0.995),
    "from scratch": (0.35, 0.28),
    "linear probe": (0.93, 0.96),
    "fine-tuning, low rate": (0.92, 0.985),
    "fine-tuning, middle rate": (0.955, 0.975),
    "fine-tuning, high rate": (0.956, 0.88),
    "fine-tuning, interpolated": (0.956, 0.984),
    "joint training": (0.975, 0.993),
}
BASELINES = tuple(MEANS)
LONG = "a name that is so very long that nobody would put it in a spec " * 2
ACCURACY = {"key": "accuracy", "name": "accuracy", "better": "higher", "share": True}
ROLES = {"source as it is": "source", "joint training": "bound"}
OWN = {
    "L2-SP then interpolation": (0.968, 0.99),
    "L2-SP": (0.962, 0.985),
    "LHUC": (0.945, 0.976),
    "output conservation": (0.955, 0.989),
    "layer transfer": (0.958, 0.96),
    "surgical": (0.949, 0.981),
    "mixout": (0.96, 0.978),
    "LP-FT": (0.957, 0.972),
    LONG: (0.9635, 0.9853),
}


def interval(values):
    mean = statistics.fmean(values)
    half = 2.1 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": mean, "low": mean - half, "high": mean + half, "count": len(values)}


def harmonic(a, b):
    return 2 * a * b / (a + b)


def a_comparison(shots=(5,), seeds=5, targets=("jackson", "nicolas", "theo", "yweweler"), own=OWN, *, source=True):
    """The best method wins; from scratch is far below all others."""
    draw = random.Random(0).gauss
    means = MEANS | dict(own)
    tables = []
    for number in shots:
        worse = (5 / number) ** 0.4
        runs = {
            name: [
                (place, min(1.0, 1 - (1 - to) * worse + draw(0, 0.006)), min(1.0, kept + draw(0, 0.002)))
                for place in targets
                for _ in range(seeds)
            ]
            for name, (to, kept) in means.items()
        }
        best = "fine-tuning, interpolated"
        rows = []
        for name, found in runs.items():
            scores = [harmonic(to, kept) if source else to for _, to, kept in found]
            others = [harmonic(to, kept) if source else to for _, to, kept in runs[best]]
            gap = interval([a - b for a, b in zip(scores, others, strict=True)])
            rows.append(
                {
                    "id": name,
                    "variant": name,
                    "role": ROLES.get(name, "baseline") if name in BASELINES else "method",
                    "baseline": name in BASELINES,
                    "target": interval([to for _, to, _ in found]),
                    "source": interval([kept for *_, kept in found]) if source else None,
                    "harmonic": interval(scores) if source else None,
                    "constrained": 0.41 if source else None,
                    "seconds": interval([12.0 + draw(0, 1) for _ in found]),
                    "difference": None if name == best else gap,
                    "wins": name != best and gap["low"] > 0,
                    "per_target": {
                        place: {
                            "before": interval([0.81] * seeds),
                            "after": interval([to for where, to, _ in found if where == place]),
                        }
                        for place in targets
                    },
                }
            )
        tables.append({"shots": number, "best_baseline": best, "best_baseline_id": best, "rows": rows})
    left = [] if source else ["source kept, harmonic mean and constrained score: the source has no data"]
    return {
        "kind": "compare",
        "metric": ACCURACY,
        "tables": tables,
        "verdict": [f"At {number} shots something wins by +1.0 points." for number in shots],
        "left_out": left,
        "runs": [],
        "spec": {"task": "speech", "data": {"shots": 5}},
    }


def a_sweep(layers=("stem", "blocks.0", "blocks.1", "head"), seeds=3, *, source=True, controls=True):
    """The output side transfers better; the first two layers from there can be held; strength 1 is the best."""
    draw, depth = random.Random(1).gauss, len(layers)

    def around(mean):
        return interval([mean + draw(0, 0.001) for _ in range(seeds)])

    def point(target, kept):
        return {"target": around(target), "source": around(kept) if source else None}

    held = {"input": [0.2, 0.3, 0.45, 0.6, 0.8], "output": [0.2, 0.6, 0.7, 0.75, 0.8]}
    cost = {"input": [0, 0.05, 0.08, 0.1, 0.15], "output": [0, 0, 0.004, 0.1, 0.15]}
    curves = []
    for side in ("input", "output"):
        for form in ("AnB", "AnB+", *(("BnB", "BnB+") if controls else ())):
            points = []
            for n in range(depth + 1):
                place = round(4 * n / depth)
                mean = held[side][place] + (cost[side][place] if form == "AnB+" else 0)
                points.append({"n": n, **point(0.2 if form.startswith("B") else mean, 0.9 * mean)})
            curves.append({"side": side, "form": form, "points": points})
    accuracies = {0.0: (0.95, 0.96), 0.1: (0.955, 0.965), 1.0: (0.955, 0.985), 100.0: (0.85, 0.99)}
    path = []
    for t in (0.0, 0.5, 1.0):
        found = point(0.81 + 0.14 * t, 0.99 - 0.03 * t)
        path.append({"t": t, **{name: value for name, value in found.items() if value is not None}})
    return {
        "kind": "sweep",
        "metric": ACCURACY,
        "layers": list(layers),
        "curves": curves,
        "strengths": [{"method": "l2_sp", "strength": s, **point(*both)} for s, both in accuracies.items()],
        "path": path,
        "before": point(0.8, 0.99),
        "runs": [],
        "spec": {"task": "speech"},
    }


FIELDS = {
    "strategies.0.alpha": {"low": 1e-4, "high": 1.0, "log": True},
    "training.epochs": {"low": 10, "high": 60, "log": False},
    "strategies.0.mode": {"choices": ["coupled", "decoupled"]},
}


def a_search(objective="harmonic", trials=20, fields=FIELDS):
    """Trial 2 failed, 5 and 10 were pruned, 7 is far below all others."""
    draw, found = random.Random(2), []
    for number in range(trials):
        params = {}
        for name, field in fields.items():
            if "choices" in field:
                params[name] = draw.choice(field["choices"])
            else:
                params[name] = field["low"] * (field["high"] / field["low"]) ** draw.random()
        target, kept = (0.11, 0.1) if number == 7 else (0.93 + 0.03 * draw.random(), 0.95 + 0.03 * draw.random())
        state = "failed" if number == 2 else "pruned" if number in (5, 10) else "complete"
        done = state == "complete"
        score = [target, kept] if objective == "both" else [target if objective == "target" else harmonic(target, kept)]
        found.append(
            {
                "number": number,
                "state": state,
                "values": score if done else [],
                "params": params,
                "target": target if done else None,
                "source": kept if done and objective != "target" else None,
                "seconds": 12.3 if done else None,
                "why": "training.epochs: 10.5 is not whole. Give a whole number." if state == "failed" else None,
            }
        )
    done = [trial for trial in found if trial["values"]]
    best = [max(done, key=lambda trial: trial["values"])["number"]] if done else []
    if objective == "both":
        best = [a["number"] for a in done if not any(_beats(b["values"], a["values"]) for b in done)]
    return {
        "kind": "tune",
        "metric": ACCURACY,
        "objective": objective,
        "fields": fields,
        "trials": found,
        "best": best,
        "spec": {"task": "speech"},
    }


def _beats(one, other):
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


ERROR_RATE = {"key": "wer", "name": "word error rate", "better": "lower", "share": True}
DISTANCE = {"key": "distance", "name": "distance", "better": "lower", "share": False}


def in_errors(value, *, share=True):
    """The same result for an error rate, 1 minus each accuracy; else for a distance, 20 times that."""
    metric, scale = (ERROR_RATE, 1.0) if share else (DISTANCE, 20.0)
    if isinstance(value, dict) and {"mean", "low", "high"} <= value.keys():
        return value | {
            "mean": scale * (1 - value["mean"]),
            "low": scale * (1 - value["high"]),
            "high": scale * (1 - value["low"]),
        }
    if isinstance(value, dict):
        untouched = ("seconds", "difference", "params", "fields")
        errors = {key: each if key in untouched else in_errors(each, share=share) for key, each in value.items()}
        if "trials" in value:
            for trial in errors["trials"]:
                trial["values"] = [scale * (1 - each) for each in trial["values"]]
                for domain in ("target", "source"):
                    if trial[domain] is not None:
                        trial[domain] = scale * (1 - trial[domain])
        return errors | ({"metric": metric} if "metric" in value else {})
    return [in_errors(each, share=share) for each in value] if isinstance(value, list) else value


class _Balance(HTMLParser):
    """Every element that is opened is closed, in order."""

    void = frozenset({"meta", "br", "use", "path"})

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a page and checks it: well-formed, self-contained, no missing value shown."""

    def write(writer, result):
        path = tmp_path / "report.html"
        writer(result, path)
        html = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|<script|<link|@import|<img|<metadata", html)
        assert all(address.startswith("#") for address in re.findall(r'(?:href|src)="([^"]*)"', html))
        assert re.findall(r"url\((?!#)", html) == []
        ids = re.findall(r'\sid="([^"]*)"', html)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'href="#([^"]*)"', html)) | set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)
        # What a reader sees: the text of elements, not the attributes.
        seen = re.sub(r"<style.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL)
        assert not re.search(r"\bNone\b|\bnan\b|mathdefault", seen)
        parser = _Balance()
        parser.feed(html)
        assert parser.open == []
        return html

    return write


@pytest.fixture
def results():
    """Functions that make a result of each study."""
    return {"compare": a_comparison, "sweep": a_sweep, "tune": a_search}


@pytest.fixture
def errors():
    """Function that turns a result in accuracies into one in errors."""
    return in_errors
