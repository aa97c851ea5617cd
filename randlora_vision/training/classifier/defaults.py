"""The defaults of train_classifier.py, which depend on the method, the data and the model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from randlora_vision.training.classifier.methods import adapter_targets, config_of
from randlora_vision.training.classifier.options import (
    ClassifierModel,
    ClassifierOptions,
    ClassifierSettings,
)
from randlora_vision.training.harness.options import Training
from randlora_vision.training.methods.adaptation import suggested_lr
from randlora_vision.training.methods.defaults import Defaults, ScriptDefaults, with_rank
from randlora_vision.training.option_fields import without

# The rates of the demo have the lowest validation loss (one seed) on a coarse grid. The others are the usual ones,
# but for RandLoRA, whose rate follows from the model (`suggest_lr`): this one is for its head.
DEFAULTS = ScriptDefaults(
    own={
        "randlora": Defaults(1e-3, 32, suggested=True),
        "lora": Defaults(1e-3, 8),
        "vera": Defaults(4e-3, 256),
        "full": Defaults(1e-5),
        "linear-probe": Defaults(1e-3),
    },
    demo={
        "randlora": Defaults(2e-3, 16),
        "lora": Defaults(6e-3, 2),
        "vera": Defaults(3e-2, 64),
        "full": Defaults(1.2e-3),
        "linear-probe": Defaults(5e-2),
    },
    own_steps=1000,
    demo_steps=300,
)
_DEMO_HEAD_LR = 6e-3  # of RandLoRA


def resolve(
    options: ClassifierOptions, chosen: ClassifierModel, model: nn.Module, images: Callable[[], Tensor]
) -> ClassifierSettings:
    """Return the options with every default filled in, given the model's name and the loaded model.

    `images` returns a batch (B, 3, H, W) on whose features a rate is measured, where one is suggested.
    """
    embedded, training = options.embedded, options.training
    defaults = DEFAULTS.of(options.adapter.method, embedded)
    lr, suggested = defaults.rate(training.lr, options.adapter.method)
    adapter = with_rank(options.adapter, defaults.rank, model, lambda: adapter_targets(model, options))
    if adapter.method == "randlora" and embedded and training.lr in (None, "auto"):
        adapter = replace(adapter, head_lr=adapter.head_lr or _DEMO_HEAD_LR)
    settings = ClassifierSettings(
        **without(options, "model", "adapter", "training"),
        model=chosen,
        adapter=adapter,
        training=Training(
            **without(training, "lr", "steps"),
            lr=lr,
            steps=training.steps or DEFAULTS.steps(embedded),
        ),
    )
    if not suggested or adapter.method != "randlora":
        return settings
    adapter = replace(adapter, head_lr=adapter.head_lr or lr)
    lr = suggested_lr(model, config_of(model, settings), features_of(model, images()))
    return replace(settings, training=replace(settings.training, lr=lr), adapter=adapter)


def features_of(model: Any, images: Tensor) -> Callable[[], Tensor]:
    """Return a function that gives the features (B, D) of images before the classifier, which is a new one."""
    images = images.to(next(model.parameters()).device)
    return lambda: model.forward_head(model.forward_features(images), pre_logits=True)
