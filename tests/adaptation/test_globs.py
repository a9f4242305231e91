"""Arguments and fields that are lists of globs: text alone is one glob for ``fresh``, and refused for all others."""

import re

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.experiments.spec.spec import parse_spec


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


DATA = torch.zeros(6, 3), torch.arange(6) % 2
SPEC = {"task": "speech", "data": {"kind": "folder", "root": "x", "target": "anna"}}


def compared(**options):
    return ctl.compare(network(), network(), {"a": []}, DATA, {"target": DATA}, seeds=1, baselines=[], **options)


CALLS = {
    **{f"adapt {name}": lambda one, name=name: ctl.adapt(network(), network(), **{name: one})
       for name in ("layers", "allow", "head")},
    **{f"compare {name}": lambda one, name=name: compared(**{name: one}) for name in ("layers", "allow", "head")},
    "itself missing": lambda one: ctl.itself(missing=one),
    "find_layers layers": lambda one: ctl.find_layers(network(), layers=one),
    "find_layers head": lambda one: ctl.find_layers(network(), head=one),
}  # fmt: skip
FIELDS = {
    "LHUC.on": lambda one: ctl.LHUC(on=one),
    "LoRA.on": lambda one: ctl.LoRA(on=one),
    "FeatureConservation.layers": lambda one: ctl.FeatureConservation(layers=one),
    "FeatureExtraction.layers": lambda one: ctl.FeatureExtraction(layers=one),
    "LayerTransfer.layers": lambda one: ctl.LayerTransfer(layers=one),
    "SurgicalFineTuning.candidates": lambda one: ctl.SurgicalFineTuning(block="best", candidates=one),
    "Stage.train": lambda one: ctl.Stage(train=one),
    "Phase.frozen": lambda one: ctl.Phase(frozen=one),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [("2", "; received the text '2'. Write {0}=['2']."), (3, ", all texts; received 3. Write {0}=['...'].")],
    ids=["text", "number"],
)
def test_an_argument(name, wrong, said):
    argument = name.rpartition(" ")[2]
    with pytest.raises(ctl.SelectorError) as refused:
        CALLS[name](wrong)
    assert str(refused.value) == f"{argument} must be a list of globs{said.format(argument)}"


@pytest.mark.parametrize("name", FIELDS)
def test_a_field(name):
    with pytest.raises(ctl.SpecError, match=rf"^{re.escape(name)}: .*; received '2'\. Write \['2'\]\.$"):
        FIELDS[name]("2")
    FIELDS[name](["2"])


@pytest.mark.parametrize("fields", [{"layers": "conv"}, {"model": {"import": "a:b", "head": "conv"}}], ids=str)
def test_a_field_of_a_spec(fields):
    with pytest.raises(ctl.SpecError, match=r"  (layers|model\.head): .*; received 'conv'\. Write \[conv\]\."):
        parse_spec(SPEC | fields)


def test_fresh_takes_one_glob_alone(tmp_path):
    assert ctl.adapt(network(), network(), fresh="2").plan.fresh == ("2.weight", "2.bias")
    assert parse_spec(SPEC | {"fresh": "fc"}).fresh == "fc"
    with pytest.raises(ctl.SelectorError, match=r"fresh: 'fc': must match"):
        compared(fresh="fc")
    start, other = network().state_dict(), network().state_dict()
    merged = ctl.merge(start, other, tmp_path / "half.safetensors", t=0.5, fresh="2.*")
    assert set(merged.taken) == {"2.weight", "2.bias"}
