"""The flags of open_clip's training script, and what they mean for train_clip.py."""

from collections.abc import Callable
from typing import Any

from randlora_vision.training.harness.flags import HUGGING_FACE, Given, Refused, Table, only


def _lock(other: str, towers: str) -> Any:
    """Return the meaning of a switch that freezes one tower."""
    both = Refused("both towers are locked, so there is nothing to train: lock one")
    return lambda given: both if other in given else f"--towers {towers}"


def _trains(given: Given) -> bool:
    return not {"--train-data", "--data", "--config"}.isdisjoint(given)


def _validation(given: Given) -> str:
    if _trains(given):
        return "--val-data {}"
    if "--imagenet-val" in given:
        return Refused("without --train-data, one thing is evaluated: leave it or --imagenet-val out")
    return "--eval-only --data {}"


def _imagenet(given: Given) -> str:
    if _trains(given):
        return "--retention-data {} --retention-class-names imagenet"
    return "--eval-only --class-names imagenet --data {}"


def _every(flag: str, option: str) -> Callable[[Given], str]:
    """Return the meaning of a number of epochs, of which 0 is never."""
    return lambda given: "" if list(given.get(flag, ())) == ["0"] else f"{option} {{}}"


_LAUNCHER = Refused("devices and processes are chosen by accelerate launch: see accelerate launch --help")
_SHARDING = Refused("sharding is configured in accelerate: see accelerate launch --use_fsdp")
_PARTS = Refused("leave --lock-image and --lock-text out too, and give --target-modules with a pattern of the blocks")
_FIXED = Refused("the model is used as it was pretrained: leave it out, or change a configuration (--model FILE.json)")
_NO_AUDIO = Refused("audio models are not supported: leave it out")
_NO_NAFLEX = Refused("images have one size, see --force-image-size: leave it out")
_NO_COCA = "its text decoder is not trained here: leave it out to adapt the towers of a CoCa model with --loss clip"
_NO_DISTILLATION = Refused(
    "there is no teacher here: distil with open_clip itself, and give its weights as --pretrained"
)
_PURE = Refused("trained parameters stay in float32: give amp_bf16")
_LOCAL = Refused("the run folder is on disk: copy it after the run")

OPEN_CLIP: Table = {
    "--train-data": "--data {}",
    "--val-data": _validation,
    "--train-num-samples": "--epoch-images {}",
    "--train-data-upsampling-factors": Refused("give the shards in the proportions that you want"),
    "--val-num-samples": {"*": ""},  # they are counted
    "--dataset-type": {
        **dict.fromkeys(("csv", "webdataset", "auto"), ""),
        "synthetic": Refused("leave --train-data out to try the script on the embedded digits"),
        "*": _NO_AUDIO,
    },
    "--dataset-resampled": "",  # an epoch has --epoch-images, and all shards are shuffled together
    "--csv-separator": {
        **dict.fromkeys(("\t", "\\t", ","), ""),
        "*": Refused("columns are separated by commas or tabs, which are recognised: convert the file"),
    },
    "--csv-img-key": "--image-column {}",
    "--csv-caption-key": "--caption-column {}",
    "--image-key": Refused("the images of shards are found by their file extensions: leave it out"),
    "--text-key": {"txt": "", "*": Refused("give --caption-column for a key of the .json files")},
    "--json-text-key": "--caption-column {}",
    "--json-text-key-probs": Refused("give one --caption-column"),
    "--max-image-pixels": Refused("Pillow's own limit applies: leave it out"),
    "--imagenet-val": _imagenet,
    "--imagenet-v2": Refused("give --retention-data FOLDER --retention-class-names imagenet"),
    "--logs": "--runs-dir {}",
    "--name": "--run-name {}",
    "--log-local": "",
    "--wd": "--weight-decay {}",
    "--momentum": only("0.9", otherwise="give --opt-kwargs momentum=NUMBER"),
    "--warmup": "--warmup-steps {}",
    "--opt": "--optimizer {}",
    "--opt-kwargs": "--optimizer-kwargs {}",
    "--opt-fallback-list": Refused("one optimiser trains everything: leave it out"),
    "--text-layer-decay": Refused("give --layer-decay, which applies to each tower separately"),
    "--image-layer-decay": Refused("give --layer-decay, which applies to each tower separately"),
    "--visual-layer-decay": Refused("give --layer-decay, which applies to each tower separately"),
    "--wd-exclude": Refused("vectors and scalars are never decayed, matrices always: leave it out"),
    "--text-pooler-own-group": Refused("see --layer-decay: leave it out"),
    "--skip-scheduler": "--schedule constant --warmup-steps 0",
    "--lr-scheduler": {
        **dict(HUGGING_FACE["--lr-scheduler"]),  # type: ignore[arg-type]
        "const": "--schedule constant",
        "const-cooldown": "--schedule wsd",
    },
    "--epochs-cooldown": "--decay-epochs {}",
    "--lr-cooldown-end": "--min-lr {}",
    "--lr-cooldown-power": "--lr-power {}",
    "--save-frequency": _every("--save-frequency", "--checkpoint-epochs"),
    "--save-most-recent": "--checkpoints-total-limit 1",
    "--delete-previous-checkpoint": "--checkpoints-total-limit 1",
    "--zeroshot-frequency": _every("--zeroshot-frequency", "--eval-epochs"),
    "--val-frequency": _every("--val-frequency", "--eval-epochs"),
    "--val-retrieval-chunk-size": Refused("retrieval needs no chunks here: leave it out"),
    "--val-retrieval-precision": {"fp32": "", "*": Refused("similarities are computed in float32: leave it out")},
    "--precision": {
        "amp": "--mixed-precision fp16",
        "amp_bf16": "--mixed-precision bf16",
        "amp_bfloat16": "--mixed-precision bf16",
        "fp32": "--mixed-precision no",
        **dict.fromkeys(("bf16", "fp16", "pure_bf16", "pure_fp16"), _PURE),
    },
    "--pretrained-image": Refused("give the weights of the whole model with --pretrained"),
    "--lock-image": _lock("--lock-text", "text"),
    "--lock-text": _lock("--lock-image", "vision"),
    **dict.fromkeys(("--lock-image-unlocked-groups", "--lock-text-unlocked-layers"), _PARTS),
    "--lock-image-freeze-bn-stats": "",
    "--lock-text-freeze-layer-norm": "",
    "--use-bn-sync": Refused("batch normalisation keeps the base model's statistics: leave it out"),
    "--interpolation": "--image-interpolation {}",
    "--square-resize-only": "--image-resize-mode squash",
    "--grad-checkpointing": "--gradient-checkpointing",
    "--accum-freq": "--gradient-accumulation-steps {}",
    "--siglip": "--loss siglip",
    **dict.fromkeys(("--local-loss", "--gather-with-grad", "--ddp-static-graph"), ""),
    "--loss-dist-impl": Refused("features are gathered from all processes: leave it out"),
    **dict.fromkeys(("--force-context-length", "--force-custom-text"), _FIXED),
    "--force-quick-gelu": Refused("choose the model whose name ends in -quickgelu"),
    "--torchcompile": "--torch-compile",
    **dict.fromkeys(
        ("--torchcompile-strategy", "--torchcompile-backend", "--torchcompile-mode"),
        Refused("give --torch-compile, which has PyTorch's default mode"),
    ),
    "--device": {"cuda": "", "*": _LAUNCHER},
    **dict.fromkeys(("--dist-url", "--dist-backend", "--no-set-device-rank"), _LAUNCHER),
    **dict.fromkeys(
        ("--fsdp", "--fsdp-no-reshard-after-forward", "--fsdp-offload-cpu", "--fsdp-checkpoint"), _SHARDING
    ),
    "--wandb-notes": Refused("set the environment variable WANDB_NOTES"),
    "--wandb-project-name": "--tracker-project {}",
    "--debug": Refused("set the environment variable RANDLORA_DEBUG=1 to see tracebacks"),
    "--copy-codebase": Refused("environment.json in the run folder records the command and the versions"),
    "--grad-clip-norm": "--max-grad-norm {}",
    "--log-every-n-steps": "--log-every {}",
    "--log-metric-every-n-steps": "--log-every {}",
    "--train-loss-ema-samples": Refused("metrics.jsonl has the mean loss since its last line: leave it out"),
    "--coca-caption-loss-weight": only("0", "0.0", otherwise=_NO_COCA),
    "--coca-contrastive-loss-weight": only("1", "1.0", otherwise=_NO_COCA),
    **dict.fromkeys(("--remote-sync", "--remote-sync-frequency", "--remote-sync-protocol"), _LOCAL),
    **dict.fromkeys(("--distill-model", "--distill-pretrained"), _NO_DISTILLATION),
    "--use-bnb-linear": Refused("layers quantised by bitsandbytes are adapted by the library, not by this script"),
    **dict.fromkeys(
        (
            *("--use-naflex", "--force-naflex-vision", "--naflex-num-train-image-tokens", "--naflex-patch-sizes"),
            *("--naflex-patch-size-probs", "--naflex-seq-lens", "--naflex-seq-len-probs", "--naflex-max-text-tokens"),
            *("--naflex-max-tokens-per-batch", "--naflex-batch-divisor", "--naflex-loss-scale", "--length-bucketing"),
            *("--bucket-pool", "--bucket-chunk", "--bucket-prefetch-pools", "--naflex-pad-multiple"),
            "--text-pad-multiple",
        ),
        _NO_NAFLEX,
    ),
    **dict.fromkeys(
        (
            *("--audio-ext", "--pretrained-audio", "--audio-fill", "--audio-trunc", "--audio-fusion"),
            *("--audio-int16-normalize", "--audio-zeroshot-dataset", "--audio-zeroshot-split"),
            *("--audio-zeroshot-audio-key", "--audio-zeroshot-target-key", "--audio-zeroshot-class-key"),
            *("--audio-zeroshot-template", "--audio-zeroshot-workers", "--audio-zeroshot-multiprocessing-context"),
            *("--audio-multiprocessing-context", "--audio-layer-decay"),
        ),
        _NO_AUDIO,
    ),
}
