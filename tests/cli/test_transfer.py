import json
import math
import shutil
import signal

import pytest
import torch

import asga
from asga import LayerPolicy, Policy
from asga.cli import main
from asga.cli.console import Console


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def table_of(folder) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / "result.json").read_text())["table"]}


def write_policy(path, bits: dict[str, tuple], **meta: object) -> None:
    Policy({name: LayerPolicy(*pair) for name, pair in bits.items()}, meta).save(path)


BITS = {"conv1": (8, 8), "conv2": (3, 4), "conv3": (4, 2), "fc": (8, 8)}
# Of ``asga_test_factory:net`` on images of 12x12, with four classes.
MACS = {"conv1": 144 * 4 * 27, "conv2": 36 * 8 * 36, "conv3": 36 * 8 * 72, "fc": 8 * 4}


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
        ends, inside = 64 * (MACS["conv1"] + MACS["fc"]), MACS["conv2"] + MACS["conv3"]
        searched = sum(MACS[name] * layer.weight_bits * layer.act_bits for name, layer in policy.items())
        assert table["searched"]["bitops"] == searched
        assert table["uniform w4a4"]["bitops"] == ends + 16 * inside
        assert table["uniform w2a3"]["bitops"] == ends + 6 * inside
        for name, row in list(table.items())[1:]:
            assert name in out
            assert len(row["top1"]) == 2
            assert row["top1_mean"] == pytest.approx(sum(row["top1"]) / 2)
            assert row["top1_std"] == pytest.approx(abs(row["top1"][0] - row["top1"][1]) / math.sqrt(2))
            # The budget's word, w4a4, means what it says here too.
            assert row["bitops_share"] == pytest.approx(row["bitops"] / (ends + 16 * inside))

    def test_evaluate_gives_the_reported_accuracy(self, run, transfer_arguments, target, tmp_path):
        assert run(*transfer_arguments, "--epochs", 3, "--seeds", 2)[0] == 0
        status, out, _ = run("evaluate", "run")
        assert status == 0
        row = table_of(tmp_path / "run")["searched"]
        assert out == f"top-1 {row['top1'][0]:.2%}, loss {self._loss(tmp_path):.4f}, 16 images of {target}\n"

    def _loss(self, tmp_path) -> float:
        return json.loads((tmp_path / "run" / "stages.json").read_text())["searched/seed0"]["loss"]

    def test_has_figures(self, figures, run, transfer_arguments, tmp_path):
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
        bits = {**BITS, "conv1": (6, 8), "conv2": (None, None)}
        write_policy(tmp_path / "own.json", bits, architecture="asga_test_factory:net")
        assert run(*transfer_arguments, "--policy", "own.json", "--compare", "w2a2")[0] == 0
        state = torch.load(tmp_path / "run" / "uniform w2a2-seed0.pt", weights_only=True)
        assert "conv2.weight_quantizer.scale" not in state
        expected = 48 * MACS["conv1"] + 1024 * MACS["conv2"] + 4 * MACS["conv3"] + 64 * MACS["fc"]
        assert table_of(tmp_path / "run")["uniform w2a2"]["bitops"] == expected

    def test_shares_are_those_of_the_search_whatever_it_pinned(self, run, transfer_arguments, tmp_path):
        """A word leaves pinned layers at their bits, so that the search's own data give the search's own share."""
        meta = {
            "architecture": "asga_test_factory:net",
            "budget": {"bitops": "w4a4"},
            "pinned": ["conv1", "conv3", "fc"],
        }
        write_policy(tmp_path / "own.json", {**BITS, "conv2": (4, 4)}, **meta)
        assert run(*transfer_arguments, "--policy", "own.json", "--compare", "w4a4")[0] == 0
        table = table_of(tmp_path / "run")
        assert table["searched"]["bitops_share"] == 1
        assert table["uniform w4a4"]["bitops"] == table["searched"]["bitops"]

    def test_a_model_of_two_layers(self, run, transfer_arguments, tmp_path):
        """First and last are all there is; and the policy names no budget."""
        write_policy(tmp_path / "own.json", {"1": (4, 4), "3": (4, 4)}, architecture="asga_test_factory:two_layers")
        assert run(*transfer_arguments, "--policy", "own.json", "--compare", "w2a2")[0] == 0
        table = table_of(tmp_path / "run")
        assert table["uniform w2a2"]["bitops"] == table["searched"]["bitops"]
        assert table["uniform w2a2"]["bitops_share"] is None

    @pytest.mark.parametrize("options", [("--method", "sgd"), ("--precision", "bfloat16")], ids=" ".join)
    def test_options(self, run, transfer_arguments, tmp_path, options):
        assert run(*transfer_arguments, *options)[0] == 0
        assert run("evaluate", "run")[1].startswith(f"top-1 {table_of(tmp_path / 'run')['searched']['top1'][0]:.2%},")

    def test_limit_and_batch_larger_than_the_data(self, run, transfer_arguments):
        status, _, err = run(*transfer_arguments, "--limit", 10_000, "--batch-size", 10_000)
        assert (status, err) == (0, "")


COMPARED = ("--seeds", "2", "--compare", "w3a3")


@pytest.fixture(scope="module")
def whole(transfer_arguments, factories, tmp_path_factory):
    """A transfer that was never interrupted."""
    folder = tmp_path_factory.mktemp("transfer") / "whole"
    assert main([*transfer_arguments, *COMPARED, "--out", str(folder)]) == 0
    return folder


class TestResume:
    def _check_same(self, whole, resumed, bits_of, run_contents) -> None:
        assert run_contents(resumed) == run_contents(whole)
        names = sorted(file.name for file in whole.glob("*.pt"))
        assert names == sorted(file.name for file in resumed.glob("*.pt"))
        for name in set(names) - {"checkpoint.pt"}:
            first, second = (bits_of(torch.load(folder / name, weights_only=True)) for folder in (whole, resumed))
            assert first == second, name
        assert bits_of(table_of(resumed)) == bits_of(table_of(whole))

    @pytest.mark.parametrize(
        ("stage", "step", "end"),
        [
            ("float", 2, "Ctrl-C"),
            ("float", 4, "kill"),
            ("searched/seed0", 3, "Ctrl-C"),
            ("searched/seed1", 1, "kill"),
            ("uniform w3a3/seed0", 4, "Ctrl-C"),
        ],
    )
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
                    run(*transfer_arguments, *COMPARED)
            else:
                status, _, err = run(*transfer_arguments, *COMPARED)
                assert status == 130
                assert "--resume: run" in err
        assert run(*transfer_arguments, *COMPARED, "--resume")[0] == 0
        self._check_same(whole, tmp_path / "run", bits_of, run_contents)

    @pytest.mark.parametrize(
        ("before", "function"), [(0, "save_tensors"), (1, "finish"), (2, "save_tensors"), (4, "finish")]
    )
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
                run(*transfer_arguments, *COMPARED)
        assert run(*transfer_arguments, *COMPARED, "--resume")[0] == 0
        self._check_same(whole, tmp_path / "run", bits_of, run_contents)

    def test_of_a_complete_run_prints_the_table_again(
        self, run, transfer_arguments, tmp_path, whole, bits_of, run_contents
    ):
        shutil.copytree(whole, tmp_path / "run")
        status, out, _ = run(*transfer_arguments, *COMPARED, "--resume")
        assert status == 0
        assert "uniform w3a3" in out
        assert table_of(tmp_path / "run") == table_of(whole)
        self._check_same(whole, tmp_path / "run", bits_of, run_contents)

    @pytest.mark.parametrize("name", ["float.pt", "searched-seed1.pt"])
    def test_damaged_weights_are_named(self, fails, transfer_arguments, tmp_path, whole, name):
        shutil.copytree(whole, tmp_path / "run")
        (tmp_path / "run" / name).write_bytes(b"damaged")
        assert f"{name} is no file of weights, or a damaged one" in fails(*transfer_arguments, *COMPARED, "--resume")


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
            (("--model", "mobilenet_v2"), "the policy is for another architecture, asga_test_factory:net"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
    )
    def test_option(self, fails, transfer_arguments, options, message):
        assert message in fails(*transfer_arguments, *options)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 3}, "written by a newer asga (policy version 3)"),
            ({"format": "other"}, "not a policy"),
            ({"meta": {}}, "--model is needed"),
            ({"layers": {}}, "at least one layer"),
            ({"layers": {"0": {"weight_bits": 9, "act_bits": 8}}}, "layer '0': weight_bits is 9; supported are 2 to 8"),
            ({"layers": {"0": {"weight_bits": 1, "act_bits": 8}}}, "weight_bits is 1"),
            ({"layers": {"0": {"weight_bits": "4", "act_bits": 8}}}, "weight_bits is '4'; supported are int2, int3"),
        ],
        ids=["newer", "format", "no architecture", "empty", "9 bits", "1 bit", "text"],
    )
    def test_policy(self, fails, transfer_arguments, policy_file, tmp_path, change, message):
        (tmp_path / "own.json").write_text(json.dumps({**json.loads(policy_file.read_text()), **change}))
        err = fails(*transfer_arguments, "--policy", "own.json")
        assert message in err
        assert err.count("\n") == 1

    def test_broken_json(self, fails, transfer_arguments, policy_file, tmp_path):
        (tmp_path / "own.json").write_text(policy_file.read_text()[:60])
        err = fails(*transfer_arguments, "--policy", "own.json")
        assert "own.json: not valid JSON: line " in err
        assert err.count("\n") == 1

    def test_unknown_layer(self, fails, transfer_arguments, tmp_path):
        write_policy(tmp_path / "own.json", {**BITS, "conv33": (4, 4)}, architecture="asga_test_factory:net")
        assert "'conv33'; did you mean 'conv3'" in fails(*transfer_arguments, "--policy", "own.json")

    def test_missing_layer(self, fails, transfer_arguments, tmp_path):
        bits = {name: pair for name, pair in BITS.items() if name != "conv3"}
        write_policy(tmp_path / "own.json", bits, architecture="asga_test_factory:net")
        err = fails(*transfer_arguments, "--policy", "own.json")
        assert "layers of the model that the policy does not mention: 'conv3'" in err


def test_existing_run_is_refused(fails, transfer_arguments, run):
    assert run(*transfer_arguments)[0] == 0
    assert "run already holds a run (transfer," in fails(*transfer_arguments)


def test_run_of_another_command_is_not_resumed(fails, run, search_arguments, transfer_arguments):
    assert run(*search_arguments)[0] == 0
    assert "command: 'search' then, 'transfer' now" in fails(*transfer_arguments, "--resume")
