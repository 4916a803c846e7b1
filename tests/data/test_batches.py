import numpy as np
import pytest
import torch

from asga.data import Batches, ImageFiles, ImageTensor


def numbered_images(n=20, classes=4):
    """Image i is filled with the value i, so that a batch tells which images it has."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 8, 8).contiguous()
    return ImageTensor(images, torch.arange(n) % classes, tuple("abcd"[:classes]))


def raw(dataset, batch_size, **options):
    """Batches whose pixels are those of the files, divided by 255."""
    options = {"shuffle": False, "augment": False, "mean": (0.0,) * 3, "std": (1.0,) * 3} | options
    return Batches(dataset, batch_size, **options)


def order(batches, **options):
    """Which images each batch has, by their pixels."""
    return [(images[:, 0, 4, 4] * 255).round().int().tolist() for images, _ in batches.iterate(**options)]


def assert_same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


class TestOrder:
    def test_validation_is_in_order_and_complete(self):
        batches = raw(numbered_images(), 8)
        assert len(batches) == 3
        assert order(batches) == [list(range(8)), list(range(8, 16)), list(range(16, 20))]

    def test_training_drops_what_is_left_over(self):
        batches = raw(numbered_images(), 8, shuffle=True)
        found = order(batches)
        assert len(batches) == len(found) == 2
        assert [len(batch) for batch in found] == [8, 8]
        assert len({i for batch in found for i in batch}) == 16

    def test_training_uses_everything_when_it_divides(self):
        found = order(raw(numbered_images(), 5, shuffle=True))
        assert sorted(i for batch in found for i in batch) == list(range(20))

    @pytest.mark.parametrize("shuffle", [False, True])
    def test_smaller_than_a_batch(self, shuffle):
        batches = raw(numbered_images(n=5), 8, shuffle=shuffle)
        assert len(batches) == 1
        assert sorted(order(batches)[0]) == [0, 1, 2, 3, 4]

    def test_labels_follow_their_images(self):
        dataset = numbered_images()
        for images, labels in raw(dataset, 8, shuffle=True):
            indices = (images[:, 0, 0, 0] * 255).round().long()
            assert torch.equal(labels, dataset.labels[indices])

    def test_epochs_and_seeds_differ(self):
        batches = raw(numbered_images(), 8, shuffle=True, seed=3)
        first = order(batches)
        assert order(batches) == first
        batches.set_epoch(1)
        assert order(batches) != first
        assert order(raw(numbered_images(), 8, shuffle=True, seed=4)) != first


class TestResume:
    @pytest.mark.parametrize("start", [0, 1, 3, 5])
    def test_iterate_from_the_middle(self, start):
        options = {"shuffle": True, "augment": True, "seed": 7}
        whole = Batches(numbered_images(n=43), 8, **options)
        resumed = Batches(numbered_images(n=43), 8, **options)
        for batches in (whole, resumed):
            batches.set_epoch(2)
        assert_same(list(whole)[start:], resumed.iterate(start))

    def test_streamed_from_the_middle(self, tmp_path):
        image = pytest.importorskip("PIL.Image")
        paths = []
        for i in range(12):
            paths.append(str(tmp_path / f"{i}.png"))
            image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(paths[-1])
        labels = torch.arange(12) % 4
        files = ImageFiles(paths, labels, tuple("abcd"), workers=0)
        memory = ImageTensor(numbered_images(n=12).images, labels, tuple("abcd"))
        options = {"shuffle": True, "augment": True, "seed": 7}
        # Streaming and memory give the same batches, from any start.
        assert_same(Batches(memory, 4, **options).iterate(1), Batches(files, 4, **options).iterate(1))

    def test_augmentation_differs_between_batches(self):
        images = torch.zeros(16, 1, 8, 8, dtype=torch.uint8)
        images[:, :, 2:6, 3] = 255
        dataset = ImageTensor(images, torch.zeros(16, dtype=torch.int64), ("a",))
        batches = Batches(dataset, 8, shuffle=False, augment=True)
        (first, _), (second, _) = batches
        assert not torch.equal(first, second)

    def test_global_random_state_is_neither_read_nor_advanced(self):
        batches = Batches(numbered_images(), 8, shuffle=True, augment=True)
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first = list(batches)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(1)
        assert_same(first, batches)

    @pytest.mark.parametrize("start", [-1, 3])
    def test_start_out_of_range(self, start):
        with pytest.raises(ValueError, match=rf"start is {start}; an epoch has 2 batches"):
            raw(numbered_images(), 8, shuffle=True).iterate(start)


class TestNormalization:
    def test_pixels_are_centered_and_scaled(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8, generator=generator)
        dataset = ImageTensor(images, torch.zeros(32, dtype=torch.int64), ("a",))
        batches = Batches(dataset, 32, shuffle=False, augment=False)
        ((result, labels),) = batches
        assert result.dtype == torch.float32
        assert labels.dtype == torch.int64
        # A float32 mean of 2,048 values of size one: rounding stays below 1e-5.
        torch.testing.assert_close(result.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(result.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)

    def test_given_statistics_are_used(self):
        train = Batches(numbered_images(), 8, shuffle=True, augment=False)
        val = Batches(numbered_images(n=8), 8, shuffle=False, augment=False, mean=train.mean, std=train.std)
        ((images, _),) = val
        expected = (torch.arange(8) / 255 - train.mean[0]) / train.std[0]
        torch.testing.assert_close(images[:, 0, 0, 0], expected)

    def test_channel_of_one_color(self):
        dataset = ImageTensor(
            torch.full((4, 1, 8, 8), 51, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ("a",)
        )
        batches = Batches(dataset, 4, shuffle=False, augment=False)
        assert batches.std == (1.0,)
        ((images, _),) = batches
        # 51/255 in float32 is within one rounding of the mean.
        assert images.abs().max() < 1e-6

    def test_digits_like_images_are_never_mirrored(self):
        images = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
        images[:, :, :, 1] = 255  # Left of the middle whatever the shift, unless mirrored.
        labels = torch.zeros(64, dtype=torch.int64)
        for mirror in (False, True):
            dataset = ImageTensor(images, labels, ("a",), mirror=mirror)
            batches = Batches(dataset, 64, shuffle=False, augment=True, mean=(0.0,), std=(1.0,))
            ((result, _),) = batches
            assert bool(result[..., 4:].any()) == mirror


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"mean": (0.0,) * 3}, "mean and std must be given together"),
        ({"mean": (0.0,), "std": (1.0,)}, "mean has 1 and std 1 values; images have 3 channels"),
        ({"mean": (0.0,) * 3, "std": (1.0, 0.0, 1.0)}, "std is .* positive"),
    ],
)
def test_bad_arguments(options, message):
    arguments = {"batch_size": 8, "shuffle": False, "augment": False} | options
    with pytest.raises(ValueError, match=message):
        Batches(numbered_images(), **arguments)


def test_empty_dataset():
    empty = ImageTensor(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), ("a",))
    with pytest.raises(ValueError, match="dataset is empty"):
        Batches(empty, 8, shuffle=False, augment=False)


def test_negative_epoch():
    with pytest.raises(ValueError, match="epoch is -1"):
        raw(numbered_images(), 8).set_epoch(-1)


class TestSplit:
    @pytest.mark.parametrize("shuffle", [False, True])
    def test_images_are_on_one_side_each_class_on_both(self, shuffle):
        dataset = numbered_images()
        sides = raw(dataset, 5, shuffle=shuffle).split(0.4)
        images = [sorted(i for batch in order(side) for i in batch) for side in sides]
        if not shuffle:  # training drops what is left over
            assert sorted(images[0] + images[1]) == list(range(20))
            assert torch.bincount(dataset.labels[images[1]]).tolist() == [2, 2, 2, 2]
        assert not set(images[0]) & set(images[1])
        assert [len(side) for side in sides] == ([2, 1] if shuffle else [3, 2])

    def test_is_the_same_whatever_the_seed_and_epoch(self):
        first = raw(numbered_images(), 4, shuffle=True, seed=1).split(0.4)
        second = raw(numbered_images(), 4, shuffle=True, seed=2).split(0.4)
        second[1].set_epoch(3)
        assert order(first[1]) != order(second[1])
        assert {i for batch in order(first[1]) for i in batch} == {i for batch in order(second[1]) for i in batch}

    @pytest.mark.parametrize("share", [0.0, 1.0, -1])
    def test_share_out_of_range(self, share):
        with pytest.raises(ValueError, match="share is"):
            raw(numbered_images(), 4).split(share)

    def test_one_side_empty(self):
        with pytest.raises(ValueError, match=r"share is 0\.01, which leaves one side of 20 images empty"):
            raw(numbered_images(), 4).split(0.01)
