import math

import numpy as np
import pytest
import torch

from asga._checks import check_autocast, check_call, check_count, check_instance, check_number


class TestCount:
    @pytest.mark.parametrize("value", [1, 7, np.int64(3)])
    def test_integers_pass(self, value):
        found = check_count("epochs", value)
        assert found == value
        assert type(found) is int

    @pytest.mark.parametrize("value", [1.0, "1", None, True])
    def test_other_types(self, value):
        with pytest.raises(TypeError, match=f"epochs is {value!r}; an integer is needed"):
            check_count("epochs", value)

    def test_too_small(self):
        check_count("warmup", 0, least=0)
        with pytest.raises(ValueError, match="epochs is 0; it must be at least 1"):
            check_count("epochs", 0)


class TestCall:
    def test_functions_pass(self):
        check_call("loss_fn", torch.nn.functional.mse_loss)
        check_call("loss_fn", torch.nn.MSELoss())
        check_call("progress", None, or_none=True)

    def test_others(self):
        with pytest.raises(TypeError, match="loss_fn is None; a function is needed"):
            check_call("loss_fn", None)
        with pytest.raises(TypeError, match="progress is 3; a function, or None, is needed"):
            check_call("progress", 3, or_none=True)


class TestNumber:
    @pytest.mark.parametrize("value", [0, 0.5, np.float32(0.1), 10**9])
    def test_numbers_pass(self, value):
        found = check_number("lr", value)
        assert found == value
        assert type(found) in (int, float)

    @pytest.mark.parametrize("value", ["0.1", None, True, torch.tensor(0.1)])
    def test_other_types(self, value):
        with pytest.raises(TypeError, match=r"lr is .*; a number is needed"):
            check_number("lr", value)

    @pytest.mark.parametrize("value", [-1, math.nan, math.inf])
    def test_out_of_range(self, value):
        with pytest.raises(ValueError, match=f"lr is {value}; it must be finite and not negative"):
            check_number("lr", value)

    def test_bound(self):
        with pytest.raises(ValueError, match="momentum is 1; it must be below 1 and not negative"):
            check_number("momentum", 1, below=1)


def test_instance():
    check_instance("meta", {}, (dict, type(None)), "a mapping")
    with pytest.raises(TypeError, match="meta is 3; a mapping is needed"):
        check_instance("meta", 3, (dict, type(None)), "a mapping")


def test_autocast():
    for dtype in (None, torch.bfloat16, torch.float16):
        check_autocast(dtype)
    with pytest.raises(TypeError, match=r"autocast is 'bfloat16'; a dtype such as torch.bfloat16, or None, is needed"):
        check_autocast("bfloat16")
    with pytest.raises(ValueError, match=r"autocast is torch.int8; it must be torch.bfloat16"):
        check_autocast(torch.int8)
