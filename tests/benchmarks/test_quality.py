"""The quality benchmark: its search, its sizes, its scores and intervals, and that it goes on after a stop."""

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from torch import nn
from torch.testing import assert_close

from benchmarks.methods import randlora_numbers, trained_numbers
from benchmarks.quality import __main__ as command
from benchmarks.quality import data, defaults, prepare, variants
from benchmarks.quality.data import Archive
from benchmarks.quality.methods import METHODS, knob_for
from benchmarks.quality.problems import Aligned, Classification, Prompts, Retrieval
from benchmarks.quality.report import Row, differences, half_width
from benchmarks.quality.search import WIDEST, best_exponent, next_run
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


def test_frozen_heads_belong_to_the_features_of_the_suggested_rate():
    torch.manual_seed(0)
    images, head = torch.randn(12, 6), nn.Linear(6, 4)
    embeddings = head(images) / head(images).norm(dim=1, keepdim=True)  # as open_clip's encode_image(normalize=True)
    assert_close(Aligned(nn.Identity(), head, images, images, {}, 8, 0).features(nn.Identity(), images), embeddings)


def test_prompts_are_scored_by_the_closest_text():
    texts = torch.eye(3)
    labels = torch.arange(6) % 3
    features = 7 * texts[labels] + 0.1
    problem = Prompts(nn.Identity(), nn.Identity(), features, labels, {}, 2, 0, texts=texts)
    outputs = problem.outputs(nn.Identity(), features)
    assert problem.score(outputs, labels) == 1 and problem.score(outputs, (labels + 1) % 3) == 0
    cosines = nn.functional.cosine_similarity(features[:, None], texts[None], dim=-1)
    assert_close(problem.criterion(outputs, labels), nn.functional.cross_entropy(cosines / 0.05, labels))
    assert not problem.constant(outputs) and problem.constant(outputs[:1].expand(4, -1))


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


def test_differences_are_taken_seed_by_seed_and_at_the_same_size():
    def row(method, budget, scores):
        return Row("digits", method, 0, scores, 0.0, {}, {"budget": budget})

    found = [row("lora", 0, {0: 0.1}), row("lora", 1, {0: 0.5, 1: 0.9, 2: 0.7}), row("uniform", 0, {0: 0.15})]
    found += [row("uniform", 1, {0: 0.52, 2: 0.76}), row("full", -1, {0: 0.6})]
    low, high = stats.t.interval(0.95, 1, 4.0, stats.sem([2.0, 6.0]))
    assert [(row.method, *others) for row, *others in differences(found, "lora")] == [
        ("uniform", "+5.0", 1),
        ("uniform", f"+4.0 ± {(high - low) / 2:.1f}", 2),
        ("full", "+10.0", 1),
    ]


def test_an_archive_is_verified(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"content")
    archive = Archive("PyPI", "a", "1", "a.whl", hashlib.sha256(b"content").hexdigest(), 0.0, "nothing")
    assert archive.get(tmp_path) == tmp_path / "a.whl"
    with pytest.raises(ValueError, match="has the SHA-256 .* remove it"):
        replace(archive, sha256="0").get(tmp_path)


def test_without_npm_both_archives_are_named_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(data, "find_spec", lambda module: module)
    place = r"https://registry.npmjs.org/emoji-datasource-{0}/-/emoji-datasource-{0}-16.0.0.tgz"
    with pytest.raises(ValueError, match=f"npm is not installed: put {place.format('google')} and .*twitter"):
        data.get(tmp_path, ["dinov2", "emoji"])
    assert not list((tmp_path / "archives").iterdir())


def test_a_missing_module_is_named_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda module: None if module == "onnx" else module)
    with pytest.raises(ValueError, match=r"needs onnx: pip install -e '.\[quality\]'"):
        data.get(tmp_path)
    assert not (tmp_path / "archives").exists()


def test_a_failed_download_says_what_the_downloader_said(tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="npm error code E404\n\nnpm error 404 Not Found\n")
    monkeypatch.setattr(data.subprocess, "run", lambda *_, **__: failed)
    archive = Archive("npm", "emoji", "16", "emoji-16.tgz", "0", 1.0, "pictures")
    with pytest.raises(
        ValueError, match=r"npm could not get emoji 16: npm error code E404 / npm error 404 .*; put http"
    ):
        archive.get(tmp_path)


def emoji_archive(path, artist, rows):
    """An npm archive of emoji, each a name, a category and the grey of its left half on a transparent ground."""
    table, files = [], {}
    for number, (name, category, grey) in enumerate(rows):
        own = {"image": f"{number}.png", "name": name, "short_name": f"emoji_{number}", "category": category}
        table.append({**own, **{f"has_img_{name}": True for name in prepare.ARTISTS}})
        picture = Image.new("RGBA", (64, 64), (0, 255, 0, 0))  # transparent, but green
        picture.paste((grey, grey, grey, 255), (0, 0, 32, 64))
        content = io.BytesIO()
        picture.save(content, "PNG")
        files[f"package/img/{artist}/64/{number}.png"] = content.getvalue()
    with tarfile.open(path, "w:gz") as archive:
        for name, held in {"package/emoji.json": json.dumps(table).encode(), **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(held)
            archive.addfile(member, io.BytesIO(held))
    return path


def test_emoji_of_both_artists_on_white_without_copies(tmp_path):
    rows = [
        ("RED HEART", "Symbols", 1),
        (None, "Flags", 2),
        ("skin", "Component", 3),
        ("ISLAND", "Flags", 2),  # the same drawing as the first flag
        ("Red heart", "Flags", 4),  # the same caption as the heart
        ("END", "Flags", 5),
    ]
    paths = {artist: emoji_archive(tmp_path / f"{artist}.tgz", artist, rows) for artist in prepare.ARTISTS}
    prepare.prepare_emoji(paths, tmp_path)
    held, words = load_file(tmp_path / "emoji.safetensors"), json.loads((tmp_path / "emoji.json").read_text())
    assert words == {"captions": ["red heart", "emoji 1", "end"], "categories": ["Flags", "Symbols"]}
    assert held["labels"].tolist() == [1, 0, 0]
    assert held["google"].shape == (3, 64, 64, 3)
    assert held["google"][:, 0, 0, 0].tolist() == [1, 2, 5] and held["twitter"][0, 0, 63].tolist() == [255, 255, 255]


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
    peaks = {line["method"]: line["peak_bytes"] for line in read_lines(tmp_path / "peaks.jsonl")}
    assert 4 * 128 * 128 * 4 < peaks["full"] < peaks["lora"] * 2 and peaks["probe"] < peaks["lora"] < peaks["full"]
    assert (tmp_path / "budgets.png").stat().st_size and (tmp_path / "rates.png").stat().st_size


def test_a_variant_is_compared_with_the_default_seed_by_seed():
    scores = {"default": {0: 0.8, 1: 0.7, 2: 0.9}, "no warmup": {0: 0.75, 1: 0.71}, "gamma-zero": {3: 1.0}}
    lines = [
        {"task": "digits-short", "variant": name, "seed": seed, "test": score, "lr": 1e-3}
        for name, by_seed in scores.items()
        for seed, score in by_seed.items()
    ]
    _, *rows = variants.table_rows(lines)
    assert [row[1:] for row in rows] == [
        ["default", "1.0e-03", "80.0", ""],
        ["no warmup", "1.0e-03", "73.0", "-2.0 (-5.0, +1.0)"],
    ]


def test_the_command_of_the_variants_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "TASKS", {"digits-short": replace(TASKS["linear-full"], steps=3)})
    few = {name: variants.VARIANTS[name] for name in ("default", "alpha = 100 r")}
    monkeypatch.setattr(variants, "VARIANTS", few)
    words = ["--data", str(tmp_path), "--out", str(tmp_path), "--tasks", "digits-short"]
    variants.main([*words, "--seeds", "1"])
    first = read_lines(tmp_path / variants.FILE)
    variants.main([*words, "--seeds", "2"])
    lines = read_lines(tmp_path / variants.FILE)
    assert lines[:2] == first and [(line["variant"], line["seed"]) for line in lines[2:]] == [(n, 1) for n in few]
    assert first[0]["lr"] / first[1]["lr"] == pytest.approx(100 / variants.ALPHA_PER_RANK, rel=0.01)  # as alpha does


def test_the_default_rate_is_compared_with_the_best_of_the_grid_over_the_same_seeds():
    results = searched(2, "uniform")
    results = {
        run: {**line, "lr": 8e-3, "trained": 9, "budget": run.budget, "test": 0.9} for run, line in results.items()
    }
    found = {("default", 0): 0.8, ("default", 1): 0.9, ("default", 7): 0.1, ("a third", 0): 0.7}
    trials = {
        defaults.Trial("digits", "uniform", 1, at, seed): {"lr": 2e-3, "test": score}
        for (at, seed), score in found.items()
    }
    _, row = defaults.table_rows(results, trials)
    assert row[1:] == ["uniform", "9", "60.0", "3", "-10.0", "", "+5.0", "4"]


def test_the_command_of_the_defaults_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "linear-low", replace(TASKS["linear-low"], steps=3))
    words = ["--data", str(tmp_path), "--out", str(tmp_path), "--tasks", "linear-low", "--methods", "uniform"]
    defaults.main([*words, "--at", "default"])
    first = read_lines(tmp_path / defaults.FILE)
    defaults.main([*words, "--at", "default", "three times"])
    lines = read_lines(tmp_path / defaults.FILE)
    assert lines[:1] == first and [line["at"] for line in lines[1:]] == ["three times"]
    assert lines[1]["lr"] == pytest.approx(3 * lines[0]["lr"], rel=0.01)
