"""Text where text is wanted: what YAML 1.1 takes for booleans, octals, dates and times stays as it is written."""

from __future__ import annotations

import json

import pytest
import yaml

from conservtl import SpecError
from conservtl.experiments.spec.reading import read_yaml
from conservtl.experiments.spec.spec import dump_spec, load_spec, parse_spec, with_fields

WORDS = (
    *("yes", "no", "on", "off", "Yes", "NO", "y", "n", "true", "false", "True", "FALSE", "null"),
    *("0017", "17", "-3", "+5", "1_000", "0x1F", "0b11", "0o17", "1.50", "2.", ".5", "1e5", "1234e567"),
    *("6.0e+2", "1.5.2"),
    *("2024-01-01", "2024-01-01T10:00:00Z", "12:30", "1:02:03", "9:5.25", ".inf", ".nan", "=", "07.5"),
)  # fmt: skip
FIELDS = {"task": "speech", "data": {"kind": "folder", "root": "somewhere", "target": "theo"}}


@pytest.fixture
def load(tmp_path):
    """Return a function that loads a spec whose data section has further lines, with overrides."""

    def loaded(lines: str = "", *overrides: str, target: str = "target: theo", end: str = ""):
        path = tmp_path / "spec.yaml"
        body = "".join(f"  {line}\n" for line in ["kind: folder", "root: somewhere", target, *lines.splitlines()])
        path.write_text(f"task: speech\ndata:\n{body}{end}")
        return load_spec(path, overrides)

    return loaded


class TestWords:
    def test_in_a_list_in_one_line(self, load):
        assert load(f"words: [{', '.join(WORDS)}]").data.words == WORDS

    def test_in_a_list_of_lines(self, load):
        assert load("words:\n" + "".join(f"- {word}\n" for word in WORDS)).data.words == WORDS

    def test_in_an_override(self, load):
        assert load("", f"data.words=[{', '.join(WORDS)}]").data.words == WORDS

    def test_in_json(self, tmp_path):
        path = tmp_path / "spec.json"
        data = {**FIELDS["data"], "words": [17, 1.5, True, None, "yes", "0017"]}
        path.write_text(json.dumps({**FIELDS, "data": data}))
        assert load_spec(path).data.words == ("17", "1.5", "true", "null", "yes", "0017")

    def test_in_quotes(self, load):
        assert load("words: ['yes', \"0017\", 'null', '~']").data.words == ("yes", "0017", "null", "~")

    @pytest.mark.parametrize("word", WORDS)
    def test_as_the_only_text(self, load, word):
        if word != "null":
            assert load(target=f"target: {word}").data.target == word
            assert load("", f"data.target={word}").data.target == word

    def test_null_is_nothing_where_one_text_is_wanted(self, load):
        with pytest.raises(SpecError, match=r"data\.target: Input should be a valid string; received null\. Give text"):
            load(target="target: null")
        assert load("words: null").data.words is None

    def test_by_an_anchor(self, load):
        end = "source:\n  data: null\n  labels: *w\n"
        spec = load("words: &w [on, off, 007]", end=end)
        assert spec.data.words == spec.source.labels == ("on", "off", "007")

    def test_everywhere(self, load):
        end = (
            "source: {weights: 2024, key: 1.10, labels: [on, off], rename: {no: yes, 01: 1.0}}\n"
            "strategies: [{kind: discriminative_lr, groups: {0: 0.5, 1.10: 1}}]\n"
            "layers: [0, 1]\n"
            "compare:\n  targets: [007, no]\n"
            "  variants: {on: {data.target: 1e5}, 3: {data.target: 4, training.fused: no}}\n"
            "model: {args: {dropout: 0.1}}\n"
        )
        spec = load("source_speakers: [1, 02]", end=end)
        assert str(spec.source.weights) == "2024"
        assert spec.source.key == "1.10"
        assert spec.source.labels == ("on", "off")
        assert spec.source.rename == {"no": "yes", "01": "1.0"}
        assert spec.strategies[0].groups == {"0": 0.5, "1.10": 1.0}
        assert spec.layers == ("0", "1")
        assert spec.data.source_speakers == ("1", "02")
        assert spec.compare.targets == ("007", "no")
        assert list(spec.compare.variants) == ["on", "3"]
        changed = [with_fields(spec, fields) for fields in spec.compare.variants.values()]
        assert [(one.data.target, one.training.fused) for one in changed] == [("1e5", "auto"), ("4", False)]

    def test_a_resolved_spec_reads_back_the_same(self, load, tmp_path):
        spec = load(f"words: [{', '.join(WORDS)}]", target="target: 0017")
        again = tmp_path / "resolved.yaml"
        again.write_text(dump_spec(spec))
        assert load_spec(again) == spec


class TestNumbersAndBooleans:
    @pytest.mark.parametrize(("text", "value"), [("yes", True), ("off", False), ("True", True), ("false", False)])
    def test_booleans_where_booleans_are_wanted(self, load, text, value):
        assert load("", f"training.fused={text}").training.fused is value
        assert load(end=f"training: {{fused: {text}}}\n").training.fused is value

    @pytest.mark.parametrize(
        ("text", "value"), [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("1_0.5", 10.5), (".5", 0.5), ("2", 2)]
    )
    def test_numbers_where_numbers_are_wanted(self, load, text, value):
        found = load("", f"training.lr={text}").training.lr
        assert found == value
        assert type(found) is float

    def test_a_whole_number_is_decimal(self, load):
        """YAML 1.1 reads 0017 as 15, YAML 1.2 as 17."""
        assert load("shots: 0017").data.shots == 17

    @pytest.mark.parametrize("text", ["12:30", "2024-01-01", "maybe"])
    def test_other_text_is_no_number(self, load, text):
        with pytest.raises(SpecError, match=rf"data\.shots: .*received '{text}'"):
            load(f"shots: {text}")

    def test_arguments_of_other_libraries(self, tmp_path):
        path = tmp_path / "spec.yaml"
        path.write_text(
            "task: vision\ndata: {kind: digits}\n"
            "model: {name: resnet18, args: {zero_init_residual: yes, a: [off, 'off', 1.50], b: {c: True}, d: 0017}}\n"
        )
        args = load_spec(path).model.args
        assert args == {"zero_init_residual": True, "a": [False, "off", 1.5], "b": {"c": True}, "d": "0017"}
        assert [type(value) for value in args["a"]][:2] == [bool, str]

    def test_python_values(self):
        """A number that is passed in Python is text as Python prints it."""
        assert parse_spec({**FIELDS, "data": {**FIELDS["data"], "words": (1, 2.5)}}).data.words == ("1", "2.5")
        with pytest.raises(SpecError, match=r"data\.target: .*received \['a'\]|data\.target: "):
            parse_spec({**FIELDS, "data": {**FIELDS["data"], "target": ["a"]}})


class TestDocuments:
    @pytest.mark.parametrize(
        "text",
        ["1", "-7", "1.5", "true", "~", "", "{a: 1, b: [x, {c: null}]}", "[1.0e+3, -0.5]", "{<<: {a: 1}, b: 2}", "'5'"],
    )
    def test_where_both_versions_agree_nothing_changes(self, text):
        assert read_yaml(text) == yaml.safe_load(text)

    def test_merged_fields_may_be_replaced(self):
        assert read_yaml("base: &b {x: 1, y: 2}\nmine: {<<: *b, y: 3}")["mine"] == {"x": 1, "y": 3}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("seed: 1\nseed: 2", "found 'seed' twice"),
            ("data: {shots: 1, shots: 1}", "found 'shots' twice"),
            ("{[a, b]: 1}", "found a name that is no text"),
            (f"seed: {'9' * 5000}", "found a number that cannot be read"),
            ("a: !!int abc", "found the tag .*:int'; a spec has no tags"),
            ("a: !!python/object:os.system x", r"found the tag .*os\.system'; a spec has no tags"),
        ],
    )
    def test_others_are_refused_with_their_line(self, tmp_path, text, message):
        path = tmp_path / "spec.yaml"
        path.write_text(text)
        with pytest.raises(SpecError, match=rf"^spec '\S+' is not valid YAML: line [12], column \d+: .*{message}"):
            load_spec(path)
