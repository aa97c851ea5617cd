"""Every figure in the README and docs comes from a committed result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import choosing, published
from benchmarks.quality import defaults, report
from benchmarks.quality.tasks import TASKS
from randlora_vision import RandLoRAConfig
from randlora_vision.training.harness.options import AdapterOptions

ROOT = Path(__file__).parents[2]
# Percentages, and numbers with a unit of size or a thousands separator.
_FIGURE = re.compile(r"\d[\d.,]*\s?(?:%|KB|MB|GB)|\b\d{1,3}(?:,\d{3})+\b")


@pytest.mark.parametrize("page", published.pages(), ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert published.filled(text) == text, "run: make figures"


def test_the_readme_has_no_other_figures() -> None:
    text = published._MARKED.sub("", (ROOT / "README.md").read_text(encoding="utf-8"))
    prose = re.sub(r"```.*?```|https?://\S+", "", text, flags=re.DOTALL)
    assert _FIGURE.findall(prose) == []
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_the_tables_say_what_was_measured() -> None:
    figures = published.demo()
    right = sum(answer["adapted"] == answer["digit"] for answer in figures["answers"])
    assert right > 5 and figures["samples"] == {"test": 599, "original": 300}
    for method in figures["methods"].values():  # proportions of whole images
        assert method["after"]["test"] * 599 == pytest.approx(round(method["after"]["test"] * 599), abs=1e-9)
        low, high = method["interval"]["test"]
        assert low < method["after"]["test"] < high
    table = published.demo_table()
    assert f"{figures['methods']['randlora']['after']['test']:.1%}" in table
    flops = {name: int(line["flops"]) for name, line in published.costs()["ViT-S/16, 16 images"].items()}
    assert f"| {flops['ours'] / flops['peft_randlora']:.2f} |" in published.cost_table()


def test_a_changed_result_changes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = published.demo()
    figures["methods"]["randlora"]["after"]["test"] = 0.123
    (tmp_path / "demo.json").write_text(json.dumps(figures))
    monkeypatch.setattr(published, "RESULTS", tmp_path)
    assert "12.3%" in published.filled("<!-- figures: demo -->\n<!-- end -->")


def test_the_page_on_choosing_has_the_figures_of_the_quality_benchmark() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in choosing.RUNS.read_text(encoding="utf-8").splitlines()]
    of_probe = [line for line in lines if (line["task"], line["method"]) == ("mnist-all", "probe")]  # one seed
    best = max(of_probe, key=lambda line: line["val"])
    width = 1.96 * (best["test"] * (1 - best["test"]) / 500) ** 0.5
    header, cells = (
        next(line for line in page.splitlines() if line.startswith(start)).split("|")
        for start in ("| method | linear map", "| linear probe |")
    )
    place = header.index(" MNIST, 4,300 images, DINOv2-S ")
    assert cells[place].strip() == f"{best['test']:.1%} ± {width:.1%}".replace("%", "")
    trials = defaults.read_trials(choosing.RUNS.with_name(defaults.FILE)).items()
    of_digits = [line["test"] for trial, line in trials if trial.at == "default" and
                 (trial.task, trial.method, trial.budget) == ("digits-short", "structured", 1)]  # fmt: skip
    row = next(
        line for line in page.splitlines() if line.startswith("| inverted digits, demo ViT, 100 steps | structured")
    )
    assert row.split(" | ")[3] == f"{100 * sum(of_digits) / len(of_digits):.1f}"
    # What the prose concludes.
    assert "MNIST, 16 shots, DINOv2-S (accuracy): Best adapter: OFT. Below it" in page
    assert "emoji captions, DINOv2-S, MiniLM (mean recall): Best adapter: RandLoRA, structured. This task" in page
    assert "inverted digits, demo ViT, 100 steps (accuracy): Best adapter: RandLoRA, structured." in page
    assert "linear map, Gaussian change (explained): Best adapter: LoRA. Below it with 95% intervals" in page


def test_the_defaults_keep_their_rules() -> None:
    """In the middle size, no task has the default bases more than a point below uniform ones, or told apart as worse,
    and every task has the default rate within two points of the best of the grid."""
    default = RandLoRAConfig().bases
    assert AdapterOptions().bases == default  # of the scripts
    tasks = report.tasks_of(choosing.results())
    for task in tasks:
        found = [row for row in report.rows(choosing.results(), task) if row.result["budget"] in report.MEASURED]
        (difference,) = (text for row, text, _ in report.differences(found, "uniform") if row.method == default)
        mean, width = map(float, difference.split(" ± "))  # of several seeds
        assert mean > -1 and mean + width > 0, task
    trials = defaults.read_trials(choosing.RUNS.with_name(defaults.FILE))
    rates = [line for line in defaults.table_rows(choosing.results(), trials) if line[1] == default]
    assert {line[0] for line in rates} == {TASKS[task].title for task in tasks}
    for line in rates:
        assert float(line[7]) <= 2, line


def test_a_changed_run_changes_the_pages_on_choosing_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("choosing.md", "learning-rate.md"))
    changed = {run: {**line, "test": 0.5 * line["test"]} for run, line in choosing.results().items()}
    monkeypatch.setattr(choosing, "results", lambda: changed)
    for table in ("methods", "minus_lora", "rates", "bases", "grid"):
        assert f"<!-- figures: {table} -->" in pages
        assert published.TABLES[table]() not in pages


def test_badges_are_true() -> None:
    readme, project = (ROOT / "README.md").read_text(), (ROOT / "pyproject.toml").read_text()
    assert 'license = "Apache-2.0"' in project and "licence-Apache_2.0" in readme
    lowest = re.search(r'requires-python = ">=([\d.]+)"', project)
    assert lowest and f"python-{lowest[1]}+" in readme.replace("%2B", "+")
    assert "2502.00987" in (ROOT / "CITATION.cff").read_text()
