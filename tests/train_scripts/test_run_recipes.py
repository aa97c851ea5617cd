"""The paper's recipes: sizes, options, lengths, the data sets' names, a run that goes on, and the gathered table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from randlora_vision.training.clip.classifier import ClassPromptLoss
from randlora_vision.training.data.known_data import known_data
from tests.training_helpers import (
    Killed,
    as_in_a_new_process,
    draw_nothing,
    script,
    write_class_folders,
    write_tiny_clip,
)

recipes = script("run_recipes")
WIDTH, BLOCKS = 768, 12
WEIGHTS = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]  # qkv, out, two of the MLP


@pytest.mark.parametrize("name", ["clip/ViT-B-32/vision", "dinov2/ViT-B-14"])
def test_numbers_of_a_vit_b(name: str) -> None:
    numbers = recipes.numbers_of(recipes.rows()[name])
    assert numbers["lora"] == BLOCKS * sum(32 * (out + inputs) for out, inputs in WEIGHTS)
    assert numbers["randlora"] == BLOCKS * 4 * (WIDTH // 6) * (6 + WIDTH)
    assert abs(numbers["randlora"] / numbers["lora"] - 1) < 0.02
    assert numbers["vera"] == BLOCKS * sum(256 + out for out, _ in WEIGHTS)


def test_every_row_has_valid_options_for_every_method_and_number_of_images() -> None:
    cars = recipes.data_sets()["cars"]
    for name, row in recipes.rows().items():
        for images in ("1", "50%"):
            comparison = row.comparison(cars, images, "DIR", Path("runs"), list(row.methods), [1])
            for method in row.methods:
                options = comparison.given(method, comparison.rates[method][0], 1, {})
                training, adapter = options.training, options.adapter
                assert training.min_lr == pytest.approx(training.lr / 100), name
                assert (training.weight_decay, training.batch_size, training.warmup_fraction) == (0.1, 128, 0.0)
                assert adapter.method == method and (method != "randlora" or adapter.alpha == 1)
                assert method != "lora" or (adapter.rank, adapter.alpha) == (32, 1)


@pytest.mark.parametrize(
    ("name", "images", "length"),
    [
        ("dtd", "1", {"steps": 103}),  # 47 images, 28 times as an epoch
        ("cars", "16", {"steps": 245}),  # 3136 images, more than ten batches
        ("dtd", "50%", {"epochs": 76}),
    ],
)
def test_length_of_a_run(name: str, images: str, length: dict[str, float]) -> None:
    assert recipes.data_sets()[name].length(images, 128) == length


def test_the_data_sets_are_the_22_whose_words_are_known() -> None:
    found = recipes.data_sets()
    assert len(found) == 22
    for data in found.values():
        recipes._check_data(data)
        known = known_data(data.data)
        assert known is not None and len(known.names) in (0, data.classes) or data.classes > len(known.names)


def test_a_row_goes_on_after_a_stop_and_its_results_are_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row of clip.yaml as it is, but for the model, the precision and the length."""
    model, row = write_tiny_clip(tmp_path / "tiny"), "clip/ViT-B-32/vision-and-classifier"
    write_class_folders(tmp_path / "eurosat")
    words = ["run", row, "--data-root", str(tmp_path), "--data", "eurosat", "--images", "1"]
    words += ["--methods", "randlora", "lora", "--output-dir", str(tmp_path / "out"), "--"]
    words += ["--model", f"local-dir:{model}", "--pretrained", "None", "--mixed-precision", "no", "--steps", "2"]
    words += ["--workers", "0", "--val-fraction", "0.3", "--eval-every", "5", "--checkpoint-every", "1"]
    draw_nothing(monkeypatch)
    as_in_a_new_process()
    steps, forward = iter(range(1, 10)), ClassPromptLoss.forward

    def stopped(self: ClassPromptLoss, batch: Any) -> Any:
        if next(steps) == 4:  # the second step of the second method
            raise Killed
        return forward(self, batch)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ClassPromptLoss, "forward", stopped)
        recipes.main(words)
    assert "kept:" not in capsys.readouterr().out
    recipes.main(words)
    printed = capsys.readouterr().out
    place = tmp_path / "out" / row / "eurosat" / "1"
    assert f"kept: {place / 'randlora'}" in printed and f"resumed from {place / 'lora' / 'checkpoints'}" in printed
    for method, settings in {"randlora": (6, 1, "gamma-zero"), "lora": (32, 1, "lambda-zero")}.items():
        adapter = yaml.safe_load((place / method / "config.yaml").read_text())["adapter"]
        assert (adapter["rank"], adapter["alpha"], adapter["init"]) == settings and adapter["probe_lr"] == 0.0002
        assert len(json.loads((place / method / "summary.json").read_text())["after"]) == 1
    recipes.main(["gather", "--output-dir", str(tmp_path / "out")])
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.startswith(f"| {row} | 1 | 2 |") and "| RandLoRA |" in table and "| LoRA |" in table
    assert "Data sets in the mean, by images per class or part: 1: 1." in table and table in capsys.readouterr().out


def test_the_table_is_the_mean_over_the_data_sets_that_all_methods_have(tmp_path: Path) -> None:
    def write(data: str, method: str, seed: int, top1: float) -> None:
        folder = tmp_path / "clip/ViT-B-32/both" / data / "1" / method / f"seed-{seed}"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"after": {"test": {"top1": top1}}}))
        (folder / "config.yaml").write_text(yaml.safe_dump({"training": {"seed": seed}}))

    for data, scores in {"dtd": (0.4, 0.6), "cars": (0.2, 0.4)}.items():
        for seed, score in enumerate(scores):
            write(data, "randlora", seed, score)
    write("dtd", "lora", 0, 0.5)
    lines: list[Any] = recipes.table(tmp_path, "clip/ViT-B-32/both", recipes.rows()["clip/ViT-B-32/both"]).splitlines()
    assert lines[2].startswith("| RandLoRA | 50.0 ± 127.1 |")  # dtd alone: t for one degree of freedom
    assert lines[3].startswith("| LoRA | 50.0 |")
    assert lines[-1] == "Data sets in the mean, by images per class or part: 1: 1."
