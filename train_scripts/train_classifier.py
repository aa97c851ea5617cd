"""Adapt a timm image classifier to your images with RandLoRA.

accelerate launch --quiet train_scripts/train_classifier.py

accelerate launch --quiet train_scripts/train_classifier.py --data FOLDER --model vit_base_patch16_224 --pretrained

Without arguments, it trains on handwritten digits that need no download. Adapters are added to the backbone, the
classifier head is trained in full, and both are saved in one file. The run folder contains that file, the metrics,
the figures and the settings.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from randlora_vision.demos import classifier as demo_classifier
from randlora_vision.errors import user_errors
from randlora_vision.training.classifier.defaults import DEFAULTS, resolve
from randlora_vision.training.classifier.evaluation import Evaluation, evaluate, write_results
from randlora_vision.training.classifier.loaded import LoadedClassifier
from randlora_vision.training.classifier.loss import ClassifierLoss
from randlora_vision.training.classifier.methods import adapt, head_parameters, own_rates
from randlora_vision.training.classifier.models import load_classifier, with_own_head
from randlora_vision.training.classifier.options import ClassifierModel, ClassifierOptions, ClassifierSettings
from randlora_vision.training.classifier.timm_flags import TIMM
from randlora_vision.training.data.batches import evaluation_batches, spaced_batch
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.read import read_data
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import digits
from randlora_vision.training.evaluation.model_card import write_card
from randlora_vision.training.evaluation.publishing import check_login, publish
from randlora_vision.training.evaluation.results import Measured, check_equal, closing_words
from randlora_vision.training.harness.accelerators import make_accelerator
from randlora_vision.training.harness.epochs import in_steps
from randlora_vision.training.harness.fit import finish, fit, open_run
from randlora_vision.training.harness.memory import checkpoint_activations, on_device
from randlora_vision.training.harness.options import parse
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.harness.streaming import training_loader
from randlora_vision.training.methods.adaptation import SAMPLES, Adaptation, start
from randlora_vision.training.methods.task import AdaptedTask
from randlora_vision.training.option_fields import without


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    train(parse(ClassifierOptions, argv, __doc__ or "", TIMM, DEFAULTS.help()))


def train(options: ClassifierOptions) -> dict[str, Any]:
    """Evaluate, adapt, train, save, reload and evaluate again; return the content of summary.json."""
    check_login(options.hub)
    accelerator = make_accelerator(options.training)
    say = accelerator.print
    options, run, resume = open_run(options, "classifier", accelerator)
    skipped = SkipList(run.skipped if run.writing else None, options.data.strict_data)
    with accelerator.main_process_first():  # it downloads, indexes and pretrains; the others then use its files
        splits, original = read_images(options, skipped)
        chosen = choose_model(options)
        loaded = load_classifier(chosen, len(splits.class_names), options.training.seed)
    model = on_device(loaded.model, accelerator.device, options.speed.channels_last)
    settings = resolve(options, chosen, model, partial(few_images, splits, loaded))
    settings = in_steps(settings, len(splits.images["train"]), accelerator.num_processes)
    training = settings.training
    say(f"model: {chosen.model}{'' if loaded.has_weights else ' with RANDOM weights (no --pretrained)'}")
    say(f"images: {splits}{skipped}")
    for note in splits.notes:
        say(f"note: {note}")

    set_seed(training.seed)
    evaluation = Evaluation(splits, original, loaded.eval_transform, training, skipped)
    before = evaluate_before(settings, loaded, evaluation, original is not None, accelerator.device)
    head_numbers = sum(parameter.numel() for _, parameter in head_parameters(model))
    if settings.speed.gradient_checkpointing:
        checkpoint_activations(model, "the backbone")
    adaptation = adapt(model, settings)
    start(adaptation, settings.adapter, resume is not None)
    say(f"before: {before or NO_HEAD}\n\n{adaptation.report}\n{DEFAULTS.rank_note(options.adapter, options.embedded)}")

    train = splits.select("train", loaded.training_transform(splits, settings.augment), skipped)
    val = evaluation_batches(
        splits.select("val", loaded.eval_transform, skipped), training.batch_size, training.workers
    )
    classes = len(splits.class_names)
    task = AdaptedTask(
        adaptation,
        loss=ClassifierLoss(model, classes, settings.augment),
        batches=training_loader(train, training, accelerator, settings.augment.aug_repeats or 1),
        evaluate=lambda: evaluate(model, val, classes).values,
        own_lr=own_rates(model, settings),
        path=run.adapter if run.writing else None,
    )
    if settings.speed.torch_compile:
        task.loss.compile()
    prepared = loaded.preprocessing(splits, settings.augment, settings.data.background)
    speed = fit(task, settings, splits, run, accelerator, resume, prepared)
    model.requires_grad_(False)  # PyTorch chooses kernels by this flag: use those of the reloaded model
    after = evaluation.run(model)
    summary: dict[str, Any] = {}
    if run.writing:
        difference = check_reload(settings, accelerator.device, adaptation, evaluation, after, run)
        summary = write_results(run, settings, adaptation, head_numbers, evaluation, before, after, speed, difference)
        code = [*loaded.code, *adaptation.loading_code(run.adapter), *loaded.using_code(splits.class_names)]
        say(closing_words(run, before or NO_HEAD, after, summary, code))
        card = partial(write_card, run, loaded.base(chosen), splits.name, training, summary, code)
    finish(run, accelerator, speed.steps)
    if run.writing:
        publish(run, settings.hub, card, say)
    return summary


def read_images(options: ClassifierOptions, skipped: SkipList) -> tuple[ImageSplits, ImageSplits | None]:
    """Return the images, and those of the base model's original task if known; raise ValueError for captions."""
    splits = read_data(options.data, skipped)
    if not isinstance(splits, ImageSplits):
        raise ValueError(f"--data {options.data.data} has captions, not classes: --label-column names the classes")
    known = options.embedded and options.model.model is None
    return splits, digits.read_digits(digits.KNOWN_DIGITS) if known else None


def few_images(splits: ImageSplits, loaded: LoadedClassifier) -> Tensor:
    """Return a few validation images (B, 3, H, W), on which a learning rate is measured."""
    return spaced_batch(splits.select("val", loaded.eval_transform, SkipList()), SAMPLES)["images"]


_USUAL_MODEL = "vit_base_patch16_224"
NO_HEAD = "not measured (the classifier head is new)"


def choose_model(options: ClassifierOptions) -> ClassifierModel:
    """Return the chosen model, by default the digits ViT, which is pretrained first if it is not cached."""
    given = options.model
    pretrained, name = given.pretrained, given.model
    if name is None:
        pretrained = True
        cache_dir = given.cache_dir
        name = f"local-dir:{demo_classifier.demo_model_folder(cache_dir)}" if options.embedded else _USUAL_MODEL
    return ClassifierModel(**without(given, "model", "pretrained", "cache_dir"), model=name, pretrained=pretrained)


def evaluate_before(
    settings: ClassifierSettings, loaded: LoadedClassifier, evaluation: Evaluation, demo: bool, device: torch.device
) -> Measured | None:
    """Evaluate the base model with the pretrained head; None if that head is for other classes."""
    if demo:  # its head has five of the ten classes
        return evaluation.run(with_own_head(settings.model, settings.training.seed).to(device))
    return None if loaded.fresh_head else evaluation.run(loaded.model)


def check_reload(
    settings: ClassifierSettings,
    device: torch.device,
    adaptation: Adaptation,
    evaluation: Evaluation,
    trained: Measured,
    run: RunFolder,
) -> float:
    """Load the saved file into a fresh base model and return the largest difference between logits."""
    loaded = load_classifier(settings.model, len(evaluation.class_names), settings.training.seed)
    fresh = on_device(loaded.model, device, settings.speed.channels_last)
    adaptation.load(fresh, run.adapter)
    return check_equal(evaluation.predict(fresh), trained.logits, run)


if __name__ == "__main__":
    main()
