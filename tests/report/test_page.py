import json
import re
import sys
from collections.abc import Sequence

import pytest

from asga.policy import LayerPolicy, Policy
from asga.report import write_report
from asga.search.comparison import Score, UniformComparison


@pytest.fixture(scope="session")
def page_of(parse):
    """A function that writes the page of a run folder and parses it."""

    def page(folder):
        path = write_report(folder)
        assert path == folder / "report.html"
        return parse(path)

    return page


@pytest.fixture(scope="module")
def complete(tmp_path_factory, fill_run, page_of):
    """The page of a run with all its files, as a path and parsed."""
    folder = tmp_path_factory.mktemp("run")
    fill_run(folder)
    return folder / "report.html", page_of(folder)


def test_a_complete_run_has_every_section(complete):
    assert complete[1].headings == [
        "Results",
        "Policy",
        "Cost against the budget",
        "Training",
        "Diagnostics of the ASGA step",
        "Configuration",
    ]


def test_summary_and_results_are_in_words(complete):
    text = complete[1].text
    for expected in (
        "budget BitOps ≤ w4a4, size ≤ 1.5MB",
        "BitOps of the policy 1.5 M of 2.0 M (75.0 %), within the budget",
        "size of the policy 1.0 MB of 1.5 MB (66.7 %), within the budget",
        "time 1 h 2 min",
        "searched mixed 94.0 % ± 1.4 % 0.250 ± 0.030 1.5 M 75.0 % 1.0 MB 1 min 1 s",
        "over 2 seeds",
        "Each seed searches its own policy.",
        "102.0 % expected at the end of the search; 107.0 % likeliest candidates",
        "5.0 bits for weights (2 of 3 layers; the others are float) and 6.7 bits for activations.",
        "asga 0.1.0 torch 2.13.0",
    ):
        assert expected in text


def test_toss_ups_are_marked_and_explained(complete):
    text = complete[1].text
    assert "1 of 2 choices were toss-ups" in text
    assert text.count("0.02 toss-up") == 1


def test_probabilities_over_time_are_drawn_and_described(complete):
    page = complete[0].read_text()
    assert page.count('class="sparkline"') == 2
    assert 'aria-label="layer1.0.conv1, weight: 2 bits 45% to 45%, 4 bits 44% to 44%, 8 bits 11% to 11%"' in page
    assert 'aria-label="2 bits: 45.0 %, 4 bits: 44.0 %, 8 bits: 11.0 %"' in page


@pytest.fixture
def text_of(tmp_path, page_of):
    """A function from what ``result.json`` holds besides the time to the text of the page."""

    def text(policy: Policy | None = None, **result) -> str:
        (tmp_path / "result.json").write_text(json.dumps({"command": "search", "seconds": 1.0, **result}))
        if policy is not None:
            policy.save(tmp_path / "policy.json")
        return page_of(tmp_path).text

    return text


BETTER, UNCLEAR, WORSE = (0.04, 0.06), (0.19, -0.09), (-0.04, -0.06)


def _comparison(lost: tuple[float, ...] = BETTER, *, tuned: bool = False) -> dict[str, object]:
    """A policy, and what the best uniform pair loses more on every batch."""
    policy = (1.0, 1.2)[: len(lost)]

    def score(more: Sequence[float], top1: float | None = 0.6) -> Score:
        return Score(tuple(loss + m for loss, m in zip(policy, more, strict=True)), top1, {"bitops": 0.95})

    pairs = {"w2a4": score(lost), "w3a3": score([0.3] * len(lost), None)}
    return UniformComparison(score([0.0] * len(lost)), pairs, tuned).to_dict()


class TestUniform:
    """The policy beside uniform pairs of bits."""

    def test_is_told_with_all_pairs(self, text_of):
        text = text_of(uniform=_comparison())
        assert "loss on the proxy 1.1000 , that of the best uniform pair within the budget, w2a4, 1.1500" in text
        assert "a difference of -0.0500 ± 0.0100: better than uniform bits." in text
        assert "policy 1.1000 60.0 % 95.0 % w2a4 1.1500 60.0 % 95.0 % w3a3 1.4000 95.0 %" in text

    @pytest.mark.parametrize(
        ("lost", "words"),
        [
            (UNCLEAR, "not distinguishable from uniform bits"),
            (WORSE, "NOT better than uniform bits"),
            ((0.0, 0.0), "the uniform pair w2a4 itself"),
        ],
    )
    def test_not_better_is_a_warning(self, text_of, lost, words):
        text = text_of(uniform=_comparison(lost))
        assert f": {words}." in text
        assert f"On the proxy, at equal cost, the policy is {words}, see below" in text

    def test_better_is_none(self, text_of):
        assert "On the proxy, at equal cost" not in text_of(uniform=_comparison())

    @pytest.mark.parametrize(
        ("method", "words"),
        [
            ("asga", "as the search left them"),
            ("hawq", "quantized without training"),
            ("uniform", "fine-tuned for a few"),
        ],
    )
    def test_how_it_was_measured_is_told(self, text_of, method, words):
        assert words in text_of(uniform=_comparison(tuned=method == "uniform"), method=method)

    def test_a_single_batch_has_no_error(self, text_of):
        text = text_of(uniform=_comparison((0.05,)))
        assert "a difference of -0.0500: not comparable with uniform bits on a single batch (smaller ones give" in text
        assert "On the proxy, at equal cost, the policy is not comparable with uniform bits on a single batch" in text

    def test_the_uniform_policy_itself_is_not_warned_of(self, text_of):
        assert "On the proxy, at equal cost" not in text_of(uniform=_comparison(WORSE), method="uniform")

    def test_of_several_seeds(self, text_of):
        seeds = {"seed0": {"uniform": _comparison(WORSE)}, "seed1": {"uniform": _comparison()}}
        text = text_of(seeds=seeds)
        assert "On the proxy, at equal cost, policies of single seeds: 1 of 2 NOT better than uniform bits" in text
        assert "seed0: loss on the proxy 1.1000" in text
        assert "seed1: loss on the proxy 1.1000" in text

    def test_of_several_seeds_together(self, text_of):
        seeds = {"seed0": {"uniform": _comparison()}, "seed1": {"uniform": _comparison()}}
        text = text_of(seeds=seeds, uniform=_comparison(UNCLEAR, tuned=True), method="asga")
        assert "On the proxy, at equal cost, the policy is not distinguishable from uniform bits, see below" in text
        assert "policies of single seeds" not in text
        assert "policy: loss on the proxy 1.1000" in text
        assert "policy 1.1000 60.0 % 95.0 % w2a4 1.1500" in text
        assert "seed0, seed1: All are choices of the same mixture" in text
        assert "policy: All were fine-tuned for a few steps" in text

    def test_no_pair_fits_the_budget(self, text_of):
        text = text_of(uniform={**_comparison(), "pairs": {}})
        assert "uniform" not in text


SENSITIVITIES = {"layer1.0.conv1": {"weight": {"2": 0.1, "4": 0.01}, "act": {"2": 0.2, "4": 0.0}}}


class TestDiagnosis:
    """What `asga diagnose` finds."""

    def test_is_told(self, text_of, policy):
        text = text_of(
            policy,
            command="diagnose",
            sensitivities=SENSITIVITIES,
            proxy_sensitivities=SENSITIVITIES,
            rank_correlations=[
                {"kind": "weight", "bits": 2, "rho": 0.864, "interval": [0.641, 0.95], "layers": 22},
                {"kind": "act", "bits": 4, "rho": None, "interval": None, "layers": 1},
            ],
            increase_on_target={"policy": 0.0304, "best by the target's sensitivities": 0.01668},
            starved=[{"layer": "layer1.0.conv1", "kind": "weight", "bits": 2, "wanted": 4, "increase": 0.09}],
        )
        assert "weight 2 0.86 0.64 to 0.95 22 activation 4 1" in text
        assert "policy 0.0304 , best by the target's sensitivities 0.01668 ." in text
        assert "layer1.0.conv1 weight 2 4 +0.09" in text
        assert "How much the loss on the target would rise" in text

    def test_without_a_proxy(self, text_of):
        text = text_of(sensitivities=SENSITIVITIES, increase_on_target={"policy": 0.03}, starved=[])
        assert "Proxy against target" not in text
        assert "Fewer bits" not in text

    def test_sensitivities_of_a_search(self, text_of):
        text = text_of(sensitivities=SENSITIVITIES)
        assert "Sensitivity of layers" in text
        assert "The policy on the target" not in text


AGREEMENT = {
    "names": ["seed0", "seed1"],
    "choices": 3,
    "unanimous": 1,
    "equal": 1 / 3,
    "chance": 0.5,
    "p_value": 0.81,
    "pairs": [{"first": "seed0", "second": "seed1", "equal": 1 / 3, "chance": 0.5, "p_value": 0.81}],
    "bits": {"layer1.0.conv1": {"weight": [2, 3], "act": [4, 4]}, "fc": {"weight": [8, None]}},
}


class TestAgreement:
    """Of the seeds of a search."""

    @pytest.fixture
    def text(self, run_folder, result, page_of):
        def page(**changes) -> str:
            found = {**result, "agreement": {**AGREEMENT, **changes}}
            (run_folder / "metrics.jsonl").unlink(missing_ok=True)  # fewer figures to draw
            (run_folder / "result.json").write_text(json.dumps(found))
            return page_of(run_folder).text

        return page

    def test_is_told_with_the_choices_on_which_they_differ(self, text):
        shown = text()
        assert "the same bits in 33.3 % of the 3 choices; chance would give 50.0 % (p = 0.81). All 2 agree" in shown
        assert "layer1.0.conv1 weight 2 3 2" in shown  # seed0, seed1, policy
        assert "fc weight 8 float float" in shown
        assert "layer1.0.conv1 activation" not in shown

    def test_no_better_than_chance_is_said(self, text):
        assert "That is not more than chance" in text()
        assert "That is not more than chance" not in text(p_value=0.001)

    def test_of_more_than_two_seeds_has_all_pairs(self, text):
        pairs = [{**AGREEMENT["pairs"][0], "second": f"seed{i}"} for i in (1, 2)]
        assert "seed0, seed2 33.3 % 50.0 % 0.81" in text(names=["seed0", "seed1", "seed2"], pairs=pairs)


def test_events_are_listed_and_recoveries_warned_of(tmp_path, page_of):
    where = {"stage": "search/seed0", "epoch": 2}
    events = [
        {"event": "skipped", **where, "step": 3, "reason": "the loss is nan"},
        {"event": "skipped", **where, "step": 4, "reason": "the loss is inf"},
        {"event": "recovery", **where, "step": 5, "what": "back to epoch 1, step 9; rho_max 0.5 -> 0.25"},
        {"event": "skipped", "stage": "float", "epoch": 1, "step": 1, "reason": "the loss is nan"},
        {"event": "of somebody else", "stage": "my stage"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    page = page_of(tmp_path)
    assert page.headings == ["Events"]
    assert "search/seed0: training went back to an earlier step 1 time, see Events below." in page.text
    assert "search/seed0, epoch 2, step 5: back to epoch 1, step 9; rho_max 0.5 -> 0.25" in page.text
    assert "search/seed0, epoch 2, step 3: the loss is nan. Steps of search/seed0 that were left out: 2" in page.text
    assert "step 4" not in page.text
    assert "my stage: of somebody else" in page.text
    assert "float, epoch 1, step 1: the loss is nan. Steps of float that were left out: 1" in page.text


@pytest.mark.parametrize(
    ("files", "headings"),
    [
        (["config.json"], ["Configuration"]),
        (["policy.json"], ["Policy"]),
        (["metrics.jsonl"], ["Policy", "Cost against the budget", "Training", "Diagnostics of the ASGA step"]),
        (["result.json"], ["Results", "Cost against the budget"]),
        (
            ["config.json", "policy.json", "result.json"],
            ["Results", "Policy", "Cost against the budget", "Configuration"],
        ),
    ],
    ids=lambda value: "+".join(value) if value[0].endswith(("json", "jsonl")) else "",
)
def test_any_subset_of_the_files_gives_a_page(run_folder, files, headings, page_of):
    for path in run_folder.iterdir():
        if path.name not in files:
            path.unlink()
    assert page_of(run_folder).headings == headings


def test_a_run_under_way_says_where_it_is(run_folder, page_of):
    (run_folder / "result.json").unlink()
    (run_folder / "policy.json").unlink()
    text = page_of(run_folder).text
    assert "not finished; last epoch: searched/seed1, 1 of 2" in text
    assert "time so far 3 min 0 s" in text
    assert "There is no policy yet" in text
    assert "toss-up" not in text


def test_a_run_that_has_hardly_begun_says_so(run_folder, page_of):
    for name in ("result.json", "policy.json", "metrics.jsonl"):
        (run_folder / name).unlink()
    assert "state not finished; no epoch is complete yet" in page_of(run_folder).text


def test_a_radius_on_its_bound_is_reported_for_the_stage(complete):
    text = complete[1].text
    assert "searched: the radius ρ was on its upper bound, rho_max, in 97.0 % of the steps" in text
    assert "search: the radius" not in text


def test_lines_that_were_cut_are_reported(complete, run_folder, page_of):
    assert "could not be read" not in complete[1].text
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write('{"event": "epo')
    assert "could not be read and are missing here: 1." in page_of(run_folder).text


def test_a_policy_over_its_budget_is_called_that(run_folder, policy, page_of):
    meta = {**policy.meta, "limits": {"bitops": 1_000_000}}
    Policy(policy, meta).save(run_folder / "policy.json")
    assert "1.5 M of 1.0 M (150.0 %), over the budget" in page_of(run_folder).text


def test_small_floats_are_named_and_averaged_by_their_bits(run_folder, policy, page_of):
    layers = {"conv1": LayerPolicy("fp8", 8), "layer1.0.conv1": LayerPolicy("fp4", 4), "fc": LayerPolicy(None, 8)}
    Policy(layers, policy.meta).save(run_folder / "policy.json")
    text = page_of(run_folder).text
    assert "6.0 bits for weights" in text
    assert "fp4" in text


def test_everything_from_outside_is_escaped(run_folder, records, result, page_of):
    attack = "<script>alert('x')</script>\"&$"
    (run_folder / "config.json").write_text(json.dumps({"command": attack, "options": {attack: attack}}))
    (run_folder / "result.json").write_text(
        json.dumps({**result, "notes": [attack], "table": [{**result["table"][0], "name": attack}]})
    )
    lines = [json.dumps({**record, "stage": attack}) for record in records]
    (run_folder / "metrics.jsonl").write_text("\n".join(lines))
    Policy({attack: LayerPolicy(2, 2)}, {"architecture": attack}).save(run_folder / "policy.json")
    page = page_of(run_folder)
    assert "<script" not in write_report(run_folder).read_text()
    assert page.text.count("alert('x')") >= 7


def test_the_page_needs_no_network(complete):
    page = complete[0].read_text()
    outside = set(re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page))
    assert outside  # references within the figures
    assert all(address.startswith("#") for address in outside)
    assert "default-src 'none'" in page


def test_references_within_figures_are_unique_on_the_page(complete):
    path, page = complete
    assert len(page.ids) == len(set(page.ids))
    references = set(re.findall(r"(?:href=\"|url\()#([\w-]+)", path.read_text()))
    assert references == set(page.ids)


def test_colors_of_figures_follow_the_mode(complete):
    figures = re.findall(r"<figure.*?</figure>", complete[0].read_text(), re.DOTALL)
    assert len(figures) == 7  # policy, cost, three stages, diagnostics of two
    for figure in figures:
        assert "var(--ink)" in figure
        assert re.findall(r"(?:fill|stroke): #\w+", figure) == []


def test_the_same_run_gives_the_same_page(complete, run_folder):
    assert write_report(run_folder).read_bytes() == complete[0].read_bytes()


def test_a_missing_library_names_its_extra(run_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"asga\[report\]"):
        write_report(run_folder)
    assert not (run_folder / "report.html").exists()
