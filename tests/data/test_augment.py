import pytest
import torch

from asga.data.augment import shift_and_flip


def augment(images, *, mirror, seed=0):
    return shift_and_flip(images, mirror=mirror, generator=torch.Generator().manual_seed(seed))


def candidates(image, mirror):
    """Every result that one image [C, H, W] may have."""
    _, height, width = image.shape
    pad_y, pad_x = max(1, height // 8), max(1, width // 8)
    padded = torch.nn.functional.pad(image, (pad_x, pad_x, pad_y, pad_y))
    shifted = [padded[:, y : y + height, x : x + width] for y in range(2 * pad_y + 1) for x in range(2 * pad_x + 1)]
    return shifted + [image.flip(2) for image in shifted] if mirror else shifted


@pytest.mark.parametrize("mirror", [False, True], ids=["shift", "shift+mirror"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16), (2, 5, 24)], ids=str)
def test_every_image_is_shifted_by_at_most_an_eighth(shape, mirror):
    image = torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = image.expand(800, *shape)
    result = augment(images, mirror=mirror)
    assert result.shape == images.shape
    assert result.dtype == images.dtype
    allowed = {tuple(candidate.flatten().tolist()) for candidate in candidates(image, mirror)}
    seen = {tuple(image.flatten().tolist()) for image in result}
    # The largest case has 5 x 5 x 2 = 50 results; 800 draws miss one with probability 50 (49/50)^800 < 1e-5.
    assert seen == allowed


def test_generator_alone_decides():
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augment(images, mirror=True, seed=5), augment(images, mirror=True, seed=5))
    assert not torch.equal(augment(images, mirror=True, seed=5), augment(images, mirror=True, seed=6))


def test_input_is_left_alone():
    images = torch.full((4, 1, 8, 8), 9, dtype=torch.uint8)
    augment(images, mirror=True)
    assert torch.all(images == 9)
