"""The flags of timm's train.py, and what they mean for train_classifier.py."""

from collections.abc import Callable

from randlora_vision.training.harness.flags import Given, Refused, Table, With, only


def _folder(given: Given) -> str:
    return "--data-root {}" if "--dataset" in given else "--data {}"


def _decay_rate(given: Given) -> str:
    return "--lr-power {}" if list(given.get("--sched", ())) == ["poly"] else "--decay-rate {}"


def _sched(given: Given) -> str:
    return next(iter(given.get("--sched", ())), "cosine")


def _decays(*schedules: str) -> Callable[[Given], str]:
    """Return the meaning of the times at which some schedules fall, which others do not use."""
    return lambda given: "--decay-epochs {}" if _sched(given) in schedules or "--sched" not in given else ""


def _number(given: Given, flag: str) -> float:
    """Return the value of a flag, by default 1."""
    text = next(iter(given.get(flag, ())), "1")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{flag} must be a number, got {text}") from None


def _cycles(given: Given) -> int:
    return int(_number(given, "--lr-cycle-limit"))


def _cycle_limit(given: Given) -> str:
    if given and _cycles(given) == 1:
        return ""
    if _sched(given) != "cosine":
        return Refused(f"--sched {_sched(given)} has no cycles here: leave it out, or give --sched cosine")
    decay = "" if "--lr-cycle-decay" in given else " --lr-cycle-decay 0.5"
    return f"--schedule cosine_with_restarts --lr-num-cycles {{}}{decay}"


def _cycle(flag: str) -> Callable[[Given], str]:
    return lambda given: f"{flag} {{}}" if not given or _cycles(given) > 1 else ""


def _epochs(given: Given) -> str:
    """Return the epochs of all cycles, of which timm's --epochs are the first."""
    if _cycles(given) == 1:
        return "--epochs {}"
    mul = _number(given, "--lr-cycle-mul")
    return f"--epochs {_number(given, '--epochs') * sum(mul**cycle for cycle in range(_cycles(given))):g}"


def _lr_base(given: Given) -> str:
    size = next(iter(given.get("--lr-base-size", ())), "256")
    scaling = f" --lr-scaling {given['--lr-base-scale'][0]}" if "--lr-base-scale" in given else ""
    return "" if "--lr" in given else f"--lr {{}} --lr-images {size}{scaling}"


_FROZEN = Refused("batch normalisation keeps the base model's statistics: leave it out")
_NO_DISTILLATION = Refused("there is no distillation here: leave it out")
_ONE_SIZE = Refused("every image has the size of --img-size: leave it out")
_LAUNCHER = Refused("devices and processes are chosen by accelerate launch: see accelerate launch --help")

TIMM: Table = {
    "": _folder,
    "--data-dir": _folder,
    "--dataset": "--data timm:{}",
    "--dataset-download": "--download",
    "--input-key": "--image-column {}",
    "--target-key": "--label-column {}",
    "--input-img-mode": only("RGB", otherwise="images are read in RGB: leave it out"),
    "--train-num-samples": "--epoch-images {}",
    "--train-split": only("train", otherwise="name the training data with --data, for example --data hf:NAME@SPLIT"),
    "--val-split": only(
        "validation", otherwise="name the validation data with --val-data, for example --val-data hf:NAME@SPLIT"
    ),
    "--val-num-samples": Refused("the validation images are counted: leave it out"),
    "--class-map": Refused("the classes are the names of the folders or those in --label-column: leave it out"),
    "--dataset-trust-remote-code": Refused("code of a dataset is never run: use a dataset without code"),
    "-c": "--config {}",
    "--pretrained-path": "--initial-checkpoint {}",
    "--no-resume-opt": Refused("resuming restores the optimiser: leave --resume out to start anew"),
    **dict.fromkeys(
        ("--gp", "--head-init-scale", "--head-init-bias", "--fast-norm"),
        Refused("the model is built with timm's settings: choose another --model"),
    ),
    "--in-chans": Refused("images are grey or in colour as the model's own configuration says: leave it out"),
    "--input-size": Refused("give --img-size"),
    "--train-crop-mode": Refused("training crops are timm's default (rrc): see --scale and --ratio"),
    "-b": "--batch-size {}",
    "-vb": Refused("evaluation uses --batch-size: leave it out"),
    "--validation-batch-size": Refused("evaluation uses --batch-size: leave it out"),
    "--grad-accum-steps": "--gradient-accumulation-steps {}",
    "--grad-checkpointing": "--gradient-checkpointing",
    "--torchcompile": {"": "--torch-compile", "inductor": "--torch-compile", "*": Refused("give --torch-compile")},
    "--torchcompile-mode": Refused("--torch-compile uses PyTorch's default mode: leave it out"),
    "--torchscript": Refused("give --torch-compile"),
    "--fuser": Refused("give --torch-compile"),
    "--amp": "--mixed-precision fp16",
    "--amp-dtype": With("--amp", {"float16": "--mixed-precision fp16", "bfloat16": "--mixed-precision bf16"}),
    "--model-dtype": Refused("trained parameters stay in float32: give --mixed-precision bf16"),
    "--device": {"cuda": "", "*": _LAUNCHER},
    "--local-rank": {"*": ""},
    **dict.fromkeys(("--device-modules", "--no-ddp-bb", "--synchronize-step"), _LAUNCHER),
    "--opt": "--optimizer {}",
    "--opt-eps": "--eps {}",
    "--opt-betas": "--beta1 {} --beta2 {}",
    "--opt-kwargs": "--optimizer-kwargs {}",
    "--momentum": only("0.9", otherwise="give --opt-kwargs momentum=NUMBER"),
    "--clip-grad": "--max-grad-norm {}",
    "--clip-mode": only("norm", otherwise="gradients are clipped by their norm: leave it out"),
    "--layer-decay-min-scale": only("0", "0.0", otherwise="give a --layer-decay closer to 1"),
    "--layer-decay-no-opt-scale": Refused("all layers are trained: leave it out"),
    "--sched": {
        "cosine": "--schedule cosine",
        **{name: f"--schedule {name}" for name in ("tanh", "step", "multistep", "plateau", "constant", "wsd")},
        "poly": "--schedule polynomial --lr-power 0.1",
        "none": "--schedule constant --warmup-steps 0",
        "*": Refused("see --schedule for those that there are"),
    },
    "--decay-milestones": _decays("multistep"),
    "--decay-epochs": _decays("step", "wsd"),
    "--decay-rate": _decay_rate,
    "--dr": _decay_rate,
    "--patience-epochs": "--plateau-patience {}",
    "--cooldown-epochs": only("0", otherwise="the schedule ends with the training: give fewer --epochs"),
    "--warmup-prefix": Refused("the warmup is a part of --epochs: leave it out, and give more of them"),
    "--lr-noise-pct": only("0.67", otherwise="the noise of --lr-noise is below 0.67: leave it out"),
    "--lr-noise-std": only("1", "1.0", otherwise="the noise of --lr-noise has the deviation 1: leave it out"),
    "--epochs": _epochs,
    "--lr-cycle-limit": _cycle_limit,
    "--lr-cycle-mul": _cycle("--lr-cycle-mul"),
    "--lr-cycle-decay": _cycle("--lr-cycle-decay"),
    "--lr-k-decay": only("1", "1.0", otherwise="give --schedule polynomial with --lr-power"),
    "--sched-on-updates": "",
    "--lr-base": _lr_base,
    **dict.fromkeys(("--lr-base-size", "--lr-base-scale"), {"*": ""}),  # read with --lr-base, and unused beside --lr
    "--epoch-repeats": only("0", "0.0", otherwise="give more --epochs"),
    "--start-epoch": Refused("--resume goes on where the checkpoint was written: leave it out"),
    "--train-batches-per-epoch": Refused("give --epoch-images, or --steps for the whole training"),
    "--train-steps-per-epoch": Refused("give --epoch-images, or --steps for the whole training"),
    "--aa": "--auto-augment {}",
    "--reprob": "--random-erasing {}",
    "--remode": "--erasing-mode {}",
    "--recount": "--erasing-count {}",
    **dict.fromkeys(
        ("--color-jitter-prob", "--grayscale-prob", "--gaussian-blur-prob"),
        Refused("colours are changed by --color-jitter or --auto-augment"),
    ),
    "--jsd": "--jsd-loss",
    "--split-bn": "",  # batch normalisation keeps the base model's statistics
    **dict.fromkeys(("--bce-sum", "--bce-pos-weight"), Refused("give --bce-loss alone")),
    "--cutmix-minmax": Refused("give --cutmix"),
    "--mixup-prob": only("1", "1.0", otherwise="every batch is mixed: leave it out"),
    "--mixup-switch-prob": only("0.5", otherwise="each batch uses Mixup or CutMix with equal chances: leave it out"),
    "--mixup-mode": only("batch", otherwise="a batch is mixed as a whole: leave it out"),
    "--mixup-off-epoch": only("0", otherwise="Mixup stays on to the end: leave it out"),
    "--smoothing": "--label-smoothing {}",
    "--drop-connect": "--drop-path {}",
    "--drop-block": Refused("give --drop-path or --drop"),
    **dict.fromkeys(("--bn-momentum", "--bn-eps", "--sync-bn"), _FROZEN),
    "--dist-bn": {"*": ""},
    "--model-ema": "--ema-decay 0.9998",
    "--model-ema-decay": With("--model-ema", "--ema-decay {}"),
    "--model-ema-warmup": "",
    "--model-ema-force-cpu": Refused("the average is small and stays on the device: leave it out"),
    "--worker-seeding": {"*": ""},
    "--log-interval": "--log-every {}",
    "--val-interval": "--eval-epochs {}",
    "--recovery-interval": "--checkpoint-every {}",
    "--checkpoint-hist": "--checkpoints-total-limit {}",
    "-j": "--workers {}",
    "--pin-mem": "",
    "--no-prefetcher": "",
    "--use-multi-epochs-loader": "",
    "--save-images": Refused("predictions.png in the run folder shows images: leave it out"),
    "--output": "--runs-dir {}",
    "--experiment": "--run-name {}",
    "--eval-metric": "--best-metric {}",
    "--tta": only("0", otherwise="images are evaluated once: leave it out"),
    "--log-wandb": "--report-to wandb",
    "--wandb-project": "--tracker-project {}",
    "--wandb-tags": Refused("set the environment variable WANDB_TAGS"),
    "--wandb-resume-id": Refused("set the environment variable WANDB_RUN_ID"),
    **dict.fromkeys(
        (
            *("--train-batch-sizes", "--train-size-probs", "--train-size-schedule", "--train-size-schedule-spread"),
            *("--train-size-random-mix", "--variable-batch-loss-scale"),
        ),
        With("--train-img-sizes", _ONE_SIZE),
    ),
    "--train-img-sizes": _ONE_SIZE,
    **dict.fromkeys(
        (
            *("--naflex-train-seq-lens", "--naflex-max-seq-len", "--naflex-patch-sizes", "--naflex-patch-size-probs"),
            *("--naflex-loss-scale", "--naflex-patchify-channels-first"),
        ),
        With("--naflex-loader", _ONE_SIZE),
    ),
    "--naflex-loader": _ONE_SIZE,
    **dict.fromkeys(
        (
            *("--kd-distill-type", "--kd-loss-type", "--kd-temperature", "--distill-loss-weight"),
            *("--task-loss-weight", "--kd-student-feature-dim", "--kd-teacher-feature-dim", "--kd-token-distill-type"),
        ),
        With("--kd-model-name", _NO_DISTILLATION),
    ),
    "--kd-model-name": _NO_DISTILLATION,
}
