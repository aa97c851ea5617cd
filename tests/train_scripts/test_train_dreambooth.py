"""Tests of train_dreambooth.py, run as a user would run it, on tiny random pipelines of every family."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from randlora_vision.integrations.diffusers import load_adapter
from randlora_vision.training.data.sources import digits
from randlora_vision.training.dreambooth import task as dreambooth_task
from randlora_vision.training.dreambooth.batches import Prompts
from randlora_vision.training.methods.task import AdaptedTask
from tests.tiny_pipelines import PIPELINES, VOCABULARY, sample, sdxl, shallow_sd15
from tests.training_helpers import Killed, card_scope, draw_nothing, printed_code, script

PROMPT, CLASS_PROMPT = "a photo of sks digit", "a photo of a digit"
PRIOR = ["--with-prior-preservation", "--class-prompt", CLASS_PROMPT, "--num-class-images", "3"]
SHARES = {"subject", "emoji_kept"}
MEASURED = {"loss", "loss_samples", "prior_loss", "prior_loss_samples", "prior_drift", "prior_pictures"}
RUN_FILES = {
    "README.md",
    "adapter.safetensors",
    "adapter_best.safetensors",
    "config.yaml",
    "curves.png",
    "environment.json",
    "metrics.jsonl",
    "split.json",
    "summary.json",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    smaller = {"sd15": shallow_sd15, "sdxl": functools.partial(sdxl, vocabulary=VOCABULARY)}
    for name, make in {**PIPELINES, **smaller}.items():
        make().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, picture in enumerate(digits.read_digits((7,), inverted=True).images["train"][:3]):
        assert not isinstance(picture, Path)
        picture.save(folder / f"{number}.png")  # type: ignore[union-attr]
    return folder


@pytest.fixture
def train(models: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return train_dreambooth.main with defaults for a tiny pipeline; `argv` overrides them."""
    draw_nothing(monkeypatch)  # test_the_embedded_default draws
    monkeypatch.setattr(dreambooth_task, "_MEASURED", 2)

    def main(*argv: str, model: str = "sd15", module: ModuleType | None = None) -> Path:
        for state in (AcceleratorState, GradientState, PartialState):  # as in a separate process
            state._shared_state.clear()
        defaults = {
            "--pretrained-model-name-or-path": str(models / model),
            "--instance-data-dir": str(images),
            "--instance-prompt": PROMPT,
            "--output-dir": str(tmp_path / "run"),
            "--report-to": "none",
            "--resolution": "16",
            "--max-sequence-length": "16",
            "--num-inference-steps": "2",
            "--num-prior-images": "1",
            "--rank": "4",
            "--batch-size": "2",
            "--steps": "2",
            "--eval-every": "2",
            "--log-every": "1",
            "--lr": "1e-2",
        }
        given = [word for name, value in defaults.items() if name not in argv for word in (name, value)]
        (module or script("train_dreambooth")).main([*given, *argv])
        return Path(argv[argv.index("--output-dir") + 1]) if "--output-dir" in argv else tmp_path / "run"

    return main


def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, list[Any]]:
    """Return the script, and a list to which it appends the pipelines that it trains."""
    module, trained = script("train_dreambooth"), []
    adapt = module.adapt
    monkeypatch.setattr(module, "adapt", lambda family, options: trained.append(family.pipe) or adapt(family, options))
    return module, trained


def fresh(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("model", PIPELINES)
def test_the_saved_file_makes_a_fresh_pipeline_the_trained_one(
    model: str, train: Any, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, trained = watched(monkeypatch)
    folder = train("--train-text-encoder", *PRIOR, "--steps", "1", model=model, module=module)
    (pipe,) = trained
    base, reloaded = fresh(models / model), fresh(models / model)
    load_adapter(reloaded, folder / "adapter.safetensors")
    for prompt in (PROMPT, "a dog"):
        expected = sample(pipe, prompt)
        assert torch.equal(sample(reloaded, prompt), expected)
        assert (sample(base, prompt) - expected).abs().max() > 0.01
    texts = [name for name, _ in pipe.components.items() if name.startswith("text_encoder") and name[-1] != "3"]
    texts = texts[:1] if model == "flux" else texts
    for name in texts:  # the text encoders were trained and are in the file
        before, after = getattr(base, name), getattr(reloaded, name)
        ids = torch.tensor([[VOCABULARY - 2, 320, 1125, VOCABULARY - 1]])
        states = [part(ids, output_hidden_states=True).hidden_states[1] for part in (before, after)]
        assert not torch.equal(*states)


def test_a_run(train: Any, images: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(*PRIOR, "--validation-prompt", PROMPT, "a dog", "--num-validation-images", "2", "--eval-every", "1")
    assert {path.name for path in folder.iterdir()} == RUN_FILES | {"class_images", "samples", "samples.png"}
    pictures = {str(path.relative_to(folder / "samples")) for path in (folder / "samples").rglob("*.png")}
    steps = [f"step-{step:06}" for step in (1, 2)]
    each = {f"{name}/{prompt}-{n}.png" for name in ("base", *steps) for prompt in (0, 1) for n in (0, 1)}
    assert pictures == each | {f"{name}/base-and-adapted.png" for name in steps}
    assert len(list((folder / "class_images").glob("*.png"))) == 3
    printed, errors = capsys.readouterr()
    assert "Loading" not in errors and "torchao" not in errors  # the noise of libraries
    assert "transformer_blocks" in printed  # the injection report
    assert "the same pictures (largest pixel difference: 0.0e+00)" in printed
    assert f"load_adapter(pipe, '{folder}/adapter.safetensors')" in printed
    scope: dict[str, Any] = {}
    exec(printed_code(printed), scope)
    reloaded = fresh(models / "sd15")
    load_adapter(reloaded, folder / "adapter.safetensors")
    assert torch.equal(sample(scope["pipe"], PROMPT), sample(reloaded, PROMPT)) and scope["picture"].size[0] > 8

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"] == "randlora" and summary["steps"] == 2 and summary["reload_difference"] == 0
    assert summary["file_bytes"] <= 4 * summary["trained_numbers"] + 16_384
    assert set(summary["before"]) == set(summary["after"]) == MEASURED
    assert summary["before"]["prior_drift"] == 0 < summary["after"]["prior_drift"]
    assert summary["after"] != summary["before"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "eval"] == [0, 1, 2]  # not "val": on training images
    record = json.loads((folder / "split.json").read_text())
    assert record["captions"] == [PROMPT] * 3 and record["images"] == [str(images / f"{i}.png") for i in range(3)]
    assert yaml.safe_load((folder / "config.yaml").read_text())["subject"]["class_prompt"] == [CLASS_PROMPT]


def test_pictures_on_the_way_are_those_of_the_saved_file(train: Any, models: Path, monkeypatch: Any) -> None:
    """Corrupt the file saved at step 1: the picture must show it, and training must be unaffected."""
    flags = ["--validation-prompt", PROMPT, "--eval-every", "1"]
    plain = train(*flags)
    save = AdaptedTask.save

    def spoilt(self: AdaptedTask) -> str:
        calls.append(1)
        name, parameter = next((n, p) for n, p in self.adaptation.parameters() if n.endswith("gamma"))
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(-50.0 if len(calls) == 2 else 1.0)
            where = save(self)
            parameter.copy_(before)
        return where

    calls: list[int] = []
    monkeypatch.setattr(AdaptedTask, "save", spoilt)
    other = train(*flags, "--output-dir", str(plain.parent / "other"))
    pictures = [(folder / "samples/step-000001/0-0.png").read_bytes() for folder in (plain, other)]
    assert pictures[0] != pictures[1]
    assert (plain / "samples/step-000002/0-0.png").read_bytes() == (other / "samples/step-000002/0-0.png").read_bytes()
    one, two = (load_file(folder / "adapter.safetensors") for folder in (plain, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_diffusers_loads_the_lora_file(train: Any, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, trained = watched(monkeypatch)
    folder = train("--method", "lora", "--validation-prompt", PROMPT, "--train-text-encoder", module=module)
    assert json.loads((folder / "summary.json").read_text())["reload_difference"] == 0
    names = set(load_file(folder / "adapter.safetensors"))
    assert {name.partition(".")[0] for name in names} == {"unet", "text_encoder"}
    pipe, expected = fresh(models / "sd15"), sample(trained[0])
    assert (sample(pipe) - expected).abs().max() > 0.01
    pipe.load_lora_weights(folder, weight_name="adapter.safetensors")
    torch.testing.assert_close(sample(pipe), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(sample(card_scope(folder)["pipe"]), expected, rtol=0, atol=1e-5)


def test_the_code_of_the_card_makes_a_fully_tuned_pipeline(
    train: Any, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a VAE of its own, which is the base's with other weights."""
    vae = fresh(models / "sd15").vae
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.2)
    vae.save_pretrained(tmp_path / "vae")
    module, trained = watched(monkeypatch)
    own = ["--pretrained_vae_model_name_or_path", str(tmp_path / "vae"), "--optimizer", "adamw", "--scale_lr"]
    folder = train("--method", "full", "--lr", "5e-3", "--schedule", "step", "--decay-steps", "1", *own, module=module)
    assert json.loads((folder / "summary.json").read_text())["reload_difference"] == 0
    settings = yaml.safe_load((folder / "config.yaml").read_text())["training"]
    assert settings["lr"] == 1e-2 and settings["lr_images"] is None  # two images in a step
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if line["split"] == "train"] == pytest.approx([1e-2, 1e-3])
    (pipe,) = trained
    base = fresh(models / "sd15")
    pipe.text_encoder = base.text_encoder  # it was not trained, and is dropped once the prompts are encoded
    expected = sample(pipe)
    assert (sample(base) - expected).abs().max() > 0.01
    torch.testing.assert_close(sample(card_scope(folder)["pipe"]), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "argv"),
    [
        ("flux", ["--method", "full", "--lr", "1e-3", "--validation-prompt", PROMPT, "--weighting-scheme", "none"]),
        ("sd3", ["--mixed-precision", "bf16", "--validation-prompt", PROMPT, "--gradient-checkpointing"]),
        ("sdxl", ["--snr-gamma", "5", "--ema-decay", "0.9", "--gradient-accumulation-steps", "2",
                  "--no-cache-latents"]),
        ("sd15", ["--aspect_ratio_buckets", "16,16;16,32", "--train_batch_size", "1", "--center_crop", *PRIOR]),
        ("sd15", ["--target-modules", "diffusers:backbone", "--dropout", "0.1", "--text_encoder_lr", "1e-3",
                  "--train_text_encoder", "--gradient-checkpointing"]),
    ],
)  # fmt: skip
def test_options_reach_the_run(train: Any, model: str, argv: list[str]) -> None:
    summary = json.loads((train(*argv, model=model) / "summary.json").read_text())
    assert summary["reload_difference"] <= (2 / 255 if "bf16" in argv else 0)


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, graphs = torch.compile, []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda model: compiler(model, backend=backend, fullgraph=True))
    monkeypatch.setattr(dreambooth_task, "fixed_losses", lambda *_: {"loss": 0.0})  # it would be compiled too
    few = ["--target-modules", "attn.to_q", "ff.net.2", "--steps", "1"]
    plain = train(*few, "--output-dir", str(tmp_path / "plain"), model="flux")
    assert not graphs
    compiled = train(*few, "--torch-compile", "--output-dir", str(tmp_path / "compiled"), model="flux")
    assert len(graphs) == 1
    one, other = (load_file(folder / "adapter.safetensors") for folder in (plain, compiled))
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)


def test_names_that_diffusers_has_for_the_same(train: Any) -> None:
    flags = ["--max_train_steps", "3", "--learning_rate", "1e-3", "--lr_scheduler", "constant", "--lora_dropout", "0.1"]
    flags += ["--validation_steps", "2", "--checkpointing_steps", "3", "--adam_weight_decay", "0.1"]
    module, seen = script("train_dreambooth"), []
    module.train = seen.append  # type: ignore[attr-defined]
    module.main(flags)
    (options,) = seen
    training = options.training
    assert (training.steps, training.lr, training.schedule, training.eval_every) == (3, 1e-3, "constant", 2)
    assert options.checkpoints.checkpoint_every == 3 and options.adapter.dropout == 0.1
    assert training.weight_decay == 0.1


def test_names_that_kohya_has_for_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "y", "--instance_prompt", "z"]
    flags += ["--min_snr_gamma", "5", "--ip_noise_gamma", "0.1", "--noise_offset", "0.05", "--v_parameterization"]
    flags += ["--loss_type", "smooth_l1", "--huber_schedule", "exponential", "--huber_c", "0.2", "--masked_loss"]
    flags += ["--conditioning_data_dir", "masks", "--timestep_sampling", "flux_shift"]
    module, seen = script("train_dreambooth"), []
    module.train = seen.append  # type: ignore[attr-defined]
    module.main(flags)
    ((objective, subject),) = [(options.objective, options.subject) for options in seen]
    assert (objective.snr_gamma, objective.input_perturbation, objective.noise_offset) == (5.0, 0.1, 0.05)
    assert (objective.prediction_type, objective.flow_shift) == ("v_prediction", "resolution")
    assert (objective.loss_type, objective.huber_schedule, objective.huber_c) == ("smooth_l1", "exponential", 0.2)
    assert subject.mask_data_dir == "masks"
    with pytest.raises(SystemExit):
        module.main([*flags, "--zero_terminal_snr"])
    assert "rescale_betas_zero_snr" in capsys.readouterr().err


# The text encoder


def test_a_text_encoder_without_a_gradient_is_an_error(
    train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Prompts.__init__
    monkeypatch.setattr(
        Prompts, "__init__", lambda self, family, texts, trained, kept: plain(self, family, texts, False)
    )
    with pytest.raises(SystemExit):
        train("--train-text-encoder")
    assert "error: text_encoder: no gradient reaches" in capsys.readouterr().err


@pytest.mark.slow
def test_the_text_encoder_learns_at_its_own_rate(train: Any) -> None:
    folder = train("--train-text-encoder", "--text-encoder-lr", "1e-12")
    largest = {name: t.abs().max().item() for name, t in load_file(folder / "adapter.safetensors").items()}
    lambdas = {name.partition("/")[0]: value for name, value in largest.items() if "/lambda" in name}
    assert lambdas["unet"] > 1e-4 and 0 < lambdas["text_encoder"] < 1e-10


# Resuming


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without the speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith(("second", "gb"))} for line in lines]


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--steps", "3", "--eval-every", "2", "--dropout", "0.1", "--checkpointing-steps", "2", *PRIOR]
    flags += ["--validation-prompt", PROMPT, "--num-validation-images", "1", "--no-cache-latents"]
    straight = train(*flags, "--output-dir", str(tmp_path / "straight"))
    evaluate = dreambooth_task.fixed_losses

    def killed(*arguments: Any) -> dict[str, float]:
        if (tmp_path / "killed/checkpoints/step-000002").exists():
            raise Killed
        return evaluate(*arguments)

    folder = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(dreambooth_task, "fixed_losses", killed)
        train(*flags, "--output-dir", str(folder))
    train(*flags, "--output-dir", str(folder), "--resume_from_checkpoint", "latest")
    assert f"resumed from {folder}/checkpoints/step-000002" in capsys.readouterr().out
    assert numbers(folder) == numbers(straight)
    for name in ("adapter.safetensors", "samples.png", "samples/step-000002/0-0.png", "samples/step-000003/0-0.png"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "texts"),
    [("randlora", ["--train-text-encoder"]), ("lora", []), ("full", ["--train-text-encoder"])],
)
def test_a_run_starts_from_an_adapter(
    method: str, texts: list[str], train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--method", method, *texts, "--steps", "1"]
    first = train(*argv, "--output-dir", str(tmp_path / "first")) / "adapter.safetensors"
    rates = ["--lr", "1e-30", *([*texts, "--text-encoder-lr", "1e-30"] if texts else [])]
    start = ["--method", method, *rates, "--init-adapter", str(first)]
    folder = train(*start, "--weight-decay", "0", "--steps", "1")
    one, other = load_file(first), load_file(folder / "adapter.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-20)
    assert one.keys() == other.keys()
    (line,) = (line for line in numbers(folder) if line["split"] == "train")
    assert ("lr_text_encoder" in line) == bool(texts)
    if method != "full":
        with pytest.raises(SystemExit):
            train(*start, "--rank", "2", "--overwrite")
        assert "error: --init-adapter: " in capsys.readouterr().err


# Wrong input

BAD: dict[str, tuple[list[str], str]] = {
    "missing checkpoint": (["--resume_from_checkpoint", "{tmp}/run/checkpoints/step-000100"], "there is no checkpoint"),
    "unknown flag": (["--instance-promt", "x"], "Perhaps you meant --instance-prompt"),
    "no images": (["--instance-data-dir", "{tmp}/empty"], "contains no images"),
    "no folder": (["--instance-data-dir", "{tmp}/nowhere"], "does not exist or is not a folder"),
    "no caption": (["--instance-prompt", ""], "0.png has no caption: give --instance-prompt"),
    "metadata": (["--instance-data-dir", "{tmp}/meta"], 'metadata.jsonl, line 2: expected {"file_name"'),
    "broken image": (["--instance-data-dir", "{tmp}/broken"], "cannot read the image"),
    "no pipeline": (["--pretrained-model-name-or-path", "{tmp}/empty"], "model_index.json"),
    "a file": (
        ["--pretrained-model-name-or-path", "{tmp}/x.safetensors"],
        "written by save_pretrained: convert it once",
    ),
    "another pipeline": (
        ["--pretrained-model-name-or-path", "{tmp}/ddpm"],
        "is a DDPMPipeline, which cannot be trained",
    ),
    "size": (["--resolution", "15"], "--resolution 15: the sides must be multiples of 2"),
    "class prompt": (["--with-prior-preservation"], "--with-prior-preservation needs --class-prompt"),
    "class images": (["--class-data-dir", "x"], "--class-data-dir needs --with-prior-preservation"),
    "two sources": (["--dataset-name", "x"], "--instance-data-dir and --dataset-name both choose"),
    "text encoder lr": (["--text-encoder-lr", "1"], "--text-encoder-lr needs --train-text-encoder"),
    "gamma": (["--snr-gamma", "0"], "--snr-gamma must be above 0"),
    "two optimisers": (["--use_8bit_adam", "--optimizer", "lion"], "--use-8bit-adam and --optimizer"),
    "hub": (["--hub-model-id", "a/b"], "--hub-model-id needs --push-to-hub"),
    "a target": (["--target-modules", "no_such_layer"], "no_such_layer"),
    "diverged": (["--lr", "1e30", "--max-grad-norm", "0", "--steps", "9"], "training stopped after step"),
    "a run is there already": (["--output-dir", "{tmp}/old"], "already holds a run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, train: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = (images / "0.png").read_bytes()
    for name in ("empty", "meta", "other", "broken", "ddpm", "old"):
        (tmp_path / name).mkdir()
    for name in ("meta", "other"):
        (tmp_path / name / "a.png").write_bytes(picture)
    (tmp_path / "meta/metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n{"file_name": "a.png"}\n')
    (tmp_path / "other/metadata.jsonl").write_text('{"file_name": "b.png", "text": "a"}\n')
    (tmp_path / "broken/a.png").write_bytes(b"no image")
    (tmp_path / "ddpm/model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    (tmp_path / "old/metrics.jsonl").touch()
    (tmp_path / "x.safetensors").touch()
    argv, expected = BAD[case]
    with pytest.raises(SystemExit) as stopped:
        train(*[word.format(tmp=tmp_path) for word in argv])
    assert stopped.value.code == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("error: ") and expected in last


def test_a_diverged_run_keeps_the_last_good_adapter(train: Any, models: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train("--lr", "1e30", "--max-grad-norm", "0", "--steps", "9", "--eval-every", "1")
    pipe = fresh(models / "sd15")
    load_adapter(pipe, tmp_path / "run" / "adapter.safetensors")
    assert sample(pipe).isfinite().all()


# The embedded default


def test_the_embedded_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the default end to end, but for its length."""
    monkeypatch.setattr("randlora_vision.demos.subject._SAMPLES", 5)
    monkeypatch.setattr("randlora_vision.demos.subject._EVERY", 35)
    monkeypatch.setattr(dreambooth_task, "_MEASURED", 2)
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    argv = ["--output-dir", str(tmp_path / "run"), "--steps", "2", "--num-class-images", "2", "--report-to", "none"]
    script("train_dreambooth").main([*argv, "--num-inference-steps", "2"])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(summary["after"]) == MEASURED | SHARES | {"balance", "subject_pictures", "emoji_pictures"}
    assert set(summary["confidence"]["after"]) == SHARES
    assert summary["reload_difference"] == 0
    record = json.loads((tmp_path / "run/split.json").read_text())
    assert list(record["class_images"].values()) == ["a red heart", "a blue heart"]
    printed = capsys.readouterr().out
    assert "robots for the prompts of the subject" in printed
    assert re.search(r"\nprior: .* differ by 0\.\d+ .*; the right emoji for their names \d+% -> \d+%", printed)
    assert (tmp_path / "run/samples.png").exists()
    scope: dict[str, Any] = {}
    exec(printed_code(printed), scope)  # a pipeline without T5 is loaded so
    assert scope["picture"].size == (32, 32)
