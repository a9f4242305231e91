"""Plans in Hugging Face's Trainer, against loops written out for each kind of model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import conservtl as ctl

transformers = pytest.importorskip("transformers")

from conservtl.integrations.transformers import ConservingCallback, ConservingTrainer  # noqa: E402


class Trainer(ConservingTrainer, transformers.Trainer):
    pass


class Seq2SeqTrainer(ConservingTrainer, transformers.Seq2SeqTrainer):
    pass


TEXT = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
TEXT |= {"max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ALPHA, WEIGHT, RATE, CLIP = 0.3, 0.7, 0.5, 0.4


def text_classifier() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=3))


def image_classifier() -> Any:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def convolutions() -> Any:
    """A model without ``num_items_in_batch``."""
    config = transformers.ConvNextConfig(hidden_sizes=[4], depths=[1], num_stages=1, patch_size=4, num_labels=3)
    return transformers.ConvNextForImageClassification(config)


def token_classifier() -> Any:
    return transformers.BertForTokenClassification(transformers.BertConfig(**TEXT, num_labels=3))


def recognizer() -> Any:
    config = transformers.Wav2Vec2Config(
        vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        conv_dim=(4, 4), conv_stride=(4, 2), conv_kernel=(6, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", layerdrop=0.0, mask_time_prob=0.0,
        hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0, final_dropout=0.0,
        ctc_loss_reduction="mean", pad_token_id=0,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def language_model() -> Any:
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def positions(batch: dict) -> torch.Tensor:
    return batch["labels"] != -100


def next_tokens(batch: dict) -> torch.Tensor:
    """Positions whose next token counts; the last has none."""
    return F.pad(batch["labels"][:, 1:] != -100, (0, 1))


def frames(batch: dict) -> torch.Tensor:
    """Frames of the recogniser that its convolutions compute from samples alone."""
    lengths = batch["attention_mask"].sum(1)
    for kernel, stride in ((6, 4), (3, 2)):
        lengths = (lengths - kernel) // stride + 1
    return torch.arange(9) < lengths[:, None]


def mean_loss(model: Any, batch: dict, logits: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Cross-entropy at the counted positions, with torch alone."""
    labels = batch["labels"]
    if isinstance(model, transformers.GPT2LMHeadModel):
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits[counted], labels[counted])


def ctc_loss(model: Any, batch: dict, logits: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    labels = batch["labels"]
    scores = logits.log_softmax(-1).transpose(0, 1)
    texts = labels[labels >= 0]
    return F.ctc_loss(scores, texts, counted.sum(1), (labels >= 0).sum(1), blank=0, reduction="mean")


@dataclass
class Case:
    build: Callable[[], Any]
    inputs: str
    by_items: bool  # whether the model divides its loss by the number of labels in a step
    counted: Callable[[dict], torch.Tensor] = positions
    loss: Callable[..., torch.Tensor] = mean_loss
    trainer: Any = Trainer


CASES = {
    "text classification": Case(text_classifier, "text", by_items=False),
    "image classification": Case(image_classifier, "image", by_items=True),
    "token classification": Case(token_classifier, "tokens", by_items=False),
    "ctc": Case(recognizer, "speech", by_items=False, counted=frames, loss=ctc_loss),
    "t5": Case(t5, "pairs", by_items=False, trainer=Seq2SeqTrainer),
    "bart": Case(bart, "pairs", by_items=False, trainer=Seq2SeqTrainer),
    "causal language model": Case(language_model, "language", by_items=True, counted=next_tokens),
}


def examples(kind: str, count: int = 7) -> list[dict]:
    """Examples of unequal lengths, padded."""
    random = torch.Generator().manual_seed(3)
    rows = []
    for number in range(count):
        length = 3 + number % 4
        mask = (torch.arange(6) < length).long()
        tokens = torch.randint(3, 20, (6,), generator=random) * mask
        row: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
        if kind == "image":
            row = {"pixel_values": torch.randn(3, 8, 8, generator=random)}
        if kind == "speech":
            samples = 40 + 10 * (number % 4)
            mask = (torch.arange(80) < samples).long()
            row = {"input_values": torch.randn(80, generator=random) * mask, "attention_mask": mask}
        if kind in ("text", "image"):
            row["labels"] = torch.randint(3, (), generator=random)
        if kind == "tokens":
            row["labels"] = torch.randint(3, (6,), generator=random).masked_fill(mask == 0, -100)
        if kind in ("pairs", "speech"):
            row["labels"] = torch.randint(3, 6, (3,), generator=random)
            row["labels"][1 + number % 3 :] = -100
        if kind == "language":
            row["labels"] = tokens.masked_fill(mask == 0, -100)
        rows.append(row)
    return rows


def adapted(build: Callable[[], Any], strategies: list, seed: int = 0) -> ctl.Adaptation:
    torch.manual_seed(seed)
    source, model = build(), build()
    with torch.no_grad():  # larger than at initialisation, so that outputs differ
        for parameter in source.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return ctl.adapt(model, source, strategies)


def arguments(folder: Any, **changes: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": CLIP,
        "train_sampling_strategy": "sequential", "report_to": [], "disable_tqdm": True, "save_strategy": "no",
        "use_cpu": True, "logging_strategy": "no", "dataloader_pin_memory": False,
    } | changes  # fmt: skip
    return transformers.Seq2SeqTrainingArguments(str(folder), **settings)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def steps_of(rows: list[dict], size: int = 2, accumulate: int = 2) -> list[list[dict]]:
    """Batches of each step, the last ones smaller."""
    batches = [
        {key: torch.stack([row[key] for row in rows[start : start + size]]) for key in rows[0]}
        for start in range(0, len(rows), size)
    ]
    return [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]


def train_by_hand(case: Case, model: Any, source: Any, rows: list[dict], epochs: int = 2) -> list[float]:
    """Cross-entropy + WEIGHT × KL to the source + ALPHA/2 |w - w0|², clipped, by plain SGD; returns the norms."""
    start = weights(model)
    pulled = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    norms = []
    model.train()
    for batches in steps_of(rows) * epochs:
        model.zero_grad()
        totals = [int((next_tokens(b) if case.inputs == "language" else positions(b)).sum()) for b in batches]
        for batch, own in zip(batches, totals, strict=True):
            share = own / sum(totals) if case.by_items else 1 / len(batches)
            counted = case.counted(batch)
            given = {key: value for key, value in batch.items() if key != "labels" or case.inputs == "pairs"}
            ours = model(**given).logits
            with torch.no_grad():
                theirs = source(**given).logits
            p, q = theirs[counted].log_softmax(-1), ours[counted].log_softmax(-1)
            divergence = (p.exp() * (p - q)).sum(-1).mean()
            (share * (case.loss(model, batch, ours, counted) + WEIGHT * divergence)).backward()
        for name in pulled:
            parameter = model.get_parameter(name)
            gradient = ALPHA * (parameter.detach() - start[name])
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(RATE * parameter.grad)
    return norms


PLAN = [ctl.L2SP(alpha=ALPHA, beta=0.0), ctl.OutputConservation(weight=WEIGHT, temperature=1.0)]


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_a_loop_by_hand(name, tmp_path):
    """Labels and padding masked, accumulated, pulled and clipped; the last step has one example less."""
    case = CASES[name]
    rows = examples(case.inputs)
    one, other = (adapted(case.build, PLAN) for _ in range(2))
    args = arguments(tmp_path)
    before = args.to_dict()
    case.trainer(adaptation=one, args=args, train_dataset=rows).train()
    norms = train_by_hand(case, other.model, other.origin.source_model.eval(), rows)
    assert max(norms) > CLIP  # it clips
    assert max(one.drift().values()) > 1e-3
    assert_equal(weights(one.model), weights(other.model))
    assert args.to_dict() == before


def rates(optimizer: Any) -> dict[str, float]:
    return {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}


def test_the_optimizer_that_the_arguments_name_gets_the_plan_s_groups(tmp_path):
    adaptation = adapted(text_classifier, [ctl.DiscriminativeLR(decay=0.5)])
    trainer = Trainer(
        adaptation=adaptation,
        args=arguments(tmp_path, optim="adamw_torch", weight_decay=0.1, adam_beta2=0.9, learning_rate=1e-3),
        train_dataset=examples("text"),
    )
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.AdamW
    assert rates(optimizer)["classifier.weight"] == 1e-3
    assert rates(optimizer)["bert.embeddings.word_embeddings.weight"] < 5e-4
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert decays["classifier.weight"] == 0.1
    assert decays["classifier.bias"] == decays["bert.embeddings.LayerNorm.weight"] == 0.0
    assert all(group["betas"] == (0.9, 0.9) for group in optimizer.param_groups)


def test_the_trainer_s_weight_decay_is_0_where_the_class_has_another(tmp_path):
    trainer = Trainer(
        adaptation=adapted(text_classifier, []),
        args=arguments(tmp_path, optim="adamw_torch"),
        train_dataset=examples("text"),
    )
    assert {group["weight_decay"] for group in trainer.create_optimizer().param_groups} == {0.0}


def test_phases_by_epoch_scale_the_scheduler_s_rates(tmp_path):
    """The head alone at first, everything at a third of the rate afterwards, under a linear schedule of 6 steps."""
    phases = [ctl.Phase(name="head", epochs=1, frozen=("bert",)), ctl.Phase(name="all", scale=1 / 3)]

    class Phased(ctl.Strategy):
        kind: str = "phased_in_a_trainer"

        def apply(self, plan: ctl.Plan) -> ctl.Plan:
            body = tuple(row.name for row in plan.rows if row.name.startswith("bert"))
            return plan.with_phases("Phased", [phases[0].model_copy(update={"frozen": body}), phases[1]])

    seen: list[tuple[float, bool]] = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            body = kwargs["model"].bert.embeddings.word_embeddings.weight
            seen.append((kwargs["optimizer"].param_groups[0]["lr"], body.grad is not None))

    args = arguments(tmp_path, num_train_epochs=3, lr_scheduler_type="linear", learning_rate=0.6)
    adaptation = adapted(text_classifier, [Phased()])
    Trainer(adaptation=adaptation, args=args, train_dataset=examples("text"), callbacks=[Watch()]).train()
    assert [lr for lr, _ in seen] == pytest.approx([0.6, 0.5, 0.4 / 3, 0.3 / 3, 0.2 / 3, 0.1 / 3])
    assert [trained for _, trained in seen] == [False, False, True, True, True, True]


PHASED = [*PLAN, ctl.GradualUnfreezing(epochs=1), ctl.Mixout(p=0.3)]


@pytest.mark.parametrize(("step", "resume"), [(1, "folder"), (2, True), (3, "folder")])
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, step, resume):
    """Between epochs and within them, over a change of phase, with AdamW, a schedule and Mixout."""
    rows = examples("text")
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear"}

    def run(folder: str, **changes: Any) -> tuple[Any, ctl.Adaptation]:
        adaptation = adapted(text_classifier, PHASED)
        args = arguments(tmp_path / folder, **options, **changes)
        return Trainer(adaptation=adaptation, args=args, train_dataset=rows), adaptation

    whole, uninterrupted = run("whole")
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": step, "save_total_limit": 1}

    class Stop(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    first, _ = run("parts", **saving)
    first.add_callback(Stop())
    first.train()
    second, resumed = run("parts", **saving)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{step}") if resume == "folder" else True)
    assert second.state.global_step == 4
    assert_equal(weights(resumed.model), weights(uninterrupted.model))


def test_a_checkpoint_of_a_plain_trainer_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    transformers.Trainer(model=text_classifier(), args=args, train_dataset=examples("text")).train()
    trainer = Trainer(adaptation=adapted(text_classifier, PLAN), args=args, train_dataset=examples("text"))
    with pytest.raises(ctl.SpecError, match=r"checkpoint-4 must hold the adaptation's state .*conservtl\.pt"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["image classification", "causal language model", "text classification"])
def test_accumulated_batches_are_one_batch(name, tmp_path):
    """Whether or not the model divides its loss by the number of labels: here batches have as many each."""
    case = CASES[name]
    rows = examples(case.inputs, 8)
    if case.inputs == "language":  # as many tokens in each batch
        rows = [rows[number] for number in (0, 3, 1, 2, 0, 3, 1, 2)]
    found = []
    for size, accumulate in ((2, 2), (4, 1)):
        adaptation = adapted(case.build, PLAN)
        args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate)
        case.trainer(adaptation=adaptation, args=args, train_dataset=rows).train()
        found.append(weights(adaptation.model))
    assert_equal(*found)


@pytest.mark.parametrize("kind", ["image", "language"])
def test_unequal_batches_are_one_batch_too_if_the_model_divides_by_labels(kind, tmp_path):
    """A batch's share is its number of labels: 3 examples in two batches, tokens of unequal numbers."""
    case = next(case for case in CASES.values() if case.inputs == kind)
    found = []
    for size, accumulate in ((2, 2), (4, 1)):
        adaptation = adapted(case.build, PLAN)
        args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate)
        Trainer(adaptation=adaptation, args=args, train_dataset=examples(kind, 3)).train()
        found.append(weights(adaptation.model))
    assert_equal(*found)


class TestWithAScaler:
    """fp16 scales the loss; here on the CPU, in full precision, where the result must not change."""

    @pytest.mark.parametrize("clip", [0.0, CLIP])
    def test_the_pull_is_not_scaled(self, tmp_path, clip):
        found = []
        for scaled in (False, True):
            adaptation = adapted(text_classifier, PLAN)
            trainer = Trainer(
                adaptation=adaptation, args=arguments(tmp_path, max_grad_norm=clip), train_dataset=examples("text")
            )
            if scaled:
                trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            trainer.train()
            found.append(weights(adaptation.model))
        assert_equal(*found)


def test_smoothed_labels(tmp_path):
    """The Trainer takes the labels out of the batch; the terms still see what counts, and the source its labels."""
    rows = examples("pairs")
    adaptation = adapted(t5, PLAN)
    args = arguments(tmp_path, label_smoothing_factor=0.2, num_train_epochs=1, gradient_accumulation_steps=1)
    first = next(iter(steps_of(rows)))[0]
    model, source = adaptation.model, adaptation.origin.source_model
    start = weights(model)

    def collate(batch: list[dict]) -> dict:  # as DataCollatorForSeq2Seq does for smoothed labels
        rows = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
        return rows | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=rows["labels"])}

    trainer = Seq2SeqTrainer(adaptation=adaptation, args=args, train_dataset=rows[:2], data_collator=collate)
    trainer.train()
    after = weights(model)
    model.load_state_dict(start, strict=False)
    batch = collate([{key: value[n] for key, value in first.items()} for n in range(2)])
    counted = positions(batch)
    given = {key: value for key, value in batch.items() if key != "labels"}
    model.zero_grad()
    ours, theirs = model(**given).logits[counted], source.eval()(**given).logits[counted].detach()
    smooth = F.cross_entropy(ours, batch["labels"][counted], label_smoothing=0.2)
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    (smooth + WEIGHT * (p.exp() * (p - q)).sum(-1).mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    stepped = {n: p.detach() - (0 if p.grad is None else RATE * p.grad) for n, p in model.named_parameters()}
    assert_equal(after, stepped)


@pytest.mark.parametrize("told", [True, False])
def test_a_loss_of_one_s_own(tmp_path, told):
    """Divided by the number of labels, as the Trainer expects of one, or a batch's mean that says so."""

    def by_items(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    def mean(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels)

    class Means(Trainer):
        loss_is_scaled_for_ga = False

    rows = examples("text", 8)
    one, other = (adapted(text_classifier, PLAN) for _ in range(2))
    trainer, loss = (Trainer, by_items) if told else (Means, mean)
    trainer(adaptation=one, args=arguments(tmp_path), train_dataset=rows, compute_loss_func=loss).train()
    train_by_hand(CASES["text classification"], other.model, other.origin.source_model.eval(), rows)
    assert_equal(weights(one.model), weights(other.model))


def test_measurements_and_the_work_after_training(tmp_path):
    """A Fisher is measured before the first step, and the weights interpolated after the last, by the best metric."""
    strategies = [ctl.FisherSP(), ctl.WeightInterpolation(t=None, points=3)]
    adaptation = adapted(text_classifier, strategies)
    rows = examples("text", 4)
    trainer = Trainer(
        adaptation=adaptation, args=arguments(tmp_path), train_dataset=rows, eval_dataset=rows[:2],
    )  # fmt: skip
    trainer.train()
    assert len(adaptation.measured) == 1
    scores = trainer.finished["weight_interpolation"]["scores"]
    assert [one["t"] for one in scores] == [0.0, 0.5, 1.0]
    best = max(one["score"] for one in scores)
    assert -trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-5)


def test_evaluation_shows_the_task_s_loss_alone(tmp_path):
    adaptation = adapted(text_classifier, PLAN)
    rows = examples("text", 4)
    trainer = Trainer(adaptation=adaptation, args=arguments(tmp_path), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    with torch.no_grad():
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        expected = adaptation.model.eval()(**batch).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


class TestCallback:
    """For a plain Trainer, where nothing must come before its clipping."""

    def trained(self, folder: Any, strategies: list, *, mixin: bool, **changes: Any) -> dict:
        adaptation = adapted(text_classifier, strategies)
        args = arguments(folder, **changes)
        rows = examples("text")
        if mixin:
            trainer: Any = Trainer(adaptation=adaptation, args=args, train_dataset=rows)
        else:
            trainer = plain(adaptation, args, rows)
        trainer.train()
        return weights(adaptation.model)

    @pytest.mark.parametrize(
        ("strategies", "clip"),
        [
            ([ctl.L2SP(alpha=ALPHA)], 0.0),
            ([ctl.L2SP(alpha=0.5, mode="decoupled"), ctl.DiscriminativeLR(decay=0.5)], CLIP),
            ([ctl.GradualUnfreezing(epochs=1)], CLIP),
            ([ctl.Mixout(p=0.5)], 0.0),
        ],
        ids=["coupled, no clipping", "decoupled", "phases", "Mixout"],
    )
    def test_it_is_exact(self, tmp_path, strategies, clip):
        """Without accumulation: with it, the Trainer's own loss of this model counts every batch in full."""
        options = {"max_grad_norm": clip, "gradient_accumulation_steps": 1, "lr_scheduler_type": "linear"}
        found = [self.trained(tmp_path, strategies, mixin=mixin, **options) for mixin in (True, False)]
        assert_equal(*found)

    def test_it_goes_on_from_a_checkpoint(self, tmp_path):
        strategies = [ctl.L2SP(alpha=0.5, mode="decoupled"), ctl.GradualUnfreezing(epochs=1)]
        options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
        adaptation = adapted(text_classifier, strategies)
        rows = examples("text")
        plain(adaptation, arguments(tmp_path, **options), rows).train()
        for step in (2, 3):
            resumed = adapted(text_classifier, strategies)
            folder = str(tmp_path / f"checkpoint-{step}")
            plain(resumed, arguments(tmp_path, **options), rows).train(resume_from_checkpoint=folder)
            assert_equal(weights(resumed.model), weights(adaptation.model))

    @pytest.mark.parametrize(
        ("strategy", "message"),
        [
            (
                ctl.L2SP(alpha=0.1),
                r"L2SP adds to the gradients, .* after it has clipped them \(max_grad_norm is 0\.4\)",
            ),
            (ctl.Mixout(p=0.5), r"Mixout adds to the gradients"),
            (ctl.OutputConservation(), r"OutputConservation adds a term to the loss"),
            (ctl.WeightInterpolation(t=0.5), r"WeightInterpolation acts after training"),
        ],
    )
    def test_what_it_cannot_do_exactly_is_refused(self, tmp_path, strategy, message):
        trainer = plain(adapted(text_classifier, [strategy]), arguments(tmp_path), examples("text"))
        with pytest.raises(ctl.SpecError, match=message + r"[\s\S]*Use ConservingTrainer"):
            trainer.train()

    def test_another_optimizer_is_refused(self, tmp_path):
        adaptation = adapted(text_classifier, [])
        trainer = transformers.Trainer(
            model=adaptation.model,
            args=arguments(tmp_path),
            train_dataset=examples("text"),
            callbacks=[ConservingCallback(adaptation)],
        )
        with pytest.raises(ctl.SpecError, match="optimizer must be the adaptation's"):
            trainer.train()


def plain(adaptation: ctl.Adaptation, args: Any, rows: list[dict]) -> Any:
    return transformers.Trainer(
        model=adaptation.model,
        args=args,
        train_dataset=rows,
        optimizers=(adaptation.optimizer(torch.optim.SGD, lr=args.learning_rate), None),
        callbacks=[ConservingCallback(adaptation)],
    )


class TestRefusals:
    def refused(self, folder: Any, message: str, strategies: list | None = None, **changes: Any) -> None:
        adaptation = adapted(text_classifier, strategies or [])
        fields = {"adaptation": adaptation, "args": arguments(folder), "train_dataset": examples("text")} | changes
        with pytest.raises(ctl.SpecError, match=message):
            Trainer(**fields).train()

    def test_an_optimizer_of_its_own(self, tmp_path):
        model = text_classifier()
        own = torch.optim.SGD(model.parameters(), lr=0.1)
        self.refused(tmp_path, "optimizers holds an optimizer of its own", optimizers=(own, None))

    def test_another_model(self, tmp_path):
        self.refused(tmp_path, "model must be the one that was adapted", model=text_classifier())

    def test_a_model_for_each_run(self, tmp_path):
        self.refused(tmp_path, "model_init makes a new model for each run", model_init=text_classifier)

    def test_no_adaptation(self, tmp_path):
        self.refused(tmp_path, "adaptation must be the result of adapt", adaptation=None, model=text_classifier())

    def test_phases_that_do_not_fit(self, tmp_path):
        args = arguments(tmp_path, num_train_epochs=1)
        self.refused(tmp_path, "num_train_epochs is 1, but the plan's phases", [ctl.GradualUnfreezing()], args=args)

    def test_weight_decay_beside_a_pull(self, tmp_path):
        args = arguments(tmp_path, weight_decay=0.1)
        self.refused(tmp_path, r"weight_decay=0\.1 pulls to zero", [ctl.L2SP()], args=args)

    def test_an_optimizer_that_chooses_parameters(self, tmp_path):
        args = arguments(tmp_path)
        chosen = (torch.optim.SGD, {"params": [], "lr": 0.1})
        self.refused(tmp_path, "SGD chooses parameters by itself", optimizer_cls_and_kwargs=chosen, args=args)

    def test_several_gpus_in_one_process(self, tmp_path):
        args = arguments(tmp_path)
        args._n_gpu = 2
        self.refused(tmp_path, "2 GPUs in one process", args=args)

    def test_a_choice_without_a_validation_part(self, tmp_path):
        self.refused(tmp_path, "pass eval_dataset", [ctl.WeightInterpolation(t=None)])

    def test_the_mixin_by_itself(self):
        with pytest.raises(ctl.SpecError, match="is a mixin for a Trainer"):
            ConservingTrainer(adaptation=None)

    def test_the_mixin_behind_the_trainer(self):
        with pytest.raises(ctl.SpecError, match="must stand before the Trainer"):
            type("Wrong", (transformers.Trainer, ConservingTrainer), {})


def penalised(strength: float, start: dict[str, torch.Tensor]) -> Any:
    """Return a Trainer with a penalty in its loss, as people write it."""

    class Usual(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            penalty = sum((value - start[name]).square().sum() for name, value in model.named_parameters())
            return loss + strength * ALPHA / 2 * penalty

    return Usual


@pytest.mark.parametrize(("build", "kind", "times"), [(image_classifier, "image", 2), (convolutions, "image", 1)])
def test_a_penalty_in_compute_loss_counts_once_for_each_batch(build, kind, times, tmp_path):
    """As people write it, at two accumulated batches: twice if the model takes num_items_in_batch, once if not."""
    gradients = {}
    rows = examples(kind, 4)
    for accumulate, strength in ((1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0)):
        torch.manual_seed(0)
        model = build()
        start = {name: value - 0.1 for name, value in weights(model).items()}

        trainer = penalised(strength, start)
        args = arguments(
            tmp_path, gradient_accumulation_steps=accumulate, per_device_train_batch_size=4 // accumulate, max_steps=1,
            max_grad_norm=0.0,
        )  # fmt: skip
        before = weights(model)
        trainer(model=model, args=args, train_dataset=rows).train()
        name = next(name for name, value in model.named_parameters() if value.requires_grad)
        gradients[accumulate, strength] = (before[name] - weights(model)[name]) / RATE
    for accumulate in (1, 2):
        added = gradients[accumulate, 1.0] - gradients[accumulate, 0.0]
        factor = times if accumulate == 2 else 1
        torch.testing.assert_close(added, torch.full_like(added, ALPHA * 0.1 * factor), rtol=1e-3, atol=1e-5)
