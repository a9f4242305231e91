"""Position embeddings for another image size: resampled as the model's library does, and then a starting point."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import conservtl as ctl
from conservtl.source import positions
from conservtl.testing.weights import random_weights


class Patches(nn.Module):
    """A vision transformer of a user's own."""

    def __init__(self, size, tokens=1, table=False):
        super().__init__()
        count = (size // 4) ** 2 + tokens
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, tokens, 8))
        if table:
            self.pos = nn.Embedding(count, 8)
        else:
            self.pos_embedding = nn.Parameter(torch.randn(1, count, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = x + (self.pos.weight if hasattr(self, "pos") else self.pos_embedding)
        return self.head(self.block(x)[:, 0])


def by_hand(value, tokens, side, new, *, align_corners=False, antialias=False):
    """The grid of positions as a picture with a channel for each feature, resized; tokens before it as they are."""
    grid = value[0, tokens:].T.reshape(1, -1, side, side)
    grid = functional.interpolate(grid, (new, new), mode="bicubic", align_corners=align_corners, antialias=antialias)
    return torch.cat([value[:, :tokens], grid.flatten(2).transpose(1, 2)], 1)


def trained(adaptation, x, steps=3):
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        adaptation.model(x).square().mean().backward()
        optimizer.step()
    return adaptation


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("sizes", [(16, 24), (24, 16)])
@pytest.mark.parametrize("table", [False, True])
def test_a_model_of_a_users_own(tokens, sizes, table):
    old, new = sizes
    source, model = Patches(old, tokens or 1, table), Patches(new, tokens or 1, table)
    if tokens == 0:  # no class token has a position
        for part, size in ((source, old), (model, new)):
            part.cls = nn.Parameter(torch.zeros(1, 0, 8))
            count = (size // 4) ** 2
            if table:
                part.pos = nn.Embedding(count, 8)
            else:
                part.pos_embedding = nn.Parameter(torch.randn(1, count, 8))
    name = "pos.weight" if table else "pos_embedding"
    value = source.state_dict()[name].reshape(1, -1, 8).clone()
    expected = by_hand(value, tokens, old // 4, new // 4).reshape(model.state_dict()[name].shape)
    adaptation = ctl.adapt(model, source.state_dict(), [ctl.L2SP(alpha=0.5, on="all")])
    torch.testing.assert_close(model.state_dict()[name], expected)
    assert not adaptation.transfer.fresh
    assert not adaptation.transfer.unused
    text = f"resampled {name} from {old // 4}×{old // 4} to {new // 4}×{new // 4} positions with torch.nn.functional"
    assert f"source  {text}" in str(adaptation.plan)


def test_the_pull_goes_to_the_resampled_values():
    source, model = Patches(16), Patches(24)
    adaptation = ctl.adapt(model, source.state_dict(), [ctl.L2SP(alpha=0.5, on="all")])
    start = by_hand(source.pos_embedding.detach(), 1, 4, 6)
    torch.testing.assert_close(adaptation.start["pos_embedding"], start)
    assert adaptation.penalty().item() == 0
    with torch.no_grad():
        model.pos_embedding += 2.0
    assert adaptation.penalty().item() == pytest.approx(0.25 * 4 * start.numel())
    assert adaptation.drift() != dict.fromkeys(adaptation.plan.layers, 0.0)


def test_resumed_as_they_were():
    """The state has the resampled values for anchors, and goes on bit for bit; what was trained is a source too."""
    torch.manual_seed(0)
    source, x = Patches(16).state_dict(), torch.randn(2, 3, 24, 24)
    model = Patches(24)
    first = trained(ctl.adapt(model, source, [ctl.L2SP(on="all")]), x)
    state, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(model.state_dict())
    trained(first, x)
    second = ctl.adapt(Patches(24), source, [ctl.L2SP(on="all")])
    second.load_state_dict(state)
    second.model.load_state_dict(weights)
    trained(second, x)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    again = ctl.adapt(Patches(24), weights)
    assert torch.equal(again.model.pos_embedding, weights["pos_embedding"])
    assert "resampled" not in str(again.plan)


@pytest.mark.parametrize("whole", [False, True])
def test_the_source_model_takes_the_targets_images(whole):
    """A term compares with the source at the new image size, where its positions are resampled too."""
    source, model, x = Patches(16), Patches(24), torch.randn(2, 3, 24, 24)
    given = source if whole else source.state_dict()
    adaptation = ctl.adapt(model, given, [ctl.OutputConservation()], example=x)
    reference = Patches(24)
    reference.load_state_dict(source.state_dict() | {"pos_embedding": by_hand(source.pos_embedding.detach(), 1, 4, 6)})
    view = adaptation.source_view(x)
    torch.testing.assert_close(view.outputs, reference.eval()(x))


def test_declared_fresh_they_stay_as_handed_in():
    model = Patches(24)
    held = model.pos_embedding.detach().clone()
    adaptation = ctl.adapt(model, Patches(16).state_dict(), fresh=["pos_embedding"])
    assert torch.equal(model.pos_embedding, held)
    assert "resampled" not in str(adaptation.plan)


def test_the_type_is_the_sources():
    source = {name: tensor.half() for name, tensor in Patches(16).state_dict().items()}
    model = Patches(24)
    ctl.adapt(model, source)
    expected = by_hand(source["pos_embedding"].float(), 1, 4, 6).half().float()
    torch.testing.assert_close(model.pos_embedding.detach(), expected)


class TestNoGrid:
    """Positions of texts and sounds, or of no square picture, are not resampled: they are fresh, as the plan says."""

    def test_positions_of_a_text(self):
        def text(length):
            return nn.ModuleDict({"words": nn.Embedding(9, 8), "position": nn.Embedding(length, 8)})

        fresh = ctl.adapt(text(256), text(64).state_dict(), allow=["*"]).transfer.fresh
        assert fresh == {"position.weight": "shape differs: (256, 8) here, (64, 8) in the source"}

    def test_a_text_beside_a_picture(self):
        def both(length):
            model = Patches(16)
            model.words = nn.Embedding(9, 8)
            model.text_pos = nn.Parameter(torch.zeros(length, 8))
            return model

        assert set(ctl.adapt(both(64), both(36).state_dict()).transfer.fresh) == {"text_pos"}

    @pytest.mark.parametrize("shape", [(1, 36, 8), (1, 17, 6), (17, 8)])
    def test_other_shapes(self, shape):
        source = Patches(16).state_dict() | {"pos_embedding": torch.zeros(shape)}
        assert set(ctl.adapt(Patches(24), source).transfer.fresh) == {"pos_embedding"}


def test_a_grid_with_channels_last():
    """As SAM's encoder keeps it."""
    model, source = Patches(24), Patches(16)
    model.pos_embed, source.pos_embed = (nn.Parameter(torch.randn(1, n, n, 8)) for n in (6, 4))
    expected = functional.interpolate(source.pos_embed.permute(0, 3, 1, 2), (6, 6), mode="bicubic")
    ctl.adapt(model, source.state_dict())
    torch.testing.assert_close(model.pos_embed, expected.permute(0, 2, 3, 1))


def test_torchvision():
    models = pytest.importorskip("torchvision.models")

    def build(size):
        return models.VisionTransformer(size, 8, 2, 2, 8, 16, num_classes=3)

    source, model = random_weights(build(16), 1), build(40)
    expected = models.vision_transformer.interpolate_embeddings(40, 8, dict(source))["encoder.pos_embedding"]
    torch.testing.assert_close(
        expected, by_hand(source["encoder.pos_embedding"], 1, 2, 5, align_corners=True), msg="another formula"
    )
    for wrapped in (False, True):
        inner = build(40)
        model = nn.ModuleDict({"vit": inner}) if wrapped else inner
        given = {f"vit.{name}": tensor for name, tensor in source.items()} if wrapped else source
        adaptation = ctl.adapt(model, given)
        torch.testing.assert_close(inner.encoder.pos_embedding.detach(), expected)
        assert "from 2×2 to 5×5 positions with torchvision.models.vision_transformer.interp" in str(adaptation.plan)
        assert not adaptation.transfer.fresh


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_tiny_r_s16_p8_224"])
@pytest.mark.parametrize("size", [(96, 96), (64, 128)])
def test_timm(name, size):
    timm = pytest.importorskip("timm")
    options = {"num_classes": 3} | ({} if "_r_" in name else {"depth": 1})
    source, model = timm.create_model(name, img_size=160, **options), timm.create_model(name, img_size=size, **options)
    from timm.models.vision_transformer import checkpoint_filter_fn

    given = source.state_dict()
    expected = checkpoint_filter_fn(dict(given), model)["pos_embed"]
    tokens = model.num_prefix_tokens
    if size[0] == size[1]:
        side, new = model.patch_embed.grid_size[0], source.patch_embed.grid_size[0]
        torch.testing.assert_close(expected, by_hand(given["pos_embed"], tokens, new, side, antialias=True))
    adaptation = ctl.adapt(model, given)
    torch.testing.assert_close(model.pos_embed.detach(), expected)
    assert "positions with timm.layers.resample_abs_pos_embed" in str(adaptation.plan)
    assert not adaptation.transfer.fresh


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's own interpolation, without SciPy
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beit_base_patch16_224", {"embed_dim": 24, "num_heads": 2, "depth": 1}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "num_heads": (1, 1, 1, 1), "depths": (1, 1, 1, 1)}),
    ],
)
def test_relative_positions_of_timm(name, options):
    timm = pytest.importorskip("timm")
    options = options | {"num_classes": 3}
    wide = {"img_size": 128} | ({"window_size": 4} if "swin" in name else {})
    small = {"img_size": 64} | ({"window_size": 2} if "swin" in name else {})
    source, model = timm.create_model(name, **small, **options), timm.create_model(name, **wide, **options)
    given = random_weights(source, 1)
    expected = __import__(type(model).__module__, fromlist=["x"]).checkpoint_filter_fn(dict(given), model)
    adaptation = ctl.adapt(model, given)
    tables = [name for name in given if "bias_table" in name]
    assert tables
    for table in tables:
        torch.testing.assert_close(model.state_dict()[table], expected[table])
    assert not adaptation.transfer.fresh
    assert "positions with timm.layers.resize_rel_pos_bias_table" in str(adaptation.plan)


def test_hugging_face():
    transformers = pytest.importorskip("transformers")

    def build(size):
        config = transformers.ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=size,
            patch_size=8,
        )
        return transformers.ViTModel(config, add_pooling_layer=False).eval()

    source, model, x = build(32), build(48), torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        source.embeddings.position_embeddings.normal_()
    ctl.adapt(model, source.state_dict())
    with torch.no_grad():
        expected = source(x, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(model(x).last_hidden_state, expected)


class TestTablesThatDoNotFit:
    """A table of another form is left alone, and then refused by its shape."""

    class Grid:
        grid_size = (4, 4)

    @pytest.mark.parametrize(
        ("module", "value", "shape"),
        [
            (SimpleNamespace(), (1, 17, 8), (1, 17, 8)),
            (SimpleNamespace(patch_embed=Grid), (1, 17, 8), (1, 17, 9)),
            (SimpleNamespace(patch_embed=Grid), (1, 6 + 1, 8), (1, 17, 8)),
            (SimpleNamespace(patch_embed=Grid), (1, 5, 8), (1, 15, 8)),
        ],
        ids=["no grid", "another width", "no square", "fewer tokens than patches"],
    )
    def test_tokens_of_timm(self, module, value, shape):
        assert positions._by_timm(module, torch.zeros(value), shape) is None

    @pytest.mark.parametrize(
        ("module", "value"),
        [(SimpleNamespace(), (28, 2)), (SimpleNamespace(window_size=(4, 4)), (50 + 3, 2))],
        ids=["no window", "no square"],
    )
    def test_biases_of_timm(self, module, value):
        assert positions._biases_by_timm(module, torch.zeros(value), (52, 2)) is None

    @pytest.mark.parametrize(("value", "shape"), [((1, 7, 8), (1, 17, 8)), ((1, 17, 9), (1, 26, 8))])
    def test_tokens_of_torchvision(self, value, shape):
        assert positions._by_torchvision(None, torch.zeros(value), shape) is None

    def test_parameters_outside_all_modules(self):
        assert positions._resample("encoder.tokens", {}, torch.zeros(1, 17, 8), (1, 26, 8)) is None
