"""Adapters of PEFT: penalties, drift and interpolation on merged weights, and a source without a copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl

peft = pytest.importorskip("peft")

from conservtl.integrations.peft import MergedL2SP, adapt  # noqa: E402


class Net(nn.Module):
    """An embedding, a convolution over positions and two linear maps, on tokens (N, positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.convolution = nn.Conv1d(6, 6, 3, padding=1)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.convolution(self.embedding(tokens).transpose(1, 2)).mean(2)
        return self.head(self.body(x))


TARGETS = ["embedding", "convolution", "body.0"]


def network(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def wrapped(model: nn.Module | None = None, *, moved: bool = False, **fields: Any) -> Any:
    """Return a network with a LoRA; moved: with factors that are not zero."""
    options = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS} | fields
    found = peft.get_peft_model(model or network(), peft.LoraConfig(**options))
    if moved:
        move(found)
    return found


def move(model: nn.Module, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))


def dense_changes(model: Any) -> dict[str, torch.Tensor]:
    """Return name of a LoRA module -> the change of its weight, as PEFT merges it."""
    return {
        name: module.get_delta_weight(module.active_adapters[0])
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


TOKENS = torch.randint(7, (5, 4), generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 1, 2, 0, 1])


class TestMergedL2SP:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"use_rslora": True},
            {"r": 3, "alpha_pattern": {"convolution": 8}, "rank_pattern": {"body.0": 1}},
            {"target_modules": ["convolution"]},
            {"target_modules": ["embedding"]},
        ],
        ids=["alpha over r", "rsLoRA", "patterns", "convolution", "embedding"],
    )
    def test_value_and_gradient_are_those_of_the_dense_change(self, fields):
        model = wrapped(**fields)
        adaptation = adapt(model, [ctl.L2SP(alpha=0.3)])
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=1.0)
        move(model)
        dense = sum(0.3 / 2 * change.square().sum() for change in dense_changes(model).values())
        torch.testing.assert_close(adaptation.penalty(), dense)
        names = list(adaptation.plan.trained)
        parameters = [model.get_parameter(name) for name in names]
        expected = torch.autograd.grad(dense, parameters)
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        for start, parameter, gradient in zip(before, parameters, expected, strict=True):
            torch.testing.assert_close(start - parameter.detach(), gradient, rtol=1e-4, atol=1e-6)

    def test_training_equals_training_with_the_dense_penalty(self):
        ours, theirs = wrapped(), wrapped()
        adaptation = adapt(ours, [ctl.L2SP(alpha=0.4, beta=0.0)])
        optimizer = adaptation.optimizer(torch.optim.AdamW, lr=1e-2)
        plain = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for _ in range(5):
            F.cross_entropy(ours(TOKENS), LABELS).backward()
            optimizer.step()
            optimizer.zero_grad()
            penalty = sum(0.4 / 2 * change.square().sum() for change in dense_changes(theirs).values())
            (F.cross_entropy(theirs(TOKENS), LABELS) + penalty).backward()
            plain.step()
            plain.zero_grad()
        for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")

    def test_depth_and_the_number_of_elements(self):
        model = wrapped(target_modules=["convolution", "body.0"])
        adaptation = adapt(model, [ctl.L2SP(alpha=100.0, depth=(1.0, 0.5), normalize="per_parameter")])
        move(model)
        size = 6 * 6 * 3 + 6 * 8
        rows = adaptation.plan
        expected = 0.0
        for name, change in dense_changes(model).items():
            depth = rows[f"{name}.lora_B.default.weight"].depth
            expected += 100.0 * (1 - 0.5 * depth) / size / 2 * float(change.detach().square().sum())
        assert float(adaptation.penalty().detach()) == pytest.approx(expected, rel=1e-5)

    def test_beta_acts_on_a_new_head_alone(self):
        model = wrapped(modules_to_save=["head"], moved=True)
        adaptation = adapt(model, [ctl.L2SP(alpha=0.0, beta=0.2)])
        head = model.base_model.model.head.modules_to_save["default"].weight
        torch.testing.assert_close(adaptation.penalty(), 0.2 / 2 * head.square().sum())

    def test_phases(self):
        """A pair that a phase freezes is not pulled in it."""
        model = wrapped(target_modules=["convolution", "body.0"])
        adaptation = adapt(model, [ctl.L2SP(alpha=1.0, beta=0.0), ctl.GradualUnfreezing(by="layer")])
        move(model)
        changes = dense_changes(model)
        assert adaptation.frozen >= {"base_model.model.convolution.lora_B.default.weight"}
        torch.testing.assert_close(adaptation.penalty(), changes["base_model.model.body.0"].square().sum() / 2)
        adaptation.start_phase(len(adaptation.plan.phases) - 1)
        expected = sum(change.square().sum() for change in changes.values()) / 2
        torch.testing.assert_close(adaptation.penalty(), expected)

    def test_plans_are_read_back(self):
        adaptation = adapt(wrapped(), [ctl.L2SP(alpha=0.1)])
        assert ctl.Plan.model_validate_json(adaptation.plan.model_dump_json()) == adaptation.plan

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (lambda: peft.LoraConfig(r=2, target_modules=TARGETS[2:], use_dora=True), "that of DoraLinearVariant"),
            (
                lambda: peft.LoraConfig(r=2, target_modules=TARGETS[2:], init_lora_weights="pissa"),
                "='pissa' moves a part",
            ),
            (
                lambda: peft.IA3Config(target_modules=["body.0"], feedforward_modules=[]),
                "only LoRA changes a weight by B A",
            ),
            (
                lambda: peft.LoraConfig(r=2, target_modules=["body.0"], trainable_token_indices={"embedding": [1]}),
                "only LoRA|otherwise than by B A",
            ),
        ],
        ids=["DoRA", "PiSSA", "IA3", "tokens"],
    )
    def test_other_adapters_are_refused(self, config, message):
        model = peft.get_peft_model(network(), config())
        with pytest.raises(ctl.SpecError, match=message):
            adapt(model, [ctl.L2SP()])

    def test_a_convolution_in_groups_is_refused(self):
        model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 2))
        with pytest.warns(UserWarning, match="groups > 1"):
            model = wrapped(model, target_modules=["0"])
        with pytest.raises(ctl.SpecError, match="a convolution in groups"):
            adapt(model, [ctl.L2SP()])

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it
    def test_prompts_are_refused(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
        )
        prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), prompts)
        with pytest.raises(ctl.SpecError, match=r"\(PromptTuningConfig\) changes no weight by B A"):
            adapt(model, [ctl.L2SP()])

    def test_two_active_adapters_are_refused(self):
        model = wrapped()
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=TARGETS))
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(ctl.SpecError, match="has 2 active adapters"):
            adapt(model, [ctl.L2SP()])


class TestTheBase:
    def test_it_is_frozen_as_found_and_stays(self):
        model = wrapped()
        before = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
        adaptation = adapt(model, [ctl.L2SP(), ctl.OutputConservation(weight=0.5)])
        assert all("lora_" in name for name in adaptation.plan.trained)
        train(adaptation)
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    def test_nothing_is_kept_twice(self):
        """Neither anchors nor a source model: of the base there is one copy, the model's own."""
        model = wrapped()
        adaptation = adapt(model, [ctl.L2SP(), ctl.OutputConservation(weight=0.5)])
        assert not adaptation.bound.anchors.parameters
        assert adaptation.origin.source_model.model is model


def train(adaptation: ctl.Adaptation, steps: int = 3) -> None:
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.5)
    for _ in range(steps):
        outputs = adaptation.model(TOKENS)
        adaptation.loss(F.cross_entropy(outputs, LABELS), outputs, TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("config", ["lora", "dora", "ia3", "lokr"])
def test_terms_compare_with_the_model_without_its_adapter(config):
    """Of any adapter, DoRA and IA3 too: against a loop with a copy of the base."""
    configs = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=TARGETS),
        "dora": lambda: peft.LoraConfig(r=2, target_modules=TARGETS[1:], use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=["body.0", "head"], feedforward_modules=[]),
        "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["body.0"]),
    }
    torch.manual_seed(3)
    ours = peft.get_peft_model(network(), configs[config]())
    theirs, base = copy.deepcopy(ours), network()
    adaptation = adapt(ours, [ctl.OutputConservation(weight=0.8, temperature=1.0)])
    train(adaptation)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        outputs = theirs(TOKENS)
        p, q = base(TOKENS).detach().log_softmax(1), outputs.log_softmax(1)
        (F.cross_entropy(outputs, LABELS) + 0.8 * (p.exp() * (p - q)).sum(1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert one.requires_grad == other.requires_grad


def test_features_are_compared_without_the_adapter():
    ours = wrapped(moved=True)
    layer = "base_model.model.body"
    adaptation = adapt(ours, [ctl.FeatureConservation(alpha=0.6, layers=(layer,))])
    outputs = ours(TOKENS)
    found = adaptation.loss(outputs.sum(), outputs, TOKENS) - outputs.sum()
    base = network()

    def features(net: Any) -> torch.Tensor:
        return net.body(net.convolution(net.embedding(TOKENS).transpose(1, 2)).mean(2))

    difference = features(ours.base_model.model) - features(base)
    torch.testing.assert_close(found, 0.6 / 2 * difference.square().sum(1).mean(), rtol=1e-4, atol=1e-6)
    assert ours.training  # the source's pass in eval mode is over


def test_a_phase_s_frozen_factors_stay_frozen_after_the_source_has_run():
    """PEFT unfreezes every factor when it turns an adapter on."""
    model = wrapped(target_modules=["convolution", "body.0"])
    adaptation = adapt(model, [ctl.GradualUnfreezing(by="layer"), ctl.OutputConservation(weight=0.5)])
    train(adaptation)
    frozen = model.base_model.model.convolution.lora_B["default"].weight
    assert not frozen.requires_grad
    assert not frozen.any()


def test_a_copy_compares_with_its_own_model():
    adaptation = adapt(wrapped(moved=True), [ctl.OutputConservation(weight=0.5)])
    copied = copy.deepcopy(adaptation)
    source = copied.bound.terms.source_model
    assert source.model is copied.model
    train(copied)
    assert not any(torch.equal(a, b) for a, b in zip(_factors(adaptation), _factors(copied), strict=True))


def _factors(adaptation: ctl.Adaptation) -> list[torch.Tensor]:
    return [parameter for name, parameter in adaptation.model.named_parameters() if "lora_B" in name]


class TestMergedWeights:
    @pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
    def test_interpolation_is_one_scale_a_layer(self, t):
        model, base = wrapped(), network()
        adaptation = adapt(model, [ctl.WeightInterpolation(t=t)])
        move(model)
        changes = dense_changes(model)
        adaptation.finish()
        merged = copy.deepcopy(model).merge_and_unload()
        for name, start in base.named_parameters():
            change = changes.get(f"base_model.model.{name.removesuffix('.weight')}") if "weight" in name else None
            expected = start if change is None else start + t * change
            torch.testing.assert_close(merged.get_parameter(name), expected, rtol=1e-5, atol=1e-6)

    def test_a_bias_of_the_adapter_is_a_part_of_the_changed_layer(self):
        """It takes the source's rate, not that of fresh parameters, and is no phase's new parameter."""
        plan = adapt(
            wrapped(target_modules=["body.0"], lora_bias=True), [ctl.DiscriminativeLR(source=0.1, fresh=1.0)]
        ).plan
        module = "base_model.model.body.0"
        assert plan.factors[f"{module}.lora_B.default.bias"] == f"{module}.base_layer.weight"
        assert {plan[name].lr for name in plan.trained} == {0.1}
        assert plan.fresh == ()

    @pytest.mark.parametrize(
        ("strategy", "layers"),
        [
            (ctl.SurgicalFineTuning(block="*.body"), ["body"]),
            (ctl.LayerTransfer(layers=["*.body"], freeze=False), ["embedding", "convolution", "body"]),
            (ctl.GradualUnfreezing(phases=[{"train": ["*.body"]}]), ["body"]),
        ],
    )
    def test_a_layer_that_is_named_is_trained_by_its_factors_alone(self, strategy, layers):
        plan = adapt(wrapped(), [strategy]).plan
        assert {name for name in plan.trained if "lora_" not in name} == set()
        trained = [name.rpartition(".")[2] for name in dict.fromkeys(plan[one].layer for one in plan.trained)]
        assert trained == layers

    def test_a_layer_without_factors_is_refused(self):
        said = r"^SurgicalFineTuning freezes all factors .* \(on of LoRA, target_modules of PEFT\)\.$"
        with pytest.raises(ctl.SpecError, match=said):
            adapt(wrapped(), [ctl.SurgicalFineTuning(block="*.head")])

    def test_a_bias_of_the_adapter_goes_back_too(self):
        model = wrapped(target_modules=["body.0"], lora_bias=True)
        adaptation = adapt(model, [ctl.WeightInterpolation(t=0.0), ctl.L2SP()])
        move(model)
        layer = model.base_model.model.body[0]
        bias = layer.scaling["default"] * layer.lora_B["default"].bias.detach()
        square = layer.get_delta_weight("default").detach().square().sum() + bias.square().sum()
        size = sum(parameter.detach().square().sum() for parameter in network().body[0].parameters())
        assert adaptation.drift()["base_model.model.body"] == pytest.approx(float((square / size).sqrt()), rel=1e-5)
        adaptation.finish()
        torch.testing.assert_close(model(TOKENS), network()(TOKENS))
        with pytest.raises(ctl.SpecError, match=r"lora_B\.default\.bias' of the adapter changes the model otherwise"):
            adapt(wrapped(target_modules=["body.0"], lora_bias=True), [ctl.L2SP(on="all")])

    def test_the_best_point_by_a_score(self):
        model = wrapped()
        adaptation = adapt(model, [ctl.WeightInterpolation(t=None, points=5)])
        move(model)
        before = {name: value.detach().clone() for name, value in dense_changes(model).items()}
        name = next(iter(before))
        size = float(before[name].norm())
        score = lambda: -abs(float(dense_changes(model)[name].detach().norm()) / size - 0.5)  # noqa: E731
        assert adaptation.finish(score=score)["weight_interpolation"]["t"] == 0.5

    def test_drift(self):
        model, base = wrapped(), network()
        adaptation = adapt(model)
        move(model)
        changes = dense_changes(model)
        found = adaptation.drift()
        module = base.body[0]
        size = (module.weight.square().sum() + module.bias.square().sum()).sqrt()
        expected = float((changes["base_model.model.body.0"].norm() / size).detach())
        assert found["base_model.model.body"] == pytest.approx(expected, rel=1e-5)
        assert found["base_model.model.head"] == 0.0

    def test_of_another_adapter_work_after_training_is_refused(self):
        model = peft.get_peft_model(network(), peft.IA3Config(target_modules=["body.0"], feedforward_modules=[]))
        with pytest.raises(ctl.SpecError, match="only LoRA changes a weight by B A"):
            adapt(model, [ctl.WeightInterpolation(t=0.5)])


def test_fit():
    """With rates, a term, the pull on the merged weights and the way back, as on any model."""
    strategies = [ctl.L2SP(), ctl.OutputConservation(weight=0.5), ctl.WeightInterpolation(t=0.5)]
    adaptation = adapt(wrapped(moved=True), [*strategies, ctl.DiscriminativeLR(decay=0.5)])
    result = ctl.fit(adaptation, (TOKENS, LABELS), {"target": (TOKENS, LABELS)}, ctl.Training(epochs=2))
    assert result.after["weight_interpolation"] == {"t": 0.5}


def test_the_plan_of_a_plain_adapt_names_this_one():
    model = wrapped()
    source = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    assert "conservtl.integrations.peft.adapt" in str(ctl.adapt(model, source, [ctl.L2SP()]).plan)
    assert "conservtl.integrations.peft.adapt" not in str(adapt(wrapped(), [ctl.L2SP()]).plan)


class TestRefusals:
    def test_torch_s_attention(self):
        attention = nn.Sequential(nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2))
        with pytest.raises(ctl.SpecError, match="makes its weights anew whenever they are listed"):
            adapt(wrapped(attention, target_modules=["0"]), [])

    def test_no_adapter(self):
        with pytest.raises(ctl.SpecError, match="model must have an adapter"):
            adapt(network(), [])

    @pytest.mark.parametrize("name", ["lora_variant", "scaling", "lora_embedding_A"])
    def test_a_version_of_peft_with_other_names(self, name):
        model = wrapped()
        vars(model.base_model.model.body[0]).pop(name, None)
        model.base_model.model.body[0]._modules.pop(name, None)
        with pytest.raises(
            ctl.MissingExtraError, match=rf"peft {peft.__version__} has no Linear\.{name}, which .*names"
        ):
            adapt(model, [ctl.L2SP(alpha=0.1)])

    def test_a_class_that_has_moved(self):
        from conservtl.integrations.peft import names

        with pytest.raises(ctl.MissingExtraError, match=r"has no peft\.tuners\.lora\.Lora, which conservtl reads"):
            names._class("tuners.lora.Lora")

    def test_wrapped_after_adapt(self):
        model = network()
        adaptation = ctl.adapt(model, network(1), [ctl.L2SP()])
        wrapped(model)
        with pytest.raises(ctl.SpecError, match=r"'embedding\.weight' is gone and .* is new.* Call adapt again"):
            adaptation.optimizer(torch.optim.SGD, lr=0.1)

    @pytest.mark.parametrize("strategy", [ctl.L1SP(), ctl.Mixout(), ctl.SelectiveDecay(), ctl.FisherSP()])
    def test_strategies_on_frozen_weights(self, strategy):
        with pytest.raises(ctl.SpecError, match=f"{type(strategy).__name__}.* under an adapter they are frozen"):
            adapt(wrapped(), [strategy])

    def test_a_trained_bias_of_the_base_beside_a_comparison(self):
        with pytest.raises(ctl.SpecError, match=r"'.*bias' outside the adapter is trained too\. .*bias='none'"):
            adapt(wrapped(bias="all"), [ctl.OutputConservation(weight=1.0)])

    def test_outputs_of_a_new_head(self):
        with pytest.raises(ctl.SpecError, match="the head is trained as a module of its own"):
            adapt(wrapped(modules_to_save=["head"]), [ctl.OutputConservation(weight=1.0)])

    def test_without_factors_it_does_nothing(self):
        adaptation = ctl.adapt(network(), network(1), [MergedL2SP(alpha=1.0)])
        assert adaptation.plan.penalties == ()


class TestFactorsCountAsTheirWeights:
    def rates(self, strategy, **fields):
        plan = adapt(wrapped(**fields), [strategy]).plan
        return {name.removeprefix("base_model.model."): plan[name].rate(0.1) for name in plan.trained}

    def test_rates_are_those_of_the_layer_and_of_the_source(self):
        fields = {"target_modules": ["convolution", "body.0"], "modules_to_save": ["head"]}
        found = self.rates(ctl.DiscriminativeLR(decay=0.5), **fields)
        assert {name: rate for name, rate in found.items() if "lora_A" in name} == {
            "convolution.lora_A.default.weight": 0.025,
            "body.0.lora_A.default.weight": 0.05,
        }
        found = self.rates(ctl.DiscriminativeLR(source=1e-5, fresh=1e-3), **fields)
        assert found == {name: 1e-3 if name.startswith("head") else 1e-5 for name in found}

    @pytest.mark.parametrize("strategy", [ctl.LPFT(epochs=1), ctl.GradualUnfreezing()])
    def test_a_phase_for_the_head_leaves_the_adapter_as_it_is(self, strategy):
        plan = adapt(wrapped(modules_to_save=["head"]), [strategy]).plan
        assert all(".head." in row.name for row in plan.rows if row.name not in plan.frozen_in(0))
        assert any("lora_" in row.name for row in plan.rows if row.name not in plan.frozen_in(1))

    def test_layers_that_are_kept_do_not_move(self):
        plan = adapt(wrapped(), [ctl.LayerTransfer(layers=["*.convolution", "*.embedding"])]).plan
        assert plan.trained == tuple(f"base_model.model.body.0.lora_{one}.default.weight" for one in "AB")
        with pytest.raises(ctl.SpecError, match=r"FeatureExtraction freezes all factors of low rank"):
            adapt(wrapped(modules_to_save=["head"]), [ctl.FeatureExtraction()])

    def test_the_vectors_of_ia3_are_parameters_of_their_own(self):
        config = peft.IA3Config(target_modules=["body.0"], feedforward_modules=[])
        plan = adapt(peft.get_peft_model(network(), config), [ctl.DiscriminativeLR(source=1e-5, fresh=1e-3)]).plan
        assert [plan[name].lr for name in plan.trained] == [1e-3]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it
class TestInATrainer:
    """A language model with a LoRA in Hugging Face's Trainer."""

    def run(self, folder: Any, **changes: Any) -> tuple[Any, ctl.Adaptation]:
        transformers = pytest.importorskip("transformers")
        from conservtl.integrations.transformers import ConservingTrainer

        class Trainer(ConservingTrainer, transformers.Trainer):
            pass

        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
        model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)
        adaptation = adapt(
            model, [ctl.L2SP(alpha=0.5), ctl.OutputConservation(weight=0.5), ctl.DiscriminativeLR(decay=0.5)]
        )
        args = transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2, use_cpu=True,
            learning_rate=1e-2, report_to=[], disable_tqdm=True, logging_strategy="no", **changes,
        )  # fmt: skip
        rows = [{"input_ids": [1, 2 + n, 3, 4], "labels": [1, 2 + n, 3, -100]} for n in range(7)]
        return Trainer(adaptation=adaptation, args=args, train_dataset=rows), adaptation

    def test_a_resumed_run_is_an_uninterrupted_one(self, tmp_path):
        saving, found = self.run(tmp_path, save_strategy="steps", save_steps=1)
        base = {n: p.detach().clone() for n, p in found.model.named_parameters() if "lora_" not in n}
        saving.train()
        resuming, resumed = self.run(tmp_path)
        resuming.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        for (name, one), other in zip(found.model.named_parameters(), resumed.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
            assert name not in base or torch.equal(one, base[name])
        drifted = [layer for layer, moved in found.drift().items() if moved > 0]
        assert drifted == ["base_model.model.transformer.h.0", "base_model.model.transformer.h.1"]


class TestStrategy:
    """The strategy ``LoRA``, which needs no PEFT."""

    def test_its_outputs_are_those_of_pefts_own(self):
        model, tokens = network(), torch.tensor([[1, 2, 3], [4, 5, 6]])
        strategy = ctl.LoRA(rank=2, alpha=3, on=["convolution", "body.0"])
        adaptation = ctl.adapt(model, network(), [strategy], example=tokens)
        move(model)
        theirs = wrapped(target_modules=["convolution", "body.0"])
        inside = theirs.base_model.model
        with torch.no_grad():
            for own, layer in ((model.convolution, inside.convolution), (model.body[0], inside.body[0])):
                for name in ("lora_A", "lora_B"):
                    weight = getattr(layer, name)["default"].weight
                    weight.copy_(getattr(own, name).view_as(weight))
        torch.testing.assert_close(model(tokens), theirs(tokens))
        assert not torch.allclose(model(tokens), network()(tokens))
        assert adaptation.plan.totals()["trained"] == sum(p.numel() for p in theirs.parameters() if p.requires_grad)

    def test_a_model_with_an_adapter_is_refused(self):
        with pytest.raises(ctl.SpecError, match=r"must have no adapter yet; it has one of PEFT"):
            ctl.adapt(wrapped(), wrapped(), [ctl.LoRA(rank=2)])
