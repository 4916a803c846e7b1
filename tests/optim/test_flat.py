"""Many tensors as few: what shares a bucket, and that values come back where they were."""

import torch

from asga.optim._flat import buckets, copy_flat_, flatten


def test_a_bucket_holds_one_device_and_dtype_in_order():
    tensors = [torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(4), torch.ones(1, device="meta")]
    assert buckets(tensors) == [[0, 2], [1], [3]]


def test_a_bucket_has_at_most_so_many_bytes_unless_one_tensor_has_more():
    tensors = [torch.ones(n) for n in (2, 2, 1, 50, 4)]
    assert buckets(tensors, 16) == [[0, 1], [2], [3], [4]]
    assert buckets([], 16) == []


def test_values_come_back_whatever_the_layout():
    values = torch.arange(24.0).reshape(2, 3, 2, 2)
    tensors = [
        values.contiguous(memory_format=torch.channels_last),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.tensor(7.0),
        torch.ones(0),
    ]
    flat = flatten(tensors)
    assert flat.shape == (24 + 6 + 1,)
    kept = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    copy_flat_(tensors, flat)
    assert all(map(torch.equal, tensors, kept))


def test_a_copy_shares_no_memory_not_even_of_one_tensor():
    tensor = torch.ones(3)
    flat = flatten([tensor])
    tensor.zero_()
    assert flat.tolist() == [1, 1, 1]
