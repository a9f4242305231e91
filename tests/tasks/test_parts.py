"""Parts of tasks by themselves: inputs, targets, features and norms without lengths, files of several images."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conservtl.tasks.base import Task
from conservtl.tasks.speech.corpora import EspeakData, speakers
from conservtl.tasks.transcribe.features import Features
from conservtl.tasks.transcribe.masked_layers import MaskedBatchNorm1d, MaskedGroupNorm1d
from conservtl.tasks.vision import DigitsData, ImageFolderData, VisionAugment
from conservtl.tasks.vision.colour_modes import _is_stack

X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))


def test_a_model_is_called_without_the_labels():
    assert Task.inputs(None, {"x": 1, "labels": 2, "mask": 3}) == {"x": 1, "mask": 3}
    assert Task.inputs(None, (1, 2)) == 1


def test_targets_of_espeak_are_voices():
    assert len(speakers(EspeakData(kind="espeak"))) > 3


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [("none", [[1.0, 3.0], [5.0, 7.0]]), ("mean", [[-3.0, -1.0], [1.0, 3.0]]), ("bands", [[-1.0, -1.0], [1.0, 1.0]])],
)
def test_normalised_features(normalise, expected):
    found = Features(normalise=normalise)._normalised(torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
    assert torch.allclose(found, torch.tensor(expected))


def test_norms_without_lengths_are_plain():
    batch_norm, group_norm = nn.BatchNorm1d(3).eval(), nn.GroupNorm(1, 3)
    assert torch.equal(MaskedBatchNorm1d(batch_norm).eval()(X), batch_norm(X))
    assert torch.equal(MaskedGroupNorm1d(group_norm)(X), group_norm(X))
    masked = MaskedGroupNorm1d(nn.GroupNorm(3, 3))
    masked.lengths = torch.tensor([4])  # of another batch
    assert torch.equal(masked(X), nn.GroupNorm(3, 3)(X))


def test_only_pages_of_one_size_are_a_stack():
    image = SimpleNamespace(format="MPO", n_frames=2)
    assert not _is_stack(image, 2)
    sizes = [(4, 4), (2, 2)]
    image = SimpleNamespace(format="TIFF", seek=lambda number: vars(image).update(size=sizes[number]))
    assert not _is_stack(image, 2)
    sizes[1] = (4, 4)
    assert _is_stack(image, 2)


def test_an_augmentation_of_ones_own_is_taken_as_it_is(tmp_path):
    own = VisionAugment(flip=False, shift=1)
    assert ImageFolderData(kind="imagefolder", root=tmp_path, augment=own).augmentation(32) is own
    assert ImageFolderData(kind="imagefolder", root=tmp_path, augment=False).augmentation(32) is None
    assert not DigitsData(kind="digits").augmentation(32).flip
