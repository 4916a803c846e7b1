import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from asga._random import generators_of, random_state, set_random_state
from asga.data import Batches, ImageTensor
from asga.search.held_out import split_loader


def numbered(count: int = 20) -> TensorDataset:
    """A sample's input is its number."""
    return TensorDataset(torch.arange(count), torch.arange(count) % 3)


def numbers(batches) -> list[int]:
    return torch.cat([inputs for inputs, _ in batches]).tolist()


class TestDataLoader:
    @pytest.mark.parametrize("shuffle", [True, False])
    def test_every_sample_is_on_one_side(self, shuffle):
        loader = DataLoader(numbered(), batch_size=4, shuffle=shuffle)
        rest, held_out = split_loader(loader, 0.25)
        first, again = numbers(rest), numbers(rest)
        apart = numbers([held_out.batch(0), held_out.batch(1)])
        assert (len(rest), len(first), len(apart)) == (4, 15, 5)
        assert sorted(first + apart) == list(range(20))
        assert sorted(again) == sorted(first)
        assert (again == first) is not shuffle
        assert numbers(split_loader(loader, 0.25)[0]) != first or not shuffle
        assert sorted(numbers(split_loader(loader, 0.25)[0])) == sorted(first)

    def test_options_are_kept(self):
        loader = DataLoader(numbered(), batch_size=4, shuffle=True, drop_last=True, collate_fn=lambda rows: len(rows))
        rest, _ = split_loader(loader, 0.25)
        assert list(rest) == [4, 4, 4]
        assert rest.dataset is loader.dataset

    def test_shuffles_by_the_generator_of_the_loader(self):
        def order(seed: int) -> list[int]:
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(5)
            loader = DataLoader(numbered(), batch_size=4, shuffle=True, generator=generator)
            rest = split_loader(loader, 0.25)[0]
            assert generators_of(rest) == [generator]
            return numbers(rest)

        assert order(0) == order(1)

    @pytest.mark.parametrize(
        ("sampler", "message"),
        [
            ({"replacement": True, "num_samples": 8}, "draws 8 of 20 samples with replacement: only one that"),
            ({"num_samples": 8}, "draws 8 of 20 samples: only one that draws each once can be split"),
        ],
        ids=["with replacement", "a part"],
    )
    def test_a_sampler_that_draws_otherwise(self, sampler, message):
        loader = DataLoader(numbered(), batch_size=4, sampler=RandomSampler(numbered(), **sampler))
        with pytest.raises(ValueError, match=message):
            split_loader(loader, 0.25)

    def test_own_sampler(self):
        loader = DataLoader(numbered(), batch_size=4, sampler=WeightedRandomSampler([1.0] * 20, 20))
        with pytest.raises(ValueError, match=r"held_out is 0\.25, but the DataLoader has a sampler of its own"):
            split_loader(loader, 0.25)


class TestHeldOut:
    def test_order_follows_from_the_step_alone(self):
        def held_out():
            return split_loader(DataLoader(numbered(), batch_size=2, shuffle=True), 0.25)[1]

        torch.manual_seed(0)
        whole = held_out()
        expected = [whole.batch(step)[0].tolist() for step in range(9)]
        assert expected[:3] != expected[3:6]
        assert all(
            sorted(itertools.chain(*expected[i : i + 3])) == sorted(itertools.chain(*expected[:3])) for i in (3, 6)
        )
        for start in (2, 3, 7):
            torch.manual_seed(start)
            resumed = held_out()
            assert [resumed.batch(step)[0].tolist() for step in range(start, 9)] == expected[start:]

    def test_what_is_passed_over_draws_nothing_anywhere(self):
        """A resumed search goes on with the random numbers of one that was not stopped, whoever draws them."""

        class Noisy(TensorDataset):
            def __getitem__(self, index):
                return self.tensors[0][index] + np.random.rand() + random.random() + torch.rand(()), 0

        def batches(first: int, state: dict | None = None):
            held_out = split_loader(DataLoader(Noisy(torch.arange(20)), batch_size=1, shuffle=True), 0.25)[1]
            if state is not None:
                set_random_state(state)
            for step in range(first, 8):
                before = random_state()
                yield held_out.batch(step)[0].item(), before

        whole = list(batches(0))
        for first in (1, 3, 6):
            again = batches(first, whole[first][1])
            assert [value for value, _ in again] == [value for value, _ in whole[first:]]

    def test_draws_no_random_number_of_the_caller(self):
        held_out = split_loader(DataLoader(numbered(), batch_size=2, shuffle=True), 0.25)[1]
        torch.manual_seed(0)
        before = torch.get_rng_state()
        for step in range(7):
            held_out.batch(step)
        assert torch.equal(torch.get_rng_state(), before)


class TestOthers:
    def test_batches(self):
        labels = torch.arange(24) % 3
        images = torch.arange(24, dtype=torch.uint8).view(24, 1, 1, 1).expand(24, 1, 8, 8)
        loader = Batches(
            ImageTensor(images, labels, ("a", "b", "c")), 3, shuffle=True, augment=False, mean=[0], std=[1 / 255]
        )
        rest, held_out = split_loader(loader, 0.25)
        assert len(rest) == 6
        found = [x[:, 0, 0, 0].round().int().tolist() for x, _ in [*rest, held_out.batch(0), held_out.batch(1)]]
        assert sorted(itertools.chain(*found)) == list(range(24))

    def test_list_is_split_batch_by_batch(self, labeled_batches):
        batches = labeled_batches(8)
        rest, held_out = split_loader(batches, 0.25)
        apart = [held_out.batch(step)[0] for step in range(2)]
        assert len(rest) == 6
        assert {id(x) for x, _ in rest} | {id(x) for x in apart} == {id(x) for x, _ in batches}

    def test_nothing_left(self, labeled_batches):
        with pytest.raises(ValueError, match=r"held_out is 0\.1, which leaves 2 batches to train on and 0 apart"):
            split_loader(labeled_batches(2), 0.1)

    def test_cannot_be_split(self, labeled_batches):
        class Loader:
            def __len__(self) -> int:
                return 6

        with pytest.raises(ValueError, match="a Loader cannot be split"):
            split_loader(Loader(), 0.5)
