"""The defaults of train_clip.py, which depend on the method, the data and the model."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from randlora_vision.training.clip.methods import adapter_targets, config_of
from randlora_vision.training.clip.options import (
    ChosenLoss,
    ClipModel,
    ClipOptions,
    ClipSettings,
)
from randlora_vision.training.data.class_names import read_templates
from randlora_vision.training.data.known_data import known_data
from randlora_vision.training.data.sources import digits
from randlora_vision.training.harness.options import Training, TrainingOptions
from randlora_vision.training.methods.adaptation import suggested_lr
from randlora_vision.training.methods.defaults import Defaults, ScriptDefaults, with_rank
from randlora_vision.training.option_fields import without

# The rates of the demo have the lowest validation loss (mean of three seeds) on a coarse grid, with steps of a factor
# of two or less; those of DoRA, VeRA and NoLA were not searched. The others are the usual ones for pretrained CLIP
# models, but for RandLoRA, whose rate follows from the model (`suggest_lr`): this one is for a logit scale that is
# trained too.
DEFAULTS = ScriptDefaults(
    own={
        "randlora": Defaults(1e-3, 32, suggested=True),
        "lora": Defaults(1e-3, 8),
        "dora": Defaults(1e-3, 8),
        "vera": Defaults(1e-2, 256),
        "nola": Defaults(1e-2, 512),
        "full": Defaults(1e-5),
        "linear-probe": Defaults(1e-3),
    },
    demo={
        "randlora": Defaults(2e-3, 16),
        "lora": Defaults(9e-3, 8),
        "dora": Defaults(9e-3, 8),
        "vera": Defaults(3e-2, 256),
        "nola": Defaults(3e-2, 512),
        "full": Defaults(1.2e-3),
        "linear-probe": Defaults(1e-1),
    },
    own_steps=1000,
    demo_steps=250,
)


Features = Callable[[], Sequence[Tensor]]


def resolve(
    options: ClipOptions,
    chosen: ClipModel,
    model: nn.Module,
    captions: bool,
    features: Callable[[Sequence[str]], Features],
) -> ClipSettings:
    """Return the options with every default filled in, for the loaded model and for data with captions or classes.

    `features` returns, for the templates of class prompts, a function that gives the features of both towers. On them,
    a rate is measured, where one is suggested.

    Raises ValueError if the loss or the method cannot be used with such data.
    """
    embedded, images, adapter, training = options.images.embedded, options.images, options.adapter, options.training
    loss = options.loss.loss or ("clip" if captions else "class-prompts")
    if captions and loss == "class-prompts":
        raise ValueError("--loss class-prompts needs data with classes, but this has captions: choose clip or siglip")
    if captions and adapter.method == "linear-probe":
        raise ValueError("--method linear-probe is a classifier and needs data with classes, but this has captions")
    if captions and adapter.probe_lr is not None:
        raise ValueError("--probe-lr trains a classifier and needs data with classes, but this has captions")
    if captions and training.best_metric == TrainingOptions.best_metric:
        training = replace(training, best_metric="mean_recall")
    defaults = DEFAULTS.of(adapter.method, embedded)
    lr, suggested = defaults.rate(training.lr, adapter.method)
    if chosen.train_logit_scale:
        chosen = replace(chosen, logit_scale_lr=chosen.logit_scale_lr or lr)
    known = known_data(images.data)
    usual = digits.TEMPLATES if embedded else known.templates if known else ("a photo of a {}.",)
    settings = ClipSettings(
        **without(options, "clip", "images", "loss", "adapter", "training"),
        clip=chosen,
        images=replace(images, templates=read_templates(images.templates or usual)),
        loss=ChosenLoss(loss=loss),
        adapter=with_rank(adapter, defaults.rank, model, lambda: adapter_targets(model, options)),
        training=Training(**without(training, "lr", "steps"), lr=lr, steps=training.steps or DEFAULTS.steps(embedded)),
    )
    # With --eval-only nothing is trained: the adapters that a rate is taken from need not be made.
    if not suggested or settings.adapter.method != "randlora" or options.evaluation.eval_only:
        return settings
    lr = suggested_lr(model, config_of(settings), features(settings.images.templates))
    return replace(settings, training=replace(settings.training, lr=lr))
