import json
import shlex
import shutil
import signal

import pytest

from asga.cli.console import Console
from asga.policy import LayerPolicy, Policy
from asga.search import Group, LatencyTable


@pytest.fixture
def arguments(policy_file, target) -> list[str]:
    """Of a policy of ``asga_test_factory:net``, on four classes of 12x12 images."""
    return [
        *("diagnose", "--policy", str(policy_file), "--data", target, "--batch-size", "8", "--batches", "2"),
        *("--float-epochs", "1", "--device", "cpu", "--out", "run"),
    ]


def result_of(tmp_path) -> dict:
    return json.loads((tmp_path / "run" / "result.json").read_text())


class TestRunFolder:
    def test_with_a_proxy(self, figures, run, arguments, proxy, tmp_path):
        status, out, err = run(*arguments, "--proxy", proxy)
        assert (status, err) == (0, "")
        names = {file.name for file in (tmp_path / "run").iterdir()}
        assert {"config.json", "policy.json", "result.json", "report.html", "sensitivity.png"} <= names
        result = result_of(tmp_path)
        assert result["command"] == "diagnose"
        layers = ("conv1", "conv2", "conv3", "fc")
        for key in ("sensitivities", "proxy_sensitivities"):
            assert list(result[key]) == [*layers]
            assert list(result[key]["fc"]["weight"]) == ["2", "3", "4", "6", "8"]
        assert result["sensitivities"] != result["proxy_sensitivities"]
        found = {(one["kind"], one["bits"]): one for one in result["rank_correlations"]}
        assert len(found) == 10
        assert all(one["layers"] == 4 and -1 <= one["rho"] <= 1 for one in found.values())
        totals = result["increase_on_target"]
        assert list(totals) == ["policy", "best by the target's sensitivities", "best by the proxy's sensitivities"]
        policy, best, by_proxy = totals.values()
        assert best <= min(policy, by_proxy)
        assert "rank correlation of proxy and target" in out
        page = (tmp_path / "run" / "report.html").read_text()
        assert "<h2>Proxy against target</h2>" in page

    def test_without_a_proxy(self, run, arguments, tmp_path):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "")
        result = result_of(tmp_path)
        assert "rank_correlations" not in result
        assert "the rank correlation needs sensitivities there, too. Give --proxy DATA" in result["notes"][1]
        assert "no search.json of this policy lies beside it" in result["notes"][0]
        assert all(note in out for note in result["notes"])
        assert not (tmp_path / "run" / "proxy-float.pt").exists()
        # What the policy has and what it could have add up to what is said of all of it.
        totals = result["increase_on_target"]
        assert totals["policy"] >= totals["best by the target's sensitivities"]
        assert all(one["bits"] < one["wanted"] for one in result["starved"])

    def test_a_starved_layer_is_found(self, run, arguments, tmp_path):
        """All bits for the last but one layer, none for the first of the searched ones."""
        bits = {"conv1": (8, 8), "conv2": (2, 2), "conv3": (8, 8), "fc": (8, 8)}
        policy = Policy({name: LayerPolicy(*pair) for name, pair in bits.items()})
        policy.save(tmp_path / "own.json")
        assert run(*arguments, "--policy", "own.json", "--model", "asga_test_factory:net")[0] == 0
        starved = result_of(tmp_path)["starved"]
        assert {one["layer"] for one in starved} == {"conv2"}

    @pytest.mark.parametrize("score", ["hessian", "measured"])
    def test_scores(self, run, arguments, tmp_path, score):
        assert run(*arguments, "--score", score, "--weight-bits", "2,8", "--act-bits", "3")[0] == 0
        # Besides those of the policy, 3, 4 and 8 bits for weights and 4, 2 and 8 for inputs.
        found = result_of(tmp_path)["sensitivities"]["conv2"]
        assert (list(found["weight"]), list(found["act"])) == (["2", "3", "4", "8"], ["2", "3", "4", "8"])

    def test_given_weights_are_not_trained_again(self, run, arguments, proxy, tmp_path):
        assert run(*arguments, "--proxy", proxy)[0] == 0
        (tmp_path / "run").rename(tmp_path / "first")
        given = ("--init", "first/target-float.pt", "--proxy-init", "first/proxy-float.pt")
        assert run(*arguments, "--proxy", proxy, *given)[0] == 0
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        again = result_of(tmp_path)
        (tmp_path / "run" / "result.json").write_text((tmp_path / "first" / "result.json").read_text())
        assert {**again, "seconds": 0} == {**result_of(tmp_path), "seconds": 0}

    def test_what_stays_float_stays_so(self, run, arguments, tmp_path):
        bits = {"conv1": (8, 8), "conv2": (None, None), "conv3": (None, 4), "fc": (8, 8)}
        policy = Policy({name: LayerPolicy(*pair) for name, pair in bits.items()})
        policy.save(tmp_path / "own.json")
        assert run(*arguments, "--policy", "own.json", "--model", "asga_test_factory:net")[0] == 0
        assert "conv2" not in result_of(tmp_path)["sensitivities"]


class TestOfASearch:
    """What the search knows beside its policy."""

    @pytest.fixture
    def of_a_search(self, run, search_arguments, arguments, target, tmp_path) -> list[str]:
        """Of the policy of a search with its own candidates, a pin in the middle, a group and latencies."""
        names, bits = ("conv1", "conv2", "conv3", "fc"), (2, 3, 4, 5, 8)
        LatencyTable({(n, w, a): w * a for n in names for w in bits for a in bits}).to_csv("table.csv")
        space = ("--weight-bits", "2,3,5", "--act-bits", "3,5", "--first-last", 0, "--pin", "conv2=4/8")
        grouped = ("--group", "conv1,conv3=act", "--budget", "bitops=w3a4,latency=w3a5", "--latency-table", "table.csv")
        searched = ("--method", "random", "--limit", 21, "--out", "searched")
        assert run(*search_arguments, *space, *grouped, *searched)[0] == 0
        return [*arguments, "--policy", "searched/policy.json"]

    def test_its_candidates_pins_groups_and_latencies_count(self, run, of_a_search, tmp_path):
        assert run(*of_a_search)[0] == 0
        result = result_of(tmp_path)
        # The last layer was searched, so it is not kept as it is.
        assert list(result["sensitivities"]) == ["conv1", "conv3", "fc"]
        found = result["sensitivities"]["fc"]
        assert (list(found["weight"]), list(found["act"])) == (["2", "3", "5"], ["3", "5"])
        assert len(result["notes"]) == 1

    def test_the_best_policy_has_its_groups_and_latency(self, run, of_a_search, monkeypatch):
        asked = []

        def least_increase(increases, choices, profiles, limits, kept):
            asked.append((choices.groups, limits, kept))
            return choices.uniform(2, 3)

        monkeypatch.setattr("asga.cli.diagnose.least_increase", least_increase)
        assert run(*of_a_search)[0] == 0
        ((groups, limits, kept),) = asked
        assert groups == (Group(("conv1", "conv3"), "act"),)
        assert limits.keys() == {"bitops", "latency_ns"}
        assert kept == {}

    def test_where_the_proxy_is_told(self, run, of_a_search, proxy, tmp_path):
        _, out, _ = run(*of_a_search)
        hint = f"--proxy '{proxy}' --proxy-limit 21 --proxy-init searched/float.pt"
        assert f"the proxy, {proxy.rpartition('/')[2]}, orders" in out
        assert hint in out
        shutil.rmtree(tmp_path / "run")
        _, out, _ = run(*of_a_search, *shlex.split(hint))
        assert "Give --proxy" not in out
        assert "rank correlation of proxy and target" in out

    def test_other_candidates(self, run, of_a_search, tmp_path):
        (tmp_path / "table.csv").unlink()
        err = run(*of_a_search, "--weight-bits", "6")[2]
        assert "the latency table has no time for layer" in err
        shutil.rmtree(tmp_path / "run")
        assert run(*of_a_search, "--weight-bits", "8")[0] == 0
        policy = Policy.load(tmp_path / "run" / "policy.json")
        own = {policy[name].weight_bits for name in ("conv1", "conv3", "fc")}
        assert set(map(int, result_of(tmp_path)["sensitivities"]["fc"]["weight"])) == own | {8}

    def test_its_target_counts(self, figures, fails, run, search_arguments, arguments, tmp_path):
        space = ("--weight-bits", 8, "--act-bits", 8, "--target", "onnxruntime-cpu", "--budget", "bitops=w8a8")
        assert run(*search_arguments, *space, "--method", "random", "--out", "searched")[0] == 0
        err = fails(*arguments, "--policy", "searched/policy.json", "--weight-bits", "2,8")
        assert "onnxruntime-cpu cannot run" in err
        (tmp_path / "searched" / "search.json").unlink()
        assert "onnxruntime-cpu cannot run" in fails(*arguments, "--policy", "searched/policy.json", "--act-bits", "2")
        assert run(*arguments, "--policy", "searched/policy.json")[0] == 0

    def test_elsewhere(self, run, fails, of_a_search, policy_file, tmp_path):
        (tmp_path / "searched" / "policy.json").rename(tmp_path / "own.json")
        given = ("--policy", "own.json", "--search", "searched/search.json")
        assert run(*of_a_search, *given)[0] == 0
        assert list(result_of(tmp_path)["sensitivities"]) == ["conv1", "conv3", "fc"]
        err = fails(*of_a_search, *given, "--policy", policy_file, "--out", "other")
        assert f"--search: the policy {policy_file} is not of the search space of searched/search.json" in err


def test_stopped_and_resumed(run, arguments, proxy, monkeypatch, tmp_path):
    assert run(*arguments, "--proxy", proxy, "--out", "whole")[0] == 0
    show = Console.progress

    def interrupt(self, state):
        show(self, state)
        if (state.stage, state.step) == ("proxy-float", 2):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Console, "progress", interrupt)
        assert run(*arguments, "--proxy", proxy)[0] == 130
    assert run(*arguments, "--proxy", proxy, "--resume")[0] == 0
    resumed = result_of(tmp_path)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "whole").rename(tmp_path / "run")
    assert {**resumed, "seconds": 0} == {**result_of(tmp_path), "seconds": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "nowhere.json"), "no policy file at 'nowhere.json'"),
        (("--proxy-limit", 3), "--proxy is needed"),
        (("--proxy-init", "x.pt"), "--proxy is needed"),
        (("--proxy", "nowhere"), "use digits, imagefolder:PATH or cifar10:PATH"),
        (("--batches", 0), "--batches is 0; it must be at least 1"),
        (("--weight-bits", "2,9"), "supported are 2 to 8"),
        (("--model", "resnet20"), "layers of the policy that are not in the model"),
        (("--init", "nothing.pt"), "nothing.pt does not exist"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_input(fails, arguments, tmp_path, options, message):
    """Said at once: nothing has been trained, nothing written."""
    assert message in fails(*arguments, *options)
    assert not (tmp_path / "run").exists()
