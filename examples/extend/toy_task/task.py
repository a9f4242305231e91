"""The task: what conservtl needs to know to adapt, measure, compare and predict."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from conservtl.data import Domains
from conservtl.tasks.base import Prediction, Task
from conservtl.tasks.headline import Headline
from toy_task.sections import PitchData, PitchModel, Sensor
from toy_task.signals import PitchPreprocessing, hums


class Pitch(Task):
    """Estimate the pitch of a hum under a change of the sensor: a regression, judged by its mean absolute error."""

    name: ClassVar[str] = "pitch"
    summary: ClassVar[str] = "The pitch of a hum under a change of the sensor."
    model_section: ClassVar[Any] = PitchModel
    data_section: ClassVar[Any] = PitchData
    preprocessing: ClassVar[Any] = PitchPreprocessing
    headline: ClassVar[Headline] = Headline("mae", better="lower", share=False, text="mean absolute error (octaves)")
    example: ClassVar[str] = "recording"

    def load(self, data: PitchData, model: PitchModel, *, seed: int, source: bool) -> Domains:
        """Make the recordings up. The seed draws the target's shots; the source's recordings are always the same."""
        shots = hums(data.shots, data.target, data.noise, seed=1000 + seed)
        held = round(data.validation * data.shots)
        learned = hums(data.source_hums, "good", data.noise, seed=0) if source else None
        return Domains(
            labels=("pitch",),
            source_labels=("pitch",),
            shots=shots.take(range(held, data.shots)),
            validation=shots.take(range(held)) if held else None,
            target_test=hums(256, data.target, data.noise, seed=1),
            source_train=learned,
            source_test=hums(256, "good", data.noise, seed=2) if source else None,
            preprocessing=PitchPreprocessing(),
        )

    def build(self, model: PitchModel, preprocessing: PitchPreprocessing, outputs: int) -> nn.Module:
        """Return the network, with random weights."""
        width = model.width
        return nn.Sequential(
            nn.Unflatten(1, (1, -1)),
            nn.Conv1d(1, width, 9, stride=2),
            nn.ReLU(),
            nn.Conv1d(width, width, 9, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(width, outputs),
        )

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the mean squared error."""
        return nn.functional.mse_loss(outputs, batch[1])

    def metrics(self, outputs: Tensor, batch: Any) -> Mapping[str, Tensor]:
        """Return the mean absolute error."""
        return {"mae": (outputs - batch[1]).abs().mean()}

    def predictions(self, outputs: Tensor, labels: tuple[str, ...], files: Sequence[Path]) -> list[Prediction]:
        """Return the pitch of each file as text."""
        return [Prediction(file, f"{pitch:.3f}") for file, pitch in zip(files, outputs[:, 0].tolist(), strict=True)]

    def targets(self, data: PitchData) -> tuple[str, ...]:
        """Return the sensors that a study is repeated over."""
        return get_args(Sensor)

    def on_target(self, data: PitchData, target: str) -> dict[str, Any]:
        """Return the field that names the sensor."""
        return {"data.target": target}

    def target_name(self, data: PitchData, domains: Domains) -> str:
        """Return the sensor, as a report names it."""
        return f"the sensor with {data.target}" if data.target != "muffled" else "the muffled sensor"

    def fingerprint(self, data: PitchData, train: Any, preprocessing: Any) -> Any:
        """Return the fields that the source's recordings depend on, so that all sensors share one source model."""
        return data.model_dump(mode="json", include={"noise", "source_hums"})
