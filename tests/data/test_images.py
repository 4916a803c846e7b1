import pytest
import torch

from asga.data import ImageTensor


def random_images(n=20, channels=3, height=8, width=8, classes=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)
    return ImageTensor(images, torch.arange(n) % classes, tuple("abcdefgh"[:classes]))


def test_properties():
    dataset = random_images(height=6, width=10)
    assert len(dataset) == 20
    assert dataset.image_shape == (3, 6, 10)
    assert dataset.num_classes == 4
    assert dataset.mirror


def test_read_yields_the_images_asked_for():
    dataset = random_images()
    batches = [torch.tensor([3, 1]), torch.tensor([7])]
    for indices, images in zip(batches, dataset.read(batches), strict=True):
        assert torch.equal(images, dataset.images[indices])


def test_statistics_equal_the_direct_formula():
    dataset = random_images(n=50)
    mean, std = dataset.statistics()
    pixels = dataset.images.to(torch.float64) / 255
    # float64 sums of 3,200 terms: rounding stays below 1e-12.
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


class TestResized:
    def test_matches_interpolate(self):
        dataset = random_images(n=3)
        resized = dataset.resized(5)
        expected = torch.nn.functional.interpolate(dataset.images.float(), (5, 5), mode="bilinear", antialias=True)
        assert resized.images.dtype == torch.uint8
        # Rounding to bytes moves a value by at most one half.
        assert (resized.images.float() - expected).abs().max() <= 0.5
        assert torch.equal(resized.labels, dataset.labels)
        assert resized.classes == dataset.classes

    def test_more_images_than_a_chunk(self):
        dataset = random_images(n=1030, channels=1, height=2, width=2)
        resized = dataset.resized(4)
        assert torch.equal(resized.images[-1:], random_tail(dataset).resized(4).images)

    def test_keeps_whether_images_may_be_mirrored(self):
        images = random_images()
        dataset = ImageTensor(images.images, images.labels, images.classes, mirror=False)
        assert not dataset.resized(16).mirror

    def test_native_size_is_not_copied(self):
        dataset = random_images()
        assert dataset.resized(8) is dataset


def random_tail(dataset):
    """The last image alone."""
    return ImageTensor(dataset.images[-1:], dataset.labels[-1:], dataset.classes)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), "images is torch.float32"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "uint8 .N, C, H, W."),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"int64 \[2\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), "labels is torch.float32"),
        (
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
            torch.tensor([0, 2]),
            "labels are 0 to 2, with 2 classes",
        ),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([-1, 0]), "labels are -1 to 0"),
    ],
)
def test_bad_tensors(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageTensor(images, labels, ("a", "b"))
