import errno
import hashlib
import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import asga
from asga.cli import main
from asga.cli.console import Console
from asga.runs import RunFolder
from asga.search import Group, LatencyTable, SearchResult, consensus, policy_agreement


def without_times(path) -> list[dict]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


class TestRunFolder:
    def test_of_a_builtin_model(self, run, tmp_path):
        """resnet20 on digits: the shortest run there is."""
        status, out, err = run(
            *("search", "--model", "resnet20", "--data", "digits", "--limit", 40, "--batch-size", 20),
            *("--budget", "bitops=w4a4,size=w4", "--epochs", 1, "--float-epochs", 1, "--out", "my runs/one"),
        )
        assert (status, err) == (0, "")
        folder = tmp_path / "my runs" / "one"
        names = {file.name for file in folder.iterdir()}
        assert {"config.json", "metrics.jsonl", "policy.json", "result.json", "search.json"} <= names
        policy = asga.Policy.load(folder / "policy.json")
        assert len(policy) == 22
        assert policy["conv1"] == policy["fc"] == asga.LayerPolicy(8, 8)
        assert policy.meta["architecture"] == "resnet20"
        found = SearchResult.load(folder / "search.json")
        assert found.policy == policy
        assert all(share <= 1 for share in found.cost_shares(policy).values())
        result = json.loads((folder / "result.json").read_text())
        assert result["command"] == "search"
        assert result["cost_shares"]["policy"] == found.cost_shares(policy)
        assert result["choices"] == 40
        assert list(result["sensitivities"]) == [name for name in policy if name not in ("conv1", "fc")]
        assert list(result["sensitivities"]["layer1.0.conv1"]["act"]) == ["2", "3", "4", "6", "8"]
        assert result["method"] == "asga"
        assert result["uniform"]["best"] in ("w2a8", "w3a4", "w4a4", "w8a2")
        assert "bitops: policy" in out
        assert "not comparable with uniform bits on a single batch (smaller ones give more): loss on the proxy" in out
        assert result["decisions"] == [list(decision) for decision in found.choices.decisions]
        assert policy.meta["pinned"] == ["conv1", "fc"]
        config = json.loads((folder / "config.json").read_text())
        assert config["command"] == "search"
        assert config["options"]["limit"] == 40

    def test_has_figures(self, figures, run, search_arguments, tmp_path):
        status, out, _ = run(*search_arguments)
        assert status == 0
        assert "no figures" not in out
        assert (tmp_path / "run" / "policy.png").read_bytes().startswith(b"\x89PNG")
        assert "<html" in (tmp_path / "run" / "report.html").read_text()

    @pytest.mark.parametrize("method", ["asga", "sgd"])
    def test_options_reach_the_search(self, run, search_arguments, tmp_path, method):
        status, _, _ = run(
            *search_arguments,
            *("--method", method, "--weight-bits", "3,5", "--act-bits", "4", "--first-last", 0, "--target-size", 16),
            *("--precision", "bfloat16"),
        )
        assert status == 0
        found = SearchResult.load(tmp_path / "run" / "search.json")
        assert {(c.weight_bits, c.act_bits, c.pinned) for c in found.choices.layers.values()} == {((3, 5), (4,), False)}
        assert found.profiles["conv1"].macs == 16 * 16 * 4 * 3 * 9
        diagnostics = [line for line in without_times(tmp_path / "run") if line.get("stage") == "search/seed0"]
        assert any("rho" in line for line in diagnostics) is (method == "asga")

    def test_budgets_of_memory_and_latency_and_groups(self, run, search_arguments, tmp_path):
        bits = (2, 3, 4, 6, 8)
        names = ("conv1", "conv2", "conv3", "fc")
        LatencyTable({(n, w, a): w * a for n in names for w in bits for a in bits}).to_csv("table.csv")
        status, out, err = run(
            *search_arguments,
            *("--budget", "act_memory=a6, latency=150ns", "--latency-table", "table.csv", "--groups", "residual,qkv"),
        )
        assert (status, err) == (0, "")
        found = SearchResult.load(tmp_path / "run" / "search.json")
        assert found.costs(found.policy).latency_ns <= 150
        assert "act_memory_bits: policy" in out
        assert "before bits were raised" in out

    @pytest.mark.parametrize("method", ["sensitivity", "hawq", "uniform", "random"])
    def test_without_training(self, run, search_arguments, tmp_path, method):
        status, out, err = run(*search_arguments, "--method", method)
        assert (status, err) == (0, "")
        assert "bitops: policy" in out
        assert "toss-ups" not in out
        assert {line["stage"] for line in without_times(tmp_path / "run")} == {"float"}
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert result["method"] == method
        assert "toss_ups" not in result
        found = SearchResult.load(tmp_path / "run" / "search.json")
        assert found.policy == asga.Policy.load(tmp_path / "run" / "policy.json")
        assert result["uniform"] == found.uniform.to_dict()

    def test_mixed_candidates_and_images_held_out(self, run, search_arguments, tmp_path):
        assert run(*search_arguments, "--relaxation", "softmax", "--held-out", 0.25)[0] == 0
        options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
        assert (options["relaxation"], options["held_out"]) == ("softmax", 0.25)

    def test_formats_and_target_reach_the_search(self, run, search_arguments, tmp_path):
        options = ("--formats", "int4,fp4,fp8", "--act-bits", "none", "--target", "any", "--budget", "size=w6")
        assert run(*search_arguments, *options)[0] == 0
        found = SearchResult.load(tmp_path / "run" / "search.json")
        searched = {(c.weight_bits, c.act_bits) for c in found.choices.layers.values() if not c.pinned}
        assert searched == {((4, "fp4", "fp8"), (None,))}
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert (config["options"]["formats"], config["options"]["target"]) == ("int4,fp4,fp8", "any")

    def test_pins_exclusions_and_groups_reach_the_search(self, figures, run, fails, search_arguments, tmp_path):
        given = ("--pin", "conv*=8", "--pin", "conv1 = 4/6", "--first-last", 0, "--groups", " residual, qkv ")
        assert run(*search_arguments, *given, "--exclude", "conv3", "--method", "random")[0] == 0
        found = SearchResult.load(tmp_path / "run" / "search.json")
        bits = {name: (c.weight_bits, c.act_bits) for name, c in found.choices.layers.items() if c.pinned}
        assert bits == {"conv1": ((4,), (6,)), "conv2": ((8,), (8,))}
        assert found.choices.excluded == ("conv3",)
        options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
        assert (options["pin"], options["exclude"]) == (["conv*=8", "conv1 = 4/6"], ["conv3"])
        page = html.unescape((tmp_path / "run" / "report.html").read_text())
        assert "<dd>['conv*=8', 'conv1 = 4/6']</dd>" in page
        assert "(exclude: ['conv3'] then, None now)" in fails(
            *search_arguments, *given, "--method", "random", "--resume"
        )

    def test_groups_by_hand_reach_the_search(self, run, fails, search_arguments, tmp_path):
        given = ("--first-last", 0, "--group", "conv1, fc=act", "--group", "conv[23]", "--method", "random")
        assert run(*search_arguments, *given)[0] == 0
        found = SearchResult.load(tmp_path / "run" / "search.json")
        assert found.choices.groups == (Group(("conv1", "fc"), "act"), Group(("conv2", "conv3")))
        assert found.policy["conv2"] == found.policy["conv3"]
        other = ("--first-last", 0, "--group", "conv[23]", "--method", "random")
        assert "group: ['conv1, fc=act', 'conv[23]'] then" in fails(*search_arguments, *other, "--resume")

    def test_checkpoints_as_often_as_asked(self, run, search_arguments, monkeypatch):
        """Three batches an epoch, two epochs, float model and search: every second step and at each epoch's end."""
        written = []
        monkeypatch.setattr(RunFolder, "save_checkpoint", lambda *_: written.append(1))
        assert run(*search_arguments, "--checkpoint-every", 2)[0] == 0
        often, written[:] = len(written), []
        shutil.rmtree("run")
        assert run(*search_arguments)[0] == 0
        assert often == len(written) + 2 * 2

    def test_given_weights_are_not_trained_again(self, run, search_arguments, tmp_path):
        assert run(*search_arguments)[0] == 0
        (tmp_path / "run").rename(tmp_path / "first")
        status, _, _ = run(*search_arguments, "--init", "first/float.pt")
        assert status == 0
        assert not (tmp_path / "run" / "float.pt").exists()
        assert {line["stage"] for line in without_times(tmp_path / "run")} == {"search/seed0"}
        same = [asga.Policy.load(tmp_path / name / "policy.json") for name in ("first", "run")]
        assert same[0].keys() == same[1].keys()

    def test_limit_and_batch_larger_than_the_data(self, run, search_arguments):
        status, _, err = run(*search_arguments, "--limit", 10_000, "--batch-size", 10_000)
        assert (status, err) == (0, "")


@pytest.fixture(scope="module")
def whole(search_arguments, factories, tmp_path_factory):
    """A search that was never interrupted."""
    folder = tmp_path_factory.mktemp("search") / "whole"
    assert main([*search_arguments, "--out", str(folder)]) == 0
    return folder


class TestResume:
    def _same(self, whole, resumed, run_contents) -> bool:
        assert (resumed / "policy.json").read_bytes() == (whole / "policy.json").read_bytes()
        assert (resumed / "search.json").read_bytes() == (whole / "search.json").read_bytes()
        return run_contents(resumed) == run_contents(whole)

    @pytest.mark.parametrize(("stage", "epoch", "step"), [("float", 1, 2), ("float", 2, 3), ("search/seed0", 2, 2)])
    def test_after_ctrl_c(self, run, search_arguments, monkeypatch, tmp_path, whole, run_contents, stage, epoch, step):
        show = Console.progress

        def interrupt(self, state):
            show(self, state)
            if (state.stage, state.epoch, state.step) == (stage, epoch, step):
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Console, "progress", interrupt)
            status, _, err = run(*search_arguments)
        assert status == 130
        assert err == "\nasga: stopped. Go on with the same command and --resume: run\n"
        assert not (tmp_path / "run" / "policy.json").exists()
        status, _, err = run(*search_arguments, "--resume")
        assert (status, err) == (0, "")
        assert self._same(whole, tmp_path / "run", run_contents)

    def test_after_a_kill_between_the_stages(self, run, search_arguments, monkeypatch, tmp_path, whole, run_contents):
        class Killed(BaseException):
            """Nothing catches it, as nothing catches SIGKILL."""

        def kill(*_, **__):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(asga.PolicySearcher, "fit", kill)
            with pytest.raises(Killed):
                run(*search_arguments)
        assert run(*search_arguments, "--resume")[0] == 0
        assert self._same(whole, tmp_path / "run", run_contents)

    def test_of_a_complete_run_shows_it_again(self, run, search_arguments, tmp_path, whole, run_contents):
        shutil.copytree(whole, tmp_path / "run")
        status, out, _ = run(*search_arguments, "--resume")
        assert status == 0
        assert "bitops: policy" in out
        assert self._same(whole, tmp_path / "run", run_contents)
        results = [json.loads((folder / "result.json").read_text()) for folder in (whole, tmp_path / "run")]
        assert results[0] == results[1]  # the time of the search, too

    def test_other_options(self, fails, run, search_arguments, tmp_path, whole):
        shutil.copytree(whole, tmp_path / "run")
        assert "(epochs: 2 then, 3 now)" in fails(*search_arguments, "--resume", "--epochs", 3)

    def test_other_files_of_the_same_name(self, run, fails, search_arguments, tmp_path, whole):
        names, bits = ("conv1", "conv2", "conv3", "fc"), (2, 3, 4, 6, 8)
        table = LatencyTable({(n, w, a): w * a for n in names for w in bits for a in bits})
        table.to_csv("table.csv")
        shutil.copy(whole / "float.pt", "float.pt")
        given = ("--init", "float.pt", "--latency-table", "table.csv", "--method", "random")
        assert run(*search_arguments, *given)[0] == 0
        options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
        assert options["init_sha256"] == hashlib.sha256((whole / "float.pt").read_bytes()).hexdigest()
        assert run(*search_arguments, *given, "--resume")[0] == 0
        replace(table, times={**table.times, ("fc", 8, 8): 1}).to_csv("table.csv")
        assert f"(latency_table_sha256: '{options['latency_table_sha256']}' then, '" in fails(
            *search_arguments, *given, "--resume"
        )
        table.to_csv("table.csv")
        weights = torch.load("float.pt", weights_only=True)
        torch.save({name: value + 1 for name, value in weights.items()}, "float.pt")
        assert "(init_sha256: " in fails(*search_arguments, *given, "--resume")

    def test_after_sigterm_to_its_process(self, run, search_arguments, tmp_path, run_contents):
        """Stopped in the search, by what a batch system sends; the float model is done, most of the epochs are not."""
        arguments = [*search_arguments, "--epochs", "40"]
        assert run(*arguments, "--out", "whole")[0] == 0
        modules = Path(sys.modules["asga_test_factory"].__file__).parent
        # As many threads as here: sums of floats depend on it.
        env = {**os.environ, "PYTHONPATH": str(modules), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-m", "asga", *arguments]
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                metrics = tmp_path / "run" / "metrics.jsonl"
                while process.poll() is None and not (metrics.exists() and "search/seed0" in metrics.read_text()):
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                _, err = process.communicate()
            finally:
                process.kill()
        assert (process.returncode, err) == (130, "\nasga: stopped. Go on with the same command and --resume: run\n")
        assert not (tmp_path / "run" / "policy.json").exists()
        logged = sum(line.get("stage") == "search/seed0" for line in without_times(tmp_path / "run"))
        assert 0 < logged < 80  # an epoch and its probabilities each
        assert run(*arguments, "--resume")[0] == 0
        assert self._same(tmp_path / "whole", tmp_path / "run", run_contents)

    def test_nothing_there(self, fails, search_arguments):
        assert "holds no run to resume" in fails(*search_arguments, "--resume")

    @pytest.mark.parametrize("name", ["search.json", "float.pt", "stages.json", "config.json"])
    def test_damaged_file_is_named(self, fails, search_arguments, tmp_path, whole, name):
        shutil.copytree(whole, tmp_path / "run")
        (tmp_path / "run" / name).write_bytes(b"damaged")
        assert name in fails(*search_arguments, "--resume")

    def _stop_in_the_search(self, run, search_arguments, monkeypatch) -> None:
        show = Console.progress

        def interrupt(self, state):
            show(self, state)
            if (state.stage, state.epoch, state.step) == ("search/seed0", 2, 2):
                signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(Console, "progress", interrupt)
            assert run(*search_arguments)[0] == 130

    def test_damaged_checkpoint(self, run, search_arguments, monkeypatch, tmp_path, whole, run_contents):
        """The one before is used, and one line says so."""
        self._stop_in_the_search(run, search_arguments, monkeypatch)
        path = tmp_path / "run" / "checkpoint.pt"
        path.write_bytes(path.read_bytes()[:-1000])
        status, _, err = run(*search_arguments, "--resume")
        assert status == 0
        assert err.count("\n") == 1
        assert err.startswith("asga: warning: run/checkpoint.pt is damaged (")
        assert self._same(whole, tmp_path / "run", run_contents)

    def test_damaged_checkpoints_are_named(self, run, fails, search_arguments, monkeypatch, tmp_path):
        self._stop_in_the_search(run, search_arguments, monkeypatch)
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            (tmp_path / "run" / name).write_bytes(b"damaged")
        err = fails(*search_arguments, "--resume")
        assert "run/checkpoint.pt (BadZipFile) and run/checkpoint.previous.pt (BadZipFile) cannot be read" in err

    def test_full_disk(self, run, fails, search_arguments, monkeypatch, tmp_path, whole, run_contents):
        """The sixth flush is that of a checkpoint or of metrics in the middle of the float model."""
        calls, fsync = [], os.fsync

        def fail(handle):
            calls.append(1)
            if len(calls) == 6:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return fsync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            err = fails(*search_arguments)
        assert "could not be" in err
        assert "No space left on device" in err
        assert err.count("\n") == 1
        assert run(*search_arguments, "--resume")[0] == 0
        assert self._same(whole, tmp_path / "run", run_contents)


SEEDS = ("--seeds", "3", "--seed", "5")


@pytest.fixture(scope="module")
def whole_of_three(search_arguments, factories, tmp_path_factory):
    """Three searches that were never interrupted."""
    folder = tmp_path_factory.mktemp("search") / "whole"
    assert main([*search_arguments, *SEEDS, "--out", str(folder)]) == 0
    return folder


class TestSeeds:
    def test_nothing_to_choose(self, run, search_arguments):
        """One candidate everywhere: all tensors are compared, since none was in question."""
        one = ("--weight-bits", 4, "--act-bits", 4, "--budget", "bitops=w8a8")
        status, out, err = run(*search_arguments, *one, "--method", "random", "--seeds", 2)
        assert (status, err) == (0, "")
        assert "2 seeds: two of them agree on 100.0%" in out

    def test_each_has_its_policy_and_all_have_one(self, whole_of_three):
        found = [SearchResult.load(whole_of_three / f"search-seed{seed}.json") for seed in (5, 6, 7)]
        policies = [asga.Policy.load(whole_of_three / f"policy-seed{seed}.json") for seed in (5, 6, 7)]
        assert [result.policy for result in found] == policies
        assert found[0].log_probs != found[1].log_probs
        policy = asga.Policy.load(whole_of_three / "policy.json")
        assert policy == consensus(found).policy == SearchResult.load(whole_of_three / "search.json").policy
        assert policy.meta["seeds"] == 3
        assert all(share <= 1 for share in found[0].cost_shares(policy).values())

    def test_result_tells_how_much_they_agree(self, whole_of_three):
        result = json.loads((whole_of_three / "result.json").read_text())
        policies = {f"seed{seed}": asga.Policy.load(whole_of_three / f"policy-seed{seed}.json") for seed in (5, 6, 7)}
        layers = [(name, kind) for name in ("conv2", "conv3") for kind in ("weight", "act")]
        expected = policy_agreement(policies, layers)
        agreement = result["agreement"]
        assert agreement["choices"] == result["choices"] == 4
        assert [agreement[key] for key in ("equal", "chance", "p_value", "unanimous")] == [
            *(expected.equal, expected.chance, expected.p_value, expected.unanimous)
        ]
        assert [(pair["first"], pair["second"]) for pair in agreement["pairs"]] == [
            *(("seed5", "seed6"), ("seed5", "seed7"), ("seed6", "seed7"))
        ]
        assert agreement["bits"]["conv2"]["weight"] == [policy["conv2"].weight_bits for policy in policies.values()]
        assert list(result["seeds"]) == list(policies)
        assert result["seeds"]["seed6"]["cost_shares"]["policy"]["bitops"] <= 1

    def test_the_policy_of_all_is_compared_with_uniform_bits(self, run, search_arguments, tmp_path, whole_of_three):
        shutil.copytree(whole_of_three, tmp_path / "run")
        status, out, _ = run(*search_arguments, *SEEDS, "--resume")
        assert status == 0
        found = SearchResult.load(tmp_path / "run" / "search.json").uniform
        assert found.tuned
        assert (
            f"the policy of all seeds together is {found.verdict}: loss on the proxy after a short fine-tuning" in out
        )
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert result["uniform"] == found.to_dict()
        assert result == json.loads((whole_of_three / "result.json").read_text())  # not measured again

    def test_first_of_several_is_the_search_of_that_seed(self, run, search_arguments, tmp_path, whole_of_three):
        assert run(*search_arguments, "--seed", 5)[0] == 0
        alone = (tmp_path / "run" / "search.json").read_bytes()
        assert alone == (whole_of_three / "search-seed5.json").read_bytes()

    @pytest.mark.parametrize("stage", ["search/seed5", "search/seed6"])
    def test_stopped_and_resumed(self, run, search_arguments, monkeypatch, tmp_path, whole_of_three, stage):
        show = Console.progress

        def interrupt(self, state):
            show(self, state)
            if (state.stage, state.epoch, state.step) == (stage, 2, 2):
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Console, "progress", interrupt)
            assert run(*search_arguments, *SEEDS)[0] == 130
        status, out, err = run(*search_arguments, *SEEDS, "--resume")
        assert (status, err) == (0, "")
        assert "3 seeds: two of them agree on" in out
        for name in ("policy.json", "search.json", *(f"search-seed{seed}.json" for seed in (5, 6, 7))):
            assert (tmp_path / "run" / name).read_bytes() == (whole_of_three / name).read_bytes(), name
        assert without_times(tmp_path / "run") == without_times(whole_of_three)


class TestBadInput:
    """Said at once: nothing has been trained, nothing written."""

    @pytest.fixture(autouse=True)
    def nothing_is_written(self, tmp_path):
        yield
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--budget", "bitops=1000"), "least possible"),
            (("--budget", "bitops=w9a9"), "bits from 2 to 8 are supported"),
            (("--budget", "w4a4"), "'w4a4' is not a budget such as bitops=w4a4"),
            (("--budget", "energy=3J"), "'energy=3J' is not a budget such as"),
            (("--budget", "latency=3ms"), "a limit on latency needs a latency table"),
            (("--latency-table", "nowhere.csv"), "no latency table at 'nowhere.csv'"),
            (("--groups", "residuals"), "'residuals', which is no rule; rules are residual, qkv, depthwise"),
            (("--budget", "bitops=w4a4,bitops=w2a2"), "is not a budget"),
            (("--budget", "bitops"), "--budget: bitops is ''"),
            (("--budget", ""), "is not a budget"),
            (("--budget", "bitops=-3"), "--budget: bitops is '-3'"),
            (("--weight-bits", "2,9"), "asga: --weight-bits[1] is 9; supported are 2 to 8"),
            (("--act-bits", "two"), "'two' is not a list of bit-widths"),
            (("--weight-bits", "none"), "--weight-bits is None"),
            (("--formats", "int4,fp6"), "--formats[1] is 'fp6'; supported are int2"),
            (("--formats", "int4", "--weight-bits", "4"), "--formats is ('int4',) and --weight-bits is (4,)"),
            (("--formats", "fp4,fp8"), "no integer for the inputs: give act_bits, or --act-bits none"),
            (("--pin", "conv2"), "'conv2' is not a pattern with bits such as conv1=8"),
            (("--pin", "conv2=w4a4"), "'conv2=w4a4' is not a pattern with bits"),
            (("--pin", "conv2=9"), "asga: --pin 'conv2' is 9; supported are 2 to 8"),
            (("--pin", "conv2=9/4"), "asga: --pin 'conv2' (weight) is 9; supported are 2 to 8"),
            (("--pin", "conv[23]=4/9"), "asga: --pin 'conv[23]' (input) is 9; supported are 2 to 8"),
            (("--groups", "residual", "--group", "conv2,fc"), "asga: --group 'conv2,fc' is Group("),
            (("--exclude", "*"), "--first-last 0 searches them too"),
            (("--pin", "conv2=4/none8"), "is not a pattern with bits"),
            (("--pin", "con2=4"), "asga: --pin: the pattern 'con2' matches no quantizable layer; did you mean 'conv2'"),
            (("--pin", "conv2=4", "--pin", "conv2=8"), "--pin: 'conv2' is there twice"),
            (("--exclude", "layer1.*"), "asga: --exclude: the pattern 'layer1.*' matches no quantizable layer"),
            (("--group", "conv2"), "at least two layers that are searched are needed"),
            (("--group", "conv2,conv3=bits"), "--group: 'conv2,conv3=bits': share of a group is 'bits'"),
            (("--group", ","), "--group: ',': a group has no layers"),
            (("--target", "tensort"), "asga: --target is 'tensort'"),
            (("--target", "onnxruntime-cpu"), "onnxruntime-cpu cannot run, as weights x inputs:"),
            (("--first-last", "16"), "asga: --first-last is 16"),
            (("--model", "resnet21"), "model 'resnet21' is not known"),
            (("--model", "asga_test_factory:nte"), "nearest: net"),
            (("--data", "imagefolder:nowhere"), "nowhere does not exist"),
            (("--data", "nowhere"), "use digits, imagefolder:PATH or cifar10:PATH"),
            (("--init", "nothing.pt"), "nothing.pt does not exist"),
            (("--epochs", 0), "--epochs is 0; it must be at least 1"),
            (("--float-epochs", -1), "--float-epochs is -1; it must be at least 1"),
            (("--seeds", 0), "--seeds is 0; it must be at least 1"),
            (("--target-size", -8), "--target-size is -8; it must be at least 1"),
            (("--checkpoint-every", 0), "--checkpoint-every is 0; it must be at least 1"),
            (("--batch-size", 0), "asga: --batch-size is 0"),
            (("--limit", 0), "asga: --limit is 0"),
            (("--limit", 1), "the proxy has a single class"),
            (("--image-size", 0), "asga: --image-size is 0"),
            (("--device", "abacus"), "--device 'abacus' cannot be used"),
            (("--seed", -1), "asga: --seed is -1"),
            (("--held-out", 1), "asga: --held-out is 1.0"),
            (("--held-out", 0.001), "asga: --held-out is 0.001, which leaves one side of 24 images empty"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
    )
    def test_option(self, fails, search_arguments, options, message):
        assert message in fails(*search_arguments, *options)

    def test_weights_of_another_model(self, fails, search_arguments, tmp_path):
        torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
        assert "other.pt does not hold the weights of this model: " in fails(*search_arguments, "--init", "other.pt")

    @pytest.mark.parametrize("content", [b"not weights", b"layer,weight_bits\n", b"", b"\x80\x02]q\x00."])
    def test_file_without_weights(self, fails, search_arguments, tmp_path, content):
        (tmp_path / "other.pt").write_bytes(content)
        err = fails(*search_arguments, "--init", "other.pt")
        assert "other.pt is no file of weights, or a damaged one (" in err

    def test_file_of_something_else(self, fails, search_arguments, tmp_path):
        torch.save([torch.zeros(1)], tmp_path / "other.pt")
        assert "other.pt holds a list; a state dict" in fails(*search_arguments, "--init", "other.pt")

    def test_unreadable_image(self, fails, search_arguments, proxy, tmp_path):
        shutil.copytree(proxy.partition(":")[2], tmp_path / "data")
        damaged = tmp_path / "data" / "train" / "class 1" / "3.png"
        damaged.write_bytes(damaged.read_bytes()[:40])
        err = fails(*search_arguments, "--data", f"imagefolder:{tmp_path / 'data'}")
        assert str(damaged) in err
        assert err.count("\n") == 1

    def test_folder_without_validation_images(self, fails, search_arguments, proxy, tmp_path):
        shutil.copytree(proxy.partition(":")[2], tmp_path / "data")
        shutil.rmtree(tmp_path / "data" / "val")
        assert "must hold train and val" in fails(*search_arguments, "--data", f"imagefolder:{tmp_path / 'data'}")


def test_existing_run_is_refused(fails, search_arguments, run, tmp_path):
    assert run(*search_arguments)[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    err = fails(*search_arguments)
    assert "run already holds a run (search," in err
    assert err.count("\n") == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before
