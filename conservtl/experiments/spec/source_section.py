"""The section ``source`` of a spec: where the source model comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from conservtl.bounds import Place, check_names
from conservtl.engine import Training
from conservtl.source.references import is_name, reference_of
from conservtl.spec_model import FrozenModel

__all__ = ["SourceSection"]


def _path_or_name(value: Any) -> Any:
    return check_names(Path(value)) if isinstance(value, str) and not is_name(value) else value


class SourceSection(FrozenModel):
    """The source model's origin."""

    weights: Annotated[str | Path, AfterValidator(_path_or_name)] | None = None
    """Source weights: a file, a folder as save_pretrained writes it, or a name: torchvision:ResNet18_Weights.DEFAULT,
    timm:resnet18.a1_in1k, torchaudio:WAV2VEC2_BASE, hf:ORG/NAME@REVISION (safetensors), or a URL with #sha256=... The
    spec that a run writes names the very weights it took. null: a source model is trained on the source data, and
    cached."""
    key: str | None = None
    """Entry of the file that holds the weights, such as state_dict_ema; dots lead to nested ones. null: state_dict,
    model_state_dict, model or module, in this order, or else the only dictionary of tensors."""
    prefix: str | None = None
    """What the names of the wanted tensors begin with, such as backbone; removed, and other tensors are left out."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Regular expression -> replacement, for names in the file that differ from the model's; in order, after prefix."""
    data: Literal["auto"] | None = "auto"
    """auto: the source part of ``data`` (other speakers, uncorrupted images, other classes). null: the source comes
    without data; what the model keeps of it is then measured against the source model's own outputs."""
    labels: tuple[str, ...] | None = None
    """The labels of the source model's outputs, in order. null: those that the source data gives. The source's
    examples are numbered by them. If they equal the target's, in the same order, the source's head serves the target
    too."""
    training: Training = Training(epochs=30, lr=1e-3, schedule="one_cycle", evaluate_every=1000)
    """How a source model is trained if no weights are given."""
    cache: Place | None = None
    """Folder for trained source models, keyed by content. null: ``.cache/conservtl`` in the home folder."""

    @property
    def shown(self) -> str:
        """The weights' name in messages."""
        return self.weights.name if isinstance(self.weights, Path) else str(self.weights)

    def pinned(self) -> SourceSection:
        """Return the section with a name that means the same weights later too.

        Raises:
            SourceError: the name is wrong, or the server that knows it cannot be reached.
        """
        if not isinstance(self.weights, str) or (reference := reference_of(self.weights)) is None:
            return self
        return self.model_copy(update={"weights": str(reference.pinned())})
