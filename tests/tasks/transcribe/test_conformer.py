"""The compact Conformer: padding changes nothing, lengths are those of the frames, CTC's needs are checked."""

from __future__ import annotations

import pytest
import torch

import conservtl as ctl
from conservtl.tasks.audio.waves import at_speed
from conservtl.tasks.transcribe import ModelSpec, SpecAugment, Transcribe, TranscribePreprocessing, build
from conservtl.tasks.transcribe.conformer import ConformerArgs, ConformerCTC
from conservtl.tasks.transcribe.decoding import frames_needed
from conservtl.tasks.transcribe.recognizers import CTC

SMALL = ConformerArgs(width=16, blocks=2, heads=2, kernel=5)


@pytest.mark.parametrize("factor", [2, 4])
def test_an_utterance_alone_gives_what_it_gives_in_a_padded_batch(factor):
    torch.manual_seed(0)
    model = ConformerCTC(20, 6, SMALL.model_copy(update={"subsampling": factor})).eval()
    inputs, lengths = torch.randn(3, 61, 20), torch.tensor([61, 30, 7])
    with torch.no_grad():
        outputs, frames = model(inputs, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone, count = model(inputs[row : row + 1, :length], torch.tensor([length]))
            assert count.item() == frames[row].item() == alone.shape[1] == -(-length // factor)
            torch.testing.assert_close(outputs[row, : count.item()], alone[0], rtol=1e-4, atol=1e-5)


def test_convolutions_on_a_cpu_see_neighbouring_channels_and_give_what_the_plain_ones_give():
    torch.manual_seed(0)
    model = ConformerCTC(20, 6, SMALL)
    layouts = []
    for conv in (model.subsampling.conv2, model.blocks[0].convolution.depthwise):
        conv.register_forward_hook(lambda _, args, out: layouts.extend([args[0].stride(1), out.stride(1)]))
    model(torch.randn(3, 61, 20), torch.tensor([61, 30, 7]))
    assert layouts == [1, 1, 1, 1]
    for conv in (model.subsampling.conv2, model.blocks[0].convolution.depthwise):
        inputs = torch.randn(2, conv.in_channels, 9, *[4] * (conv.weight.ndim - 3), requires_grad=True)
        plain = torch.convolution(
            inputs, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, False, [0], conv.groups
        )
        torch.testing.assert_close(conv(inputs), plain)
        wanted = torch.autograd.grad(plain.square().sum(), [inputs, conv.weight, conv.bias])
        got = torch.autograd.grad(conv(inputs).square().sum(), [inputs, conv.weight, conv.bias])
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("shape", [(3, 7, 11), (40, 50, 60)])
def test_dropout_drops_its_share_and_scales_the_rest(shape):
    drop = ConformerCTC(20, 6, SMALL.model_copy(update={"dropout": 0.3})).subsampling.dropout
    inputs = torch.ones(shape, requires_grad=True)
    torch.manual_seed(0)
    outputs = drop(inputs)
    (gradient,) = torch.autograd.grad(outputs.sum(), inputs)
    torch.testing.assert_close(outputs, torch.where(outputs == 0, 0.0, 1 / 0.7))
    assert torch.equal(gradient, outputs)
    assert abs((outputs == 0).double().mean() - 0.3) < 4 * (0.3 * 0.7 / inputs.numel()) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(drop(inputs), outputs)
    assert not torch.equal(drop(inputs), outputs)
    assert torch.equal(drop.eval()(inputs), inputs)


def test_the_default_has_about_a_million_parameters_and_the_largest_usual_one_is_below_five():
    count = sum(one.numel() for one in build(ModelSpec(), TranscribePreprocessing(), 29).parameters())
    assert 0.9e6 < count < 1.2e6
    large = ModelSpec(args={"width": 192, "blocks": 8, "heads": 4})
    assert sum(one.numel() for one in build(large, TranscribePreprocessing(), 29).parameters()) < 5e6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"width": 20, "heads": 4}, "width must be a multiple of twice heads; received 20 and 4"),
        ({"kernel": 4}, "kernel must be odd; received 4"),
        ({"blcks": 4}, r"model\.args\.blcks.*conformer takes width, blocks"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args, message):
    with pytest.raises(ctl.SpecError, match=message):
        build(ModelSpec(args=args), TranscribePreprocessing(), 5)


def test_the_loss_is_that_of_torch_and_finite_under_bf16():
    """torch's mean: of each utterance's loss over its tokens."""
    task = Transcribe()
    torch.manual_seed(0)
    logits, lengths = torch.randn(2, 9, 4), torch.tensor([9, 5])
    labels = torch.tensor([[1, 2, 2], [3, -100, -100]])
    each = [
        torch.nn.functional.ctc_loss(
            logits[row, :frames].log_softmax(-1).unsqueeze(1), labels[row, :n].unsqueeze(0), [frames], [n]
        )
        for row, frames, n in ((0, 9, 3), (1, 5, 1))
    ]
    batch = {"labels": labels, "names": ["a", "b"]}
    torch.testing.assert_close(task.loss((logits, lengths), batch), torch.stack(each).mean())
    assert task.loss((logits.bfloat16(), lengths), batch).isfinite()


def test_a_text_that_needs_more_frames_than_there_are_is_named():
    """Equal neighbours need a blank between them: 1 2 2 needs four frames."""
    labels = torch.tensor([[1, 2, 3], [1, 2, 2]])
    assert frames_needed(labels).tolist() == [3, 4]
    outputs = torch.randn(2, 3, 4), torch.tensor([3, 3])
    with pytest.raises(ctl.DataError, match=r"b\.wav: .*it needs 4 .* the model gives 3"):
        Transcribe().loss(outputs, {"labels": labels, "names": ["a.wav", "b.wav"]})


def test_greedy_decoding_by_hand():
    """Best path 1 1 0 1 2 | 0 2 2 and padding: 1 1 2 and 2."""
    paths = torch.tensor([[1, 1, 0, 1, 2], [0, 2, 2, 1, 1]])
    outputs = torch.nn.functional.one_hot(paths, 3).float(), torch.tensor([5, 3])
    assert CTC().hypotheses(outputs) == [[1, 1, 2], [2]]


def test_augmentation_keeps_padding_zero_and_draws_from_its_generator_alone():
    augment = SpecAugment(time_masks=3, time_mask=0.3, noise=0.5, speed=0.1)
    batch = {"inputs": torch.ones(3, 40, 8), "lengths": torch.tensor([40, 20, 10]), "labels": torch.ones(3, 2)}
    state = torch.random.get_rng_state()
    first, second = (augment.of_batch(batch, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first["inputs"], second["inputs"])
    assert first["labels"] is batch["labels"]
    for row, length in zip(first["inputs"], first["lengths"], strict=True):
        assert not row[int(length) :].any()
    assert int(first["lengths"][0]) == first["inputs"].shape[1] != 40
    assert (first["inputs"][0] == 0).any()


def test_samples_at_another_speed_are_resampled_and_padding_stays_zero():
    augment = SpecAugment(time_masks=0, frequency_masks=0, speed=0.25)
    waves, lengths = torch.randn(2, 4000), torch.tensor([4000, 1500])
    waves[1, 1500:] = 0
    changed = augment.of_batch({"inputs": waves, "lengths": lengths}, torch.Generator().manual_seed(3))
    factor = 1 + 0.25 * (2 * float(torch.rand(1, generator=torch.Generator().manual_seed(3))) - 1)
    torch.testing.assert_close(changed["inputs"][0], at_speed(waves[0], factor))
    samples = changed["inputs"].shape[1]
    assert samples == pytest.approx(4000 / factor, rel=1e-2)
    assert changed["lengths"].tolist() == [samples, 1500 * samples // 4000]
    assert not changed["inputs"][1, changed["lengths"][1] :].any()


def test_another_voice_by_hand():
    """Bands move along the mel axis and get smooth offsets; frames stay where they are, and padding zero."""
    ramp = torch.arange(8.0).expand(2, 5, 8).contiguous()
    batch = {"inputs": ramp, "lengths": torch.tensor([5, 3]), "labels": torch.ones(2, 2)}
    still = {"time_masks": 0, "frequency_masks": 0}
    shifted = SpecAugment(**still, frequency_shift=0.25).of_batch(batch, torch.Generator().manual_seed(1))["inputs"]
    draws = torch.rand(4, generator=torch.Generator().manual_seed(1))
    moves = (2 * draws[2:] - 1) * 0.25 * 8  # behind those of the stretch
    for row, move, length in zip(shifted, moves, (5, 3), strict=True):
        expected = (torch.arange(8.0) + move).clamp(0, 7).expand(length, 8)
        torch.testing.assert_close(row[:length], expected, atol=1e-5, rtol=0)
        assert not row[length:].any()
    tilted = SpecAugment(**still, tilt=0.5).of_batch(batch, torch.Generator().manual_seed(1))["inputs"]
    offset = (tilted - ramp)[0]
    torch.testing.assert_close(offset, offset[:1].expand(5, 8))
    assert offset[0].std() > 0.05
    same = SpecAugment(**still).of_batch(batch, torch.Generator())["inputs"]
    assert torch.equal(same[0], ramp[0])
    stretched = SpecAugment(**still, frequency_stretch=0.5).of_batch(batch, torch.Generator().manual_seed(1))["inputs"]
    factor = 1 + 0.5 * (2 * draws[0] - 1)
    expected = (3.5 + factor * (torch.arange(8.0) - 3.5)).clamp(0, 7)
    torch.testing.assert_close(stretched[0, 0], expected, atol=1e-5, rtol=0)


def test_samples_have_no_mel_axis_to_bend():
    batch = {"inputs": torch.ones(2, 9), "lengths": torch.tensor([9, 4]), "labels": torch.ones(2, 2)}
    voices = SpecAugment(time_masks=0, frequency_stretch=0.2, frequency_shift=0.1, tilt=1.0)
    assert torch.equal(voices.of_batch(batch, torch.Generator())["inputs"][0], torch.ones(9))
