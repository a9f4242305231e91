"""Checks before the first step: model, loss and metrics are run on a few examples of each set."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from conservtl.batches import map_tensors, tensors_of
from conservtl.compat import without_graphs
from conservtl.engine.batch import Batches
from conservtl.engine.evaluation import NO_EXAMPLES, Functions, Holdout
from conservtl.engine.held import Held
from conservtl.engine.randomness import preserve_rng
from conservtl.engine.session import Session
from conservtl.errors import DataError, SpecError, counted
from conservtl.functions import IGNORED, Loss, cross_entropy, labels_of, logits_of
from conservtl.functions import forward as plain_forward
from conservtl.labels import labels_for_loss
from conservtl.losses import LabelLoss
from conservtl.runtime.preserve import eval_mode, preserve_buffers

__all__ = ["check_first_batches", "check_gradient", "checked"]

_FEW = 2  # examples of held data: enough for shapes, and little memory with gradients
_SAME_SHAPE = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"}


def check_first_batches(
    session: Session, functions: Functions, batches: Batches, sets: Mapping[str, Mapping[str, Holdout]]
) -> None:
    """Raise unless the sets have examples, and outputs and labels that the loss takes; everything is restored.

    Losses of torch and the default one are tried on the first examples of each set. Functions of the user's own are
    called as often as there are batches, and no more: the loss is checked in the first batch of training (``checked``).
    """
    model = session.adaptation.model
    with eval_mode(model), preserve_buffers(model), preserve_rng(batches.generators), without_graphs():
        for kind, named in sets.items():
            for name, data in named.items():
                with _about(f"the set {name!r} of {kind}"), preserve_rng(getattr(data.data, "generators", ())):
                    _check(session, functions.of(data), data.data)


def checked(functions: Functions, batches: Batches) -> Functions:
    """Return the functions with checks of inputs, outputs, labels and loss, for the first batch of training.

    Args:
        functions: the run's functions.
        batches: the training data; all labels of held data are checked.
    """

    def forward(model: nn.Module, content: Any) -> Any:
        with _about("the training data"):
            return _forward(functions, model, content)

    def loss(outputs: Any, content: Any) -> Tensor:
        with _about("the training data"):
            return _loss(functions.loss, outputs, content, batches)

    return Functions(forward, loss, functions.metrics)


def check_gradient(loss: Tensor, model: nn.Module) -> None:
    """Raise unless a loss has a gradient for a parameter that is trained."""
    if not loss.requires_grad and any(one.requires_grad for one in model.parameters()):
        raise SpecError(
            "loss must have a gradient; none of the trained parameters reaches it. Compute it from the outputs, "
            "without detach(), .item() or torch.no_grad()."
        )


def _check(session: Session, functions: Functions, data: Batches) -> None:
    """Try the loss on a few examples if no function of the user's own is called."""
    if data.count() == 0:
        raise DataError(NO_EXAMPLES)
    _check_signature(functions.metrics)
    if functions.forward is not plain_forward or not _takes_labels(functions.loss):
        return None
    model = session.adaptation.model

    def run(content: Any) -> None:
        with session.autocast():
            labels_for_loss(model, content, functions.forward, functions.loss)
            _loss(functions.loss, _forward_of_set(functions, model, content), content, data)

    with torch.no_grad():
        if isinstance(data, Held):
            with suppress(Exception):  # they may be too few: a whole batch decides, and is named
                return run(map_tensors(data.content, lambda tensor: tensor[:_FEW].to(data.device)))
        batch = next(data.epoch(), None)
        if batch is None:
            raise DataError(NO_EXAMPLES)
        return run(batch.content)


def _check_signature(metrics: Any) -> None:
    """Raise unless metrics can be called with outputs and batch."""
    try:
        inspect.signature(metrics).bind(None, None)
    except TypeError as error:
        raise SpecError(
            f"metrics must be a function (outputs, batch) -> {{name: value}}; received {metrics!r}: {error}."
        ) from error
    except ValueError:  # functions of C say no signature
        return


@contextmanager
def _about(subject: str) -> Iterator[None]:
    """Name the set in the messages of the block."""
    try:
        yield
    except (SpecError, DataError) as error:
        raise type(error)(f"{subject}: {error}") from error


def _takes_labels(loss: Loss) -> bool:
    """Whether a loss is the default one or one of torch, which take the labels out of the batch."""
    return loss is cross_entropy or (isinstance(loss, LabelLoss) and loss.of_labels)


def _check_batch(functions: Functions, content: Any) -> None:
    """Raise unless the default functions find inputs and labels in a batch."""
    if functions.forward is not plain_forward or isinstance(content, Mapping):
        return
    parts = 2 if _takes_labels(functions.loss) else 1
    short = isinstance(content, (tuple, list)) and (len(content) < parts or not tensors_of(content[0]))
    if short or not hasattr(content, "__getitem__"):
        received = f"a {type(content).__name__} of {counted(len(content), 'part')}" if short else f"{content!r:.60}"
        raise DataError(
            "a batch must be (inputs, labels), tensors, or a dictionary of the model's arguments and labels; received "
            f"{received}. Give such batches, or pass forward(model, batch) and loss(outputs, batch) for others."
        )


def _forward(functions: Functions, model: nn.Module, content: Any) -> Any:
    _check_batch(functions, content)
    try:
        return functions.forward(model, content)
    except RuntimeError as error:
        weights = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        given = {tensor.dtype for tensor in tensors_of(content) if tensor.is_floating_point()}
        if "dtype" not in str(error) or not given - weights:
            raise
        other, own = str(min(given - weights, key=str))[6:], " and ".join(sorted(str(one)[6:] for one in weights))
        raise DataError(
            f"inputs must be of the weights' type; received {other}, and the weights are {own} ({error}). Convert the "
            "inputs, as by inputs.float()."
        ) from error


def _forward_of_set(functions: Functions, model: nn.Module, content: Any) -> Any:
    try:
        return _forward(functions, model, content)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(content))
        raise DataError(
            f"its inputs must be such as the model takes; for tensors of shape {shapes} it raises: {error}. Prepare "
            "them like those to train on."
        ) from error


def _loss(loss: Loss, outputs: Any, content: Any, data: Batches | None = None) -> Tensor:
    """Return the loss if outputs and labels fit each other, and it is one finite number."""
    if loss is cross_entropy or (isinstance(loss, LabelLoss) and loss.of_classes):
        ignored = loss.ignored if isinstance(loss, LabelLoss) else IGNORED
        whole = data.content if isinstance(data, Held) else content
        _check_classes(logits_of(outputs), labels_of(whole), content, ignored)
    mode = _Broadcasting(outputs, content)
    try:
        with mode if mode.possible else nullcontext():
            value: Any = loss(outputs, content)
    except (AttributeError, TypeError) as error:
        if isinstance(content, Tensor):
            raise
        raise SpecError(
            f"loss must be a function of (outputs, batch); with a {type(content).__name__} as the batch it raises "
            f"{type(error).__name__}: {error}. Take the labels out of it (batch[1], or batch['labels'])."
        ) from error
    if not isinstance(value, Tensor):
        raise SpecError(
            f"loss must return a tensor with a gradient; received {type(value).__name__}. Return the tensor, without "
            ".item()."
        )
    if value.numel() != 1:
        raise SpecError(
            f"the loss must be a scalar, the mean over the batch; received a tensor of shape {tuple(value.shape)}. "
            "Return its mean(), or leave out reduction='none'."
        )
    if not value.is_floating_point():
        raise SpecError(
            f"loss must return a real number; received {str(value.dtype)[6:]}. Compute it from the outputs."
        )
    return value


def _check_classes(logits: Tensor, labels: Any, content: Any, ignored: int) -> None:
    """Raise unless class indices are positions of the outputs, and probabilities sum to 1."""
    few = labels_of(content)
    if isinstance(labels, Tensor) and (labels.shape[1:], labels.dtype) != (few.shape[1:], few.dtype):
        labels = few  # an augmentation mixed them
    if not isinstance(labels, Tensor) or not labels.numel() or logits.ndim < 2 or logits.shape[1] < 2:
        return  # the loss says more
    if labels.is_floating_point() and bool(labels.isnan().any()):
        raise SpecError(
            f"labels must be numbers for a cross-entropy; {counted(int(labels.isnan().sum()), 'value', 'is')} NaN. If "
            "these are missing, pass a loss that leaves them out, such as loss=lambda outputs, batch: "
            "binary_cross_entropy_with_logits(outputs[~batch[1].isnan()], batch[1][~batch[1].isnan()])."
        )
    if few.shape == logits.shape and logits.ndim == 2:
        sums, least = labels.double().sum(-1), float(labels.min())
        if least < 0 or not bool(((sums - 1).abs() < 1e-3).all()):
            raise SpecError(
                f"labels of the outputs' shape must be probabilities that sum to 1 for a cross-entropy; they are from "
                f"{least:g} to {float(labels.max()):g}, with sums from {float(sums.min()):g} to "
                f"{float(sums.max()):g}. For numbers pass loss=nn.MSELoss(), for several labels an example "
                "loss=nn.BCEWithLogitsLoss()."
            )
        return
    if labels.is_floating_point():
        return
    last = few.shape == logits.shape[:-1] and few.shape != logits.shape[:1] + logits.shape[2:]
    classes = logits.shape[-1] if last else logits.shape[1]
    numbers = labels.long()
    wrong = numbers[((numbers < 0) | (numbers >= classes)) & (numbers != ignored)]
    if wrong.numel():
        raise SpecError(
            f"labels must be positions of {counted(classes, 'output')}, 0 to {classes - 1}, or {ignored} for positions "
            f"that do not count; received {int(wrong.flatten()[0])}. Number them from 0, or give the model as many "
            "outputs as there are classes."
        )


class _Broadcasting(TorchFunctionMode):
    """Finds an operation between outputs (N, 1) and labels (N,), which makes N x N numbers of them."""

    def __init__(self, outputs: Any, content: Any) -> None:
        super().__init__()
        self._outputs = self._labels = None
        try:
            self._outputs, self._labels = logits_of(outputs), labels_of(content)
        except (SpecError, LookupError, TypeError):
            return

    @property
    def possible(self) -> bool:
        """Whether the shapes are such."""
        if not isinstance(self._labels, Tensor) or self._outputs is None or len(self._labels.shape) == 0:
            return False
        shapes = sorted((tuple(self._outputs.shape), tuple(self._labels.shape)), key=len)
        return len(shapes[0]) == 1 and shapes[0][0] > 1 and shapes[1] == (*shapes[0], 1)

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and refuse what broadcasts the two."""
        result = function(*arguments, **(options or {}))
        given = [one for one in (*arguments, *(options or {}).values()) if isinstance(one, Tensor)]
        both = any(self._is(one, self._outputs) for one in given) and any(self._is(one, self._labels) for one in given)
        square = isinstance(result, Tensor) and result.ndim == 2 and len(set(result.shape)) == 1
        if both and (square or getattr(function, "__name__", "") in _SAME_SHAPE):
            outputs, labels = (tuple(one.shape) for one in (self._outputs, self._labels) if one is not None)
            raise SpecError(
                f"loss: outputs {outputs} and labels {labels} broadcast to {outputs[0]} x {outputs[0]} numbers. Give "
                "both the same shape, as by outputs.squeeze(-1) or labels.unsqueeze(-1)."
            )
        return result

    @staticmethod
    def _is(one: Tensor, other: Any) -> bool:
        return one is other or bool(
            one.shape == other.shape and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        )
