"""Settings of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator

from conservtl.engine.criterion import Criterion
from conservtl.engine.optimizer import OptimizerName, made_of
from conservtl.engine.schedule import schedule_factor
from conservtl.spec_model import FrozenModel

__all__ = ["Training", "with_found"]

_CLASSES = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


class Training(FrozenModel):
    """Settings of ``fit``. Usual rates: 1e-5 to 1e-3 for fine-tuning, 1e-3 from scratch."""

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training data, all phases together."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 64
    """Examples per batch and process, for data that ``fit`` batches; a DataLoader has its own. auto: the largest power
    of two whose step fits into the memory of each process, on a CPU at most 64; a DataLoader is made anew in batches of
    that size, and of data of different lengths the ``batch_seconds`` are found that fit. The result says which."""
    global_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Examples per optimizer step of all processes, for a ``batch_size`` of auto: the largest divisor of a process's
    share of it that fits is the size of the batches, and ``accumulate`` follows. None: one batch, or as many as
    ``accumulate`` says."""
    batch_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Duration of a batch in seconds at most, its padding included, for data of different lengths, which is batched by
    length; a longer example is a batch alone. None: batch_size alone bounds a batch."""
    step_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Duration in seconds of all batches of an optimizer step at most, their padding and those of all processes
    included, for data of different lengths; its loss is the mean over their examples, whatever the sizes of the
    batches. None: accumulate says how many batches make a step."""
    evaluate_batch_size: Annotated[int, Field(ge=1)] = 256
    """Examples per batch of an evaluation, for data that ``fit`` batches; no result depends on it but by rounding."""
    optimizer: OptimizerName = "adamw"
    """sgd has a momentum of 0.9. Or a class of a package that ``--import`` names: {import: package.module:Class,
    args: {...}}."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """The optimizer's rate, which the plan's ratios multiply."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """The optimizer's weight decay; None: its default, and 0 on parameters whose decay the plan decides."""
    fused: bool | Literal["auto"] = "auto"
    """One kernel for all weights of a step: faster, and equal to the plain step up to rounding. auto: on CUDA, where
    torch has one for the optimizer."""
    channels_last: bool | Literal["auto"] = "auto"
    """Layout (N, H, W, C) of weights and activations, in which 2-D convolutions are faster on tensor cores; the weights
    have their own layout again afterwards. auto: on CUDA, for models with 2-D convolutions."""
    compile: bool | Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = False
    """Whether to train a model that torch.compile compiled, or the mode in which to compile it. It pays in long runs:
    compiling takes its time at the beginning and in each phase. Evaluations run the model as it is."""
    tf32: bool | Literal["auto"] = "auto"
    """Whether products and convolutions in fp32 round their inputs to TF32 on CUDA; torch's settings are restored
    afterwards. auto: under bf16 and fp16, and as torch is set in fp32."""
    hold: Literal["auto", "device", "host", "never"] = "auto"
    """Where tensors to train and evaluate on are held, and outputs of frozen parts and of the source that are computed
    once: on the device, from which batches are indexed, or in the host's memory, from which each batch is copied. auto:
    on the device if they fit its budget. never: data in the host's memory, and outputs are computed in each step."""
    hold_memory: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Budget in GiB of the device's memory for what is held there. None: half of what is free."""
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that load the examples of a dataset to train on, such as a folder of images; they stay for the whole
    run. The order does not depend on their number; a DataLoader has its own. auto: none on a CPU; on CUDA as many as
    there are cores, at most 8."""
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    """One factor on all groups, over all steps."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps over which the factor rises from 0 (constant and cosine)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that supports it, else fp32."""
    source_precision: Literal["fp32", "half"] = "fp32"
    """Precision in which the source model's linear maps and convolutions are held, if strategies compare with it. half:
    that of ``precision`` if it is bf16 or fp16, in which they compute anyway: half of the memory, nothing to convert in
    each step, and the same results. The result's ``execution`` says if it had no effect."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    distributed: Literal["auto", "ddp", "fsdp2"] = "auto"
    """How the processes of torchrun or accelerate launch share the model. ddp: each has all of it. fsdp2: parameters,
    gradients, the optimizer's state and starting values are sharded. auto: ddp, or fsdp2 if accelerate is configured
    for FSDP."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """CPU threads that torch may use; None: as many as it has. One is best for a network so small that threads mostly
    wait for each other, above all on a busy machine. auto: one, unless all are a tenth faster in the first twelve
    steps of a phase; the choice depends on time, so two runs may differ by the rounding of sums split over threads. A
    resumed run keeps the choice. On a GPU auto is None."""
    checkpointing: bool = False
    """Whether blocks of the model keep their inputs alone and are computed again in the backward pass: less memory for
    activations, and one forward pass more in time. For models of transformers and timm, the task's own recognizers,
    and yours with a method ``checkpointed_blocks()`` that returns its blocks."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients are averaged into one step."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of all gradients together, with the pull; None: not clipped."""
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of an exponential average of the weights, taken in after each step from the starting point on, such as
    0.999; evaluations, the weights that are kept and the result are the average. After n steps the starting point has a
    share of ema to the n in it: for a short run choose a smaller one. None: no average."""
    mixup: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Mix each image with another of its batch, by torchvision's MixUp: shares are drawn from Beta(mixup, mixup), such
    as 0.2, and labels are mixed alike. None: not. With cutmix too, one of the two is drawn for each batch."""
    cutmix: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Paste a part of another image of the batch, by torchvision's CutMix: its area is drawn from Beta(cutmix, cutmix),
    such as 1, and labels are mixed by area. None: not."""
    batch_norm: Literal["train", "eval"] = "train"
    """Batch norms of trained layers: train updates their statistics on the target, eval keeps the source's."""
    keep: Literal["last", "target", "harmonic", "path"] = "last"
    """Weights to keep: the last, or those with the best validation score, of the target or of target and source
    together; the loss decides between equal scores. path: the best of 11 points between the starting point and the
    last weights, by the score of target and source together if there is a source to validate on; the middle of those
    that are equal but for half a target example."""
    select: Criterion | None = None
    """Metric of the validation score: accuracy, loss, wer, cer, or {metric: NAME, direction: higher or lower}; None:
    accuracy, or the loss if it is all that is measured. Scores of target and source together: the harmonic mean of a
    metric of which higher values are better, the sum of one of which lower values are better."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Evaluations without a better validation score after which training stops; None: never. Only the last phase can
    be cut short. The path then ends at the last weights."""
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    log: tuple[str, ...] = ()
    """Experiment trackers of Accelerate that get each epoch's numbers, by name: tensorboard, wandb, mlflow, ... They
    need a folder to write to (``--out``, or ``out`` of ``fit``). Runs of a study are not logged."""
    deterministic: bool = False
    """Whether to refuse operations that are not deterministic on a GPU while training."""

    @model_validator(mode="after")
    def _check_checkpointing(self) -> Self:
        if self.checkpointing and self.compile:
            raise ValueError(
                "checkpointing and compile: blocks are not compiled where they are computed again. Leave "
                "one of them out"
            )
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.step_seconds is not None and (self.accumulate > 1 or self.global_batch_size is not None):
            other = "accumulate" if self.accumulate > 1 else "global_batch_size"
            raise ValueError(
                f"step_seconds decides how many batches make a step; received {other}={getattr(self, other)} too. "
                "Leave one of them out"
            )
        if self.step_seconds is not None and (self.batch_seconds or 0) > self.step_seconds:
            raise ValueError(
                f"batch_seconds must be at most step_seconds, {self.step_seconds:g}; received {self.batch_seconds:g}. "
                "A step holds whole batches"
            )
        if self.global_batch_size is None:
            return self
        if self.batch_size != "auto":
            raise ValueError(
                f"global_batch_size is for a batch_size of auto; received batch_size={self.batch_size}. Set "
                "batch_size to auto, or leave global_batch_size out and set accumulate"
            )
        if self.accumulate > 1:
            raise ValueError(
                f"global_batch_size decides how many batches make a step; received accumulate={self.accumulate} too. "
                "Leave one of them out"
            )
        return self

    @property
    def known_batch_size(self) -> int:
        """Examples per batch; the usual number for a size that is not found yet."""
        return 64 if self.batch_size == "auto" else self.batch_size

    @property
    def step_size(self) -> int:
        """Examples per optimizer step and process; for a batch size that is not found yet, the usual one."""
        if self.global_batch_size is not None:
            return self.global_batch_size
        return self.known_batch_size * self.accumulate

    def factor(self, step: int, steps: int) -> float:
        """Return the factor on all rates at a step.

        Args:
            step: 0 to ``steps`` - 1.
            steps: optimizer steps of the whole training.
        """
        return schedule_factor(self, step, steps)

    def make(self) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
        """Return the optimizer class and its keyword arguments.

        Raises:
            SpecError: a class that is named was not imported by hand, or cannot be called as the settings say.
        """
        named = self.optimizer
        cls, options = made_of(self, _CLASSES[named] if isinstance(named, str) else named.load())
        return cls, options | ({"momentum": 0.9} if named == "sgd" else {})


def with_found(training: Training, sizes: Mapping[str, Any]) -> Training:
    """Return settings with sizes that were found; unchecked: a found batch size stands beside a global one."""
    return BaseModel.model_copy(training, update=sizes)
