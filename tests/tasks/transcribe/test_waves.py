"""Recordings changed at random in training: speed, room and noise, by seed and name alone."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

import conservtl as ctl
from conservtl.data.sequences import Sequences, joined
from conservtl.engine.buckets import BucketedBatches
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import parse_spec
from conservtl.tasks.audio.noise import SyntheticNoise, at_snr, babble, coloured, stretch
from conservtl.tasks.audio.rooms import decaying, reverberated
from conservtl.tasks.audio.waves import WaveAugment, WaveChange, at_speed
from conservtl.tasks.transcribe.task import Transcribe

soundfile = pytest.importorskip("soundfile")
RATE = 2000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def power(wave):
    return float(wave.square().mean())


def tone(hertz, seconds=0.5):
    return torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * RATE)) / RATE)


@pytest.mark.parametrize("speed", [0.9, 1.1, 1.25])
def test_a_recording_is_resampled_as_torchaudio_does(speed):
    functional = pytest.importorskip("torchaudio.functional")
    wave = torch.randn(1001, generator=seeded())
    expected, _ = functional.speed(wave, 16_000, speed)
    ours = at_speed(wave, speed)
    assert len(ours) == math.ceil(1001 / speed)
    torch.testing.assert_close(ours, expected[: len(ours)], rtol=1e-4, atol=1e-5)


def test_a_quicker_recording_is_higher():
    """100 Hz at 1.25 times the speed are 125 Hz: bin 50 of a transform of 0.4 s."""
    found = torch.fft.rfft(at_speed(tone(100), 1.25)).abs().argmax()
    assert int(found) == 50


@pytest.mark.parametrize("snr", [-3.0, 0.0, 20.0])
def test_noise_has_its_level_below_the_speech(snr):
    wave, noise = tone(100), 7 * torch.randn(1000, generator=seeded())
    added = at_snr(wave, noise, snr) - wave
    assert 10 * math.log10(power(wave) / power(added)) == pytest.approx(snr, abs=1e-3)


def test_noise_without_power_is_left_out():
    wave = tone(100)
    assert torch.equal(at_snr(wave, torch.zeros(1000), 10.0), wave)


def test_pink_noise_has_the_same_power_in_each_octave():
    spectrum = torch.fft.rfft(coloured("pink", 2**16, seeded())).abs().square()
    octaves = [float(spectrum[2**k : 2 ** (k + 1)].sum()) for k in range(8, 14)]
    assert max(octaves) / min(octaves) < 1.3
    white = torch.fft.rfft(coloured("white", 2**16, seeded())).abs().square()
    assert float(white[2**13 : 2**14].sum() / white[2**12 : 2**13].sum()) == pytest.approx(2, rel=0.1)


def test_a_babble_holds_each_voice_at_one_level():
    """Two tones, one a hundred times louder, both shorter than the babble."""
    both = babble([tone(100, 0.3), 100 * tone(300, 0.3)], 1000, seeded())
    spectrum = torch.fft.rfft(both).abs()
    assert float(spectrum[50] / spectrum[150]) == pytest.approx(1, rel=0.1)


def test_a_short_recording_is_repeated_and_a_long_one_cut():
    repeated = stretch(torch.arange(3), 7, seeded()).tolist()
    assert repeated == [(repeated[0] + place) % 3 for place in range(7)]
    cut = stretch(torch.arange(100), 10, seeded(1)).tolist()
    assert cut == list(range(cut[0], cut[0] + 10))


def test_echoes_fall_by_sixty_decibels_in_their_time_and_have_their_level():
    response = decaying(0.4, 6.0, RATE, seeded())
    assert response[0] == 1
    assert len(response) == 801
    echoes = response[1:]
    assert 10 * math.log10(1 / float(echoes.square().sum())) == pytest.approx(6, abs=1e-3)
    # Levels of two windows 0.2 s apart differ by 30 dB.
    early, late = power(echoes[:200]), power(echoes[400:600])
    assert 10 * math.log10(early / late) == pytest.approx(30, abs=2)


def test_speech_in_a_room_is_as_long_as_loud_and_not_delayed():
    """By torch's convolution; what comes before the strongest sample of the response is left out."""
    wave = torch.randn(400, generator=seeded())
    response = torch.tensor([0.01, 0.0, -0.5, 0.2, 0.0, 0.1])
    found = reverberated(wave, response)
    by_hand = -0.5 * wave
    by_hand[1:] += 0.2 * wave[:-1]
    by_hand[3:] += 0.1 * wave[:-3]
    by_hand *= math.sqrt(power(wave) / power(by_hand))
    torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=1e-4)
    assert power(found) == pytest.approx(power(wave), rel=1e-4)


def test_a_change_is_drawn_by_its_generator_alone():
    spec = WaveAugment(room={"kind": "synthetic", "share": 0.5}, noise={"kind": "synthetic"})
    change, wave = WaveChange(spec, RATE), tone(100)
    torch.manual_seed(0)
    first = change(wave, seeded(3))
    torch.manual_seed(1)
    assert torch.equal(first, change(wave, seeded(3)))
    drawn = [change(wave, seeded(seed)) for seed in range(40)]
    assert {len(one) for one in drawn} == {math.ceil(1000 / speed) for speed in (0.9, 1.0, 1.1)}
    assert len({one.sum().item() for one in drawn}) > 30
    assert change.durations == (1 / 1.1, 1 / 0.9)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two speakers, noise of 50 Hz, and one impulse response."""
    root = tmp_path_factory.mktemp("waves")
    lines = []
    for speaker, pitch in (("ann", 300), ("cid", 450)):
        for number, text in enumerate(("ab", "ba", "abba", "aab", "b", "a")):
            wave = torch.cat([tone(pitch * (1 + (letter == "a")), 0.2) for letter in text])
            name = f"{speaker}{number}.wav"
            soundfile.write(
                root / name, (wave / 4 + 0.01 * torch.randn(len(wave), generator=seeded(number))).numpy(), RATE
            )
            lines.append({"audio_filepath": name, "text": text, "speaker": speaker})
    (root / "all.json").write_text("\n".join(map(json.dumps, lines)))
    for folder, wave in (("noises", tone(50, 0.1)), ("rooms", torch.tensor([0.0, 1.0, 0.5]))):
        (root / folder).mkdir()
        soundfile.write(root / folder / "one.wav", wave.numpy() / 2, RATE)
    return root


def spec_of(root, waves, source=None, **training):
    return parse_spec(
        {
            "task": "transcribe",
            "model": {"args": {"width": 16, "blocks": 1, "heads": 2, "subsampling": 2, "dropout": 0}},
            "data": {
                "kind": "manifest", "root": str(root), "files": ["all.json"], "target": "cid", "shots": 4,
                "held_out": 0.3, "features": {"sample_rate": RATE, "n_mels": 12, "hop": 0.02},
                "augment": {"time_masks": 0, "frequency_masks": 0, "waves": waves},
                "source_augment": None if source is None else {"waves": source},
            },
            "source": {"training": {"epochs": 1, "batch_size": 4, "threads": 1}, "cache": str(root / "cache")},
            "training": {"epochs": 2, "batch_size": 2, "lr": 0.002, "threads": 1, **training},
        }
    )  # fmt: skip


BOTH = {"noise": {"kind": "synthetic", "colours": ["babble", "pink"], "share": 1.0}, "room": {"kind": "synthetic"}}


def epoch_of(data, **options):
    batches = BucketedBatches(data, **{"most": 2, "seconds": None, "shuffle": True, **options})
    return {
        name: batch["inputs"][row, : batch["lengths"][row]]
        for batch in batches
        for row, name in enumerate(batch["names"])
    }


def test_utterances_change_by_epoch_and_not_by_batch_or_order(root):
    shots = prepare(spec_of(root, BOTH)).domains.shots
    torch.manual_seed(0)
    first, second = epoch_of(shots), epoch_of(shots)
    torch.manual_seed(0)
    again = epoch_of(shots)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(first[name].shape != second[name].shape or not torch.equal(first[name], second[name]) for name in first)
    seed = 12345
    alone = {name: shots.batch([place], seed)["inputs"][0] for place, name in enumerate(shots.names)}
    together = shots.take([3, 1, 0, 2]).batch(range(4), seed)
    for row, name in enumerate(together["names"]):
        torch.testing.assert_close(together["inputs"][row, : together["lengths"][row]], alone[name])
    beside = joined([Sequences((torch.zeros(3, 12),), (torch.tensor([1]),), ("x",), (), (0.1,)), shots])
    assert beside.durations == (1 / 1.1, 1 / 0.9)
    assert torch.equal(beside.batch([1], seed)["inputs"][0], alone[shots.names[0]])
    assert torch.equal(beside.batch([0], seed)["inputs"][0], torch.zeros(3, 12))


def test_evaluations_and_measurements_get_recordings_as_they_are(root):
    domains = prepare(spec_of(root, BOTH)).domains
    assert domains.target_test.durations is None
    assert domains.source_train.durations is None
    plain = epoch_of(domains.shots, shuffle=False)
    for place, name in enumerate(domains.shots.names):
        assert torch.equal(plain[name], domains.shots.inputs[place])
    unchanged = BucketedBatches(domains.shots, 4, None, shuffle=True).plain()
    assert all("draw" not in batch for batch in unchanged)


def test_a_batch_of_slower_recordings_keeps_its_bound(root):
    shots = prepare(spec_of(root, {"speeds": [0.5]})).domains.shots
    batches = list(BucketedBatches(shots, 4, 1.7, shuffle=True))
    assert all(len(one["lengths"]) * int(one["lengths"].max() - 1) * 0.02 <= 1.7 for one in batches)
    assert len(batches) > len(BucketedBatches(shots, 4, 1.7, shuffle=False))


def test_a_run_with_waves_is_reproduced_and_resumed(root, tmp_path):
    def trained(stop=None, **options):
        setting = prepare(spec_of(root, BOTH, epochs=3))
        adaptation = setting.adaptation(obtain_source(setting).with_notes())
        if stop is not None:
            calls = []

            def forward(model, batch):
                calls.append(1)
                if len(calls) == stop:
                    signal.raise_signal(signal.SIGINT)
                return setting.task.forward(model, batch)

            options["forward"] = forward
        setting.fit(adaptation, setting.domains.shots, **options)
        return torch.cat([one.detach().flatten() for one in adaptation.model.parameters()])

    whole = trained()
    with pytest.raises(KeyboardInterrupt):
        trained(stop=3, out=tmp_path)
    assert torch.equal(whole, trained(out=tmp_path, resume=True))


def test_noise_and_rooms_from_files(root):
    waves = {
        "speeds": [1.0],
        "noise": {"kind": "files", "root": str(root / "noises"), "snr": [0, 0], "share": 1.0},
        "room": {"kind": "files", "root": str(root / "rooms"), "share": 1.0},
    }
    shots = prepare(spec_of(root, waves)).domains.shots
    wave, rate = shots.inputs.wave(0)
    changed = shots.inputs.change(wave - wave.mean(), seeded())
    assert rate == RATE
    in_room = reverberated(wave - wave.mean(), torch.tensor([1.0, 0.5]))
    noise = changed - in_room
    assert 10 * math.log10(power(in_room) / power(noise)) == pytest.approx(0, abs=0.05)
    spectrum = torch.fft.rfft(noise[:400]).abs()
    assert int(spectrum.argmax()) == 10  # 50 Hz


def test_a_source_model_is_trained_anew_if_a_noise_changes(root):
    waves = {"noise": {"kind": "files", "root": str(root / "noises")}}
    setting = prepare(spec_of(root, None, waves))
    before = Transcribe().fingerprint(setting.spec.data, setting.domains.source_train, setting.domains.preprocessing)
    soundfile.write(root / "noises" / "two.wav", tone(60).numpy(), RATE)
    after = Transcribe().fingerprint(setting.spec.data, setting.domains.source_train, setting.domains.preprocessing)
    (root / "noises" / "two.wav").unlink()
    assert before != after


@pytest.mark.parametrize(
    ("waves", "message"),
    [
        ({"noise": {"kind": "files", "root": "nowhere"}}, r"waves.noise.root must be a folder of recordings; nowhere"),
        ({"room": {"kind": "files", "root": "{root}/cache"}}, r"waves.room.root must hold recordings; there is none"),
        ({"noise": {"kind": "files", "root": "{root}/links"}}, r"leads out of .*data.augment.waves.noise.follow_links"),
        ({"noise": {"kind": "files", "root": "{root}/broken"}}, r"bad.wav cannot be read as audio"),
        ({"noise": {"kind": "files", "root": "{root}/still"}}, r"quiet.wav is silent"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(root, waves, message):
    (root / "cache").mkdir(exist_ok=True)
    for folder in ("links", "broken", "still"):
        (root / folder).mkdir(exist_ok=True)
    (root / "broken" / "bad.wav").write_text("no audio")
    soundfile.write(root / "still" / "quiet.wav", tone(60).numpy() * 0, RATE)
    if not (root / "links" / "out.wav").is_symlink():
        (root / "links" / "out.wav").symlink_to(root / "ann0.wav")
    filled = json.loads(json.dumps(waves).replace("{root}", str(root)))
    with pytest.raises(ctl.DataError, match=message):
        prepare(spec_of(root, filled))


def test_a_babble_without_a_source_is_refused(root):
    spec = WaveAugment(noise=SyntheticNoise(colours=("babble",)))
    with pytest.raises(ctl.SpecError, match=r"a babble is made of the source's utterances, and this run reads none"):
        WaveChange(spec, RATE)


@pytest.mark.parametrize(
    ("waves", "message"),
    [
        ({"speeds": []}, "at least 1"),
        ({"speeds": [3.0]}, "less than or equal to 2"),
        ({"noise": {"kind": "synthetic", "snr": [20, 10]}}, "the lower bound comes first; received 20 and 10"),
        ({"room": {"kind": "synthetic", "rt60": [0.6, 0.1]}}, "the shorter time comes first"),
        ({"noise": {"kind": "synthetic", "colours": ["brown"]}}, "'white', 'pink' or 'babble'"),
    ],
)
def test_bad_settings_are_refused(waves, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(WaveAugment).validate_python(waves)


def test_a_text_too_long_for_its_quicker_recording_is_named(root):
    setting = prepare(spec_of(root, {"speeds": [2.0]}))
    shots = setting.domains.shots.take([0])
    slow = shots.batch([0])
    frames = int(slow["lengths"][0])
    labels = torch.tensor([1, 2] * (frames // 2))
    long = Sequences(shots.inputs, (labels,), shots.names, shots.groups, shots.seconds)
    logits = torch.zeros(1, frames, 3)
    assert setting.task.loss((logits, slow["lengths"]), long.batch([0])).isfinite()
    quick = long.batch([0], 1)
    with pytest.raises(ctl.DataError, match=rf"{long.names[0]}.*lower data.augment.waves.speeds"):
        setting.task.loss((logits[:, : int(quick["lengths"][0])], quick["lengths"]), quick)


@pytest.mark.parametrize("speeds", [[1.0], [2.0, 1.0]])
def test_a_run_stops_before_training_if_a_text_would_not_fit_at_the_highest_speed(root, speeds):
    """The densest text of 4 letters has 21 frames of the network in 0.8 s, and 11 at twice the speed."""
    setting = prepare(spec_of(root, {"speeds": speeds}))
    adaptation = setting.adaptation(obtain_source(setting).with_notes())
    shots = setting.domains.shots
    place = max(range(len(shots)), key=lambda one: len(shots.labels[one]) / shots.seconds[one])
    labels = list(shots.labels)
    frames = setting.task.forward(adaptation.model, shots.batch([place]))[1].item()
    labels[place] = torch.tensor([1, 2] * frames)[:frames]
    long = dataclasses.replace(shots, labels=tuple(labels))
    if speeds == [1.0]:
        assert setting.fit(adaptation, long).steps > 0
        return
    before = copy.deepcopy(adaptation.model.state_dict())
    with pytest.raises(ctl.DataError, match=rf"{shots.names[place]}: a text of CTC .*lower data.augment.waves.speeds"):
        setting.fit(adaptation, long)
    assert all(torch.equal(value, before[name]) for name, value in adaptation.model.state_dict().items())


def test_a_spec_with_everything_at_once(root):
    """Waves, steps by seconds, blocks computed again and fp16."""
    options = {"step_seconds": 1.5, "batch_seconds": 1.0, "checkpointing": True, "precision": "fp16", "clip": 1.0}
    setting = prepare(spec_of(root, BOTH, **options))
    adaptation = setting.adaptation(obtain_source(setting).with_notes())
    result = setting.fit(adaptation, setting.domains.shots)
    assert {"checkpointing", "fp16"} <= set(result.execution.split(", "))
    assert result.steps > 2  # of two epochs, each of one step or more
    assert all(math.isfinite(line["loss"]) for line in result.history)
