"""The quality benchmark: its search, its sizes, its scores and intervals, and that it goes on after a stop."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import nn

from benchmarks.methods import randlora_numbers, trained_numbers
from benchmarks.quality import __main__ as command
from benchmarks.quality.data import Archive
from benchmarks.quality.methods import METHODS, knob_for
from benchmarks.quality.nola import inject_nola
from benchmarks.quality.problems import Classification, Retrieval
from benchmarks.quality.report import half_width
from benchmarks.quality.search import DEFAULT_RATES, WIDEST, best_exponent, next_run
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.train import Run, read_lines


def searched(best, method="lora", seeds=(0, 1, 2)):
    """Every run that the search asks for, of a method whose score falls with the distance to the exponent `best`."""
    results = {}
    while run := next_run(results, "digits", method, 1, seeds[:1], seeds):
        results[run] = {"val": -abs(run.exponent - best), "test": 0.0}
        assert len(results) < 30, "the search does not end"
    return results


@pytest.mark.parametrize("best", [-3, -1, 0, 2, 3])
def test_the_grid_is_widened_until_the_best_rate_is_inside(best):
    results = searched(best)
    tried = {run.exponent for run in results if run.seed == 0}
    assert best_exponent(results, "digits", "lora", 1) == best
    assert {best - 1, best, best + 1} <= tried
    assert {run.exponent for run in results if run.seed == 2} == {best}


def test_a_search_ends_where_no_rate_is_inside():
    assert max(run.exponent for run in searched(99)) == WIDEST


def test_the_default_rate_a_third_and_three_times_it_are_measured_but_not_searched():
    results = searched(2, "uniform")
    assert set(DEFAULT_RATES) <= {run.exponent for run in results}
    assert best_exponent(results, "digits", "uniform", 1) == 2
    assert {run.exponent for run in results if run.seed == 2} == {2}
    assert not set(DEFAULT_RATES) & {run.exponent for run in searched(2, "lora")}


def network():
    return nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.knobs])
def test_knobs_match_the_budget_as_well_as_any(name):
    targets, method = ["0", "2", "4"], METHODS[name]
    budget = randlora_numbers(network(), targets, 8)
    chosen = knob_for(method, network(), targets, 8)
    distances = {
        knob: abs(trained_numbers(method.apply(network(), targets, knob, 0)) - budget)
        for knob in set(method.knobs) & {chosen - 1, chosen, chosen + 1, chosen // 2, chosen * 2}
    }
    assert distances[chosen] == min(distances.values())


def test_nola_is_its_sum():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 20)), torch.randn(3, 12)
    before = model(x)
    weight = model[0].weight.detach().clone()
    inject_nola(model, ["0"], 5)
    torch.testing.assert_close(model(x), before)
    part = model[0].parametrizations.weight[0]
    nn.init.normal_(part.b)
    (bank,) = part.bank
    down = sum(part.a[k] * bank[k, :, :12] for k in range(5)) / 12**0.5
    up = sum(part.b[k] * bank[k, :, :20].T for k in range(5)) / 5**0.5
    torch.testing.assert_close(model[0].weight, weight + up @ down)
    assert trained_numbers(model) == 10


def test_mean_recall_against_a_sorted_list():
    torch.manual_seed(0)
    images, texts = (nn.functional.normalize(torch.randn(40, 6), dim=-1) for _ in range(2))
    texts = nn.functional.normalize(texts + images, dim=-1)
    problem = Retrieval(nn.Identity(), nn.Identity(), images, texts, {}, 8, 0)
    similar = images @ texts.T
    hits = [
        int(i in rows[i].argsort(descending=True)[:most])
        for rows in (similar, similar.T)
        for most in (1, 5, 10)
        for i in range(40)
    ]
    assert problem.score(images, texts) == pytest.approx(sum(hits) / len(hits))


def test_one_class_for_everything_is_noticed():
    labels = torch.arange(6) % 3
    logits = torch.eye(3)[labels]
    problem = Classification(nn.Identity(), nn.Identity(), logits, labels, {"val": (logits, labels)}, 2, 0)
    assert not problem.figures(nn.Identity()).constant
    assert problem.figures(nn.Linear(3, 3).requires_grad_(False).apply(lambda m: nn.init.zeros_(m.weight))).constant


def test_every_sample_once_per_epoch():
    inputs = torch.arange(10)
    problem = Classification(nn.Identity(), nn.Identity(), inputs, inputs, {}, 4, 0)
    drawn = torch.cat([problem.next_batch()[0] for _ in range(5)])
    assert drawn[:10].sort().values.tolist() == drawn[10:].sort().values.tolist() == list(range(10))


def test_intervals():
    scores = [0.5, 0.6, 0.7]
    low, high = stats.t.interval(0.95, 2, 0.6, stats.sem(scores))
    assert half_width(scores, 0) == pytest.approx((high - low) / 2)
    assert half_width([0.5], 400) == pytest.approx(1.96 * 0.025, rel=1e-3)
    assert half_width([0.0, 0.0], 400) == 0


def test_an_archive_is_verified(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"content")
    archive = Archive("PyPI", "a", "1", "a.whl", hashlib.sha256(b"content").hexdigest(), 0.0, "nothing")
    assert archive.get(tmp_path) == tmp_path / "a.whl"
    with pytest.raises(ValueError, match="has the SHA-256 .* remove it"):
        replace(archive, sha256="0").get(tmp_path)


def test_without_npm_the_archive_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    archive = Archive("npm", "emoji", "16", "emoji-16.tgz", "0", 1.0, "pictures")
    with pytest.raises(ValueError, match=r"npm is not installed: put emoji-16.tgz of emoji 16 from npm into"):
        archive.get(tmp_path)


def test_the_command_goes_on_after_a_stop(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "linear-low", replace(TASKS["linear-low"], steps=6))
    words = ["--data", str(tmp_path), "--out", str(tmp_path), "--tasks", "linear-low", "--budgets", "small"]
    words += ["--methods", "uniform", "lora", "full", "probe", "--seeds", "2", "--search-seeds", "1"]
    command.main(words)
    path = tmp_path / "runs.jsonl"
    whole = path.read_text().splitlines()
    assert {"uniform", "lora", "full", "probe"} == {json.loads(line)["method"] for line in whole}
    path.write_text("\n".join([*whole[:-2], whole[-2][:20]]))  # stopped while it wrote a line
    command.main(words)
    runs = {Run(**{name: line[name] for name in Run.__annotations__}): line for line in read_lines(path)}
    assert len(runs) == len(whole)
    assert list(runs.values())[-2:] == [json.loads(line) for line in whole[-2:]]
    report = (tmp_path / "report.md").read_text()
    assert "| RandLoRA, uniform | 640 |" in report
    assert (tmp_path / "budgets.png").stat().st_size and (tmp_path / "rates.png").stat().st_size
