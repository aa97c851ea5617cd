"""The flags of diffusers, open_clip and timm: every documented command, every flag, and what the aliases mean."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from randlora_vision.train_scripts import train_classifier, train_clip, train_dreambooth
from randlora_vision.training.classifier.options import ClassifierOptions
from randlora_vision.training.clip.options import ClipOptions
from randlora_vision.training.dreambooth.options import DreamBoothOptions
from randlora_vision.training.harness.flags import HUGGING_FACE, Refused, aliases_of, translate
from randlora_vision.training.harness.help import help_text
from randlora_vision.training.harness.options import parse

HERE = Path(__file__).parent
SCRIPTS: dict[str, tuple[Any, ...]] = {
    "train_dreambooth": (DreamBoothOptions, train_dreambooth.DIFFUSERS, train_dreambooth),
    "train_clip": (ClipOptions, train_clip.OPEN_CLIP, train_clip),
    "train_classifier": (ClassifierOptions, train_classifier.TIMM, train_classifier),
}


NOT_HERE = (  # what the documented commands that are refused have in common
    *("--text_encoder_use_attention_mask", "--train_text_encoder_ti", "piecewise_constant", "--do_fp8_training"),
    *("--coca", "--audio", "--lock-text-unlocked", "--remote-sync", "--distill-model", "--train-data-upsampling"),
    *("--clip-mode agc", "--prior_generation_precision", "--cache_dir"),
)


def sections(name: str) -> list[tuple[str, str]]:
    """Return the lines of a file with the script that each belongs to."""
    script, found = "", []
    for line in (HERE / name).read_text().splitlines():
        if line.startswith("["):
            script = line.strip("[]")
        else:
            found.append((script, line))
    return found


def parsed(script: str, *argv: str) -> Any:
    options, table, _ = SCRIPTS[script]
    return parse(options, argv, "A test.", table)


@pytest.fixture(autouse=True)
def every_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "randlora_vision.training.harness.trackers.get_available_trackers", lambda: ["tensorboard", "wandb"]
    )


@pytest.mark.parametrize(("script", "command"), sections("peer_commands.txt"))
def test_a_documented_command_is_accepted_or_refused_for_a_flag(script: str, command: str) -> None:
    try:
        parsed(script, *shlex.split(command))
    except ValueError as refusal:
        assert any(word in command for word in NOT_HERE), refusal
        reason = str(refusal)
        assert re.match("(Error parsing )?--?[a-z]", reason) and "\n" not in reason
        assert " ".join(reason.split()) == reason
    else:
        assert not any(word in command for word in NOT_HERE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_the_peer_is_known(script: str) -> None:
    options, table, _ = SCRIPTS[script]
    everything = help_text(options, "A test.", {}, {}, everything=True)
    own = {word.strip(",") for word in everything.split() if word.startswith("--")} | {"--config", "--no-cache-latents"}
    flags = [
        flag.replace("_", "-") for name, line in sections("peer_flags.txt") for flag in line.split() if name == script
    ]
    assert len(flags) > 60
    assert [flag for flag in flags if flag not in own | {*table, *HUGGING_FACE}] == []


KOHYA = {  # what kohya's scripts call the settings of losses, noise and captions, and what they are here
    "--min_snr_gamma=5": ("snr_gamma", 5.0),
    "--noise_offset=0.1": ("noise_offset", 0.1),
    "--ip_noise_gamma=0.1": ("input_perturbation", 0.1),
    "--debiased_estimation_loss": ("debiased_estimation_loss", True),
    "--v_parameterization": ("prediction_type", "v_prediction"),
    "--loss_type=smooth_l1": ("loss_type", "smooth_l1"),
    "--huber_schedule=snr": ("huber_schedule", "snr"),
    "--huber_c=0.2": ("huber_c", 0.2),
    "--huber_scale=2": ("huber_scale", 2.0),
    "--weighting_scheme=mode": ("weighting_scheme", "mode"),
    "--logit_mean=0.5": ("logit_mean", 0.5),
    "--logit_std=2": ("logit_std", 2.0),
    "--mode_scale=1.5": ("mode_scale", 1.5),
    "--timestep_sampling=sigmoid": ("weighting_scheme", "logit_normal"),
    "--sigmoid_scale=0.5": ("logit_std", 0.5),
    "--discrete_flow_shift=3": ("discrete_flow_shift", "3"),
    "--training_shift=3": ("discrete_flow_shift", "3"),
    "--caption_dropout_rate=0.1": ("caption_dropout_rate", 0.1),
    "--shuffle_caption": ("shuffle_caption", True),
    "--zero_terminal_snr": "rescale_betas_zero_snr",
    "--scale_v_pred_loss_like_noise_pred": "--snr-gamma",
    "--multires_noise_iterations=6": "--noise-offset",
    "--adaptive_noise_scale=0.01": "--noise-offset",
    "--min_timestep=100": "--weighting-scheme",
    "--model_prediction_type=sigma_scaled": "raw",
    "--caption_dropout_every_n_epochs=2": "--caption-dropout-rate",
    "--caption_tag_dropout_rate=0.1": "not dropped",
}


@pytest.mark.parametrize("flag", KOHYA)
def test_the_names_of_kohya_for_losses_and_noise(flag: str) -> None:
    expected = KOHYA[flag]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            parsed("train_dreambooth", flag)
        return
    options = parsed("train_dreambooth", flag)
    name, value = expected
    assert getattr(options.objective if hasattr(options.objective, name) else options.subject, name) == value


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_table_names_only_options_of_its_script(script: str) -> None:
    options, table, _ = SCRIPTS[script]
    everything = help_text(options, "A test.", {}, {}, everything=True)
    assert [target for target in aliases_of({**HUGGING_FACE, **table}) if f"  {target}" not in everything] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_is_short_and_shows_the_aliases(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options, table, module = SCRIPTS[script]
    table = {**HUGGING_FACE, **table}
    short, full = (
        help_text(options, module.__doc__, table, module.DEFAULTS.help(), everything=everything)
        for everything in (False, True)
    )
    assert short.count("\n") < 150
    for text in (short, full):
        assert max(map(len, text.splitlines())) < 80
        assert not any(mark in text for mark in ("None", " options:", "Default:", "(default: )"))
    assert "--batch-size, --train-batch-size" in short and "--schedule, --lr-scheduler" in full
    words = full.replace(",", " ").replace("(", " ").split()
    for aliases in aliases_of(table).values():
        assert all(alias.flag in words for alias in aliases if alias.flag)
    for name in options.__dataclass_fields__:
        assert f"\n{name} options" not in full


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("train_dreambooth", "--max_train_steps=5 --learning-rate 1e-3", {"training.steps": 5, "training.lr": 1e-3}),
        (
            "train_dreambooth",
            "--num_train_epochs 3 --lr_warmup_steps=2",
            {"training.epochs": 3, "training.warmup_steps": 2},
        ),
        ("train_dreambooth", "--validation_epochs=50", {"training.eval_epochs": 50}),
        ("train_dreambooth", "--lr_scheduler constant_with_warmup", {"training.schedule": "constant"}),
        (
            "train_dreambooth",
            "--optimizer AdamW --adam_beta2 0.9",
            {"training.optimizer": "adamw", "training.beta2": 0.9},
        ),
        ("train_dreambooth", "--repeats=1 --logging_dir logs --local_rank 0 --offload", {}),
        ("train_dreambooth", "--optimizer adamW --use_aspect_ratio_buckets", {"training.optimizer": "adamw"}),
        ("train_dreambooth", "--optimizer lion", {"training.optimizer": "lion"}),
        (
            "train_dreambooth",
            "--final_validation_prompt=a --use_aspect_ratio_buckets --caption_dropout 0.1 --instance_data_dir d",
            {
                "validation.validation_prompt": ("a",),
                "subject.aspect_ratio_buckets": "auto",
                "subject.caption_dropout_rate": 0.1,
            },
        ),
        (
            "train_dreambooth",
            "--final_validation_prompt=a --validation_prompt b",
            {"validation.validation_prompt": ("b",)},
        ),
        ("train_clip", "--zeroshot-frequency 0 --save-frequency 0", {"training.eval_epochs": None}),
        ("train_dreambooth", "--optimizer=Prodigy --prodigy_decouple True", {"training.optimizer": "prodigy"}),
        (
            "train_dreambooth",
            "--lora_layers=attn.to_k,attn.to_q",
            {"adapter.target_modules": ("attn.to_k", "attn.to_q")},
        ),
        (
            "train_dreambooth",
            "--lr_scheduler=polynomial --lr_power 2",
            {"training.schedule": "polynomial", "training.lr_power": 2},
        ),
        (
            "train_clip",
            "--train-data x --csv-img-key a --csv-caption-key b",
            {"images.data": "x", "images.image_column": "a"},
        ),
        ("train_clip", "--precision amp_bf16 --siglip", {"training.mixed_precision": "bf16", "loss.loss": "siglip"}),
        ("train_clip", "--siglip --epochs 2", {"training.epochs": 2, "loss.loss": "siglip"}),
        ("train_clip", "--lock-image", {"clip.towers": "text"}),
        ("train_clip", "--val-num-samples 500 --lock-image", {"clip.towers": "text"}),
        ("train_dreambooth", "--enable_xformers_memory_efficient_attention --seed 3", {"training.seed": 3}),
        ("train_clip", "--lock_text --wd=0.5", {"clip.towers": "vision", "training.weight_decay": 0.5}),
        (
            "train_clip",
            "--imagenet-val d",
            {"images.data": "d", "images.class_names": "imagenet", "evaluation.eval_only": True},
        ),
        (
            "train_clip",
            "--imagenet-val d --train-data x",
            {"images.data": "x", "evaluation.retention_data": "d", "evaluation.retention_class_names": "imagenet"},
        ),
        ("train_clip", "--logs a --name b --resume latest", {"run.runs_dir": "a", "run.run_name": "b"}),
        ("train_clip", "--report-to wandb,tensorboard", {"run.report_to": ("wandb", "tensorboard")}),
        ("train_dreambooth", "--report_to wandb tensorboard", {"run.report_to": ("wandb", "tensorboard")}),
        (
            "train_clip",
            "--model m --aug-cfg scale=(0.4,1.0) use_timm=True",
            {"clip.augmentation": {"scale": (0.4, 1.0), "use_timm": True}},
        ),
        (
            "train_classifier",
            "folder -b 4 -j 0",
            {"data.data": "folder", "training.batch_size": 4, "training.workers": 0},
        ),
        ("train_classifier", "-b 4 --model m --amp folder", {"data.data": "folder", "model.model": "m"}),
        (
            "train_classifier",
            "--dataset torch/cifar10 root",
            {"data.data": "timm:torch/cifar10", "data.data_root": "root"},
        ),
        ("train_classifier", "--amp-dtype bfloat16 --amp", {"training.mixed_precision": "bf16"}),
        ("train_classifier", "--amp", {"training.mixed_precision": "fp16"}),
        (
            "train_classifier",
            "--opt-betas 0.8 0.9 --opt_eps 1e-6",
            {"training.beta1": 0.8, "training.beta2": 0.9, "training.eps": 1e-6},
        ),
        ("train_classifier", "--model-ema-decay 0.9 --model-ema", {"training.ema_decay": 0.9}),
        ("train_classifier", "--smoothing 0.2 --bce-loss", {"augment.label_smoothing": 0.2, "augment.bce_loss": True}),
        ("train_clip", "--val-data v --model RN50", {"images.data": "v", "evaluation.eval_only": True}),
        ("train_clip", "--val-data v --train-data d", {"images.data": "d", "images.val_data": "v"}),
        (
            "train_clip",
            "--lr-scheduler const-cooldown --epochs-cooldown 2 --lr-cooldown-end 1e-6 --lr 1",
            {"training.schedule": "wsd", "training.decay_epochs": (2,), "training.min_lr": 1e-6},
        ),
        (
            "train_clip",
            "--model m --square-resize-only --interpolation bilinear --image-mean 0.1 0.2 0.3",
            {
                "clip.changes": {
                    "image_mean": (0.1, 0.2, 0.3),
                    "image_interpolation": "bilinear",
                    "image_resize_mode": "squash",
                }
            },
        ),
        (
            "train_classifier",
            "folder --sched multistep --decay-milestones 30 60 90",
            {"training.schedule": "multistep", "training.decay_epochs": (30, 60, 90)},
        ),
        ("train_classifier", "--sched poly --decay-rate 0.5", {"training.lr_power": 0.5, "training.decay_rate": 0.1}),
        ("train_classifier", "--sched poly", {"training.schedule": "polynomial", "training.lr_power": 0.1}),
        ("train_classifier", "--wandb-project a", {"run.tracker_project": "a"}),
        (
            "train_classifier",
            "--model m --model-kwargs patch_size=12 act_layer=silu",
            {"model.arguments": {"patch_size": 12, "act_layer": "silu"}},
        ),
        (
            "train_classifier",
            "--model-ema-decay 0.9 --amp-dtype bfloat16 --kd-temperature 2 --decay-epochs 30 --sched cosine",
            {"training.ema_decay": 0, "training.mixed_precision": "no", "training.decay_epochs": ()},
        ),
        (
            "train_classifier",
            "--lr-base 0.1 --lr-base-size 128 --lr-base-scale sqrt",
            {"training.lr": 0.1, "training.lr_images": 128, "training.lr_scaling": "sqrt"},
        ),
        ("train_classifier", "--lr-base 0.1", {"training.lr_images": 256, "training.lr_scaling": None}),
        ("train_classifier", "--lr-base 0.1 --lr 1", {"training.lr": 1, "training.lr_images": None}),
        ("train_dreambooth", "--scale_lr --lr 1", {"training.lr_images": 1, "training.lr_scaling": "linear"}),
        (
            "train_classifier",
            "--epochs 10 --sched cosine --lr-cycle-mul 2. --lr-cycle-limit 3",
            {
                "training.schedule": "cosine_with_restarts",
                "training.epochs": 70,
                "training.lr_num_cycles": 3,
                "training.lr_cycle_mul": 2,
                "training.lr_cycle_decay": 0.5,
            },
        ),
        ("train_classifier", "--lr-cycle-limit 1 --lr-cycle-decay 0.2", {"training.schedule": "cosine"}),
        (
            "train_classifier",
            "--opt sgd --opt-kwargs nesterov=True dampening=0.1",
            {"training.optimizer_arguments": {"nesterov": True, "dampening": 0.1}},
        ),
        (
            "train_classifier",
            "--aug-splits 3 --jsd --split-bn --resplit --aug-repeats 3.0",
            {"augment.aug_splits": 3, "augment.jsd_loss": True, "augment.resplit": True, "augment.aug_repeats": 3},
        ),
        ("train_clip", "--train-num-samples 4e8", {"training.epoch_images": 400_000_000}),
        ("train_clip", "--coca-caption-loss-weight 0 --coca-contrastive-loss-weight 1.0 --lr 1", {"training.lr": 1}),
        ("train_classifier", "--sched none", {"training.schedule": "constant", "training.warmup_steps": 0}),
    ],
)
def test_a_peers_flags_mean_the_same_here(script: str, words: str, expected: dict[str, Any]) -> None:
    options = parsed(script, *words.split())
    for path, value in expected.items():
        group, _, name = path.partition(".")
        assert getattr(getattr(options, group), name) == value, path


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("train_dreambooth", "--scale_lr", "--lr-images .--scale-lr, --lr-base-size. needs a number for --lr"),
        ("train_clip", "--val-data a --imagenet-val b", "--val-data: without --train-data, one thing is evaluated"),
        (
            "train_dreambooth",
            "--prodigy_decouple False",
            "--prodigy-decouple False: the settings are diffusers",
        ),
        ("train_dreambooth", "--lr_scheduler cosin", "--lr-scheduler must be one of cosine, .*got cosin"),
        ("train_dreambooth", "--max-train-steps 5 --num-train-epochs 3", "--steps and --epochs set the same thing"),
        ("train_dreambooth", "--max-train-steps", "--steps"),
        ("train_dreambooth", "--max-train-steps=4.5", "--steps must be INT, got 4.5"),
        ("train_clip", "--train-num-samples inf", "--epoch-images must be INT, got inf"),
        ("train_clip", "--coca-caption-loss-weight 2", "its text decoder is not trained here"),
        ("train_classifier", "--sched tanh --lr-cycle-limit 2", "--lr-cycle-limit: --sched tanh has no cycles here"),
        ("train_classifier", "--epochs 5 --lr-cycle-limit x", "--lr-cycle-limit must be a number, got x"),
        ("train_classifier", "--aug-repeats 2 --streaming --data a", "--streaming"),
        ("train_classifier", "--jsd-loss", "--jsd-loss needs --aug-splits"),
        ("train_dreambooth", "--lerning-rate 3", "Perhaps you meant .*--learning-rate"),
        ("train_clip", "--lock-image --lock-text", "both towers are locked"),
        ("train_clip", "--warmup 3 --warmup-fraction 0.1", "--warmup-fraction and --warmup-steps set the same"),
        ("train_clip", "folder", "Unrecognized options: folder"),
        ("train_clip", "--model m --aug-cfg scal=3", "expected NAME=VALUE with a name from scale"),
        ("train_clip", "--model m --cache-dir x", "set the environment variable HF_HOME"),
        ("train_classifier", "--sched step", "--schedule step needs --decay-steps or --decay-epochs"),
        ("train_classifier", "--sched rsqrt", "--sched rsqrt: see --schedule"),
        ("train_classifier", "--model m --model-kwargs pretrained=1", "expected NAME=VALUE with a name other than"),
        ("train_classifier", "--momentum 0.5", "--momentum 0.5: give --opt-kwargs momentum=NUMBER"),
        ("train_classifier", "--min-lr 1 --lr 0.1", "--min-lr must be at most --lr 0.1, got 1.0"),
    ],
)
def test_what_has_no_meaning_here_is_refused_in_one_line(script: str, words: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as refusal:
        parsed(script, *words.split())
    assert "\n" not in str(refusal.value)


def test_a_flag_replaces_its_rivals_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("training: {steps: 5, warmup_steps: 2, eval_every: 3, lr: 0.5}\n")
    words = ["--config", str(tmp_path / "old.yaml"), "--epochs", "2", "--warmup-fraction", "0.2"]
    training = parsed("train_classifier", *words).training
    assert (training.steps, training.epochs) == (None, 2)
    assert (training.warmup_steps, training.warmup_fraction) == (None, 0.2)
    assert (training.eval_every, training.lr) == (3, 0.5)


def test_the_settings_that_a_run_of_timm_keeps_are_a_config_file() -> None:
    """All of them, most with their defaults, as timm writes them."""
    words = ["-c", str(HERE / "timm_args.yaml"), "--epochs", "7"]
    options = parsed("train_classifier", *words)
    training, augment = options.training, options.augment
    assert (options.model.model, options.data.data, options.model.pretrained) == ("vit_tiny_patch16_224", "/data", True)
    assert (training.optimizer, training.lr, training.lr_images, training.epochs) == ("lamb", 0.1, 256, 7)
    assert (training.batch_size, training.warmup_epochs, training.seed, training.ema_decay) == (128, 5, 42, 0)
    assert (training.mixed_precision, training.schedule, training.log_every) == ("no", "cosine", 50)
    assert (augment.train_interpolation, augment.erasing_mode, augment.label_smoothing) == ("random", "pixel", 0.1)
    assert training.optimizer_arguments == {"trust_clip": True}


def test_a_file_may_have_peers_names_but_not_in_place_of_an_option_of_another_group(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("training: {learning_rate: 0.5, train_batch_size: 3}\n")
    training = parsed("train_dreambooth", "--config", str(tmp_path / "a.yaml")).training
    assert (training.lr, training.batch_size) == (0.5, 3)
    (tmp_path / "a.yaml").write_text("run: {optimizer: sgd, report_to: [wandb, tensorboard]}\n")
    with pytest.raises(ValueError, match="optimizer belongs under training:"):
        parsed("train_dreambooth", "--config", str(tmp_path / "a.yaml"))


def test_negative_numbers_and_prompts_are_values() -> None:
    table = {"--mean": "--logit-mean {}", "--no": Refused("no")}
    assert translate(["--mean", "-0.5"], DreamBoothOptions, table) == ["--logit-mean=-0.5"]
    words = ["--validation_prompt", "a b", "c", "--seed", "3"]
    assert translate(words, DreamBoothOptions, table) == ["--validation-prompt", "a b", "c", "--seed", "3"]
