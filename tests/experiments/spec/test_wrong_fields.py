"""Every union of every spec: a wrong value is named by the path as it is written, with what is expected there."""

from __future__ import annotations

import inspect
import pickle
import re
from functools import cache

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import conservtl as ctl
from conservtl import SpecError
from conservtl.experiments.spec.fields import with_values
from conservtl.experiments.spec.spec import _adapter, parse_spec

INTERNAL = re.compile(
    r"constrained-|function-|literal\[|tuple\[|list\[|dict\[|lax-or-strict|json-or-python|nullable|is-instance|"
    r"Value error|Assertion|valid tuple|Tuple |instance of|Extra inputs|discriminator|tagged-union|\bunion\b"
)
WORD, MISSPELT = "no such word", "a_field_of_nothing"
VALUES = {"bool": True, "text": WORD, "list": [[]], "number": -7.5, "fields": {MISSPELT: 1}, "kind": {"kind": WORD}}


@cache
def schema() -> dict:
    return _adapter().json_schema()


def resolved(node: dict) -> dict:
    while "$ref" in node:
        node = schema()["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def least(node: dict) -> object:
    """Return a right value for a field."""
    node = resolved(node)
    if "discriminator" in node:
        return least(node["oneOf"][0])
    for key, value in (("const", node.get("const")), ("enum", (node.get("enum") or [None])[0])):
        if key in node:
            return value
    if "anyOf" in node:
        return least(node["anyOf"][0])
    if node["type"] == "object":
        kinds = {key: least(node["properties"][key]) for key in ("kind", "task") if key in node.get("properties", {})}
        return kinds | {name: least(node["properties"][name]) for name in node.get("required", ())}
    if node["type"] == "array":
        return [least(part) for part in node.get("prefixItems", ())]
    number = node.get("minimum", node.get("exclusiveMinimum", 0) + 0.5 * ("exclusiveMinimum" in node))
    return {"string": "x", "boolean": False, "null": None}.get(node["type"], number)


def unions(node: dict, put, path: tuple[str, ...]):
    """Yield (path, node, function that puts a value there into a whole spec) for each union below a node."""
    node = resolved(node)
    if "discriminator" in node or len(node.get("anyOf", ())) > 1:
        yield path, node, put
        for one in node.get("oneOf", node.get("anyOf", ())):
            yield from unions(one, put, path)
    for name, inner in node.get("properties", {}).items():
        if name in ("kind", "task", "recipe"):
            continue
        others = least(node)
        yield from unions(inner, lambda value, name=name, others=others: put({**others, name: value}), (*path, name))
    if node.get("items"):
        yield from unions(node["items"], lambda value: put([value]), (*path, "0"))
    parts = node.get("prefixItems", ())
    for place, inner in enumerate(parts):
        known = [least(part) for part in parts]
        yield from unions(
            inner, lambda value, place=place, known=known: put([*known[:place], value, *known[place + 1 :]]),
            (*path, str(place)),
        )  # fmt: skip


@cache
def places() -> list:
    found: dict = {}
    for task in ("speech", "transcribe", "vision"):
        spec = next(one for one in map(resolved, schema()["oneOf"]) if one["properties"]["task"]["const"] == task)
        for path, node, put in unions(spec, lambda fields: fields, ()):
            shared = path[0] in ("training", "strategies", "source", "compare", "sweep", "tune")
            key = (path, str(node)) if shared else (task, path, str(node))
            found.setdefault(key, (path, node, put))
    return list(found.values())


def refusal(content: dict) -> str | None:
    try:
        parse_spec(content)
    except SpecError as error:
        return str(error)
    return None


@pytest.mark.parametrize("wrong", VALUES)
def test_a_wrong_value_in_any_union(wrong):
    refused = 0
    for path, _, put in places():
        if (said := refusal(put(VALUES[wrong]))) is None:
            continue
        refused += 1
        name = ".".join(path)
        named = re.findall(r"^ *([\w.]+): ", said, re.MULTILINE)
        assert any(f"{one}.".startswith(f"{name}.") or f"{name}.".startswith(f"{one}.") for one in named), said
        assert not INTERNAL.search(said), said
    assert refused > 50


def kinds() -> list:
    """Return (path, kind -> fields, function that puts a value there) of each union of kinds."""
    told = [(path, node, put) for path, node, put in places() if "discriminator" in node]
    return [
        (".".join(path), {kind: resolved({"$ref": ref}) for kind, ref in node["discriminator"]["mapping"].items()}, put)
        for path, node, put in told
    ]


def test_a_kind_that_is_missing_misspelt_or_alone():
    assert {path for path, _, _ in kinds()} >= {"data", "data.decoding", "data.tokens", "strategies.0"} | {
        f"data.{part}.waves.{change}" for part in ("augment", "source_augment") for change in ("room", "noise")
    }
    for path, members, put in kinds():
        missing = refusal(put({}))
        assert re.search(rf"  {path}: '?kind'? is missing\. Name the (kind|strategy)", missing), missing
        assert all(kind in missing for kind in members) or path == "strategies.0"
        for kind in members:
            assert f"  {path}: '{kind}x' is none of" in (said := refusal(put({"kind": f"{kind}x"}))), said
            assert "Did you mean '" in said
            said = refusal(put(kind))
            assert re.search(rf"  {path}: must hold fields .*received '{kind}'\. Write {{kind: {kind}}}\.", said), said


def test_a_field_of_a_kind_that_is_misspelt_of_another_kind_or_of_a_wrong_type():
    for path, members, put in kinds():
        for kind, fields in members.items():
            right = {**least(fields), "kind": kind}
            names = [name for name in fields["properties"] if name != "kind"]
            for name in [name for name in names if len(name) > 4]:
                said = refusal(put({**right, f"{name}z": 1}))
                assert f"  {path}.{name}z: there is no such field. Did you mean '{name}'?" in said, said
            for name in names:
                said = refusal(put({**right, name: [[[]]]}))
                assert said is None or re.search(rf"^  {path}\.{name}[.:]", said, re.MULTILINE), said
                assert said is None or not INTERNAL.search(said), said
            other = next((one for one in members.values() if set(one["properties"]) - set(fields["properties"])), None)
            if other is not None:
                (name, *_) = [one for one in other["properties"] if one not in fields["properties"]]
                said = refusal(put({**right, name: 1}))
                assert re.search(rf"  {path}\.{name}: there is no such field\. It belongs to {{kind: \w+}}\.", said), (
                    said
                )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"data.augment.waves": True}, r"such as data\.augment\.waves\.speeds, or be null; .*True\. Write {} for the"),
        ({"data.unlabelled": "all"}, r"data\.unlabelled: .*or be null; received 'all'\. Write {utterances: all}\."),
        ({"data.unlabelled": {"utterances": 0}}, "must be a whole number of at least 1 or 'all'; received 0"),
        ({"data.decoding": {"lexicon": "x"}}, "'kind' is missing.* one of greedy, beam, as in {kind: beam}"),
        ({"data.source_speakers": "theo"}, r"source_speakers: .*a list; received 'theo'\. Write \[theo\]\."),
        ({"training.optimizer": {"imports": "a:b"}}, r"training\.optimizer: .*imports: there is no such field"),
        ({"model.import": "no colon"}, r"model\.import: must have the form package\.module:build; received 'no colon'"),
        (
            {"strategies": [{"kind": "layer_transfer", "layers": "all"}]},
            r"layers: must be a whole number of at least 1, a number above 0 and at most 1 or a list of at least one ",
        ),
        ({"model": "transformers/whisper"}, r"such as model\.name; .*Write {name: transformers/whisper}\."),
        ({"data.root": None}, r"data\.root: must be a path; received null\. Give a path\."),
        ({"strategies": [{"kind": "l2_sp", "alpha": True}]}, r"strategies\.0\.alpha: .* valid number; received True"),
        ({"training.lr": True}, r"training\.lr: Input .* valid number; received True\. Give a number above 0\."),
        ({"strategies": [{"kind": "lora", "on": "head"}]}, r"strategies\.0\.on: .* a list; rec.* Write \[head\]\."),
        ({"seed": "abc"}, r"seed: Input should be a valid integer; received 'abc'\. Give a whole number of at least 0"),
        ({"training.epochs": None}, r"epochs: .*; received null\. Give a whole number of at least 1\."),
        ({"training.lr": {"range": [1, 2]}}, r"A range is searched by `conservtl tune` alone; give one value\."),
        ({"strategies": "l2_sp"}, r"strategies: Input should be a list; received 'l2_sp'\. Write \[{kind: l2_sp}\]\."),
        ({"strategies": {"kind": "l2_sp", "alpha": 2}}, r"received the fields .*Write \[{kind: l2_sp, alpha: 2}\]\."),
        ({"strategies": [{"recipe": "vision"}]}, r"strategies\.0: a recipe .*Write strategies: {recipe: vision}\."),
        ({"strategies": {"recipe": "visoin"}}, "recipe must be one of .* Did you mean 'vision'"),
        ({"compare.shots": [0]}, r"\A.*\n  compare\.shots\.0: [^\n]*received 0\Z"),
    ],
)  # fmt: skip
def test_sentences(fields, said):
    content = {"task": "transcribe", "data": {"kind": "manifest", "root": "x", "target": "anna"}}
    with pytest.raises(SpecError, match=said):
        parse_spec(with_values(content, fields))


@pytest.mark.parametrize(
    ("cls", "fields", "said"),
    [
        (ctl.Training, {"step_second": 3}, ".step_second: there is no such field. Did you mean 'step_seconds'?"),
        (ctl.L2SP, {"alfa": 1}, ".alfa: there is no such field. Did you mean 'alpha'?"),
        (ctl.L2SP, {"alpha": -1}, ".alpha: Input should be greater than or equal to 0; received -1"),
        (ctl.Training, {"batch_size": 0}, ".batch_size: must be a whole number of at least 1 or 'auto'; received 0"),
        (ctl.Training, {"optimizer": "adan"}, ". Did you mean 'adam'?"),
        (ctl.LayerTransfer, {}, ".layers: Field required. Give a whole number of at least 1, "),
        (ctl.SelectiveDecay, {"threshold": True, "every": "x"}, "\nSelectiveDecay.every: "),
        (ctl.Recipe, {"task": "x", "strategies": [{"kind": "l3_sp"}]}, "Recipe.strategies.0: 'l3_sp' is"),
        (ctl.GradualUnfreezing, {"phases": [{"trai": 1}]}, ".phases.0.trai: there is no such field. Did you"),
    ],
)  # fmt: skip
def test_a_spec_made_in_python_names_its_class_and_is_pydantics_error_too(cls, fields, said):
    with pytest.raises(SpecError) as refused:
        cls(**fields)
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"{cls.__name__}.")
    assert not INTERNAL.search(str(refused.value))
    assert isinstance(refused.value, ValidationError)
    assert refused.value.errors()[0]["loc"]
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)


@pytest.mark.parametrize(
    ("strategies", "said"),
    [
        ([ctl.L2SP(), {"kind": "l2_sp", "alfa": 1}], "1.alfa: there is no such field. Did you mean 'alpha'?"),
        ([{"kind": "l2sp", "alpha": -1}], "0.alpha: Input should be greater than or equal to 0; received -1"),
        ([{"kind": "gradual_unfreezing", "phases": [{"trai": 1}]}], "0.phases.0.trai: there is no such field. Did you"),
        ([ctl.L2SP(), ctl.L2SP], "1 must be a Strategy, such as L2SP(alpha=0.1); received <class"),
        ([{"alpha": 1}], "0: kind is missing. Name the strategy, such as {'kind': 'l2_sp'}."),
        ([{"recipe": "vision"}], "0: a recipe takes the place of a list of strategies. Write ctl.recipe('vision')."),
    ],
)  # fmt: skip
def test_a_list_of_strategies_names_the_entry(strategies, said):
    model, data = torch.nn.Linear(4, 2), (torch.zeros(4, 4), torch.arange(4) % 2)
    calls = {
        f"strategies.{said}": lambda: ctl.adapt(model, torch.nn.Linear(4, 2), strategies),
        f"variants.mine.{said}": lambda: ctl.compare(model, model, {"mine": strategies}, data, {"target": data}),
        f"strategy{said[1:]}": lambda: ctl.sweep(model, model, data, {"target": data}, strategy=strategies[-1]),
    }
    for sentence, call in calls.items():
        with pytest.raises(SpecError) as refused:
            call()
        assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize("wrong", [True, False, np.True_, torch.tensor(False)], ids=repr)
def test_a_boolean_is_no_number(wrong):
    for field in ("alpha", "beta", "every"):
        with pytest.raises(SpecError, match=rf"^L2SP\.{field}: Input should be a valid \w+; received .*\. Give a"):
            ctl.L2SP(**{field: wrong})
    with pytest.raises(SpecError, match=r"^L2SP\.depth\.1: Input should be a valid number; received"):
        ctl.L2SP(depth=(1, wrong))
    with pytest.raises(SpecError, match=r"^Training\.batch_size: must be a whole number of at least 1 or 'auto'; rec"):
        ctl.Training(batch_size=wrong)
    with pytest.raises(SpecError, match=r"^DiscriminativeLR\.groups\.a: Input should be a valid number; received"):
        ctl.DiscriminativeLR(groups={"a": wrong})
    assert ctl.LHUC(freeze=wrong).freeze is bool(wrong)


def test_numbers_of_numpy_and_torch_are_numbers():
    depth = (torch.tensor(1), np.int8(2))
    spec = ctl.L2SP(alpha=np.float32(0.5), beta=torch.tensor(0.25), every=np.int64(3), depth=depth)
    assert (spec.alpha, spec.beta, spec.every, spec.depth) == (0.5, 0.25, 3, (1.0, 2.0))
    assert ctl.GradualUnfreezing(epochs=1).epochs == 1
    assert ctl.GradualUnfreezing(epochs=0.5).epochs == 0.5


def test_a_field_that_is_assigned_to():
    training = ctl.Training()
    with pytest.raises(SpecError) as refused:
        training.lr = 0.1
    assert str(refused.value) == (
        "Training.lr: cannot change once it is made; received 0.1. Make a copy: model_copy(update={'lr': 0.1})."
    )
    assert isinstance(refused.value, ValidationError)
    with pytest.raises(SpecError, match=r"^Training\.lrr: there is no such field\. Did you mean 'lr'\?$"):
        training.lrr = 1
    with pytest.raises(SpecError, match=r"^Training\.lr: no field can be deleted; received del\. For its default make"):
        del training.lr
    assert training.model_copy(update={"lr": 0.1}) == ctl.Training(lr=0.1)
    assert training.model_copy(update={"lr": 0.1}).model_fields_set == {"lr"}


def test_a_copy_has_right_fields():
    with pytest.raises(SpecError, match=r"^Training\.lr: Input should be greater than 0; received -1$"):
        ctl.Training().model_copy(update={"lr": -1})
    with pytest.raises(SpecError, match=r"^L2SP\.alfa: there is no such field\. Did you mean 'alpha'\?$"):
        ctl.L2SP().model_copy(update={"alfa": 1})


def test_fields_go_by_name():
    with pytest.raises(TypeError, match=r"L2SP takes its fields by name, alpha, beta, .*; received 0\.1 alone"):
        ctl.L2SP(0.1)
    assert "unnamed" not in str(inspect.signature(ctl.L2SP))
