import pytest
import torch

from asga.data.selection import rank_in_class, select

NAMES = ("ant", "bee", "cat")
# 6 ants, 3 bees, 1 cat, interleaved.
LABELS = torch.tensor([0, 1, 0, 0, 2, 1, 0, 0, 1, 0])


class TestClasses:
    def test_all_by_default(self):
        indices, labels, names = select(LABELS, NAMES)
        assert indices.tolist() == list(range(10))
        assert torch.equal(labels, LABELS)
        assert names == NAMES

    def test_first_n(self):
        indices, labels, names = select(LABELS, NAMES, classes=2)
        assert indices.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
        assert labels.tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0]
        assert names == ("ant", "bee")

    def test_names_are_numbered_in_the_order_given(self):
        indices, labels, names = select(LABELS, NAMES, classes=["cat", "bee"])
        assert indices.tolist() == [1, 4, 5, 8]
        assert labels.tolist() == [1, 0, 1, 1]
        assert names == ("cat", "bee")

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            (0, "classes is 0; the data has 3 classes"),
            (4, "classes is 4; the data has 3 classes"),
            (["bea"], "'bea', which the data does not; nearest: bee"),
            (["ant", "ant"], "one twice"),
            ([], "number or a list of names"),
            ("ant", "number or a list of names"),
        ],
    )
    def test_bad_classes(self, classes, message):
        with pytest.raises(ValueError, match=message):
            select(LABELS, NAMES, classes=classes)

    def test_class_without_images(self):
        with pytest.raises(ValueError, match="no image of the classes cat"):
            select(torch.tensor([0, 1]), NAMES, classes=["cat"])


class TestLimit:
    @pytest.mark.parametrize(
        ("limit", "counts"),
        [(3, [1, 1, 1]), (5, [2, 2, 1]), (7, [3, 3, 1]), (9, [5, 3, 1]), (10, [6, 3, 1]), (99, [6, 3, 1])],
    )
    def test_shares_are_equal_until_a_class_is_used_up(self, limit, counts):
        _, labels, _ = select(LABELS, NAMES, limit=limit)
        assert torch.bincount(labels).tolist() == counts

    def test_remainder_is_within_one(self):
        labels = torch.arange(10).repeat(20)
        _, chosen, _ = select(labels, [str(i) for i in range(10)], limit=57)
        assert sorted(torch.bincount(chosen).tolist()) == [5] * 3 + [6] * 7

    def test_applies_within_the_classes_kept(self):
        _, labels, _ = select(LABELS, NAMES, classes=["bee", "ant"], limit=4)
        assert torch.bincount(labels).tolist() == [2, 2]

    def test_depends_on_the_seed_alone(self):
        labels = torch.arange(10).repeat(20)
        names = [str(i) for i in range(10)]
        first, again, other = (select(labels, names, limit=50, seed=seed)[0] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(first, first.sort().values)

    def test_smaller_limit_is_a_part_of_a_larger(self):
        labels = torch.arange(10).repeat(20)
        names = [str(i) for i in range(10)]
        small = set(select(labels, names, limit=23)[0].tolist())
        large = set(select(labels, names, limit=61)[0].tolist())
        assert small.issubset(large)
        assert (len(small), len(large)) == (23, 61)

    def test_below_one(self):
        with pytest.raises(ValueError, match="limit is 0"):
            select(LABELS, NAMES, limit=0)


def test_rank_in_class_permutes_every_class():
    ranks = rank_in_class(LABELS, torch.Generator().manual_seed(3))
    for label, count in enumerate((6, 3, 1)):
        assert sorted(ranks[label == LABELS].tolist()) == list(range(count))
