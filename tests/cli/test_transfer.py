import json
import math
import shutil
import signal

import pytest
import torch

import asga
from asga import LayerPolicy, Policy
from asga.cli.console import Console


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def table_of(folder) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / "result.json").read_text())["table"]}


def write_policy(path, bits: dict[str, tuple], **meta: str) -> None:
    Policy({name: LayerPolicy(*pair) for name, pair in bits.items()}, meta).save(path)


BITS = {"0": (8, 8), "3": (3, 4), "6": (4, 2), "11": (8, 8)}


class TestRunFolder:
    def test_from_a_search_on_other_data(self, run, search_arguments, target, tmp_path):
        """Three classes of 8x8 images there, four of 12x12 here."""
        assert run(*search_arguments, "--out", "proxy")[0] == 0
        status, out, err = run(
            *("transfer", "--policy", "proxy/policy.json", "--data", target, "--batch-size", 8, "--epochs", 2),
            *("--float-epochs", 2, "--seeds", 2, "--compare", "w4a4", "w2a3", "--out", "a target"),
        )
        assert (status, err) == (0, "")
        folder = tmp_path / "a target"
        assert {"config.json", "metrics.jsonl", "policy.json", "result.json", "model.pt"} <= {
            file.name for file in folder.iterdir()
        }
        policy = Policy.load(folder / "policy.json")
        assert policy == Policy.load(tmp_path / "proxy" / "policy.json")
        table = table_of(folder)
        assert list(table) == ["float", "searched", "uniform w4a4", "uniform w2a3"]
        assert [row["seeds"] for row in table.values()] == [1, 2, 2, 2]
        macs = {"0": 144 * 4 * 27, "3": 36 * 8 * 36, "6": 36 * 8 * 72, "11": 8 * 4}
        ends = 64 * (macs["0"] + macs["11"])
        searched = sum(macs[name] * layer.weight_bits * layer.act_bits for name, layer in policy.items())
        assert table["searched"]["bitops"] == searched
        assert table["uniform w4a4"]["bitops"] == ends + 16 * (macs["3"] + macs["6"])
        assert table["uniform w2a3"]["bitops"] == ends + 6 * (macs["3"] + macs["6"])
        for name, row in list(table.items())[1:]:
            assert name in out
            assert len(row["top1"]) == 2
            assert row["top1_mean"] == pytest.approx(sum(row["top1"]) / 2)
            assert row["top1_std"] == pytest.approx(abs(row["top1"][0] - row["top1"][1]) / math.sqrt(2))
            assert row["bitops_share"] == pytest.approx(row["bitops"] / searched)

    def test_evaluate_gives_the_reported_accuracy(self, run, transfer_arguments, target, tmp_path):
        assert run(*transfer_arguments, "--epochs", 3, "--seeds", 2)[0] == 0
        status, out, _ = run("evaluate", "run")
        assert status == 0
        row = table_of(tmp_path / "run")["searched"]
        assert out == f"top-1 {row['top1'][0]:.2%}, loss {self._loss(tmp_path):.4f}, 16 images of {target}\n"

    def _loss(self, tmp_path) -> float:
        return json.loads((tmp_path / "run" / "stages.json").read_text())["searched/seed0"]["loss"]

    def test_has_figures(self, run, transfer_arguments, tmp_path):
        pytest.importorskip("matplotlib")
        pytest.importorskip("jinja2")
        status, out, _ = run(*transfer_arguments)
        assert status == 0
        assert "no figures" not in out
        assert (tmp_path / "run" / "policy.png").read_bytes().startswith(b"\x89PNG")
        assert "<html" in (tmp_path / "run" / "report.html").read_text()

    def test_given_weights(self, run, transfer_arguments, tmp_path):
        assert run(*transfer_arguments)[0] == 0
        (tmp_path / "run").rename(tmp_path / "first")
        assert run(*transfer_arguments, "--init", "first/float.pt")[0] == 0
        assert not (tmp_path / "run" / "float.pt").exists()
        tables = table_of(tmp_path / "first"), table_of(tmp_path / "run")
        assert tables[0]["float"]["top1"] == tables[1]["float"]["top1"]
        assert tables[0]["searched"]["top1"] == tables[1]["searched"]["top1"]

    def test_comparison_keeps_first_and_last_and_what_stays_float(self, run, transfer_arguments, tmp_path):
        write_policy(
            tmp_path / "given.json", {**BITS, "0": (6, 8), "3": (None, None)}, architecture="asga_test_factory:net"
        )
        assert run(*transfer_arguments, "--compare", "w2a2")[0] == 0
        state = torch.load(tmp_path / "run" / "uniform w2a2-seed0.pt", weights_only=True)
        assert "3.weight_quantizer.scale" not in state
        macs = {"0": 144 * 4 * 27, "3": 36 * 8 * 36, "6": 36 * 8 * 72, "11": 8 * 4}
        expected = 48 * macs["0"] + 1024 * macs["3"] + 4 * macs["6"] + 64 * macs["11"]
        assert table_of(tmp_path / "run")["uniform w2a2"]["bitops"] == expected

    def test_a_model_of_two_layers(self, run, transfer_arguments, factories, tmp_path):
        """First and last are all there is."""
        (tmp_path / "asga_two_layers.py").write_text(
            "from torch import nn\n\n\n"
            "def net(num_classes):\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.ReLU(), nn.Linear(8, num_classes))\n"
        )
        write_policy(tmp_path / "given.json", {"1": (4, 4), "3": (4, 4)})
        assert run(*transfer_arguments, "--model", "asga_two_layers:net", "--compare", "w2a2")[0] == 0
        assert table_of(tmp_path / "run")["uniform w2a2"]["bitops_share"] == 1

    @pytest.mark.parametrize("options", [("--method", "sgd"), ("--precision", "bfloat16")], ids=" ".join)
    def test_options(self, run, transfer_arguments, tmp_path, options):
        assert run(*transfer_arguments, *options)[0] == 0
        assert run("evaluate", "run")[1].startswith(f"top-1 {table_of(tmp_path / 'run')['searched']['top1'][0]:.2%},")

    def test_limit_and_batch_larger_than_the_data(self, run, transfer_arguments):
        status, _, err = run(*transfer_arguments, "--limit", 10_000, "--batch-size", 10_000)
        assert (status, err) == (0, "")


class TestResume:
    ARGUMENTS = ("--seeds", 2, "--compare", "w3a3")

    @pytest.fixture
    def whole(self, run, transfer_arguments, tmp_path):
        """The same transfer, never interrupted."""
        assert run(*transfer_arguments, *self.ARGUMENTS)[0] == 0
        return shutil.move(tmp_path / "run", tmp_path / "whole")

    def _check_same(self, tmp_path, bits_of, run_contents) -> None:
        whole, resumed = tmp_path / "whole", tmp_path / "run"
        assert run_contents(resumed) == run_contents(whole)
        names = sorted(file.name for file in whole.glob("*.pt"))
        assert names == sorted(file.name for file in resumed.glob("*.pt"))
        for name in names:
            tensors = [bits_of(torch.load(folder / name, weights_only=True)) for folder in (whole, resumed)]
            assert (
                tensors[0]["state" if name == "checkpoint.pt" else "0.weight"]
                == tensors[1]["state" if name == "checkpoint.pt" else "0.weight"]
            )
            if name != "checkpoint.pt":
                assert tensors[0] == tensors[1], name
        assert bits_of(table_of(resumed)) == bits_of(table_of(whole))

    @pytest.mark.parametrize(
        ("stage", "step"),
        [("float", 2), ("float", 4), ("searched/seed0", 3), ("searched/seed1", 1), ("uniform w3a3/seed0", 4)],
    )
    @pytest.mark.parametrize("end", ["Ctrl-C", "kill"])
    def test_inside_a_stage(
        self, run, transfer_arguments, monkeypatch, tmp_path, whole, bits_of, run_contents, stage, step, end
    ):
        show = Console.progress

        def interrupt(self, state):
            show(self, state)
            if (state.stage, state.step) == (stage, step):
                if end == "kill":
                    raise Killed
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Console, "progress", interrupt)
            if end == "kill":
                with pytest.raises(Killed):
                    run(*transfer_arguments, *self.ARGUMENTS)
            else:
                status, _, err = run(*transfer_arguments, *self.ARGUMENTS)
                assert status == 130
                assert "--resume: run" in err
        assert run(*transfer_arguments, *self.ARGUMENTS, "--resume")[0] == 0
        self._check_same(tmp_path, bits_of, run_contents)

    @pytest.mark.parametrize("before", range(5))
    @pytest.mark.parametrize("function", ["save_tensors", "finish"])
    def test_killed_between_stages(
        self, run, transfer_arguments, monkeypatch, tmp_path, whole, bits_of, run_contents, before, function
    ):
        """After a stage was trained: before its weights were written, or before it was recorded as finished."""
        done = []
        where = "asga.cli.pipeline.save_tensors" if function == "save_tensors" else "asga.runs.RunFolder.finish"
        original = asga.cli.pipeline.save_tensors if function == "save_tensors" else asga.runs.RunFolder.finish

        def kill(*arguments):
            if len(done) == before:
                raise Killed
            done.append(1)
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(where, kill)
            with pytest.raises(Killed):
                run(*transfer_arguments, *self.ARGUMENTS)
        assert run(*transfer_arguments, *self.ARGUMENTS, "--resume")[0] == 0
        self._check_same(tmp_path, bits_of, run_contents)

    def test_of_a_complete_run_prints_the_table_again(
        self, run, transfer_arguments, tmp_path, whole, bits_of, run_contents
    ):
        shutil.copytree(whole, tmp_path / "run")
        status, out, _ = run(*transfer_arguments, *self.ARGUMENTS, "--resume")
        assert status == 0
        assert "uniform w3a3" in out
        assert table_of(tmp_path / "run") == table_of(whole)
        self._check_same(tmp_path, bits_of, run_contents)

    @pytest.mark.parametrize("name", ["float.pt", "searched-seed1.pt"])
    def test_damaged_weights_are_named(self, fails, transfer_arguments, tmp_path, whole, name):
        shutil.copytree(whole, tmp_path / "run")
        (tmp_path / "run" / name).write_bytes(b"damaged")
        assert f"{name} does not hold the weights" in fails(*transfer_arguments, *self.ARGUMENTS, "--resume")


class TestBadInput:
    """Said at once: nothing has been trained, nothing written."""

    @pytest.fixture(autouse=True)
    def nothing_is_written(self, tmp_path):
        yield
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--policy", "nowhere.json"), "no policy file at 'nowhere.json'"),
            (("--seeds", 0), "--seeds is 0; it must be at least 1"),
            (("--epochs", 0), "--epochs is 0; it must be at least 1"),
            (("--compare", "w4"), "--compare: 'w4' is not a uniform policy such as w4a4"),
            (("--compare", "w4a9"), "with 2 to 8 bits"),
            (("--init", "nothing.pt"), "nothing.pt does not exist"),
            (("--data", "cifar10:nowhere"), "nowhere does not exist"),
            (("--model", "resnet20"), "the policy is for another architecture, asga_test_factory:net"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
    )
    def test_option(self, fails, transfer_arguments, options, message):
        assert message in fails(*transfer_arguments, *options)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 2}, "written by a newer asga (policy version 2)"),
            ({"format": "other"}, "not a policy"),
            ({"meta": {}}, "--model is needed"),
            ({"layers": {}}, "at least one layer"),
            ({"layers": {"0": {"weight_bits": 9, "act_bits": 8}}}, "layer '0': weight_bits is 9; supported are 2 to 8"),
            ({"layers": {"0": {"weight_bits": 1, "act_bits": 8}}}, "weight_bits is 1"),
            ({"layers": {"0": {"weight_bits": "4", "act_bits": 8}}}, "weight_bits is '4'; an integer from 2 to 8"),
        ],
        ids=["newer", "format", "no architecture", "empty", "9 bits", "1 bit", "text"],
    )
    def test_policy(self, fails, transfer_arguments, policy_file, change, message):
        policy_file.write_text(json.dumps({**json.loads(policy_file.read_text()), **change}))
        err = fails(*transfer_arguments)
        assert message in err
        assert err.count("\n") == 1

    def test_broken_json(self, fails, transfer_arguments, policy_file):
        policy_file.write_text(policy_file.read_text()[:60])
        err = fails(*transfer_arguments)
        assert "given.json: not valid JSON: line " in err
        assert err.count("\n") == 1

    def test_unknown_layer(self, fails, transfer_arguments, policy_file):
        write_policy(policy_file, {**BITS, "1l": (4, 4)}, architecture="asga_test_factory:net")
        assert "'1l'; did you mean '11'?" in fails(*transfer_arguments)

    def test_missing_layer(self, fails, transfer_arguments, policy_file):
        write_policy(policy_file, {k: v for k, v in BITS.items() if k != "6"}, architecture="asga_test_factory:net")
        assert "layers of the model that the policy does not mention: '6'" in fails(*transfer_arguments)


def test_existing_run_is_refused(fails, transfer_arguments, run):
    assert run(*transfer_arguments)[0] == 0
    assert "run already holds a run (transfer," in fails(*transfer_arguments)


def test_run_of_another_command_is_not_resumed(fails, run, search_arguments, transfer_arguments):
    assert run(*search_arguments)[0] == 0
    assert "command: 'search' then, 'transfer' now" in fails(*transfer_arguments, "--resume")
