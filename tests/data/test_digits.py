import pytest
import torch

from asga.data.digits import read_digits

load_digits = pytest.importorskip("sklearn.datasets").load_digits


def test_shapes_and_values():
    images, labels, names = read_digits("train")
    assert images.dtype == torch.uint8
    assert images.shape == (1438, 1, 8, 8)
    assert labels.dtype == torch.int64
    assert names == tuple("0123456789")
    # 16 levels of ink are spread over a byte.
    assert images.min() == 0
    assert images.max() == 255


def test_splits_are_a_stratified_partition():
    images, labels = zip(*(read_digits(split)[:2] for split in ("train", "val")), strict=True)
    assert len(images[1]) == 359
    everything = torch.bincount(torch.cat(labels))
    val = torch.bincount(labels[1])
    assert torch.all((val - 0.2 * everything).abs() <= 0.5)
    # Nothing is lost or taken twice: the same multiset of pixel rows.
    bunch = load_digits()
    original = (torch.from_numpy(bunch.images) * 255 / 16).round().to(torch.uint8).flatten(1)
    assert sorted(torch.cat(images).flatten(1).tolist()) == sorted(original.tolist())


def test_every_call_gives_the_same_split():
    first, second = read_digits("val"), read_digits("val")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
