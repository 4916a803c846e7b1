import itertools
import math

import numpy as np
import pytest

from asga.search import program
from asga.search.program import Link, Pair, Program, exceeds


def random_layers(seed: int, count: int, digits: int = 3) -> tuple[list[list[Pair]], list[int]]:
    """Layers of one to four pairs, the first without loss, and two limits that some choice meets exactly."""
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(count):
        size = int(rng.integers(1, 5))
        losses = np.sort(rng.random(size) * 10) * (np.arange(size) > 0)
        costs = rng.integers(0, 10**digits, size=(size, 2))
        layers.append([Pair((k, k % 2), float(losses[k]), tuple(map(int, costs[k])), 0.0) for k in range(size)])
    witness = [layer[int(rng.integers(len(layer)))] for layer in layers]
    return layers, [sum(pair.extra[m] for pair in witness) for m in range(2)]


def brute_force(layers: list[list[Pair]], slack: list[int], links: tuple[Link, ...] = ()) -> float | None:
    fitting = (
        math.fsum(pair.loss for pair in chosen)
        for chosen in itertools.product(*layers)
        if exceeds(chosen, slack) is None
        and all(len({chosen[layer].index[link.axis] for layer in link.layers}) == 1 for link in links)
    )
    return min(fitting, default=None)


@pytest.mark.parametrize("links", [(), (Link(0, (0, 2)), Link(1, (1, 2, 3)))], ids=["apart", "linked"])
def test_equals_brute_force(links):
    for seed in range(30):
        layers, slack = random_layers(seed, 5)
        chosen, best = Program(layers, slack, links).least_loss(), brute_force(layers, slack, links)
        if best is None:
            assert chosen is None, seed
        else:
            assert exceeds(chosen, slack) is None
            assert math.fsum(pair.loss for pair in chosen) == pytest.approx(best, abs=1e-8), seed
            for link in links:
                assert len({chosen[layer].index[link.axis] for layer in link.layers}) == 1


def test_a_core_of_any_size_gives_the_same(monkeypatch):
    layers, slack = random_layers(3, 40)
    answers = []
    for size in (0, 3, 1000):
        monkeypatch.setattr(program, "_FIRST_CORE", size)
        answers.append(math.fsum(pair.loss for pair in Program(layers, slack).least_loss()))
    assert answers == pytest.approx([answers[0]] * 3, abs=1e-8)


def test_a_core_leaves_most_pairs_out(monkeypatch):
    layers, slack = random_layers(4, 60)
    exact_solve, sizes = Program._solve, []

    def solve(self, objective, core, largest_loss):
        sizes.append(int(core.sum()))
        return exact_solve(self, objective, core, largest_loss)

    monkeypatch.setattr(Program, "_solve", solve)
    assert Program(layers, slack).least_loss() is not None
    assert max(sizes) < 0.8 * sum(map(len, layers))


def test_answers_that_exceed_a_limit_are_cut_off(monkeypatch):
    """A solver that takes the limits 10 % too large for a while still leads to the exact answer."""
    layers, slack = random_layers(5, 12, digits=12)
    expected = Program(layers, slack).least_loss()
    exact_solve, offered = Program._solve, []

    def sloppy_solve(self, *args):
        exact, sloppy = self._upper, self._upper.copy()
        sloppy[:2] = 1.1 if len(offered) < 5 else 1.0
        self._upper = sloppy
        offered.append(exact_solve(self, *args))
        self._upper = exact
        return offered[-1]

    monkeypatch.setattr(Program, "_solve", sloppy_solve)
    assert Program(layers, slack).least_loss() == expected
    assert any(exceeds(chosen, slack) is not None for chosen in offered[:5] if chosen is not None)


def test_nothing_fits():
    layers = [[Pair((0, 0), 0.0, (2, 0), 0.0), Pair((1, 0), 1.0, (0, 2), 0.0)] for _ in range(3)]
    assert Program(layers, [3, 3]).least_loss() is None
    assert Program(layers, [2, 4]).least_loss() is not None
