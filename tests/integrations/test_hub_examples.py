"""The scripts of examples/trainers for Hugging Face's Trainer and PEFT, and the numbers on their page."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "trainers"
PAGES = [ROOT / "docs" / "trainers.md", *sorted((ROOT / "docs" / "trainers").glob("*.md"))]
PAGE = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)


@pytest.fixture
def script(monkeypatch):
    """Return a function that imports a script, and leaves no trace of it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize(("accumulate", "size"), [(1, 8), (2, 4)])
def test_in_a_trainer(script, accumulate, size):
    """The weights of the plain loop, but for the statistics of smaller batches: these are held."""
    pytest.importorskip("transformers")
    module, loop = script("huggingface_trainer"), script("plain_loop")
    if accumulate > 1:
        for one in (module, loop):
            one.network = nn_without_norms(one.network)
            one.source = nn_without_norms(one.source)
    found, expected = module.main(accumulate, size).model.state_dict(), loop.main().model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def nn_without_norms(build):
    """Return a function that builds the network with an identity in the place of its norm."""

    def make() -> nn.Module:
        model = build()
        model[1] = nn.Identity()
        return model

    return make


def test_a_lora_in_a_loop(script):
    """Against a loop with a copy of the base and the penalty on the dense change."""
    peft = pytest.importorskip("peft")
    module, problem = script("lora_loop"), script("problem")
    adaptation = module.main()
    model, base = module.adapter(), problem.source().eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    layers = [layer for layer in model.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    for _ in range(problem.EPOCHS):
        model.train()
        model.base_model.model[1].eval()  # the base is frozen, and so are its statistics
        for inputs, labels in problem.batches():
            outputs = model(inputs)
            p = (base(inputs).detach() / 2).log_softmax(1)
            divergence = 4 * (p.exp() * (p - (outputs / 2).log_softmax(1))).sum(1).mean()
            penalty = 0.1 / 2 * sum(layer.get_delta_weight("default").square().sum() for layer in layers)
            (F.cross_entropy(outputs, labels) + 0.2 * divergence + penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, one), other in zip(adaptation.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)


ROWS = dict(re.findall(r"^\| `(\w+For\w+)` \|(.*)\|$", PAGE, re.MULTILINE))


@pytest.mark.parametrize("name", ROWS)
def test_the_table_of_gradients_is_measured(name, tmp_path):
    """Task and penalty at two accumulated batches, relative to one batch of all examples."""
    transformers = pytest.importorskip("transformers")
    model, rows = build(transformers, name)
    start = {key: value.detach().clone() for key, value in model.named_parameters()}

    class WithPenalty(transformers.Trainer):
        strength = 0.0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return loss + self.strength * sum((p - start[n] + 1).square().sum() for n, p in model.named_parameters())

    def gradient(accumulate: int, strength: float) -> torch.Tensor:
        model.load_state_dict(start, strict=False)
        args = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate,
            max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0,
            train_sampling_strategy="sequential", use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
            logging_strategy="no",
        )  # fmt: skip
        trainer = WithPenalty(model=model, args=args, train_dataset=rows)
        trainer.strength = strength
        trainer.train()
        return torch.cat([(start[n] - p.detach()).flatten() for n, p in model.named_parameters()])

    task = [gradient(accumulate, 0.0) for accumulate in (1, 2)]
    both = [gradient(accumulate, 0.001) for accumulate in (1, 2)]
    factors = [float(task[1].norm() / task[0].norm()), float((both[1] - task[1]).norm() / (both[0] - task[0]).norm())]
    written = [float(cell) for cell in ROWS[name].split("|")[:2]]
    assert factors == pytest.approx(written, rel=1e-2)


def build(transformers, name):
    """Return a tiny model without dropout, and four examples."""
    torch.manual_seed(0)
    if name == "BertForSequenceClassification":
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config), [
            {"input_ids": [1, 2 + n, 3], "labels": n % 3} for n in range(4)
        ]
    if name == "ViTForImageClassification":
        config = transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
            num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    else:
        config = transformers.ConvNextConfig(hidden_sizes=[4], depths=[1], num_stages=1, patch_size=4, num_labels=3)
    images = torch.randn(4, 3, 8, 8)
    return getattr(transformers, name)(config), [{"pixel_values": images[n], "labels": n % 3} for n in range(4)]
