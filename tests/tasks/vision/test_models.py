"""Models by name, their published settings, and preprocessing as their users expect it."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from conservtl.errors import DataError, SpecError
from conservtl.tasks.vision import (
    CifarResNet,
    ImageFolderData,
    ImageSettings,
    ModelSpec,
    VisionPreprocessing,
    build,
    load,
    published_settings,
)
from conservtl.tasks.vision.models import _build_torchvision, _timm_settings

SMALL = VisionPreprocessing(images=ImageSettings(size=32))
_BESIDE = Path(__file__).parents[4] / "shared" / "data"


def _count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("depth", "parameters"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_cifar_resnets_have_the_sizes_of_the_paper(depth, parameters):
    model = build(ModelSpec(name=f"cifar_resnet{depth}"), SMALL, 10)
    assert _count(model) / 1e6 == pytest.approx(parameters, abs=0.006)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth


def test_cifar_resnet_names_its_layers_as_published_weights_do():
    names = set(CifarResNet(20, 10).state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer3.2.bn2.bias", "linear.weight"} <= names
    assert {name.split(".")[0] for name in names} == {"conv1", "bn1", "layer1", "layer2", "layer3", "linear"}
    assert not any("shortcut" in name or "downsample" in name for name in names)


def test_cifar_resnet_shortcuts_take_every_second_pixel_and_pad_channels_on_both_sides():
    model = CifarResNet(20, 10).eval()
    block = model.layer2[0]
    torch.nn.init.zeros_(block.bn2.weight)
    inputs = torch.rand(1, 16, 8, 8)
    outputs = block(inputs)
    assert torch.equal(outputs[:, 8:24], inputs[:, :, ::2, ::2])
    assert not outputs[:, :8].any()
    assert not outputs[:, 24:].any()


@pytest.mark.parametrize("size", [16, 32, 40])
def test_cifar_resnet_takes_images_of_other_sizes(size):
    assert build(ModelSpec(), SMALL, 3)(torch.zeros(2, 3, size, size)).shape == (2, 3)


@pytest.mark.skipif(not (_BESIDE / "weights").is_dir(), reason="no published CIFAR weights beside this checkout")
@pytest.mark.skipif(not (_BESIDE / "cifar10").is_dir(), reason="no CIFAR-10 images beside this checkout")
def test_published_cifar_weights_load_by_name_and_read_80_percent_of_the_photographs():
    found = torch.load(_BESIDE / "weights" / "resnet20-12fca82f.th", map_location="cpu", weights_only=True)
    model = build(ModelSpec(), SMALL, 10)
    model.load_state_dict({name.removeprefix("module."): v for name, v in found["state_dict"].items()})
    domains = load(ImageFolderData(root=_BESIDE / "cifar10"), model=ModelSpec(), seed=0)
    with torch.no_grad():
        read = model.eval()(domains.target_test.inputs).argmax(1)
    assert float((read == domains.target_test.labels).float().mean()) == pytest.approx(0.804, abs=0.005)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "timm/resnet10t", "resnet10t"])
def test_names_of_torchvision_and_timm_are_built_for_the_classes(name):
    pytest.importorskip("timm")
    model = build(ModelSpec(name=name), SMALL, 7)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_models_built_for_one_size_get_the_size_of_the_images():
    pytest.importorskip("timm")
    small = VisionPreprocessing(images=ImageSettings(size=64))
    args = {"patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    spec = ModelSpec(name="timm/vit_tiny_patch16_224", args=args)
    assert build(spec, small, 3)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "near"),
    [("cifar_resnet21", "cifar_resnet20"), ("resnet81", "resnet18"), ("timm/resnet_18", "timm/resnet18")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, near):
    pytest.importorskip("timm")
    with pytest.raises(SpecError, match=r"model\.name must be") as caught:
        build(ModelSpec(name=name), SMALL, 2)
    assert near in str(caught.value)
    assert name in str(caught.value)


def test_an_unknown_tag_is_answered_with_the_nearest():
    pytest.importorskip("timm")
    with pytest.raises(SpecError, match=r"resnet18 has no published weights tagged 'a9_in1k'.*a1_in1k"):
        published_settings(ModelSpec(name="timm/resnet18.a9_in1k"))


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(SpecError, match=r"model\.args must fit the constructor of cifar_resnet20.*'wide': 2"):
        build(ModelSpec(args={"wide": 2}), SMALL, 2)


@pytest.mark.parametrize("name", ["weights", "pretrained", "num_classes"])
def test_weights_and_classes_are_not_the_models_arguments(name):
    with pytest.raises(ValidationError, match=name):
        ModelSpec(name="resnet18", args={name: 1})


def test_published_settings_are_those_of_the_weights():
    pytest.importorskip("timm")
    assert published_settings(ModelSpec()) == ImageSettings(size=32)
    assert published_settings(ModelSpec(name="resnet18")) == ImageSettings(size=224, resize=256)
    assert published_settings(ModelSpec(name="resnet50")).resize == 232
    timm = published_settings(ModelSpec(name="timm/resnet18"))
    assert (timm.size, timm.resize, timm.interpolation) == (224, 235, "bicubic")
    assert published_settings(ModelSpec(name="timm/vit_base_patch16_224.augreg_in21k")).mean == (
        0.5,
        0.5,
        0.5,
    )


def test_every_torchvision_classifier_has_settings():
    models = pytest.importorskip("torchvision.models")
    for name in models.list_models(module=models):
        assert published_settings(ModelSpec(name=name)).size >= 224


@pytest.mark.parametrize("shape", [(300, 260), (61, 97), (256, 256), (500, 31)])
def test_preprocessing_is_torchvisions_to_the_last_bit(tmp_path, shape):
    image_module, transforms = pytest.importorskip("PIL.Image"), pytest.importorskip("torchvision.transforms")
    values = torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image_module.fromarray(values.numpy()).save(tmp_path / "one.png")
    settings = ImageSettings(size=48, resize=56, interpolation="bicubic")
    expected = transforms.Compose(
        [
            transforms.Resize(56, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(48),
            transforms.ToTensor(),
            transforms.Normalize(settings.mean, settings.std),
        ]
    )(image_module.open(tmp_path / "one.png"))
    ours = VisionPreprocessing(images=settings).read([tmp_path / "one.png"])
    assert torch.allclose(ours[0], expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_any_colour_mode_is_read_as_rgb(tmp_path, mode):
    image = pytest.importorskip("PIL.Image").new("RGB", (9, 7), (200, 200, 200)).convert(mode)
    path = tmp_path / ("one.jpg" if mode == "CMYK" else "one.png")
    image.save(path, **({"transparency": 0} if mode == "P" else {}))
    settings = ImageSettings(size=8, crop="squash", mean=(0, 0, 0), std=(1, 1, 1))
    assert VisionPreprocessing(images=settings).read([path]).shape == (1, 3, 8, 8)


def test_no_files_are_an_empty_batch():
    assert SMALL.read([]).shape == (0, 3, 32, 32)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken\.png must be an image"):
        SMALL.read([tmp_path / "broken.png"])
    with pytest.raises(DataError, match=r"missing\.png must be an image"):
        SMALL.read([tmp_path / "missing.png"])


def test_preprocessing_survives_json():
    assert VisionPreprocessing.model_validate_json(SMALL.model_dump_json()) == SMALL


def test_a_crop_larger_than_the_resized_image_is_refused():
    with pytest.raises(ValidationError, match=r"resize 20 and size 32"):
        ImageSettings(size=32, resize=20)


def test_fields_that_torchvisions_builders_need(monkeypatch):
    """Of transformers the size; without auxiliary outputs, which would make a tuple of the logits."""
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setattr(models, "get_model", lambda name, **given: (name, given))
    usual = {"weights": None, "num_classes": 3}
    assert _build_torchvision("resnet18", 64, 3, {}) == ("resnet18", usual)
    assert _build_torchvision("vit_b_16", 64, 3, {}) == ("vit_b_16", {**usual, "image_size": 64})
    fitting = {"aux_logits": True, "init_weights": True}
    assert _build_torchvision("googlenet", 64, 3, {"aux_logits": True}) == ("googlenet", {**usual, **fitting})


def test_settings_of_a_network_of_ones_own_and_of_one_without_weights():
    timm = pytest.importorskip("timm")
    own = published_settings(ModelSpec.model_validate({"import": "conservtl.tasks.vision.cifar_resnet:CifarResNet"}))
    assert (own.size, own.resize) == (224, 256)
    assert timm.get_pretrained_cfg("no_such_network") is None
    assert _timm_settings("no_such_network") == own


def test_networks_for_other_channels_are_refused(monkeypatch):
    timm = pytest.importorskip("timm")
    config = timm.get_pretrained_cfg("resnet18")
    monkeypatch.setattr(config, "input_size", (1, 32, 32))
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: config)
    with pytest.raises(SpecError, match="must take RGB images; gray takes 1 channels"):
        _timm_settings("gray")
