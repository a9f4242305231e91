"""Form in which the task's loss takes the model's outputs, read from the graph of operations between the two."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from conservtl.compat import saved_by_node
from conservtl.functions import labels_of
from conservtl.plan.term import OutputForm, TaskLoss

__all__ = ["on_other_inputs", "read_task_loss"]

_SOFTMAX = {"NllLoss", "LogSoftmax", "Softmax", "CtcLoss", "CudnnCtcLoss", "MultiMarginLoss", "Logsumexp"}
_SIGMOID = {
    "BinaryCrossEntropyWithLogits",
    "LogSigmoid",
    "Sigmoid",
    "Softplus",
    "SoftMarginLoss",
    "MultilabelMarginLoss",
}
_SQUARED = {"MseLoss", "SmoothL1Loss", "HuberLoss", "Abs", "Pow", "LinalgVectorNorm", "Norm"}
_ALIGNED = {"CtcLoss", "CudnnCtcLoss"}
_MIXING = {"Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv", "Dot", "Convolution", "Cdist", "EuclideanDist"}
_MIXING |= {"Pow", "Sum", "LinalgVectorNorm", "NativeLayerNorm", "NativeBatchNorm", "EmbeddingBag"}
"""Operations that compute others from outputs: behind them a softmax is no longer of the outputs."""
_SAME_AXES = {"ToCopy", "Clone", "Contiguous", "Slice", "Mul", "Div", "Add", "Index"}
_NODES = 400  # of the graph that are searched for the outputs
_NEAR = 12  # nodes next to the loss that are read if it does not lead to the outputs
_UNSIGNED = 1 << 63

Node = Any


def read_task_loss(loss: Tensor, logits: Any, batch: Any = None) -> TaskLoss:
    """Return how a loss takes the outputs: their form, class axis, and the positions that it counts.

    The operations from the outputs to the loss say it: a softmax or a loss of classes, a sigmoid or a loss of binary
    labels, a squared or absolute difference. Classes are on the axis of the softmax. A position does not count if its
    label is the ignored index (-100 by default); without such a loss, if its label in the batch is -100. The labels of
    a CTC loss have positions of their own, which say nothing of the outputs'.
    """
    if not isinstance(logits, Tensor) or loss.grad_fn is None:
        return TaskLoss(None, "the loss is not computed from the outputs")
    ends = _ends(logits)
    nodes, linked = _between(loss.grad_fn, ends, logits)
    names = [_name(node) for node in nodes]
    axis = _axis(nodes, names, ends, logits) if linked else None
    form, why = _form(set(names), loss)
    if form in ("softmax", "sigmoid") and linked and not _direct(nodes, names, ends, logits):
        form, axis = "squared", None  # classes of a head outside the model: its outputs are features
    counted = _counted(nodes, names, logits, axis) if form == "softmax" else None
    aligned = form == "squared" or bool(_ALIGNED.intersection(names))
    if counted is None and not aligned:
        counted = _counted_in(batch, logits, axis)
    return TaskLoss(form, why, axis, counted, aligned)


def on_other_inputs(task: TaskLoss, logits: Any, batch: Any) -> TaskLoss:
    """Return the form of a loss for outputs that it was not computed on: their own labels say which count."""
    if task.aligned or not isinstance(logits, Tensor):
        return replace(task, counted=None)
    return replace(task, counted=_counted_in(batch, logits, task.axis))


def _name(node: Node) -> str:
    """Return the name of an operation: NllLoss2DBackward0 is NllLoss."""
    return re.sub(r"(\dD)?Backward\d*$", "", str(node.name()))


def _form(names: set[str], loss: Tensor) -> tuple[OutputForm | None, str]:
    """Return the form, and why there is none."""
    classes, labels = names & _SOFTMAX, names & _SIGMOID
    given = "NllLoss" in names and "Log" in names and not names & {"LogSoftmax", "Softmax"}
    if given or ("BinaryCrossEntropy" in names and not labels):
        return None, "the loss takes them as probabilities, so logits are not known: let the model return logits"
    if classes and labels:
        return None, f"the loss takes them as classes ({min(classes)}) and as labels of their own ({min(labels)})"
    if classes:
        return "softmax", ""
    if labels:
        return "sigmoid", ""
    if names & _SQUARED:
        return "squared", ""
    return None, f"the loss ({_name(loss.grad_fn)}) says neither classes, nor binary labels, nor numbers"


def _ends(logits: Tensor) -> set[Node]:
    """Return the operations that computed the outputs: the last, and those before it that only pass them on.

    A model that computes its loss itself returns other tensors than the loss is of, if it is wrapped: copies in single
    precision (Accelerate), or the results of a node behind the outputs and the loss (DDP).
    """
    ends: set[Node] = set()
    node, place = logits.grad_fn, logits.output_nr
    while node is not None:
        name = _name(node)
        if name == "_DDPSink":  # behind the loss too, so no end
            node, place = node.next_functions[place]
            continue
        ends.add(node)
        if name not in ("ToCopy", "Clone"):
            break
        node, place = node.next_functions[0]
    return ends


def _between(start: Node, ends: set[Node], logits: Tensor) -> tuple[list[Node], bool]:
    """Return the operations between the loss and the outputs, the loss first, and whether they lead there.

    If they do not, as with outputs of another forward pass, these are the operations next to the loss.
    """
    order: list[Node] = []
    parents: dict[Node, list[Node]] = {start: []}
    queue = deque([start])
    found: set[Node] = set()
    while queue and len(order) < _NODES:
        node = queue.popleft()
        if node in ends or getattr(node, "variable", None) is logits:
            found.add(node)
            continue
        order.append(node)
        for after, _ in node.next_functions:
            if after is None:
                continue
            if after not in parents:
                parents[after] = []
                queue.append(after)
            parents[after].append(node)
    if not found:
        return order[:_NEAR], False
    linked: set[Node] = set()
    queue = deque(node for end in found for node in parents[end])
    while queue:
        node = queue.popleft()
        if node not in linked:
            linked.add(node)
            queue.extend(parents[node])
    return [node for node in order if node in linked], True


def _direct(nodes: Sequence[Node], names: Sequence[str], ends: set[Node], logits: Tensor) -> bool:
    """Return whether a softmax or a sigmoid takes the outputs themselves: moved, resized or scaled at most."""
    between = dict(zip(nodes, names, strict=True))
    queue = [node for node, name in between.items() if name in _SOFTMAX | _SIGMOID]
    seen = set(queue)
    while queue:
        for after, _ in queue.pop().next_functions:
            if after in ends or (after is not None and getattr(after, "variable", None) is logits):
                return True
            if after in between and after not in seen and between[after] not in _MIXING:
                seen.add(after)
                queue.append(after)
    return False


def _axis(nodes: Sequence[Node], names: Sequence[str], ends: set[Node], logits: Tensor) -> int | None:
    """Return the axis of the outputs that the softmax runs over; None: not known."""
    for node, name in zip(nodes, names, strict=True):
        if name in ("LogSoftmax", "Softmax"):
            shape = saved_by_node(node, "result").shape
            over = _signed(saved_by_node(node, "dim")) % len(shape)
            classes = shape[over]
            axis = _followed(node, over, ends, logits)
            if axis is not None:
                return axis
            fitting = [place for place in range(1, logits.ndim) if logits.shape[place] == classes]
            return fitting[0] if len(fitting) == 1 else None
    return None


def _followed(node: Node, axis: int, ends: set[Node], logits: Tensor) -> int | None:
    """Return the axis in the outputs of an axis of an operation's input; None: not known."""
    while True:
        node = node.next_functions[0][0] if node.next_functions else None
        if node is None:
            return None
        if node in ends or getattr(node, "variable", None) is logits:
            return axis % logits.ndim
        name = _name(node)
        if name == "Transpose":
            first, second = (_signed(one) for one in (saved_by_node(node, "dim0"), saved_by_node(node, "dim1")))
            if axis < 0 or first < 0 or second < 0:
                return None
            axis = {first: second, second: first}.get(axis, axis)
        elif name == "Permute":
            axis = _signed(saved_by_node(node, "dims")[axis])
        elif name in ("View", "UnsafeView", "ReshapeAlias"):
            before = tuple(saved_by_node(node, "self_sym_sizes"))
            if axis != 1 or logits.ndim < 3:
                return None
            axis = len(before) - 1
        elif name not in _SAME_AXES:
            return None


def _counted(nodes: Sequence[Node], names: Sequence[str], logits: Tensor, axis: int | None) -> Tensor | None:
    """Return which positions the loss of classes counts, as its labels say."""
    shape = _positions(logits, axis)
    for node, name in zip(nodes, names, strict=True):
        if name == "NllLoss":
            target = saved_by_node(node, "target")
            counted: Tensor = target != _signed(saved_by_node(node, "ignore_index"))
            if counted.numel() == shape.numel():
                return counted.view(shape)
            # A language model's loss, of the outputs without the last position and the labels without the first.
            if len(shape) == 2 and counted.numel() == shape[0] * (shape[1] - 1) and "Slice" in names:
                return F.pad(counted.view(shape[0], -1), (0, 1))
    return None


def _counted_in(batch: Any, logits: Tensor, axis: int | None) -> Tensor | None:
    """Return which positions have a label other than -100 in a batch."""
    try:
        labels = labels_of(batch)
    except (KeyError, IndexError, TypeError):
        return None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != _positions(logits, axis):
        return None
    return labels.to(logits.device) != -100


def _positions(logits: Tensor, axis: int | None) -> torch.Size:
    """Return the shape of the outputs without the class axis."""
    classes = {3: 2}.get(logits.ndim, min(1, logits.ndim)) if axis is None else axis
    return torch.Size(size for place, size in enumerate(logits.shape) if place != classes)


def _signed(value: int) -> int:
    """Return an integer that torch gives without its sign."""
    return int(value) - 2 * _UNSIGNED if int(value) >= _UNSIGNED else int(value)
