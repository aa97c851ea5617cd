"""Adapt a CLIP model to classes of images, or to images with captions, with RandLoRA.

accelerate launch --quiet train_scripts/train_clip.py

accelerate launch --quiet train_scripts/train_clip.py --data FOLDER --model ViT-B-32 --pretrained laion2b_s34b_b79k

Without arguments, it trains on handwritten digits that need no download. For data with classes, the text features
of the class prompts are the classifier weights and the loss is the cross entropy of its logits. For data with
captions, the loss is contrastive. The run folder contains the adapter, the metrics, the figures and the settings.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from randlora_vision.demos import clip as demo_clip
from randlora_vision.errors import user_errors
from randlora_vision.integrations._open_clip_models import LoadedClip, load_clip
from randlora_vision.names import counted
from randlora_vision.training.clip.defaults import DEFAULTS, resolve
from randlora_vision.training.clip.evaluation import ClipMeasured, Evaluation
from randlora_vision.training.clip.load import load_classifier, load_trained
from randlora_vision.training.clip.methods import adapt, checkpoint_towers, own_rates
from randlora_vision.training.clip.open_clip_flags import OPEN_CLIP
from randlora_vision.training.clip.options import ClipModel, ClipOptions, ClipSettings
from randlora_vision.training.clip.results import RunResults, base_of, loading_code, write_evaluation, write_results
from randlora_vision.training.clip.tasks import loss_of, preprocessing_of, tower_features, training_data, validation
from randlora_vision.training.data.captioned import PairSplits, truncated_captions
from randlora_vision.training.data.class_names import require_words
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.read import read_data, read_evaluation
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import digits
from randlora_vision.training.data.splits import Splits
from randlora_vision.training.evaluation.model_card import write_card
from randlora_vision.training.evaluation.publishing import check_login, publish
from randlora_vision.training.evaluation.results import Results, check_equal, closing_words, task_name
from randlora_vision.training.harness.accelerators import make_accelerator
from randlora_vision.training.harness.epochs import in_steps
from randlora_vision.training.harness.fit import finish, fit, open_run
from randlora_vision.training.harness.memory import on_device
from randlora_vision.training.harness.options import parse
from randlora_vision.training.harness.preprocessing import check_preprocessing
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.harness.streaming import training_loader
from randlora_vision.training.methods.adaptation import start
from randlora_vision.training.methods.task import AdaptedTask
from randlora_vision.training.option_fields import without


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    train(parse(ClipOptions, argv, __doc__ or "", OPEN_CLIP, DEFAULTS.help()))


def train(options: ClipOptions) -> dict[str, Any]:
    """Evaluate, adapt, train, save, reload and evaluate again; return the content of summary.json."""
    check_login(options.hub)
    accelerator = make_accelerator(options.training)
    say = accelerator.print
    options, run, resume = open_run(options, "clip", accelerator)
    skipped = SkipList(run.skipped if run.writing else None, options.images.strict_data)
    with accelerator.main_process_first():  # it downloads, indexes and pretrains; the others then use its files
        data = read_task(options, skipped)
        chosen = choose_model(options)
        clip = load(chosen, options, accelerator.device)
    class_names = data.class_names if isinstance(data, ImageSplits) else None
    settings = resolve(
        options, chosen, clip.model, captions=class_names is None, features=partial(tower_features, clip, data)
    )
    if not settings.evaluation.eval_only:  # that has no training images
        settings = in_steps(settings, len(data.images["train"]), accelerator.num_processes)
    training = settings.training
    say(f"model: {chosen.model}{'' if clip.has_weights else ' with RANDOM weights (no --pretrained)'}")
    say(f"images: {data}{skipped}")
    for note in data.notes:
        say(f"note: {note}")
    truncated = truncated_captions(data, clip.tokenize) if isinstance(data, PairSplits) else 0
    if truncated:
        say(f"note: {counted(truncated, 'caption')} truncated to the model's context")

    set_seed(training.seed)
    evaluation = Evaluation(clip, read_tests(settings, data, skipped), settings, skipped)
    if settings.evaluation.eval_only:
        return evaluate(settings, clip, evaluation, run, accelerator)
    before = evaluation.run(clip)
    if settings.speed.gradient_checkpointing:
        checkpoint_towers(clip.model, settings)
    classifier, adaptation = adapt(clip, class_names, settings)
    start(adaptation, settings.adapter, resume is not None)
    say(f"zero-shot: {before}\n\n{adaptation.report}\n{DEFAULTS.rank_note(options.adapter, options.images.embedded)}")
    images = training_data(clip, data, settings, skipped)
    task = AdaptedTask(
        adaptation,
        loss=loss_of(clip, classifier, settings),
        batches=training_loader(images, training, accelerator),
        evaluate=validation(clip, data, classifier, settings, skipped),
        own_lr=own_rates(clip.model, settings),
        path=run.adapter if run.writing else None,
    )
    if settings.speed.torch_compile:
        task.loss.compile()
    prepared = preprocessing_of(clip, data, settings)
    speed = fit(task, settings, data, run, accelerator, resume, prepared)
    task.loss.requires_grad_(False)  # PyTorch chooses kernels by this flag: use those of the reloaded model
    after = evaluation.run(clip, classifier)
    accelerator.wait_for_everyone()  # until the file that every process now reads is written
    difference = check_reload(settings, accelerator.device, evaluation, after, run)
    scales = evaluate_scales(settings, accelerator.device, evaluation, run.adapter)
    summary: dict[str, Any] = {}
    if run.writing:
        measured = RunResults(evaluation, before, after, scales, truncated)
        summary = write_results(run, settings, adaptation, measured, speed, difference)
        code = loading_code(run, settings, adaptation, evaluation.class_names)
        say(closing_words(run, before, after, summary, code))
        card = partial(write_card, run, base_of(settings), data.name, training, summary, code)
    finish(run, accelerator, speed.steps)
    if run.writing:
        publish(run, settings.hub, card, say)
    return summary


def evaluate(
    settings: ClipSettings, clip: LoadedClip, evaluation: Evaluation, run: RunFolder, accelerator: Accelerator
) -> dict[str, Any]:
    """Evaluate the model, also with the adapter if one is given; return the content of summary.json."""
    before, after = evaluation.run(clip), None
    scales: list[tuple[float, Results]] = []
    if settings.evaluation.adapter is not None:
        path = Path(settings.evaluation.adapter)
        prepared = {"evaluation": preprocessing_of(clip, evaluation.tests[evaluation.task], settings)["evaluation"]}
        check_preprocessing(
            path.with_name(run.preprocessing.name), prepared, "give the --force-image-size and --background of that run"
        )
        after = evaluation.run(clip, load_classifier(clip, evaluation.class_names, settings, path))
        scales = evaluate_scales(settings, accelerator.device, evaluation, path)
    run.write_config(settings)
    summary: dict[str, Any] = {}
    if run.writing:
        summary = write_evaluation(run, settings, RunResults(evaluation, before, after, scales))
        with_adapter = f"\nwith {settings.evaluation.adapter}: {after}" if after else ""
        accelerator.print(f"base model: {before}{with_adapter}\n\nresults: {run.path}")
    finish(run, accelerator, step=0)
    return summary


def read_task(options: ClipOptions, skipped: SkipList) -> Splits:
    """Return the data of the task: its splits, or what --eval-only measures of it."""
    images = options.images
    if options.evaluation.eval_only:
        data = read_evaluation(images, skipped, images.class_names, images.eval_split)
    else:
        data = read_data(images, skipped, images.class_names)
    if isinstance(data, ImageSplits) and images.class_names is None:
        require_words(data, images.data)
    return data


def read_tests(options: ClipOptions, data: Splits, skipped: SkipList) -> dict[str, Splits]:
    """Return the data sets to evaluate on: the task, and those on which forgetting is measured, if any."""
    tests: dict[str, Splits] = {task_name(data.final): data}
    if options.images.embedded:
        tests["original"] = digits.read_digits(digits.KNOWN_DIGITS)
    if options.evaluation.retention_data is not None:
        images = replace(
            options.images, data=options.evaluation.retention_data, val_data=None, test_data=None, streaming=False
        )
        tests["retention"] = read_evaluation(
            images, skipped, options.evaluation.retention_class_names, images.eval_split
        )
        if isinstance(tests["retention"], ImageSplits):
            require_words(tests["retention"], images.data)
    return tests


def choose_model(options: ClipOptions) -> ClipModel:
    """Return the chosen model, by default the digits CLIP, which is pretrained first if it is not cached."""
    given = options.clip
    name, pretrained = given.model, given.pretrained
    if name is None and options.images.embedded:
        name = f"local-dir:{demo_clip.demo_model_folder(given.cache_dir)}"
    elif name is None:
        name, pretrained = "ViT-B-32", pretrained or "laion2b_s34b_b79k"
    return ClipModel(**without(given, "model", "pretrained", "cache_dir"), model=name, pretrained=pretrained)


def load(chosen: ClipModel, options: ClipOptions, device: torch.device) -> LoadedClip:
    """Load the base model; a linear probe on adapted features also loads the given adapter."""
    clip = load_clip(chosen.model, chosen.pretrained, options.training.seed, chosen.changes, chosen.augmentation)
    on_device(clip.model, device, options.speed.channels_last)
    adapter = options.evaluation.adapter
    if adapter is not None and not options.evaluation.eval_only and load_trained(clip.model, adapter) is not None:
        raise ValueError(f"--adapter {adapter} already holds a linear classifier: give an adapter without one")
    return clip


def evaluate_scales(
    settings: ClipSettings, device: torch.device, evaluation: Evaluation, path: Path
) -> list[tuple[float, Results]]:
    """Evaluate the model at every requested scale of the adapter."""
    results = []
    for scale in settings.evaluation.scales:
        clip = load(settings.clip, settings, device)
        classifier = load_classifier(clip, evaluation.class_names, settings, path, scale)
        results.append((scale, evaluation.run(clip, classifier).results))
    return results


def check_reload(
    settings: ClipSettings, device: torch.device, evaluation: Evaluation, trained: ClipMeasured, run: RunFolder
) -> float:
    """Load the saved file into a fresh base model and return the largest difference between logits."""
    fresh = load(settings.clip, settings, device)
    logits = evaluation.predict(fresh, load_classifier(fresh, evaluation.class_names, settings, run.adapter))
    return check_equal(logits, trained.logits, run)


if __name__ == "__main__":
    main()
