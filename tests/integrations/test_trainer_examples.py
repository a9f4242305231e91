"""Every script of examples/trainers runs; those without a schedule end with the weights of the plain loop."""

from __future__ import annotations

import copy
import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import conservtl as ctl
from conservtl.compat import accelerate_states

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "trainers"
PAGES = [ROOT / "docs" / "trainers.md", *sorted((ROOT / "docs" / "trainers").glob("*.md"))]
PAGE = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


@pytest.fixture
def script(monkeypatch):
    """Return a function that imports a script, and leaves no trace of it or of Accelerate's state."""
    monkeypatch.syspath_prepend(EXAMPLES)
    shared = accelerate_states(process=True)
    states = [dict(state) for state in shared]
    yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)
    for state, before in zip(shared, states, strict=True):
        state.clear()
        state.update(before)


@pytest.fixture
def plain(script):
    """The weights at the end of the plain loop."""
    return copy.deepcopy(script("plain_loop").main().model.state_dict())


def close(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def by_hand(problem, after_epoch=lambda _: None, after_step=lambda _: None, accumulate=1):
    """The problem in a loop of torch alone, with the penalty in the loss; returns the model and its rates."""
    model, start = problem.network(), problem.source().state_dict()
    model.load_state_dict(start)
    layers = {"0": 0.8**2, "1": 0.8**2, "3": 0.8, "5": 1.0}  # a norm has the rate of its layer
    groups = [
        {"params": list(model.get_submodule(name).parameters()), "lr": 0.1 * ratio, "ratio": ratio}
        for name, ratio in layers.items()
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for epoch in range(problem.EPOCHS):
        model.train()
        for number, (inputs, labels) in enumerate(problem.batches(), 1):
            (F.cross_entropy(model(inputs), labels) / accumulate).backward()
            if number % accumulate:
                continue
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.grad.add_(parameter.detach() - start[name], alpha=0.1)
            yield model
            optimizer.step()
            optimizer.zero_grad()
            after_step(model)
        rate = after_epoch(epoch) or 0.1
        for group in optimizer.param_groups:
            group["lr"] = group["ratio"] * rate
    return model


def finished(loop, before_step=lambda _: None):
    """Run a loop by hand to its end and return the model."""
    try:
        while True:
            before_step(next(loop))
    except StopIteration as end:
        return end.value


def test_the_plain_loop_is_the_loop_by_hand(script, plain):
    clip = torch.nn.utils.clip_grad_norm_
    close(finished(by_hand(script("problem")), lambda model: clip(model.parameters(), 0.5)), plain)


def test_in_lightning(script, plain):
    pytest.importorskip("lightning.pytorch")
    close(script("lightning_trainer").main().model, plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_lightning_from_the_command_line(script, plain, monkeypatch):
    """With AdamW in the place of SGD, its default weight decay contradicts no pull."""
    pytest.importorskip("jsonargparse")
    cli = pytest.importorskip("lightning.pytorch.cli")
    module = script("lightning_cli")
    words = ["lightning_cli.py", "fit", "--config", str(EXAMPLES / "lightning_cli.yaml")]
    monkeypatch.setattr(sys, "argv", words)
    close(cli.LightningCLI(module.Classifier, save_config_callback=None).model.model, plain)
    choice = "{class_path: torch.optim.AdamW, init_args: {lr: 0.01}}"
    monkeypatch.setattr(sys, "argv", [*words, "--trainer.callbacks.init_args.optimizer", choice])
    (optimizer,) = cli.LightningCLI(module.Classifier, save_config_callback=None).trainer.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_in_fabric(script, plain, tmp_path):
    fabric = pytest.importorskip("lightning.fabric")
    module = script("fabric_loop")
    adaptation = module.main(tmp_path)
    close(adaptation.model, plain)
    again = ctl.adapt(module.network(), module.source(), module.STRATEGIES)
    fabric.Fabric(accelerator="cpu", devices=1).load(
        tmp_path / "last.ckpt", {"model": again.model, "adaptation": again}, strict=False
    )
    assert again.drift() == adaptation.drift()


def test_in_accelerate(script, plain, tmp_path):
    module = script("accelerate_loop")
    adaptation = module.main(tmp_path)
    close(adaptation.model, plain)
    state = torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)
    again = ctl.adapt(module.network(), module.source(), module.STRATEGIES)
    again.load_state_dict(state)
    assert all(torch.equal(tensor, again.start[name]) for name, tensor in adaptation.start.items())


def test_in_accelerate_with_accumulation(script):
    found = script("accelerate_loop").main(accumulate=2).model
    clip = torch.nn.utils.clip_grad_norm_
    loop = by_hand(script("problem"), accumulate=2)
    close(found, finished(loop, lambda model: clip(model.parameters(), 0.5)).state_dict())


def test_timms_schedule_and_average(script):
    pytest.importorskip("timm")
    adaptation, average = script("timm_loop").main()
    mean = {}

    def lerp(model):
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                mean[name] = mean[name].lerp(tensor, 0.1)

    problem = script("problem")
    mean |= copy.deepcopy(problem.source().state_dict())
    cosine = lambda epoch: 0.01 + 0.09 * 0.5 * (1 + math.cos(math.pi * (epoch + 1) / 4))  # noqa: E731
    close(adaptation.model, finished(by_hand(problem, cosine, lerp)).state_dict())
    found = average.module.state_dict()
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, msg=name)


def test_timms_average_holds_plain_weights(script, monkeypatch):
    """Its copies of hooks mix nothing, and it is updated with the weights after the step."""
    pytest.importorskip("timm")
    module = script("timm_loop")
    monkeypatch.setattr(module, "STRATEGIES", (ctl.Mixout(p=0.5),))
    _, average = module.main()
    before = copy.deepcopy(average.module.state_dict())
    average.module.train()(torch.randn(8, 2))
    assert torch.equal(average.module.state_dict()["0.weight"], before["0.weight"])


def test_averaged_weights(script, monkeypatch):
    """The mean of the last two epochs at rates that SWALR anneals to, and held statistics that update_bn leaves."""
    module = script("averaged_weights")
    adaptation, average = module.main()
    shares = [0.5, 1.0, 1.0, 1.0]  # of the way from 0.1 to 0.05: half a cosine over two epochs
    ends = []

    def note(model):
        ends.append(copy.deepcopy(dict(model.named_parameters())))

    model = finished(by_hand(script("problem"), lambda epoch: 0.1 - 0.05 * shares[epoch], note))
    close(adaptation.model, model.state_dict())
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter, (ends[11][name] + ends[15][name]) / 2, msg=name)
    monkeypatch.setattr(module, "STRATEGIES", (ctl.LayerTransfer(layers=["0"]),))
    adaptation, average = module.main()
    for norm in (adaptation.model[1], average.module[1]):
        assert torch.equal(norm.running_mean, adaptation.start["1.running_mean"])


def test_in_one_process_and_in_two(script, plain, tmp_path):
    """The plain loop with held statistics, shuffled by the seed; two processes are started by the slow test."""
    module = script("many_processes")
    adaptation = module.main()
    assert torch.equal(adaptation.model[1].running_mean, adaptation.start["1.running_mean"])
    assert adaptation.drift()["5"] > 0
    again = module.main()
    close(again.model, adaptation.model.state_dict())


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(script, tmp_path):
    expected = script("many_processes").main().model.state_dict()
    code = "import sys, torch, many_processes as m; torch.save(m.main().model.state_dict(), sys.argv[1])"
    (tmp_path / "save.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "save.py"]
    environment = os.environ | {"PYTHONPATH": f"{EXAMPLES}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "w.pt"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("target ") == 1  # the first process alone talks
    found = torch.load(tmp_path / "w.pt")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_every_trainer_has_a_page_that_the_overview_and_the_site_link_to():
    names = {path.stem for path in PAGES[1:]}
    assert names == {
        "accelerate", "lightning", "many-processes", "peft", "plain-loops", "swa", "timm", "transformers",
    }  # fmt: skip
    site = (ROOT / "mkdocs.yml").read_text()
    assert all(f"(trainers/{name}.md)" in PAGES[0].read_text() and f"trainers/{name}.md" in site for name in names)
    assert all("```" in path.read_text() for path in PAGES[1:])


def test_the_page_names_every_script():
    assert [path.name for path in EXAMPLES.iterdir() if path.is_file() and path.name not in PAGE] == []


def test_lines_that_a_diff_adds_are_lines_of_a_script():
    lines = {line.strip() for path in EXAMPLES.glob("*.py") for line in path.read_text().splitlines()}
    diffs = re.findall(r"^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    added = [line[1:].strip() for diff in diffs for line in diff.splitlines() if line.startswith("+")]
    assert len(added) > 10
    assert [line for line in added if line not in lines] == []


def test_the_code_of_fit_runs():
    code = re.findall(r"^```python\n(.*?)^```", PAGES[0].read_text(), re.MULTILINE | re.DOTALL)[-1]
    assert "ctl.fit(" in code
    exec(compile(code, "docs/trainers.md", "exec"), {})
