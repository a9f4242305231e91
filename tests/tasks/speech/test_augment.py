"""Random changes of speech inputs: each along its own axis, by how much it says, drawn from one generator."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from conservtl.tasks.audio.noise import SyntheticNoise
from conservtl.tasks.audio.waves import WaveAugment
from conservtl.tasks.speech import SpeechAugment
from conservtl.tasks.speech.corpora import EspeakData, _augmentations

STRONG = SpeechAugment(time_stretch=0.3, frequency_stretch=0.2, frequency_shift=0.1, tilt=0.3, noise=0.3, time_masks=2)


@pytest.mark.parametrize("shape", [(6, 40, 101), (6, 8000)])
@pytest.mark.parametrize("augment", [SpeechAugment(), STRONG])
def test_random_changes_follow_the_generator(shape, augment):
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before, state = inputs.clone(), torch.get_rng_state()
    first, again, other = (augment(inputs, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == inputs.shape
    assert first.dtype == inputs.dtype
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(inputs, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_change_leaves_inputs_as_they_are():
    nothing = SpeechAugment(time_shift=0, time_masks=0, frequency_masks=0)
    for shape in ((2, 40, 101), (2, 800)):
        inputs = torch.randn(shape)
        torch.testing.assert_close(nothing(inputs, torch.Generator()), inputs, atol=1e-4, rtol=0)


def test_masks_blank_at_most_what_is_allowed():
    masks = SpeechAugment(time_shift=0, time_masks=1, time_mask=0.2, frequency_masks=1, frequency_mask=0.25)
    inputs = torch.ones(50, 40, 100)
    inputs[:, ::2] = -1
    blank = masks(inputs, torch.Generator().manual_seed(0)).abs() < 0.5
    assert blank.all(dim=1).sum(dim=1).max() <= 21
    assert blank.all(dim=2).sum(dim=1).max() <= 11
    assert blank.any()


BANDS, FRAMES, COUNT = 48, 200, 64
BAND, ONSET = 20.0, 70.0  # of the tone
NOTHING = SpeechAugment(time_shift=0, time_masks=0, frequency_masks=0)


def tones() -> Tensor:
    """Spectrograms of one tone, a bump around its band, that sets in at one frame."""
    at = torch.arange(BANDS) + 0.5
    bump = torch.exp(-((at - BAND) ** 2) / 8)
    level = torch.sigmoid(torch.arange(FRAMES) + 0.5 - ONSET)
    return (bump[:, None] * level).expand(COUNT, BANDS, FRAMES).contiguous()


def bands_of(spectrograms: Tensor) -> Tensor:
    """Mean band of each, weighted by its energy."""
    energy = spectrograms.sum(dim=2)
    return energy @ (torch.arange(BANDS) + 0.5) / energy.sum(dim=1)


def onsets_of(spectrograms: Tensor) -> Tensor:
    """Where each one's level crosses half of what it rises to, between frames."""
    level = spectrograms.sum(dim=1)
    level = level / level[:, -1:]
    after = (level >= 0.5).float().argmax(dim=1)
    row = torch.arange(len(level))
    low, high = level[row, after - 1], level[row, after]
    return after - 0.5 + (0.5 - low) / (high - low)


def symmetric_draws(seed: int, fields: int, count: int) -> list[Tensor]:
    """Numbers between -1 and 1: one tensor for each field, drawn in order."""
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.rand(count, generator=generator) - 1 for _ in range(fields)]


def place_after(place: float, size: int, stretch: Tensor, shift: Tensor) -> Tensor:
    """Where a place of an axis lies after it was scaled about its middle and shifted.

    The output at y shows the input at middle + (1 + stretch) (y - middle) + shift * size.
    """
    return size / 2 + (place - size / 2 - shift * size) / (1 + stretch)


@pytest.mark.parametrize(
    "fields",
    [
        {"time_stretch": 0.2},
        {"time_shift": 0.1},
        {"frequency_stretch": 0.2},
        {"frequency_shift": 0.1},
        {"time_stretch": 0.2, "time_shift": 0.05, "frequency_stretch": 0.3, "frequency_shift": 0.1},
    ],
    ids=" ".join,
)
def test_a_tone_moves_along_the_axis_that_is_named(fields):
    """A change of the mel axis moves the band and leaves the onset; one of time does the reverse."""
    names = ("time_stretch", "time_shift", "frequency_stretch", "frequency_shift")
    draws = symmetric_draws(3, len(names), COUNT)
    drawn = {name: fields.get(name, 0.0) * draw for name, draw in zip(names, draws, strict=True)}
    band = place_after(BAND, BANDS, drawn["frequency_stretch"], drawn["frequency_shift"])
    onset = place_after(ONSET, FRAMES, drawn["time_stretch"], drawn["time_shift"])

    changed = NOTHING.model_copy(update=fields)(tones(), torch.Generator().manual_seed(3))

    torch.testing.assert_close(bands_of(changed), band, atol=0.1, rtol=0)
    torch.testing.assert_close(onsets_of(changed), onset, atol=0.2, rtol=0)
    moves = {"time": onset.sub(ONSET).abs().max(), "frequency": band.sub(BAND).abs().max()}
    for axis, move in moves.items():
        assert (move > 0.5) == any(name.startswith(axis) for name in fields), axis


@pytest.mark.parametrize(("field", "dim"), [("time", 2), ("frequency", 1)])
def test_masks_blank_whole_frames_or_whole_bands(field, dim):
    inputs = 2.0 * torch.randint(0, 2, (COUNT, BANDS, FRAMES), generator=torch.Generator().manual_seed(1)) - 1
    masks = NOTHING.model_copy(update={f"{field}_masks": 1, f"{field}_mask": 0.2})
    changed = masks(inputs, torch.Generator().manual_seed(0))
    blank = changed.abs() < 0.5  # the mean of as many ones as minus ones
    assert torch.equal(blank, blank.all(dim=3 - dim, keepdim=True).expand_as(blank))
    mean = inputs.mean(dim=(1, 2), keepdim=True).expand_as(inputs)
    torch.testing.assert_close(changed[blank], mean[blank])
    width = blank.any(dim=3 - dim).sum(dim=1)
    size = inputs.shape[dim]
    assert 0.1 * size < width.max() <= 0.2 * size + 1
    first, last = blank.any(dim=3 - dim).int().argmax(dim=1), blank.any(dim=3 - dim).flip(1).int().argmax(dim=1)
    assert torch.equal((size - last - first)[width > 0], width[width > 0])  # one span


def test_a_tilt_is_one_offset_a_band_for_all_frames():
    inputs = torch.randn(COUNT, BANDS, FRAMES, generator=torch.Generator().manual_seed(1))
    offsets = NOTHING.model_copy(update={"tilt": 0.5})(inputs, torch.Generator().manual_seed(0)) - inputs
    torch.testing.assert_close(offsets, offsets[:, :, :1].expand_as(offsets), atol=1e-4, rtol=0)
    assert offsets[:, :, 0].std(dim=1).min() > 0.01
    assert offsets[:, 1:, 0].sub(offsets[:, :-1, 0]).abs().max() < 0.2 * offsets.abs().max()  # smooth


def test_noise_is_white_up_to_its_standard_deviation():
    inputs = torch.zeros(COUNT, BANDS, FRAMES)
    noise = NOTHING.model_copy(update={"noise": 0.4})(inputs, torch.Generator().manual_seed(0))
    level = noise.std(dim=(1, 2))
    assert level.max() <= 0.41
    assert level.mean() == pytest.approx(0.2, abs=0.05)
    for near in (noise[:, 1:] * noise[:, :-1], noise[..., 1:] * noise[..., :-1]):
        assert (near.mean(dim=(1, 2)) / level**2).abs().max() < 0.05


def test_a_shifted_waveform_leaves_silence_behind():
    waves = 1 + torch.rand(COUNT, 1000, generator=torch.Generator().manual_seed(1))
    changed = NOTHING.model_copy(update={"time_shift": 0.1})(waves, torch.Generator().manual_seed(5))
    (draw,) = symmetric_draws(5, 1, COUNT)
    moves = (0.1 * draw * 1000).round().long().tolist()
    assert min(moves) < -20
    assert max(moves) > 20
    for before, after, move in zip(waves, changed, moves, strict=True):
        expected = torch.zeros(1000)
        if move >= 0:
            expected[move:] = before[: 1000 - move]
        else:
            expected[:move] = before[-move:]
        assert torch.equal(after, expected)


def test_a_waveform_is_masked_in_one_span_of_samples():
    waves = 1 + torch.rand(COUNT, 1000, generator=torch.Generator().manual_seed(1))
    masks = NOTHING.model_copy(update={"time_masks": 1, "time_mask": 0.2})
    blank = masks(waves, torch.Generator().manual_seed(0)) != waves
    width = blank.sum(dim=1)
    assert 100 < width.max() <= 201
    assert (blank[:, 1:] != blank[:, :-1]).sum(dim=1).max() <= 2


def test_samples_change_in_speed_room_and_noise():
    """Twice the speed by hand: a tone an octave higher, in the middle of silence."""
    tones = torch.sin(2 * torch.pi * 100 * torch.arange(1000) / 2000).expand(3, -1)
    nothing = {"time_shift": 0, "time_masks": 0}
    augment = SpeechAugment(**nothing, waves=WaveAugment(speeds=(2.0,)))
    assert torch.equal(augment(tones, torch.Generator().manual_seed(0)), tones)  # its rate is not known
    quick = augment.at(2000)(tones, torch.Generator().manual_seed(0))
    assert quick.shape == tones.shape
    assert not quick[:, :249].any()
    assert not quick[:, 751:].any()
    assert int(torch.fft.rfft(quick[0, 250:750]).abs().argmax()) == 50  # 200 Hz in a quarter of a second
    noisy = SpeechAugment(**nothing, waves=WaveAugment(speeds=(1.0,), noise=SyntheticNoise(snr=(10, 10), share=1)))
    added = noisy.at(2000)(tones, torch.Generator().manual_seed(0)) - tones
    ratio = 10 * (tones.square().mean(1) / added.square().mean(1)).log10()
    torch.testing.assert_close(ratio, torch.full((3,), 10.0), rtol=1e-3, atol=0)
    assert not torch.equal(added[0], added[1])


@pytest.mark.parametrize(
    ("features", "noise", "message"),
    [
        ({}, None, "augment.waves changes samples, and features.kind is 'logmel'.*Set features.kind to waveform"),
        ({"kind": "waveform"}, {"kind": "synthetic", "colours": ["babble"]}, "a babble is for utterances"),
    ],
)
def test_changes_that_words_do_not_have_are_refused(features, noise, message):
    with pytest.raises(ValidationError, match=message):
        EspeakData(features=features, augment={"waves": {"noise": noise}})


def test_the_sample_rate_is_that_of_the_features():
    data = EspeakData(features={"kind": "waveform", "sample_rate": 4000}, augment={"waves": {}})
    ours, theirs, _ = _augmentations(data).values()
    assert ours._change.rate == 4000
    assert theirs == data.source_augment
