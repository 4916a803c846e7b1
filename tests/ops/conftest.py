import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from asga.ops import direct


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors as small as most here gain nothing from more, and the machine may have other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def calls_past_the_dispatcher() -> Callable[[], AbstractContextManager[list[str]]]:
    """A context that lists the calls of the compiled sweeps on addresses, as `asga.ops.direct` makes them."""

    @contextmanager
    def watch() -> Iterator[list[str]]:
        made = []

        def spy(name: str) -> Callable:
            run = getattr(direct._C, name)
            return lambda *arguments: (made.append(name), run(*arguments))[1]

        sweeps = ("fake_quant", "fake_quant_backward", "mixed_fake_quant", "mixed_fake_quant_backward")
        spies = types.SimpleNamespace(**{name: spy(name) for name in sweeps})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(direct, "_C", spies)
            yield made

    return watch
