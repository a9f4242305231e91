"""Sources under other names, and checkpoints that hold several dictionaries: said, chosen, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.source.read import read_source
from conservtl.testing.weights import random_weights


def network(classes=2):
    """49 parameters: 16 blocks of three, and a head of one."""
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, bias=False)) for _ in range(16)]
    return nn.Sequential(*blocks, nn.Linear(4, classes, bias=False))


def renamed(state, change):
    return {change(name): tensor for name, tensor in state.items()}


def equal(state, expected):
    return all(torch.equal(state[name], tensor) for name, tensor in expected.items())


class TestPrefix:
    @pytest.mark.parametrize("prefix", ["backbone.", "backbone", "net.encoder.", "encoder_"])
    def test_removed(self, prefix):
        model = network()
        plain = random_weights(model, 1)
        start = prefix if prefix.endswith(("_", ".")) else f"{prefix}."
        source = renamed(plain, lambda name: start + name) | {"projector.weight": torch.zeros(3, 3)}
        adaptation = ctl.adapt(model, source, prefix=prefix)
        assert equal(model.state_dict(), plain)
        assert not adaptation.transfer.unused
        assert f"source  removed the prefix {prefix!r}, left out 1 tensor without it" in str(adaptation.plan)
        every = sum(tensor.numel() for tensor in source.values())
        assert f"without it, 9 of {every:,} values (projector.weight (3, 3))" in str(adaptation.plan)

    def test_inside_a_wrapper(self):
        model = network()
        plain = random_weights(model, 1)
        ctl.adapt(model, renamed(plain, lambda name: f"module.encoder.{name}"), prefix="encoder")
        assert equal(model.state_dict(), plain)

    def test_none_begins_with_it(self):
        source = renamed(random_weights(network(), 1), lambda name: f"backbone.{name}")
        with pytest.raises(ctl.SourceError, match=r"prefix must begin names.*'bakbone\.'\. Did you mean 'backbone'"):
            ctl.adapt(network(), source, prefix="bakbone.")

    def test_of_a_part_of_a_model(self):
        """The structure of that part alone is compared, and a term runs it under the model's names."""
        whole = nn.ModuleDict({"body": network(), "other": nn.Conv1d(3, 3, 3)})
        model, x = network(), torch.randn(3, 4)
        adaptation = ctl.adapt(model, whole, [ctl.FeatureConservation(alpha=1.0)], example=x, prefix="body")
        assert torch.equal(model(x), whole["body"](x))
        assert adaptation.loss(torch.zeros(()), model(x), x).item() == 0
        whole["body"][3][1] = nn.RMSNorm(4)
        with pytest.raises(ctl.SourceError, match=r"layer '3\.1': norm LayerNorm here, RMSNorm in the source"):
            ctl.adapt(network(), whole, prefix="body")


class TestRename:
    def test_in_order(self):
        model = network()
        plain = random_weights(model, 1)
        source = renamed(plain, lambda name: f"stage.{name}".replace("1.weight", "1.gamma"))
        adaptation = ctl.adapt(model, source, rename={r"\bgamma$": "weight", r"^stage\.(\d+)": r"\1"})
        assert equal(model.state_dict(), plain)
        assert r"source  renamed '\\bgamma$' to 'weight'" in str(adaptation.plan)

    def test_after_the_prefix(self):
        model = network()
        plain = random_weights(model, 1)
        ctl.adapt(model, renamed(plain, lambda name: f"a.b{name}"), prefix="a.", rename={"^b": ""})
        assert equal(model.state_dict(), plain)

    def test_of_a_model(self):
        source = nn.ModuleDict({"net": network()})
        model, x = nn.ModuleDict({"body": network()}), torch.randn(3, 4)
        ctl.adapt(model, source, rename={r"^net\.": "body."})
        assert torch.equal(model["body"](x), source["net"](x))

    @pytest.mark.parametrize(
        ("rename", "error", "message"),
        [
            (
                {"^encoder": "x"},
                ctl.SourceError,
                r"'\^encoder' matches none of 49, of which the first is '0\.0\.weight'",
            ),
            ({"(": ""}, ctl.SpecError, r"'\(': '' is not valid: missing \)"),
            ({"0": r"\3"}, ctl.SpecError, "is not valid: invalid group reference"),
            ({r"^\d+\.": ""}, ctl.SourceError, r"names must be unique; '0\.0\.weight' and '1\.0\.weight' both mean"),
        ],
    )
    def test_wrong(self, rename, error, message):
        with pytest.raises(error, match=message):
            ctl.adapt(network(), random_weights(network(), 1), rename=rename)


class TestTooLittle:
    """Names of 1 parameter in 49, or 24 of 11,000 values, are a coincidence; the message says what would fit."""

    @pytest.mark.parametrize(
        ("change", "fits"),
        [
            (lambda name: f"backbone.{name}", "prefix='backbone.'"),
            (lambda name: f"net.encoder.{name}", "prefix='net.encoder.'"),
            (lambda name: name.replace("0.", "dense.", 1) if ".0." in name else name, None),
        ],
    )
    def test_prefix_that_fits(self, change, fits):
        model = network()
        plain = random_weights(model, 1)
        source = renamed(plain, change) | {"16.weight": plain["16.weight"]}
        if fits is None:
            assert ctl.adapt(model, plain).transfer.fresh == {}
            return
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ctl.SourceError, match="of 49 tensors with 392 values it gives 1 with 8") as error:
            ctl.adapt(model, source)
        assert f"With {fits}, 49 tensors with 392 values fit" in str(error.value)
        assert "source.prefix" in str(error.value)
        assert equal(model.state_dict(), before)
        ctl.adapt(model, source, prefix=fits.split("'")[1])
        assert equal(model.state_dict(), plain)

    def test_prefix_to_add(self):
        """To 36 of 49 names: too few to add it unasked, and enough to say so."""
        model = nn.ModuleDict({"features": network(), "head": nn.Linear(2, 2)})
        plain = random_weights(model["features"], 1)
        few = {name: tensor for name, tensor in plain.items() if int(name.split(".")[0]) < 12}
        source = few | {f"other{i}": torch.zeros(3, i + 1) for i in range(13)}
        with pytest.raises(ctl.SourceError, match=r"With rename=\{'\^': 'features\.'\}, 36 of the model's 51 tensors"):
            ctl.adapt(model, source)
        ctl.adapt(model, source, rename={"^": "features."})
        assert equal(model["features"].state_dict(), few)

    def test_renaming_that_fits(self):
        """Blocks called otherwise, and the names that norms had in TensorFlow: found by trying, and they do fit."""
        model = nn.ModuleDict({"layers": network(), "norm": nn.LayerNorm(4)})
        plain = random_weights(model, 1)

        def change(name):
            return (
                name.replace("layers.", "blocks.")
                .replace("norm.weight", "norm.gamma")
                .replace("norm.bias", "norm.beta")
            )

        with pytest.raises(ctl.SourceError, match="With rename=") as error:
            ctl.adapt(model, renamed(plain, change))
        suggestion = eval(str(error.value).split("rename=")[1].split(", 51 of")[0])
        ctl.adapt(model, renamed(plain, change), rename=suggestion)
        assert equal(model.state_dict(), plain)

    def test_numbers_in_words(self):
        model = nn.ModuleDict({f"block_{i}": nn.Linear(4, 4) for i in range(12)} | {"head": nn.Linear(4, 2)})
        plain = random_weights(model, 1)
        source = renamed(plain, lambda name: name.replace("block_", "blk"))
        with pytest.raises(ctl.SourceError, match=r"With rename=\{'\\\\bblk\(\?=\\\\d\)': 'block_'\}, 26 tensors"):
            ctl.adapt(model, source)
        ctl.adapt(model, source, rename={r"\bblk(?=\d)": "block_"})
        assert equal(model.state_dict(), plain)

    def test_a_few_under_other_names_are_said(self):
        """Enough is found to go on, but norms would begin anew: the plan says which renaming finds them."""
        model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3)), nn.Linear(4, 2))
        plain = random_weights(model, 1)
        source = renamed(plain, lambda name: name.replace("1.weight", "1.gamma").replace("1.bias", "1.beta"))
        text = str(ctl.adapt(model, source).plan)
        assert r"source  with rename={'\\bgamma\\b': 'weight', '\\bbeta\\b': 'bias'}, 6 more tensors would be" in text
        text = str(ctl.adapt(model, source, rename={r"\bgamma\b": "weight", r"\bbeta\b": "bias"}).plan)
        assert "more tensors" not in text
        assert equal(model.state_dict(), plain)

    def test_more_than_a_tenth_but_far_more_under_another_name(self):
        model = network()
        plain = random_weights(model, 1)
        few = {name: tensor for name, tensor in plain.items() if name.startswith(("0.", "1.", "2.", "16"))}
        source = few | renamed(plain, lambda name: f"student.{name}")
        with pytest.raises(ctl.SourceError, match=r"With prefix='student\.', 49 tensors"):
            ctl.adapt(model, source)
        assert ctl.adapt(model, few).transfer.copied  # nothing fits better: that much is accepted

    def test_few_values_in_most_tensors_of_another_size(self):
        """A wider source: the names fit, and only the bias of the head has the shape."""
        model, wide = (
            nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3)),
            nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 3)),
        )
        with pytest.raises(ctl.SourceError, match=r"gives 1 with 3 \(2 have another shape: '0\.weight' \(96, 64\)"):
            ctl.adapt(model, wide.state_dict())

    @pytest.mark.parametrize("options", [{"allow": ["*"]}, {"fresh": [str(i) for i in range(1, 16)]}])
    def test_allowed_or_declared(self, options):
        model = network()
        plain = random_weights(model, 1)
        few = {name: tensor for name, tensor in plain.items() if name.startswith("0.") or name == "16.weight"}
        with pytest.raises(ctl.SourceError, match="it gives 4 with 32"):
            ctl.adapt(network(), few)
        adaptation = ctl.adapt(model, few, **options)
        assert set(adaptation.transfer.copied) == set(few)

    def test_a_head_for_other_labels_does_not_count(self):
        """However large it is beside the body."""
        model, source = network(5000), network(7)
        assert set(ctl.adapt(model, source.state_dict()).transfer.fresh) == {"16.weight"}

    def test_what_a_strategy_makes_fresh_does_not_count(self):
        model = network()
        few = {name: tensor for name, tensor in random_weights(model, 1).items() if name.startswith("0.")}
        with pytest.raises(ctl.SourceError, match="it gives 3"):
            ctl.adapt(model, few)
        adaptation = ctl.adapt(network(), random_weights(model, 1), [ctl.LayerTransfer(layers=1, rest="fresh")])
        assert len(adaptation.transfer.copied) == 3


class TestUnused:
    def test_counted_and_the_largest_named(self):
        model = network()
        source = random_weights(model, 1) | {
            "decoder.weight": torch.zeros(30, 4), "a": torch.zeros(1), "b": torch.zeros(2), "c": torch.zeros(3),
        }  # fmt: skip
        text = str(ctl.adapt(model, source).plan)
        assert (
            "source  not used: 4 of 53 tensors, 126 of 518 values "
            "(the largest decoder.weight (30, 4), c (3,), b (2,))"
        ) in text  # fmt: skip

    def test_nothing_to_say(self):
        assert "\nsource  " not in str(ctl.adapt(network(), random_weights(network(), 1)).plan)

    def test_buffers_that_the_source_lacks_are_said(self):
        """Weights of a norm with the statistics of another are no norm that was ever trained."""
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
        source = {name: tensor for name, tensor in random_weights(model, 1).items() if "running" not in name}
        text = str(ctl.adapt(model, source).plan)
        assert (
            "source  4 buffers keep their own values, which the source does not have for them "
            "(1.running_mean (4,), 1.running_var (4,), 2.running_mean (4,), …)"
        ) in text  # fmt: skip
        assert "buffers" not in str(ctl.adapt(model, source, fresh=["0", "1"]).plan)
        del source["1.num_batches_tracked"]
        del source["2.num_batches_tracked"]
        assert "4 buffers" in str(ctl.adapt(model, source).plan)

    def test_kept_when_the_plan_is_drawn_again(self):
        adaptation = ctl.adapt(network(), random_weights(network(), 1) | {"more": torch.zeros(3)})
        adaptation.replan(size="small")
        assert "not used: 1 of 50 tensors" in str(adaptation.plan)

    def test_a_state_without_remarks_still_loads(self):
        """They are no part of what a state must agree on."""
        adaptation = ctl.adapt(network(), random_weights(network(), 1) | {"more": torch.zeros(3)})
        state = adaptation.state_dict()
        del state["plan"]["notes"]
        adaptation.load_state_dict(state)


class TestSeveralDictionaries:
    def plain(self, seed):
        return random_weights(network(), seed)

    @pytest.mark.parametrize("alone", ["state_dict_ema", "ema", "weights", "params", "net", "module"])
    def test_the_only_one_is_taken_and_said(self, alone):
        model = network()
        adaptation = ctl.adapt(model, {alone: self.plain(1), "epoch": 3, "acc": torch.tensor(0.9), "opt": {"lr": 1}})
        assert equal(model.state_dict(), self.plain(1))
        assert f"source  took the entry {alone!r}, ignored acc, epoch, opt" in str(adaptation.plan)

    @pytest.mark.parametrize("key", [None, "state_dict", "state_dict_ema"])
    def test_averaged_weights_beside(self, key, tmp_path):
        torch.save({"state_dict": self.plain(1), "state_dict_ema": self.plain(2), "epoch": 1}, tmp_path / "a.pt")
        model = network()
        text = str(ctl.adapt(model, tmp_path / "a.pt", key=key).plan)
        assert equal(model.state_dict(), self.plain(2 if key == "state_dict_ema" else 1))
        if key is None:
            assert (
                "took the entry 'state_dict', ignored epoch, state_dict_ema; 'state_dict_ema' holds weights too" in text
            )
        else:
            assert f"took the entry {key!r}" in text

    def test_averaged_weights_beside_in_an_entry_of_another(self):
        """The note gives the key; an optimizer's moments are no weights."""
        moments = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1.0}]}
        entries = {"model": self.plain(1), "ema": {"shadow": self.plain(2), "decay": 0.9}, "optimizer": moments}
        model = network()
        text = str(ctl.adapt(model, entries).plan)
        assert "took the entry 'model', ignored ema, optimizer; 'ema.shadow' holds weights too (key=...)" in text
        ctl.adapt(model, entries, key="ema.shadow")
        assert equal(model.state_dict(), self.plain(2))

    def test_a_trainers_state_beside_is_not_offered(self):
        """As Lightning writes it: states without tensors, scores."""
        loop = {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}
        beside = {
            "loops": {"fit_loop": loop},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        }
        text = str(ctl.adapt(network(), {"state_dict": self.plain(1), **beside}).plan)
        assert "took the entry 'state_dict', ignored callbacks, loops" in text
        assert "key=" not in text

    def test_the_documented_order(self):
        order = ["state_dict", "model_state_dict", "model", "module"]
        for place, first in enumerate(order):
            model = network()
            ctl.adapt(model, {key: self.plain(7 - i) for i, key in reversed(list(enumerate(order))) if i >= place})
            assert equal(model.state_dict(), self.plain(7 - place)), first

    def test_ambiguous_ones_are_refused(self):
        both = {"generator": self.plain(1), "discriminator": self.plain(2), "step": 3}
        with pytest.raises(ctl.SourceError, match=r"holds 2: 'generator', 'discriminator'\. Name one: key='generator'"):
            ctl.adapt(network(), both)
        model = network()
        ctl.adapt(model, both, key="discriminator")
        assert equal(model.state_dict(), self.plain(2))

    @pytest.mark.parametrize("key", ["ema.model", "ema", "a.b"])
    def test_nested(self, key):
        source = {"model": self.plain(1), "ema": {"model": self.plain(2), "decay": 0.9}, "a.b": self.plain(2)}
        model = network()
        ctl.adapt(model, source, key=key)
        assert equal(model.state_dict(), self.plain(2))

    def test_no_such_entry(self):
        with pytest.raises(ctl.SourceError, match=r"received 'model_em'\. Did you mean 'model_ema' or 'model'"):
            ctl.adapt(network(), {"model": self.plain(1), "model_ema": self.plain(2)}, key="model_em")
        with pytest.raises(ctl.SourceError, match=r"Did you mean 'model'\? The source has 'ema', 'model'\."):
            ctl.adapt(network(), {"model": self.plain(1), "ema": self.plain(2)}, key="ema_model")
        with pytest.raises(ctl.SourceError, match=r"received 'ema'\. The source has none"):
            ctl.adapt(network(), self.plain(1), key="ema")
        with pytest.raises(ctl.SourceError, match="the source is none"):
            ctl.adapt(network(), network(), key="ema")

    def test_tensors_beside_a_dictionary_are_the_weights(self):
        model = network()
        ctl.adapt(model, {**self.plain(1), "ema": self.plain(2)})
        assert equal(model.state_dict(), self.plain(1))


def test_a_source_that_was_read_before():
    model = network()
    plain = random_weights(model, 1)
    read = read_source({"ema": renamed(plain, lambda name: f"net.{name}")}, prefix="net.")
    ctl.adapt(model, read)
    assert equal(model.state_dict(), plain)
