"""A task's class is refused at its definition if a spec cannot hold it or a saved model could not be loaded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, model_validator
from torch import nn

import conservtl as ctl
from conservtl.experiments.spec.spec import parse_spec, schema
from conservtl.spec_model import FrozenModel
from conservtl.tasks import base
from conservtl.tasks.base import DataSection, Task, task_classes
from conservtl.tasks.registry import task_named, tasks


class Model(FrozenModel):
    width: int = 4
    """Units of the hidden layer."""


class NoDefault(FrozenModel):
    width: int


class WrongDefault(FrozenModel):
    width: int = 4

    @model_validator(mode="after")
    def _even(self):
        raise ValueError("width must be odd")


class Data(DataSection):
    kind: Literal["first"] = "first"


class Other(DataSection):
    kind: Literal["second"] = "second"


class Undescribed(DataSection):
    kind: Literal["third"] = "third"
    read: Callable[[str], Any] = print


class Inputs(FrozenModel):
    pass


def whole(**attributes):
    """The attributes of a complete task, some replaced or left out (None)."""
    base_ = {"name": "declared", "summary": "A task.", "model_section": Model, "data_section": Data}
    fields = {**base_, "preprocessing": Inputs, **attributes}
    return {name: value for name, value in fields.items() if value is not None}


def methods(*without):
    named = ["load", "build", "loss", "metrics", "predictions"]
    return {name: (lambda self, *_, **__: None) for name in named if name not in without}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """The tasks defined in a test are unknown to others."""
    tasks()  # the built-in ones register at their first import, for good
    monkeypatch.setattr(base, "_CLASSES", dict(base._CLASSES))


@pytest.mark.parametrize("name", ["summary", "model_section", "data_section", "preprocessing"])
def test_each_attribute_must_be_declared(name):
    with pytest.raises(ctl.SpecError, match=rf"task 'declared': Mine must declare {name}, .*class attributes"):
        type("Mine", (Task,), whole(**{name: None}) | methods())
    assert "declared" not in task_classes()


def test_all_that_is_missing_is_named_at_once():
    with pytest.raises(ctl.SpecError, match=r"must declare summary, .*; preprocessing, "):
        type("Mine", (Task,), whole(summary=None, preprocessing=None) | methods())


def test_an_attribute_may_be_inherited():
    class Common(Task):
        summary: ClassVar[str] = "A task."
        model_section: ClassVar[type[Model]] = Model
        data_section: ClassVar[Any] = Annotated[Data | Other, Field(discriminator="kind")]
        preprocessing: ClassVar[type[Inputs]] = Inputs

    type("Mine", (Common,), {"name": "declared"} | methods())
    assert parse_spec({"task": "declared", "data": {"kind": "second"}}).data == Other()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"model_section": NoDefault}, r"every field of NoDefault must have a default .*; width: Field required"),
        ({"model_section": WrongDefault}, r"every field of WrongDefault must have a default .*width must be odd"),
        ({"data_section": Undescribed}, r"Undescribed\.read must be of a type that JSON can describe"),
        ({"data_section": Annotated[Data | Undescribed, Field(discriminator="kind")]}, r"Undescribed\.read must be"),
        (
            {"data_section": dict},
            r"Mine\.data_section must be a subclass of pydantic\.BaseModel; received <class 'dict'>",
        ),
        ({"preprocessing": Inputs()}, r"Mine\.preprocessing must be a subclass of pydantic\.BaseModel"),
        ({"name": ""}, "name must be a text that specs can name; received ''"),
        ({"name": 3}, "name must be a text that specs can name; received 3"),
    ],
)
def test_sections_that_a_spec_cannot_hold(attributes, message):
    with pytest.raises(ctl.SpecError, match=message):
        type("Mine", (Task,), whole(**attributes) | methods())
    assert "declared" not in task_classes()
    assert "declared" not in json.loads(schema())["discriminator"]["mapping"]


@pytest.mark.parametrize("without", [("build",), ("build", "loss")])
def test_an_imported_task_that_lacks_a_method_is_named(without):
    """The spec's error, and the one for its name alone."""
    type("Mine", (Task,), whole() | methods(*without))
    missing = rf"'declared' is imported, but [\w.]*\.Mine does not implement {', '.join(without)}\."
    with pytest.raises(ctl.SpecError, match=missing) as raised:
        parse_spec({"task": "declared"})
    assert "--import" not in str(raised.value)
    with pytest.raises(ctl.SpecError, match=missing):
        task_named("declared")


def test_no_class_of_the_library_is_taken_for_a_task_without_a_name():
    importlib.import_module("conservtl.experiments.run.own_model")
    with pytest.raises(ctl.SpecError, match=r"'visoin' is none of .*Did you mean 'vision'") as raised:
        parse_spec({"task": "visoin"})
    assert "conservtl." not in str(raised.value)


def test_an_imported_task_without_a_name_is_named():
    cls = type("Nameless", (Task,), whole(name=None) | methods())
    for ask in (lambda: parse_spec({"task": "declared"}), lambda: task_named("declared")):
        with pytest.raises(ctl.SpecError, match=r"Nameless.* is imported, but has no name: .* name = 'declared'"):
            ask()
    assert isinstance(cls().inputs((nn.Identity(), 0)), nn.Module)
