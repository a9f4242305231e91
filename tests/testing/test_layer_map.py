"""Right maps keep the laws; a map that breaks one is refused with the module's name."""

import doctest
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import conservtl as ctl
from conservtl.layers import find_layers
from conservtl.layers.first_use import first_use
from conservtl.testing import check_layer_map, frozen_parts, layer_map, models, tied_heads
from conservtl.testing.layer_map import violations

X = torch.zeros(2, 3)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))


def broken(change, model=None, globs=()):
    """The sentences about a changed map of a network of three layers."""
    model = network() if model is None else model
    plan = ctl.adapt(network(), ctl.itself(missing=[]), example=X).plan
    return list(violations(model, change(*find_layers(model, X)), first_use(model, X), plan, globs))


def test_the_map_that_is_found_keeps_all_laws():
    assert broken(lambda *layers: layers) == []
    assert [layer.modules for layer in check_layer_map(network(), X)] == [("0", "1"), ("3",), ("4",)]
    assert [layer.name for layer in check_layer_map(network(), X, layers=["[01]", "[34]"])] == ["[01]", "[34]"]


@settings(max_examples=5, deadline=None)
@given(models())
def test_generated_models(drawn):
    check_layer_map(*drawn, head=None)


@pytest.mark.parametrize("draw", [frozen_parts, tied_heads])
def test_frozen_and_tied_parts(draw):
    @settings(max_examples=2, deadline=None)
    @given(draw())
    def holds(drawn):
        check_layer_map(*drawn)

    holds()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, b, c: (a, b), "parameter '4.weight': must be in exactly one layer; it is in 0"),
        (lambda a, b, c: (a, replace(b, parameters=b.parameters + c.parameters), c), "'4.weight': must .*it is in 2"),
        (
            lambda a, b, c: (replace(a, modules=("0", "1", "4")), b, c),
            "module '4': layer '4' lists it; '0' must not list it too",
        ),
        (lambda a, b, c: (replace(a, modules=("0", "3")), replace(b, modules=()), c), "module '3' of layer '0': holds"),
        (lambda a, b, c: (b, a, c), "layer '0': must come before '3', because '0.weight' is used before '3.weight'"),
        (lambda a, b, c: (a, replace(b, name="0"), c), "layer '0': names must be unique; 2 layers"),
        (lambda a, b, c: (a, replace(b, name="5"), c), "layer '5': its name must select its parameters"),
        (
            lambda a, b, c: (a, b, replace(c, parameters=tuple(replace(i, head=None) for i in c.parameters))),
            "head: must be found or named; none is marked",
        ),
        (
            lambda a, b, c: (a, b, replace(c, parameters=tuple(replace(i, aliases=("x",)) for i in c.parameters))),
            r"'4.weight': its other names are \[\]; the map has \['x'\]",
        ),
        (
            lambda a, b, c: (a, b, replace(c, parameters=tuple(replace(i, shape=(1,)) for i in c.parameters))),
            r"'4.weight': its shape is \(2, 4\)",
        ),
        (
            lambda a, b, c: (a, b, replace(c, parameters=(*c.parameters, replace(c.parameters[0], name="9.w")))),
            "parameter '9.w': the model has none",
        ),
        (
            lambda a, b, c: (replace(a, parameters=a.parameters[2:]), replace(b, parameters=a.parameters[:2]), c),
            "parameter '0.weight': must have a row in layer '3'; the plan has a row in layer '0'",
        ),
    ],
)
def test_each_law_names_the_module(change, says):
    assert any(re.search(says, one) for one in broken(change)), broken(change)


def test_a_plan_that_trains_a_frozen_parameter():
    model = network()
    model[3].bias.requires_grad_(False)
    assert broken(lambda *layers: layers, model) == [
        "parameter '3.bias': asks for no gradient, and the plan has it trained."
    ]


def test_a_glob_that_holds_less_than_it_matches():
    (one,) = (s for s in broken(lambda *layers: layers, globs=["[03]"]) if "glob" in s)
    assert one == "layer '[03]': must hold what its glob matches; '0.bias' is an error."


def test_a_recurrent_layer_is_divided_by_level():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 2, num_layers=2, batch_first=True), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    assert [layer.name for layer in check_layer_map(Recurrent(), torch.zeros(1, 4, 3))] == ["lstm.0", "lstm.1", "head"]


def test_a_cut_in_the_wrong_order_and_a_head_that_is_not_used():
    with pytest.raises(AssertionError, match=r"layer '\[01\]': must come before '4'"):
        check_layer_map(network(), X, layers=["4", "[01]", "3"])

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.spare = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.body(x)

    with pytest.raises(AssertionError, match="head 'spare': must be used in the forward pass"):
        check_layer_map(Unused(), X, head=["spare"])


def test_several_heads_must_be_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 4)

        def forward(self, x):
            return self.first(self.body(x)), self.second(self.body(x))

    with pytest.raises(AssertionError, match=r"head: must be found or named; any of \['first', 'second'\] may be it"):
        check_layer_map(Two(), X)
    check_layer_map(Two(), X, head=["first", "second"])


def test_real_models():
    torchvision = pytest.importorskip("torchvision")
    check_layer_map(torchvision.models.resnet18(num_classes=3), torch.zeros(1, 3, 32, 32))
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=12, num_heads=1, img_size=32)
    check_layer_map(vit, torch.zeros(1, 3, 32, 32))


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    ids = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    small = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = transformers.BertConfig(intermediate_size=8, **small)
    check_layer_map(transformers.BertForSequenceClassification(bert), ids)
    check_layer_map(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)
        ),
        ids,
    )  # tied
    albert = transformers.AlbertConfig(embedding_size=4, intermediate_size=8, **small)
    check_layer_map(transformers.AlbertForSequenceClassification(albert), ids)  # shared layers


def test_its_example_runs():
    found = doctest.testmod(layer_map)
    assert found.attempted
    assert not found.failed
