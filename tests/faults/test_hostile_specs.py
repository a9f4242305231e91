"""Specs from strangers end as a spec or as one bounded message, in little time."""

from __future__ import annotations

import time

import hostile
import pytest

import conservtl as ctl
from conservtl.experiments.spec.spec import load_spec

SPEECH = "task: speech\ndata: {kind: espeak, target: cleo}\n"
MULTIPLYING = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 8)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: []", r"spec: '\[\]' is none of speech, .*vision"),
        ("task: speech\ndata: {kind: [folder]}", r"data: .*is none of folder, espeak, speechcommands"),
        ("task: speech\ndata: {shots: 3}", r"data: 'kind' is missing\. Name the kind"),
        (SPEECH + "strategies: [{kind: {}}]", r"strategies\.0: '\{\}' is none of auto_rgn"),
        ("strategies: {recipe: [speaker]}", r"recipe must be one of speaker, recognizer, .*; received \['speaker'\]"),
        ("strategies: {recipe: {}}", r"recipe must be one of speaker, recognizer, .*; received \{\}"),
        ("strategies: {recipe: speaker}\ntraining: [1]", r"training must hold fields of its own, .* received \[1\]"),
        ("x: " + "[" * 1000 + "]" * 1000, r"more than 64 fields or lists within each other"),
        ("x: " + "{a: " * 1000 + "}" * 1000, r"more than 64 fields or lists within each other"),
        (SPEECH + "seed: !!bool maybe", r"found the tag 'tag:yaml\.org,2002:bool'; a spec has no tags"),
        (SPEECH + "seed: !!int abc", r"2002:int'; a spec has no tags"),
        (SPEECH + "seed: !!timestamp abc", r"2002:timestamp'; a spec has no tags"),
        (SPEECH + "seed: !!python/object/apply:os.system [id]", r"os\.system'; a spec has no tags"),
        (SPEECH + "seed: 2024-13-01", r"seed: Input should be a valid integer.*'2024-13-01'"),
        (SPEECH + "seed: " + "9" * 5000, r"found a number that cannot be read"),
        (SPEECH + "seed: 0x" + "f" * 9000, r"found a number that cannot be read"),
        ("task: vision\ndata: {kind: digits, split_seed: 99999999999999999999}", r"split_seed: .*less than or equal"),
        (SPEECH + f"source: {{weights: {'b' * 300}.pt}}", r"source\.weights: .*names of at most 255 bytes"),
        (SPEECH + 'source: {cache: "a\\0b"}', r"source\.cache: .*without a zero byte"),
        (MULTIPLYING + "task: *i\n", r"more than 20,000 fields and values"),
        (SPEECH + "x: &x [*x]", r"found the alias \*x within what it stands for"),
        (SPEECH + "x: &x {<<: *x}", r"found the alias \*x within what it stands for"),
        ("task: " + "a" * 300_000, r"at most 262,144 characters"),
        (SPEECH + "".join(f"k{n}: 1\n" for n in range(3000)), r"k0: there is no such field.*\n.*\.\.\. and 2,980 more"),
        (SPEECH + f"seed: {'x' * 9000}", r"seed: .*received 'x{499}\.\.\."),
    ],
)  # fmt: skip
def test_the_message_names_the_field_and_is_bounded(text, message, tmp_path):
    (tmp_path / "spec.yaml").write_text(text)
    begun = time.process_time()
    with pytest.raises(ctl.SpecError, match=f"(?s){message}") as refused:
        load_spec(tmp_path / "spec.yaml")
    assert len(str(refused.value)) < 12_000
    assert time.process_time() - begun < 10


def test_values_may_be_as_long_and_deep_as_any_spec_needs(tmp_path):
    """A thousand labels, ten levels, an alias used twice, an explicit text."""
    labels = ", ".join(f"label {number}" for number in range(1000))
    shared = "compare: {variants: {one: &v {training.lr: 0.1}, two: *v}}\n"
    (tmp_path / "spec.yaml").write_text(SPEECH + shared + f"source: {{weights: x.pt, labels: [!!str 17, {labels}]}}\n")
    spec = load_spec(tmp_path / "spec.yaml")
    assert spec.source.labels[:2] == ("17", "label 0")
    assert spec.compare.variants["one"] == spec.compare.variants["two"] == {"training.lr": 0.1}


def test_hundreds_of_specs_are_read_or_refused():
    result = hostile.main(["--specs", "150", "--seed", "11"])
    assert result["wrong"] == []
    assert result["counts"]["read"] > 10
    assert result["counts"]["refused"] > 60
