"""Class-prompt fine-tuning of CLIP as a task of the training loop, and adapting a model by any method."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader

from randlora_vision import RandLoRAConfig, plan
from randlora_vision.training.clip_classifier import ClassPromptLoss, ClipClassifier, belongs_to
from randlora_vision.training.clip_models import LoadedClip
from randlora_vision.training.clip_options import ClipOptions
from randlora_vision.training.images import Batch, LabelledImages, evaluation_batches, training_batches
from randlora_vision.training.lora import rank_for_budget
from randlora_vision.training.methods import Adaptation, LoRA, RandLoRA, TrainedTensors

_FULL_CODE = (
    "from safetensors.torch import load_file",
    "model.load_state_dict(load_file({path!r}), strict=False)",
)
_PROBE_CODE = (
    "from safetensors.torch import load_file",
    "class_features = load_file({path!r})['class_features']",
    "logits = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ class_features.T",
)


class ClassPromptTask:
    """What the loop trains: the classifier's loss on `train`, measured on `val`, saved to one file."""

    def __init__(
        self,
        classifier: ClipClassifier,
        adaptation: Adaptation,
        train: LabelledImages,
        val: LabelledImages,
        options: ClipOptions,
        processes: int,
        path: Path | None,
    ) -> None:
        training = options.training
        assert training.steps is not None
        self.loss = ClassPromptLoss(classifier)
        self.classifier = classifier
        self.adaptation = adaptation
        self.path = path
        self._logit_scale_lr = options.clip.logit_scale_lr
        self.batches: DataLoader[Batch] = training_batches(
            train,
            training.batch_size,
            training.steps * training.gradient_accumulation_steps * processes,
            training.seed,
            training.workers,
        )
        self._val = evaluation_batches(val, training.batch_size, training.workers)

    def own_lr(self) -> dict[nn.Parameter, float]:
        """Return the learning rates that are not the common one, by parameter."""
        return {self.classifier.clip.logit_scale: self._logit_scale_lr} if self._logit_scale_lr else {}

    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracies on the validation split."""
        return self.classifier.evaluate(self._val)

    def check_gradients(self) -> list[str]:
        """Leave it to the method."""
        return self.adaptation.check_gradients()

    def save(self) -> str:
        """Write what was trained, on the process that has a path."""
        if self.path is not None:
            self.adaptation.save(self.path)
        return str(self.path)


def resolve_budget(options: ClipOptions, model: nn.Module) -> ClipOptions:
    """Turn LoRA's budget, where there is one, into the rank that comes nearest to it."""
    adapter = options.adapter
    if adapter.budget is None:
        return options
    rank = rank_for_budget(model, _targets(model, options), adapter.budget)
    return replace(options, adapter=replace(adapter, rank=rank, alpha=adapter.alpha or 2.0 * rank, budget=None))


def adapt(clip: LoadedClip, class_names: Sequence[str], options: ClipOptions) -> tuple[ClipClassifier, Adaptation]:
    """Make the model trainable by the chosen method, everything else frozen; return its classifier too.

    For the linear probe the trained weights are the classifier's, for the other methods the model's own.
    """
    if options.adapter.method == "linear-probe":
        probe = _classifier(clip, class_names, options, probe=True)
        return probe, TrainedTensors(probe, ["class_features"], "linear classifier", _PROBE_CODE)
    adaptation = _adapt_model(clip.model, options)
    return _classifier(clip, class_names, options), adaptation


def reload(
    clip: LoadedClip, class_names: Sequence[str], options: ClipOptions, adaptation: Adaptation, path: Path
) -> ClipClassifier:
    """Put a saved file on a fresh base model and return the classifier that this makes."""
    if options.adapter.method == "linear-probe":
        probe = _classifier(clip, class_names, options, probe=True)
        adaptation.load(probe, path)
        return probe
    adaptation.load(clip.model, path)
    return _classifier(clip, class_names, options)


def _classifier(
    clip: LoadedClip, class_names: Sequence[str], options: ClipOptions, probe: bool = False
) -> ClipClassifier:
    return ClipClassifier(clip, class_names, options.images.templates, options.images.prompts, probe)


def _adapt_model(model: nn.Module, options: ClipOptions) -> Adaptation:
    adapter = options.adapter
    if adapter.method == "randlora":
        assert adapter.rank is not None, "resolve the options first"
        return RandLoRA(model, randlora_config(options, adapter.rank, adapter.alpha))
    if adapter.method == "lora":
        assert adapter.rank is not None and adapter.alpha is not None, "resolve the budget first"
        return LoRA(model, _targets(model, options), adapter.rank, adapter.alpha)
    towers = ("vision", "text") if options.clip.towers == "both" else (options.clip.towers,)
    # Token tables stay frozen: few of their rows are in any prompt, and they slow every step down.
    tables = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Embedding)}
    names = [
        name
        for name, _ in model.named_parameters()
        if name not in tables and any(belongs_to(name, tower) for tower in towers)
    ]
    if options.clip.train_logit_scale:
        names.append("logit_scale")
    return TrainedTensors(model, names, f"full fine-tuning ({' and '.join(towers)} tower)", _FULL_CODE)


def _targets(model: nn.Module, options: ClipOptions) -> list[str]:
    """Return the names of the weights that RandLoRA would adapt; rank 1 fits every weight."""
    return [target.name for target in plan(model, randlora_config(options, rank=1)).targets]


def randlora_config(options: ClipOptions, rank: int, alpha: float | None = None) -> RandLoRAConfig:
    """Return RandLoRA's configuration for these options; the targets are those of the towers, or the named ones."""
    adapter = options.adapter
    named = adapter.target_modules[0] if len(adapter.target_modules) == 1 else adapter.target_modules
    return RandLoRAConfig(
        rank=rank,
        alpha=alpha,
        dropout=adapter.dropout,
        target_modules=named or f"open_clip:{options.clip.towers}",
        bases=adapter.bases,
        init=adapter.init,
        seed=options.training.seed,
        modules_to_save=("logit_scale",) if options.clip.train_logit_scale else (),
    )
