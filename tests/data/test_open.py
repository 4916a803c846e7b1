import sys

import numpy as np
import pytest
import torch

import asga.data.open
from asga.data import ImageFiles, ImageTensor, open_dataset


@pytest.fixture
def folder(tmp_path):
    """train and val with 6 images of 8x8 in each of 2 classes."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


class TestDigits:
    def test_native(self):
        dataset = open_dataset("digits", "train")
        assert dataset.image_shape == (1, 8, 8)
        assert dataset.num_classes == 10
        assert not dataset.mirror

    def test_half_the_classes_at_another_resolution(self):
        dataset = open_dataset("digits", "train", image_size=16, classes=5, limit=100)
        assert dataset.image_shape == (1, 16, 16)
        assert dataset.classes == tuple("01234")
        assert torch.bincount(dataset.labels).tolist() == [20] * 5

    def test_takes_no_path(self):
        with pytest.raises(ValueError, match="take no path"):
            open_dataset("digits:somewhere", "train")

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r"asga\[search\]"):
            open_dataset("digits", "train")


class TestImageFolder:
    def test_small_folders_live_in_memory(self, folder):
        dataset = open_dataset(f"imagefolder:{folder}", "train")
        assert isinstance(dataset, ImageTensor)
        assert dataset.images.shape == (12, 3, 8, 8)
        assert dataset.classes == ("ant", "bee")
        assert dataset.mirror

    def test_large_folders_stream(self, folder, monkeypatch):
        whole = open_dataset(f"imagefolder:{folder}", "train")
        monkeypatch.setattr(asga.data.open, "MAX_BYTES_IN_MEMORY", 12 * 3 * 8 * 8 - 1)
        dataset = open_dataset(f"imagefolder:{folder}", "train")
        assert isinstance(dataset, ImageFiles)
        dataset.workers = 0
        assert torch.equal(next(dataset.read([torch.arange(12)])), whole.images)
        assert torch.equal(dataset.labels, whole.labels)

    def test_only_the_limit_is_decoded(self, folder):
        decoded = []
        spec = f"imagefolder:{folder}"
        dataset = open_dataset(
            spec, "val", limit=4, image_size=4, progress=lambda done, total: decoded.append((done, total))
        )
        assert dataset.images.shape == (4, 3, 4, 4)
        assert decoded == [(4, 4)]

    def test_one_class(self, folder):
        dataset = open_dataset(f"imagefolder:{folder}", "train", classes=["bee"])
        assert dataset.classes == ("bee",)
        assert dataset.labels.tolist() == [0] * 6

    def test_home_directory(self, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder.parent))
        assert len(open_dataset(f"imagefolder:~/{folder.name}", "val")) == 12

    def test_without_pillow(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        with pytest.raises(ImportError, match=r"asga\[search\]"):
            open_dataset(f"imagefolder:{folder}", "train")


def test_cifar10_is_resized_and_limited(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (30, 3073), np.uint8)
    records[:, 0] = np.arange(30) % 10
    (tmp_path / "test_batch.bin").write_bytes(records.tobytes())
    dataset = open_dataset(f"cifar10:{tmp_path}", "val", image_size=16, limit=20)
    assert dataset.image_shape == (3, 16, 16)
    assert torch.bincount(dataset.labels).tolist() == [2] * 10
    assert dataset.mirror


class TestErrors:
    @pytest.mark.parametrize(
        ("spec", "error", "message"),
        [
            ("imagenet", ValueError, "use digits, imagefolder:PATH or cifar10:PATH"),
            ("", ValueError, "use digits, imagefolder:PATH or cifar10:PATH"),
            ("imagefolder", ValueError, "has no path; write imagefolder:PATH"),
            ("cifar10:", ValueError, "has no path; write cifar10:PATH"),
            ("imagefolder:/no/such/place", FileNotFoundError, "/no/such/place does not exist"),
        ],
    )
    def test_spec(self, spec, error, message):
        with pytest.raises(error, match=message):
            open_dataset(spec, "train")

    def test_bare_path(self, tmp_path):
        with pytest.raises(ValueError, match=r"Did you mean 'imagefolder:.*'\?"):
            open_dataset(str(tmp_path), "train")

    def test_file_for_a_folder(self, tmp_path):
        (tmp_path / "archive.tar").touch()
        with pytest.raises(ValueError, match="is not a folder"):
            open_dataset(f"imagefolder:{tmp_path}/archive.tar", "train")

    def test_split(self):
        with pytest.raises(ValueError, match="split is 'test'"):
            open_dataset("digits", "test")

    def test_image_size(self):
        with pytest.raises(ValueError, match="image_size is 0"):
            open_dataset("digits", "train", image_size=0)
