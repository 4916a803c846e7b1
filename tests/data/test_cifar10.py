import io
import os
import pickle
import pickletools

import numpy as np
import pytest
import torch

from asga.data.cifar10 import CLASSES, read_cifar10

PER_BATCH = 4
NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def make_batches():
    """Pixels uint8 [PER_BATCH, 3072] and labels for each official file name."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(0, 256, (PER_BATCH, 3072), np.uint8), rng.integers(0, 10, PER_BATCH).tolist())
        for name in NAMES
    }


def write_binary(folder, batches):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pixels, labels) in batches.items():
        records = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())


def write_python(folder, batches, protocol=2):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pixels, labels) in batches.items():
        content = {
            b"batch_label": name.encode(),
            b"labels": labels,
            b"data": pixels,
            b"filenames": [b"a.png"],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))


def assert_train_images(result, batches):
    images, labels, names = result
    assert images.dtype == torch.uint8
    assert images.shape == (5 * PER_BATCH, 3, 32, 32)
    assert labels.dtype == torch.int64
    assert names == CLASSES
    expected = np.concatenate([batches[name][0] for name in NAMES[:5]])
    assert np.array_equal(images.flatten(1).numpy(), expected)
    assert labels.tolist() == [label for name in NAMES[:5] for label in batches[name][1]]


class TestBinary:
    @pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-bin"], ids=["batches", "parent"])
    def test_train(self, tmp_path, subfolder):
        batches = make_batches()
        write_binary(tmp_path / subfolder, batches)
        assert_train_images(read_cifar10(tmp_path, "train"), batches)

    def test_val_is_the_test_batch(self, tmp_path):
        batches = make_batches()
        write_binary(tmp_path, batches)
        images, labels, _ = read_cifar10(tmp_path, "val")
        assert np.array_equal(images.flatten(1).numpy(), batches["test_batch"][0])
        assert labels.tolist() == batches["test_batch"][1]

    @pytest.mark.parametrize("size", [0, 3072, 4 * 3073 - 1])
    def test_cut_short(self, tmp_path, size):
        write_binary(tmp_path, make_batches())
        damaged = tmp_path / "data_batch_3.bin"
        damaged.write_bytes(bytes(size))
        with pytest.raises(ValueError, match=rf"data_batch_3\.bin has {size} bytes.*3073"):
            read_cifar10(tmp_path, "train")

    def test_label_out_of_range(self, tmp_path):
        batches = make_batches()
        batches["test_batch"][1][2] = 10
        write_binary(tmp_path, batches)
        with pytest.raises(ValueError, match=r"test_batch\.bin: record 2 has label 10"):
            read_cifar10(tmp_path, "val")

    def test_missing_batches_are_named(self, tmp_path):
        write_binary(tmp_path, make_batches())
        (tmp_path / "data_batch_2.bin").unlink()
        (tmp_path / "data_batch_5.bin").unlink()
        with pytest.raises(FileNotFoundError, match=r"data_batch_2\.bin, data_batch_5\.bin missing"):
            read_cifar10(tmp_path, "train")


class TestPython:
    @pytest.mark.parametrize("protocol", [0, 2, 4])
    @pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-py"], ids=["batches", "parent"])
    def test_train(self, tmp_path, subfolder, protocol):
        batches = make_batches()
        write_python(tmp_path / subfolder, batches, protocol)
        assert_train_images(read_cifar10(tmp_path, "train"), batches)

    def test_strings_as_python_2_wrote_them(self, tmp_path):
        """The official files: protocol 2 with byte strings, and numpy's name of before version 2."""
        pixels = bytes(range(256)) * 12
        (tmp_path / "test_batch").write_bytes(
            b"\x80\x02}(U\x06labels]K\x07aU\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
            b"K\x00\x85U\x01b\x87R(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + pixels + b"tbu."
        )
        images, labels, _ = read_cifar10(tmp_path, "val")
        assert images.flatten().tolist() == list(pixels)
        assert labels.tolist() == [7]

    def test_fortran_order(self, tmp_path):
        batches = make_batches()
        fortran = {name: (np.asfortranarray(pixels), labels) for name, (pixels, labels) in batches.items()}
        write_python(tmp_path, fortran)
        assert_train_images(read_cifar10(tmp_path, "train"), batches)

    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_malicious_pickle_is_refused_and_does_not_run(self, tmp_path, protocol):
        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        write_python(tmp_path, make_batches())
        (tmp_path / "data_batch_4").write_bytes(pickle.dumps({b"data": Attack()}, protocol=protocol))
        with pytest.raises(ValueError, match=rf"data_batch_4 was refused: it asks for {os.name}\.mkdir"):
            read_cifar10(tmp_path, "train")
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("name", ["builtins eval", "numpy load", "numpy.core.multiarray scalar", "_codecs decode"])
    def test_other_names_are_refused(self, tmp_path, name):
        module, attribute = name.split()
        (tmp_path / "test_batch").write_bytes(f"c{module}\n{attribute}\n.".encode())
        with pytest.raises(ValueError, match=rf"it asks for {module}\.{attribute}\."):
            read_cifar10(tmp_path, "val")

    def test_array_of_objects_is_refused(self, tmp_path):
        content = {b"data": np.array([[1, "a"]], dtype=object), b"labels": [1]}
        (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(ValueError, match="the array does not hold bytes"):
            read_cifar10(tmp_path, "val")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, "2 images but 1 labels"),
            ({b"data": np.zeros((1, 3000), np.uint8), b"labels": [1]}, "rows of 3072 bytes"),
            ({b"data": np.zeros(3072, np.uint8), b"labels": [1]}, "rows of 3072 bytes"),
            ({b"data": b"none", b"labels": [1]}, "rows of 3072 bytes"),
            ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "record 0 has label 10"),
            ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, "integers from 0 to 9"),
            ({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["1"]}, "integers from 0 to 9"),
            ({b"labels": [1]}, "damaged .*data"),
            ([1, 2], "damaged"),
        ],
    )
    def test_content_that_does_not_fit(self, tmp_path, content, message):
        (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(ValueError, match=rf"test_batch.*{message}"):
            read_cifar10(tmp_path, "val")

    def test_cut_short_anywhere(self, tmp_path):
        batches = make_batches()
        write_python(tmp_path, {"test_batch": batches["test_batch"]})
        whole = (tmp_path / "test_batch").read_bytes()
        opcodes = [position for _, _, position in pickletools.genops(io.BytesIO(whole))]
        for position in [0, *opcodes, len(whole) - 1]:
            (tmp_path / "test_batch").write_bytes(whole[:position])
            with pytest.raises(ValueError, match="test_batch is not a CIFAR-10 batch or is damaged"):
                read_cifar10(tmp_path, "val")


def test_binary_is_preferred(tmp_path):
    batches = make_batches()
    write_binary(tmp_path / "cifar-10-batches-bin", batches)
    write_python(tmp_path / "cifar-10-batches-py", make_batches() | {"test_batch": batches["data_batch_1"]})
    images, _, _ = read_cifar10(tmp_path, "val")
    assert np.array_equal(images.flatten(1).numpy(), batches["test_batch"][0])


def test_folder_without_batches(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10 in .*imagefolder:PATH"):
        read_cifar10(tmp_path, "train")
