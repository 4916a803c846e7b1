"""Image classification data for the command line: digits, folders of images, CIFAR-10."""

from asga.data.batches import Batches
from asga.data.files import ImageFiles
from asga.data.images import ImageTensor
from asga.data.open import open_dataset

__all__ = ["Batches", "ImageFiles", "ImageTensor", "open_dataset"]
