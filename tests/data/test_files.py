import numpy as np
import pytest
import torch

from asga.data import ImageFiles, ImageTensor
from asga.data.files import list_images

Image = pytest.importorskip("PIL.Image")


def save(path, pixels, **options):
    """Write uint8 [H, W, 3] (or [H, W]) as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def random_pixels(height=8, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png_files(folder, n=10, **options):
    paths = [save(folder / f"{i:03}.png", random_pixels(seed=i)) for i in range(n)]
    return ImageFiles(paths, torch.arange(n) % 2, ("a", "b"), **options)


def original(indices):
    """What `png_files` wrote, as uint8 [B, 3, H, W]."""
    return torch.stack([torch.from_numpy(random_pixels(seed=int(i))).permute(2, 0, 1) for i in indices])


class TestListImages:
    def make(self, root, *names):
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def test_sorted_and_labeled(self, tmp_path):
        self.make(tmp_path, "train/bee/2.JPEG", "train/bee/1.png", "train/ant/deep/er/3.webp")
        paths, labels, names = list_images(tmp_path, "train")
        expected = ["train/ant/deep/er/3.webp", "train/bee/1.png", "train/bee/2.JPEG"]
        assert paths == [str(tmp_path / name) for name in expected]
        assert labels.tolist() == [0, 1, 1]
        assert names == ("ant", "bee")

    def test_hidden_and_other_files_are_passed_over(self, tmp_path):
        self.make(tmp_path, "train/a/1.png", "train/a/._1.png", "train/a/notes.txt", "train/.cache/2.png")
        paths, _, names = list_images(tmp_path, "train")
        assert paths == [str(tmp_path / "train/a/1.png")]
        assert names == ("a",)

    def test_labels_of_val_follow_train(self, tmp_path):
        self.make(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png")
        _, labels, names = list_images(tmp_path, "val")
        assert labels.tolist() == [2]
        assert names == ("a", "b", "c")

    def test_class_only_in_val(self, tmp_path):
        self.make(tmp_path, "train/a/1.png", "val/a/1.png", "val/z/1.png")
        with pytest.raises(ValueError, match=r"val.z is a class that .*train does not have"):
            list_images(tmp_path, "val")

    def test_split_missing(self, tmp_path):
        self.make(tmp_path, "train/a/1.png", "test/a/1.png")
        with pytest.raises(FileNotFoundError, match=r"val does not exist.*holds test, train"):
            list_images(tmp_path, "val")

    def test_no_class_folders(self, tmp_path):
        self.make(tmp_path, "train/1.png")
        with pytest.raises(ValueError, match="train has no folders"):
            list_images(tmp_path, "train")

    def test_class_without_images(self, tmp_path):
        self.make(tmp_path, "train/a/1.png", "train/b/notes.txt")
        with pytest.raises(ValueError, match=r"b has no images \(.bmp, .jpeg"):
            list_images(tmp_path, "train")


class TestDecoding:
    def test_load_keeps_the_pixels(self, tmp_path):
        dataset = png_files(tmp_path).load()
        assert isinstance(dataset, ImageTensor)
        assert torch.equal(dataset.images, original(range(10)))
        assert dataset.labels.tolist() == [0, 1] * 5

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
    def test_modes_become_rgb(self, tmp_path, mode):
        path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
        image = Image.fromarray(random_pixels()).convert(mode)
        image.save(path)
        dataset = ImageFiles([str(path)], torch.tensor([0]), ("a",)).load()
        assert np.array_equal(dataset.images[0].permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))

    def test_image_size_takes_the_centered_square(self, tmp_path):
        pixels = random_pixels(height=8, width=14)
        path = save(tmp_path / "a.png", pixels)
        dataset = ImageFiles([path], torch.tensor([0]), ("a",), image_size=8).load()
        assert np.array_equal(dataset.images[0].permute(1, 2, 0).numpy(), pixels[:, 3:11])

    def test_image_size_averages(self, tmp_path):
        pixels = np.kron(random_pixels(height=4, width=4), np.ones((8, 8, 1), np.uint8))
        path = save(tmp_path / "a.png", pixels)
        dataset = ImageFiles([path], torch.tensor([0]), ("a",), image_size=2).load()
        expected = Image.fromarray(pixels).resize((2, 2), Image.Resampling.BILINEAR)
        assert np.array_equal(dataset.images[0].permute(1, 2, 0).numpy(), np.asarray(expected))

    def test_large_jpeg_is_decoded_reduced_but_alike(self, tmp_path):
        rows, columns = np.mgrid[0:512, 0:512] // 2
        pixels = np.stack([rows, columns, 255 - rows], axis=2).astype(np.uint8)
        path = save(tmp_path / "a.jpg", pixels, quality=95)
        dataset = ImageFiles([path], torch.tensor([0]), ("a",), image_size=32).load()
        expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
        difference = dataset.images[0].permute(1, 2, 0).numpy().astype(int) - expected
        # The ramp has 8 levels a pixel: reduced decoding may not shift the image by as much as one.
        assert np.abs(difference).max() < 8

    def test_differing_sizes_need_an_image_size(self, tmp_path):
        paths = [save(tmp_path / "a.png", random_pixels()), save(tmp_path / "b.png", random_pixels(6, 9))]
        labels = torch.tensor([0, 0])
        with pytest.raises(ValueError, match=r"b\.png: it has 9x6 pixels, the first image 8x8; give an image size"):
            ImageFiles(paths, labels, ("a",)).load()
        assert ImageFiles(paths, labels, ("a",), image_size=4).load().image_shape == (3, 4, 4)

    def test_progress_counts_up_to_all(self, tmp_path):
        path = save(tmp_path / "a.png", random_pixels())
        files = ImageFiles([path] * 150, torch.zeros(150, dtype=torch.int64), ("a",))
        calls = []
        files.load(lambda done, total: calls.append((done, total)))
        assert calls == [(64, 150), (128, 150), (150, 150)]


class TestUnreadable:
    @pytest.fixture
    def files(self, tmp_path):
        return png_files(tmp_path)

    def damage(self, files, index, how):
        path = files.paths[index]
        with open(path, "rb") as file:
            content = file.read()
        with open(path, "wb") as file:
            file.write(how(content))
        return path

    @pytest.mark.parametrize(
        "how",
        [lambda content: b"", lambda content: b"not an image", lambda content: content[: len(content) // 2]],
        ids=["empty", "text", "truncated"],
    )
    @pytest.mark.parametrize("index", [0, 6])
    def test_is_named_and_left_alone(self, files, how, index):
        path = self.damage(files, index, how)
        with open(path, "rb") as file:
            before = file.read()
        with pytest.raises(ValueError, match=rf"cannot use image .*{index:03}\.png"):
            ImageFiles(files.paths, files.labels, files.classes).load()
        with open(path, "rb") as file:
            assert file.read() == before

    @pytest.mark.parametrize("workers", [0, 1])
    def test_is_named_when_streamed(self, files, workers):
        self.damage(files, 6, lambda content: content[:60])
        files.workers = workers
        stream = files.read([torch.tensor([0, 1]), torch.tensor([5, 6])])
        assert torch.equal(next(stream), original([0, 1]))
        with pytest.raises(ValueError, match=r"^cannot use image .*006\.png"):
            next(stream)

    def test_missing_file(self, files):
        files.paths[3] += "x"
        with pytest.raises(ValueError, match=r"cannot use image .*003\.pngx"):
            files.load()

    def test_more_than_8_bits(self, tmp_path):
        path = tmp_path / "deep.png"
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path)
        with pytest.raises(ValueError, match=r"deep\.png: its pixels have more than 8 bits"):
            ImageFiles([str(path)], torch.tensor([0]), ("a",)).load()


class TestStreaming:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_come_in_order(self, tmp_path, workers):
        files = png_files(tmp_path, workers=workers)
        batches = [torch.tensor([9, 2, 4]), torch.tensor([0]), torch.tensor([5, 5])]
        images = list(files.read(batches))
        assert [len(batch) for batch in images] == [3, 1, 2]
        for batch, indices in zip(images, batches, strict=True):
            assert torch.equal(batch, original(indices))

    def test_global_random_state_is_left_alone(self, tmp_path):
        files = png_files(tmp_path, workers=0)
        before = torch.get_rng_state()
        list(files.read([torch.tensor([0])]))
        assert torch.equal(torch.get_rng_state(), before)

    def test_statistics_of_a_small_set_are_exact(self, tmp_path):
        files = png_files(tmp_path)
        assert files.statistics() == files.load().statistics()

    def test_statistics_of_a_large_set_are_sampled(self, tmp_path):
        dark, bright = (save(tmp_path / f"{value}.png", np.full((2, 2, 3), value, np.uint8)) for value in (0, 255))
        n = 4000
        files = ImageFiles([dark] * (n // 2) + [bright] * (n // 2), torch.zeros(n, dtype=torch.int64), ("a",))
        mean, std = files.statistics()
        # The sample of 1,024 is spread evenly over the files, half of which are white.
        assert mean == (0.5, 0.5, 0.5)
        assert std == (0.5, 0.5, 0.5)

    def test_size_in_bytes(self, tmp_path):
        assert png_files(tmp_path, image_size=5).nbytes == 10 * 3 * 5 * 5
