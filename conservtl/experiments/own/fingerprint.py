"""A digest of what a program holds, so that a repeated call finds its results again."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from conservtl.batches import tensors_of
from conservtl.data import Examples, first_batch, length_of
from conservtl.engine.randomness import preserve_rng, seed_all
from conservtl.experiments.own.data import Rows
from conservtl.experiments.own.first_look import tried
from conservtl.storage.tensor_files import add_to_digest

__all__ = ["fingerprint"]


def fingerprint(problem: Any) -> str:
    """Return a digest of a problem: equal in another process that makes the same call, other if anything differs.

    Models, the source and data count by their values. A dataset is read once, from fixed seeds. Functions count by
    their code, that of functions of the same module which they call, and by loss and metrics on the first examples.
    """
    digest = _Digest()
    task, sets = problem.task, problem.task.sets
    with preserve_rng():
        for seed in (0, 1):
            seed_all(seed)
            digest.add(made := problem.task.make())
        data = {"train": sets.train, "test": sets.test, "valid": sets.valid}
        for name, each in [(f"{n} {t}", d) for n, of in data.items() for t, d in of.items()]:
            digest.add(name)
            digest.add_data(each)
        for each in (sets.source_train, sets.source_test):
            digest.add_data(each)
        batch = first_batch(next(iter(sets.train.values())), 2)
        outputs, metrics = tried(made, task.functions, batch)
        digest.add(sorted(f"{name} {float(_mean(value)):.3e}" for name, value in metrics.items()))
        digest.add([f"{float(value.float().mean()):.3e}" for value in tensors_of(outputs)])
    digest.add(dict(problem.start.read.tensors))
    digest.add(problem.start.model)
    digest.add([task.functions.forward, task.functions.loss, task.functions.metrics, task.augment])
    if task.proxies is not None:  # results without them keep their names
        digest.add(task.proxies)
    digest.add(
        [
            problem.task.make.given if problem.task.make.calls else None,
            problem.optimizer,
            problem.fresh,
            problem.headless,
            problem.allow,
            problem.example,
        ]
    )
    digest.add([sets.labels, sets.source_labels, problem.filled, task.headline.as_json()])
    return digest.text()


def _mean(value: Any) -> Any:
    return value[0] / max(1, float(value[1])) if isinstance(value, (tuple, list)) else value


class _Digest:
    """A hash of Python objects by their content."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, Any] = {}

    def text(self) -> str:
        return self._hash.hexdigest()[:20]

    def add_data(self, data: Any) -> None:
        """Add data row by row; tensors in memory as a whole."""
        if isinstance(data, DataLoader):
            data = data.dataset
        if data is None or isinstance(data, (Mapping, Examples, TensorDataset, Rows)):
            self.add(data)
            return
        self.add(length_of(data))
        seed_all(0)
        for place in range(length_of(data)):
            self.add(data[place])

    def add(self, value: Any) -> None:
        """Add an object of any kind."""
        self._hash.update(f"<{type(value).__module__}.{type(value).__qualname__}>".encode())
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
            self._hash.update(repr(value).encode())
        elif isinstance(value, Tensor):
            dense = value.detach().cpu()
            add_to_digest(self._hash, "", (dense.to_dense() if dense.is_sparse else dense).clone())
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._hash.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
        elif isinstance(value, types.ModuleType):
            self._hash.update(value.__name__.encode())
        elif id(value) not in self._seen:
            self._seen[id(value)] = value  # held, so that no other object gets its id
            self._add_parts(value)
            if isinstance(value, (Mapping, tuple, list)):
                del self._seen[id(value)]  # rows of a dataset are many

    def _add_parts(self, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value, key=repr):
                self.add(key)
                self.add(value[key])
        elif isinstance(value, (tuple, list)):
            for each in value:
                self.add(each)
        elif isinstance(value, (set, frozenset)):
            self.add(sorted(map(repr, value)))
        elif isinstance(value, functools.partial):
            self.add([value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            self.add([value.__func__, value.__self__])
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, nn.Module):
            self.add([repr(value), dict(value.state_dict()), sorted({_class_name(each) for each in value.modules()})])
            self.add([type(each).forward for each in value.modules() if not type(each).__module__.startswith("torch.")])
        else:
            self.add(value.__qualname__ if isinstance(value, type) else _class_name(value))
            if not isinstance(value, type):
                self.add(getattr(value, "__dict__", {}))

    def _add_function(self, function: types.FunctionType) -> None:
        self.add(function.__qualname__)
        self._add_code(function.__code__)
        self.add([function.__defaults__, function.__kwdefaults__])
        self.add([_content(cell) for cell in function.__closure__ or ()])
        for name in function.__code__.co_names:
            used = function.__globals__.get(name)
            if isinstance(used, (int, float, str, tuple)) or (
                isinstance(used, types.FunctionType) and used.__module__ == function.__module__
            ):
                self.add(used)

    def _add_code(self, code: types.CodeType) -> None:
        self.add([code.co_code, code.co_names, code.co_varnames])
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_code(constant)
            else:
                self.add(constant)


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
