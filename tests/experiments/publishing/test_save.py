"""A model saved from Python comes back with its outputs, labels and declarations; its card cannot be broken."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import conservtl as ctl
from conservtl.experiments.publishing.licence import front_matter, licence_of
from conservtl.storage.tensor_files import read_header

METRICS = {
    "before": {"target": {"accuracy": 0.5}, "source": {"accuracy": 0.9}},
    "after": {"target": {"accuracy": 0.75}, "source": {"accuracy": 0.88}},
    "target": "a new microphone",
}


def network(outputs=2):
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, outputs))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


def trained(model, source, strategies, **options):
    adaptation = ctl.adapt(model, source, strategies, **options)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    x = torch.randn(6, 3) if not isinstance(model, Recurrent) else torch.randn(6, 5, 3)
    for _ in range(3):
        adaptation.model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return adaptation, x


@pytest.mark.parametrize("strategies", [[], [ctl.L2SP()], [ctl.LHUC()], [ctl.InputTransform()]])
def test_it_comes_back(tmp_path, strategies):
    adaptation, x = trained(network(), network(), strategies)
    folder = ctl.save(adaptation, tmp_path / "out", ["no", "yes"], preprocessing={"rate": 8000}, metadata={"by": "me"})
    adapted = ctl.load_adapted(folder, network)
    expected = adaptation.model.eval()(x)
    torch.testing.assert_close(adapted.outputs(x), expected)
    torch.testing.assert_close(adapted.probabilities(x).sum(-1), torch.ones(6))
    assert adapted.labels == ("no", "yes")
    assert adapted.preprocessing.model_dump() == {"rate": 8000}
    assert read_header(folder / "model.safetensors")["metadata"] == {"by": "me"}
    assert ctl.Plan.model_validate_json((folder / "plan.json").read_text()) == adaptation.plan
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_the_weights_load_without_conservtl(tmp_path):
    adaptation, x = trained(network(), network(), [ctl.LHUC()])
    ctl.save(adaptation, tmp_path / "out")
    plain = network()
    plain.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
    torch.testing.assert_close(plain(x), adaptation.model.eval()(x))


def test_what_cannot_be_merged_is_named_and_put_back(tmp_path):
    adaptation, x = trained(Recurrent(), Recurrent(), [ctl.LHUC()], example=torch.zeros(2, 5, 3))
    folder = ctl.save(adaptation, tmp_path / "out")
    expected = adaptation.model.eval()(x)
    torch.testing.assert_close(ctl.load_adapted(folder, Recurrent()).outputs(x), expected)
    assert [one["kind"] for one in read_header(folder / "model.safetensors")["extended"]["strategies"]] == ["lhuc"]
    again = ctl.adapt(Recurrent(), folder, [ctl.L2SP()], example=torch.zeros(2, 5, 3))
    torch.testing.assert_close(again.model.eval()(x), expected)
    assert "import conservtl" in (folder / "README.md").read_text()


def test_as_a_source_of_another_adaptation(tmp_path):
    adaptation, _ = trained(network(), network(), [ctl.L2SP()])
    folder = ctl.save(adaptation, tmp_path / "out", ["no", "yes"])
    again = ctl.adapt(network(), folder)
    state = adaptation.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())
    assert "labels no, yes" in str(again.plan)
    three = ctl.adapt(network(3), folder, labels=(["no", "yes", "stop"], ["no", "yes"]))
    assert torch.equal(three.model[2].weight[:2], adaptation.model[2].weight)


def test_tied_weights_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    adaptation = ctl.adapt(Tied(), Tied())
    loaded = ctl.load_adapted(ctl.save(adaptation, tmp_path / "out"), Tied).model
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.head.weight, adaptation.model.head.weight)


def test_a_merged_adapter_loads_into_the_base_model(tmp_path):
    peft = pytest.importorskip("peft")
    from conservtl.integrations.peft import adapt

    base = network()
    start = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    adaptation = adapt(model, [ctl.L2SP()])
    x = torch.randn(4, 3)
    loaded = ctl.load_adapted(ctl.save(adaptation, tmp_path / "out"), network).model
    torch.testing.assert_close(loaded(x), model.eval()(x))
    assert loaded.state_dict().keys() == start.keys()


def test_what_load_adapted_needs(tmp_path):
    adaptation = ctl.adapt(network(), network())
    folder = ctl.save(adaptation, tmp_path / "out")
    with pytest.raises(ctl.SpecError, match=r"saved from Python, of a torch.*Sequential.*received no model. Pass a"):
        ctl.load_adapted(folder)
    with pytest.raises(ctl.SourceError, match="does not fit the model"):
        ctl.load_adapted(folder, network(3))
    with pytest.raises(ctl.SpecError, match="call outputs"):
        ctl.load_adapted(folder, network).predict(folder / "README.md")
    with pytest.raises(ctl.SpecError, match=r"files must be paths, or one path; received Tensor.*call\s+outputs"):
        ctl.load_adapted(folder, network).predict(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"base_model": "bad name"}, "base_model must be a repository on the Hub, ORG/NAME; received 'bad name'"),
        ({"base_model": "a/b/c"}, "received 'a/b/c'"),
    ],
)
def test_a_card_names_a_base_model_as_the_hub_does(stated, message, tmp_path):
    with pytest.raises(ctl.SpecError, match=message):
        ctl.save(ctl.adapt(network(), network()), tmp_path / "out", **stated)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "yes"}, "must be a list of texts"),
        ({"labels": ["a", "a"]}, "'a' twice"),
        ({"labels": ["a", "b", "c"]}, "'2.weight' has 2, and there are 3"),
        ({"metrics": {"accuracy": 1}}, "metrics must have the form"),
        ({"metrics": {"after": {"goal": {"f1": 1}}}}, "'goal'"),
        ({"metrics": {"after": {"target": {"f1": float("nan")}}}}, "after.target.f1 must be a finite number"),
        ({"metadata": {"model": nn.ReLU()}}, "metadata must be a mapping that JSON can hold"),
        ({"preprocessing": {"x": float("inf")}}, "preprocessing must be"),
    ],
)
def test_refusals(tmp_path, arguments, message):
    with pytest.raises(ctl.SpecError, match=message):
        ctl.save(ctl.adapt(network(), network()), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path):
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ctl.SpecError, match="'_extra_state' of the model's state is a dict"):
        ctl.save(ctl.adapt(Stateful(2, 2), nn.Linear(2, 2)), tmp_path / "out")


def test_nothing_is_overwritten_unasked_or_lost(tmp_path, monkeypatch):
    adaptation = ctl.adapt(network(), network())
    folder = ctl.save(adaptation, tmp_path / "out")
    before = (folder / "README.md").read_text()
    with pytest.raises(ctl.SpecError, match="empty or new"):
        ctl.save(adaptation, folder)
    monkeypatch.setattr("conservtl.experiments.publishing.save.save_measured", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ctl.save(adaptation, folder, metrics=METRICS, overwrite=True)
    assert (folder / "README.md").read_text() == before
    monkeypatch.undo()
    ctl.save(adaptation, folder, metrics=METRICS, overwrite=True)
    assert (folder / "report.json").is_file()
    (folder / "notes.txt").write_text("")
    with pytest.raises(ctl.SpecError, match=r"holds notes\.txt too"):
        ctl.save(adaptation, folder, overwrite=True)


def test_the_card_tells_what_was_gained_and_kept(tmp_path):
    adaptation, _ = trained(network(), network(), [ctl.L2SP()])
    ctl.save(adaptation, tmp_path / "out", ["no", "yes"], metrics=METRICS, base_model="org/net", licence="mit")
    text = (tmp_path / "out/README.md").read_text()
    assert "| target | accuracy | 50.0 % | 75.0 % |" in text
    assert "| source (retained) | accuracy | 90.0 % | 88.0 % |" in text
    data = front_matter(tmp_path / "out/README.md")
    assert (data["license"], data["base_model"]) == ("mit", "org/net")
    target, source = data["model-index"][0]["results"]
    assert target["dataset"] == {"name": "a new microphone", "type": "target"}
    assert source["metrics"] == [{"type": "accuracy", "name": "accuracy", "value": 0.88}]
    layer, value = max(adaptation.drift().items(), key=lambda item: item[1])
    assert f"| `{layer}` | {value:.4g} |" in text


HOSTILE = ["---\nlicense: mit\n---", "[x](http://e.org)", "<script>alert(1)</script>", "```\n# big", "a|b", "![](y)"]


def test_hostile_labels_and_names_do_not_break_the_card(tmp_path):
    adaptation = ctl.adapt(network(len(HOSTILE)), network(len(HOSTILE)))
    hostile = METRICS | {"target": "x: y\n---\n# Title <b> [z](u)"}
    ctl.save(adaptation, tmp_path / "out", HOSTILE, metrics=hostile)
    text = (tmp_path / "out/README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "unknown"
    assert "<script" not in body
    assert "<b>" not in body
    assert "](" not in body
    assert "\n---" not in body
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        "# Sequential adapted to x\\: y \\-\\-\\- \\# Title &lt;b\\> \\[z\\]\\(u\\)",
        "## Results",
        "## What was done",
        "## Load it",
        "## Labels",
        "## Licence of the source",
    ]


def test_the_hub_accepts_the_card(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    adaptation = ctl.adapt(network(), network(), [ctl.L2SP()])
    for target in ("a room", HOSTILE[0]):
        folder = ctl.save(adaptation, tmp_path / "out", metrics=METRICS | {"target": target}, overwrite=True)
        card = hub.ModelCard.load(folder / "README.md")
        assert card.data.library_name == "conservtl"
        found = {(one.dataset_type, one.metric_type): one.metric_value for one in card.data.eval_results}
        assert found == {("target", "accuracy"): 0.75, ("source", "accuracy"): 0.88}


def test_a_transformers_model_loads_without_conservtl(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=11, **sizes)
    model, source = (transformers.BertForSequenceClassification(config) for _ in range(2))
    adaptation = ctl.adapt(model, source)
    folder = ctl.save(adaptation, tmp_path / "out")
    again = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    labelled = ctl.save(ctl.adapt(model, source), tmp_path / "labelled", ["no", "yes"])
    assert transformers.AutoConfig.from_pretrained(labelled).id2label == {0: "no", 1: "yes"}
    x = torch.arange(6)[None]
    torch.testing.assert_close(again(x).logits, model.eval()(x).logits)
    assert front_matter(folder / "README.md")["library_name"] == "transformers"


def test_licences_as_found(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    assert licence_of(tmp_path) == licence_of(tmp_path / "model.safetensors") == "cc-by-4.0"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence_of(tmp_path) == licence_of("hf:ORG") == "unknown"
    if pytest.importorskip("timm"):
        assert licence_of("timm:resnet18.a1_in1k") == "apache-2.0"


def test_a_licence_that_is_an_address(tmp_path):
    folder = ctl.save(ctl.adapt(network(), network()), tmp_path / "out", licence="https://e.org/LICENSE")
    data = front_matter(folder / "README.md")
    assert (data["license"], data["license_name"]) == ("other", "https://e.org/LICENSE")
    assert json.loads((folder / "plan.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.empty(2, device="meta"), "a tensor without values"),
        (torch.eye(2).to_sparse(), r"a tensor of torch\.float32, torch\.sparse_coo"),
    ],
)
def test_a_buffer_that_no_file_holds_is_refused_by_name(tmp_path, value, what):
    adaptation = ctl.adapt(network(), network())
    adaptation.model.register_buffer("odd", value)
    with pytest.raises(ctl.SpecError, match=rf"'odd' of the model's state is {what}"):
        ctl.save(adaptation, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [torch.ones(2), np.ones(2), "0.9", True, float("nan"), torch.tensor(float("inf"))])
def test_a_metric_that_is_no_number_is_refused(tmp_path, value):
    with pytest.raises(ctl.SpecError, match=r"metrics: after\.target\.accuracy must be a finite number; received"):
        ctl.save(ctl.adapt(network(), network()), tmp_path / "out", metrics={"after": {"target": {"accuracy": value}}})


def test_metrics_as_tensors_and_sets_without_any(tmp_path):
    metrics = {"after": {"target": {"accuracy": torch.tensor(0.75), "errors": np.int64(3)}, "source": None}}
    folder = ctl.save(ctl.adapt(network(), network()), tmp_path / "out", metrics=metrics)
    assert json.loads((folder / "report.json").read_text())["after"] == {"target": {"accuracy": 0.75, "errors": 3}}


def test_another_object_is_refused(tmp_path):
    with pytest.raises(ctl.SpecError, match="save needs an adaptation, as adapt returns it; received Sequential"):
        ctl.save(network(), tmp_path / "out")
