"""The protocol: which images go where, and what is said when they cannot."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from conservtl.data import Examples
from conservtl.errors import DataError
from conservtl.tasks.vision import (
    Corruption,
    DataSpec,
    DigitsData,
    ImageFolderData,
    ImageSettings,
    ModelSpec,
    TorchvisionData,
    VisionAugment,
    VisionPreprocessing,
    load,
    preprocessing_for,
)
from conservtl.tasks.vision.folders import folder_parts
from conservtl.tasks.vision.parts import LazyImages, read

image_module = pytest.importorskip("PIL.Image")
CLASSES = ("ant", "bee", "cow")


def _tree(root, per_class=6, classes=CLASSES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            values = torch.randint(0, 256, (10, 12, 3), generator=generator, dtype=torch.uint8)
            image_module.fromarray(values.numpy()).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    # made in another order than the alphabet's
    _tree(tmp_path / "train", classes=CLASSES[::-1])
    _tree(tmp_path / "test", per_class=4, seed=1)
    return tmp_path


def _load(data, seed=0, **more):
    return load(data, model=ModelSpec(), seed=seed, **more)


def _spec(root, **fields):
    return ImageFolderData(root=root, images=ImageSettings(size=8), **({"shots": 2} | fields))


class TestFolders:
    def test_classes_are_in_alphabetical_order_and_shots_come_from_train(self, folder):
        domains = _load(_spec(folder))
        assert domains.labels == CLASSES
        assert domains.shots.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert all(name.startswith("train/") for name in domains.shots.names)
        assert len(domains.target_test) == 12
        assert all(name.startswith("test/") for name in domains.target_test.names)
        assert domains.shots.inputs.shape == (6, 3, 8, 8)

    def test_without_a_source_there_is_none(self, folder):
        domains = _load(_spec(folder))
        assert (domains.source_labels, domains.source_train, domains.source_test) == ((), None, None)

    def test_shots_follow_the_seed_and_the_test_part_does_not(self, folder):
        one, again, other = (_load(_spec(folder), seed=s) for s in (3, 3, 4))
        assert one.shots.names == again.shots.names
        assert torch.equal(one.shots.inputs, again.shots.inputs)
        assert one.shots.names != other.shots.names
        assert torch.equal(one.target_test.inputs, other.target_test.inputs)

    def test_validation_is_carved_from_the_shots(self, folder):
        whole = set(_load(_spec(folder, shots=4)).shots.names)
        domains = _load(_spec(folder, shots=4, validation=0.5))
        assert set(domains.shots.names) | set(domains.validation.names) == whole
        assert not set(domains.shots.names) & set(domains.validation.names)
        assert domains.validation.labels.tolist() == [0, 0, 1, 1, 2, 2]

    def test_at_one_shot_there_is_no_validation(self, folder):
        domains = _load(_spec(folder, shots=1, validation=0.5))
        assert domains.validation is None
        assert len(domains.shots) == 3

    def test_a_corruption_changes_the_target_alone(self, folder):
        clean = _load(_spec(folder))
        domains = _load(_spec(folder, corruption=Corruption(name="contrast")))
        assert domains.source_labels == domains.labels == CLASSES
        assert torch.equal(domains.source_test.inputs, clean.target_test.inputs)
        assert domains.source_test.names == domains.target_test.names
        assert not torch.equal(domains.target_test.inputs, clean.target_test.inputs)
        assert domains.shots.names == clean.shots.names
        assert not torch.equal(domains.shots.inputs, clean.shots.inputs)
        assert len(domains.source_train) == 18

    def test_noise_is_the_same_under_every_seed_of_the_run(self, folder):
        data = _spec(folder, corruption=Corruption(name="gaussian_noise"))
        assert torch.equal(_load(data, seed=0).target_test.inputs, _load(data, seed=1).target_test.inputs)

    def test_another_folder_is_the_source_with_its_own_classes(self, folder, tmp_path_factory):
        other = _tree(tmp_path_factory.mktemp("other"), per_class=5, classes=("red", "blue"))
        domains = _load(_spec(folder, source_root=other, corruption=Corruption(name="contrast")))
        assert domains.source_labels == ("blue", "red")
        assert (len(domains.source_train), len(domains.source_test)) == (8, 2)

    def test_the_source_is_left_alone_when_not_wanted(self, folder):
        domains = _load(_spec(folder, corruption=Corruption(name="contrast")), source=False)
        assert (domains.source_train, domains.source_test) == (None, None)
        assert domains.source_labels == CLASSES

    def test_val_stands_in_for_test(self, folder):
        (folder / "test").rename(folder / "val")
        assert _load(_spec(folder)).target_test.names[0] == "val/ant/00.png"

    def test_a_single_tree_is_split_once_whatever_the_seed(self, tmp_path):
        _tree(tmp_path, per_class=10)
        one, other = (_load(_spec(tmp_path), seed=s) for s in (0, 1))
        assert one.target_test.names == other.target_test.names
        assert one.target_test.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert one.shots.names != other.shots.names
        assert not set(one.shots.names) & set(one.target_test.names)
        moved = _load(_spec(tmp_path, split_seed=1))
        assert moved.target_test.names != one.target_test.names

    def test_large_sets_are_opened_one_by_one_with_the_same_values(self, folder):
        data = _spec(folder, corruption=Corruption(name="gaussian_noise"))
        part = folder_parts(data).test
        preprocessing = VisionPreprocessing(images=data.images)
        whole = read(part, preprocessing, data.corruption)
        lazy = read(part, preprocessing, data.corruption, in_memory=0)
        assert isinstance(whole, Examples)
        assert isinstance(lazy, LazyImages)
        assert torch.equal(lazy.labels, whole.labels)
        assert lazy.names == whole.names
        for i in (0, 7):
            image, label = lazy[i]
            assert torch.equal(image, whole.inputs[i])
            assert label == whole.labels[i]
        batches = torch.utils.data.DataLoader(lazy, batch_size=5)
        assert [len(labels) for _, labels in batches] == [5, 5, 2]


class TestFolderErrors:
    def test_a_missing_root(self, tmp_path):
        with pytest.raises(DataError, match=r"data\.root must be a folder.*nowhere is nothing"):
            _load(_spec(tmp_path / "nowhere"))

    def test_loose_images(self, folder):
        with pytest.raises(DataError, match=r"has 0 folders and 6 loose images.*train/ and test/"):
            _load(_spec(folder / "train" / "ant"))

    @pytest.mark.parametrize(("kept", "renamed"), [("train", "test"), ("test", "train")])
    def test_one_part_without_the_other(self, folder, kept, renamed):
        (folder / renamed).rename(folder / "other")
        with pytest.raises(DataError, match=f"has only other, {kept}"):
            _load(_spec(folder))

    def test_an_empty_class(self, folder):
        (folder / "train" / "ape").mkdir()
        with pytest.raises(DataError, match=r"every class must have images.*ape has none"):
            _load(_spec(folder))

    def test_classes_that_differ(self, folder):
        (folder / "test" / "cow").rename(folder / "test" / "cat")
        with pytest.raises(DataError, match="in one of the two only: cat, cow"):
            _load(_spec(folder))

    def test_fewer_images_than_shots(self, folder):
        with pytest.raises(DataError, match=r"received 7, and class 'ant' has 6 beside the test part.*at most 6"):
            _load(_spec(folder, shots=7))

    def test_a_single_image_cannot_be_split(self, tmp_path):
        _tree(tmp_path, per_class=1)
        with pytest.raises(DataError, match="class 'ant' must have at least 2 images"):
            _load(_spec(tmp_path))

    @pytest.mark.parametrize("below", [".", "train"])
    def test_source_and_target_overlap(self, folder, below):
        with pytest.raises(DataError, match="must not overlap"):
            _load(_spec(folder, source_root=folder / below))

    def test_an_unreadable_image(self, folder):
        whole = (folder / "test" / "bee" / "02.png").read_bytes()
        (folder / "test" / "bee" / "02.png").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"02\.png must be an image that Pillow can read"):
            _load(_spec(folder))


@pytest.fixture(scope="module")
def domains():
    pytest.importorskip("sklearn")
    return _load(DigitsData())


class TestDigits:
    def test_five_classes_each(self, domains):
        assert domains.source_labels == ("0", "1", "2", "3", "4")
        assert domains.labels == ("5", "6", "7", "8", "9")
        assert domains.shots.inputs.shape == (25, 3, 16, 16)
        parts = (domains.shots, domains.target_test, domains.source_train, domains.source_test)
        assert sum(len(part) for part in parts) == 1797

    def test_no_image_is_in_two_parts(self, domains):
        parts = (domains.shots, domains.target_test, domains.source_train, domains.source_test)
        names = [name for part in parts for name in part.names]
        assert len(set(names)) == len(names)

    def test_names_tell_the_label(self, domains):
        assert all(
            name.split("_")[1] == domains.labels[label]
            for name, label in zip(domains.shots.names, domains.shots.labels.tolist(), strict=True)
        )

    def test_the_ink_is_the_sets_own(self):
        data = DigitsData(images=ImageSettings(size=8, mean=(0, 0, 0), std=(1, 1, 1)))
        test = _load(data).source_test
        original = pytest.importorskip("sklearn.datasets").load_digits().images
        number = int(test.names[0].split("_")[2])
        assert torch.allclose(test.inputs[0, 1] * 16, torch.tensor(original[number]).float(), atol=0.04)

    def test_they_are_never_flipped(self, domains):
        assert domains.augmentation.flip is False
        with pytest.raises(ValidationError, match="must be false for digits"):
            DigitsData(augment=VisionAugment(shift=2))

    def test_a_digit_belongs_to_one_domain(self):
        with pytest.raises(ValidationError, match="List each digit once"):
            DigitsData(source=(0, 1, 2), target=(2, 3))

    def test_other_models_get_their_own_size(self):
        pytest.importorskip("torchvision")
        assert preprocessing_for(DigitsData(), ModelSpec(name="resnet18")).images.size == 224

    def test_too_many_shots(self):
        with pytest.raises(DataError, match="Ask for at most"):
            _load(DigitsData(shots=500), source=False)


class TestTorchvision:
    @pytest.fixture(autouse=True)
    def _needs_torchvision(self):
        pytest.importorskip("torchvision")

    def test_a_set_in_one_piece_is_split(self):
        args = {"size": 60, "image_size": [3, 8, 8], "num_classes": 3}
        data = TorchvisionData(name="FakeData", args=args, shots=2, images=ImageSettings(size=8))
        domains = _load(data.model_copy(update={"corruption": Corruption(name="brightness")}))
        assert domains.labels == ("0", "1", "2")
        assert sorted(domains.shots.labels.tolist()) == [0, 0, 1, 1, 2, 2]
        assert len(domains.source_train) + len(domains.source_test) == 60
        assert not set(domains.shots.names) & set(domains.target_test.names)

    def test_a_set_with_its_own_parts_keeps_them(self, tmp_path):
        _tree(tmp_path / "imagenette2" / "train", per_class=4, classes=("n01440764", "n02102040"))
        _tree(tmp_path / "imagenette2" / "val", per_class=3, classes=("n01440764", "n02102040"))
        for part in ("train", "val"):
            for file in (tmp_path / "imagenette2" / part).rglob("*.png"):
                file.rename(file.with_suffix(".JPEG"))
        data = TorchvisionData(
            name="Imagenette", root=tmp_path, test_split="val", shots=2, images=ImageSettings(size=8)
        )
        domains = _load(data)
        assert domains.labels == ("tench, Tinca tinca", "English springer, English springer spaniel")
        assert (len(domains.shots), len(domains.target_test)) == (4, 6)

    def test_an_unknown_set_is_answered_with_the_nearest(self):
        with pytest.raises(DataError, match=r"received 'CIFAR11'.*CIFAR10"):
            _load(TorchvisionData(name="CIFAR11"))

    def test_a_set_that_is_not_there_is_not_downloaded(self, tmp_path):
        with pytest.raises(DataError, match=r"data\.root must hold torchvision's CIFAR10.*Nothing is downloaded"):
            _load(TorchvisionData(name="CIFAR10", root=tmp_path))

    def test_arguments_that_do_not_fit(self, tmp_path):
        with pytest.raises(DataError, match=r"must fit torchvision's CIFAR10.*'colour': 1"):
            _load(TorchvisionData(name="CIFAR10", root=tmp_path, args={"colour": 1}))

    @pytest.mark.parametrize("name", ["download", "train", "transform"])
    def test_arguments_of_ours_are_refused(self, name):
        with pytest.raises(ValidationError, match=f"must not set {name}"):
            TorchvisionData(name="CIFAR10", args={name: True})

    def test_writing_is_not_mirrored(self):
        assert TorchvisionData(name="SVHN").augmentation(32).flip is False
        assert TorchvisionData(name="CIFAR10").augmentation(32).flip is True


class TestSpec:
    def test_kind_tells_them_apart(self):
        adapter = TypeAdapter(DataSpec)
        assert isinstance(adapter.validate_python({"kind": "digits"}), DigitsData)
        assert isinstance(adapter.validate_python({"kind": "imagefolder", "root": "x"}), ImageFolderData)
        with pytest.raises(ValidationError, match="imagefolder"):
            adapter.validate_python({"kind": "movie"})

    def test_every_field_is_described_in_the_schema(self):
        definitions = TypeAdapter(DataSpec).json_schema()["$defs"]
        for model in definitions.values():
            assert all("description" in field for field in model["properties"].values()), model["title"]

    @pytest.mark.parametrize("field", [{"shots": 0}, {"validation": 1.0}, {"colour": 1}])
    def test_what_is_out_of_bounds_is_refused(self, field):
        with pytest.raises(ValidationError):
            DigitsData.model_validate(field)

    def test_no_augmentation_when_none_is_wanted(self):
        assert DigitsData(augment=False).augmentation(16) is None
