"""Adapt a CLIP model to classes of images, or to images with captions, with RandLoRA.

accelerate launch train_scripts/train_clip.py

accelerate launch train_scripts/train_clip.py --data FOLDER --model ViT-B-32 --pretrained laion2b_s34b_b79k

Without arguments, it trains on handwritten digits that need no download. For data with classes, the text features
of the class prompts are the classifier weights and the loss is the cross entropy of its logits. For data with
captions, the loss is contrastive. The run folder contains the adapter, the metrics, the figures and the settings.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from randlora_vision.demos import clip as demo_clip
from randlora_vision.errors import user_errors
from randlora_vision.integrations._open_clip_models import LoadedClip, load_clip
from randlora_vision.training.clip.classifier import ClipClassifier
from randlora_vision.training.clip.evaluation import Answers, Exam, Splits
from randlora_vision.training.clip.load import put_on, reload
from randlora_vision.training.clip.methods import adapt, adapter_targets, checkpoint_towers
from randlora_vision.training.clip.options import ClipOptions, resolve, resolve_loss, resolve_metric
from randlora_vision.training.clip.results import Measured, loading_code, write_evaluation, write_results
from randlora_vision.training.clip.retrieval import retrieval_features
from randlora_vision.training.clip.tasks import ClassPromptTask, ContrastiveTask
from randlora_vision.training.data.captioned import PairSplits, class_captions, truncated_captions
from randlora_vision.training.data.class_names import require_words
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.read import read_data, read_evaluation
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import digits
from randlora_vision.training.evaluation.results import Results, check_equal, closing_words, task_name
from randlora_vision.training.harness.accelerators import make_accelerator
from randlora_vision.training.harness.fit import finish, fit, open_run
from randlora_vision.training.harness.memory import placed
from randlora_vision.training.harness.options import parse
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.methods.adaptation import Adaptation
from randlora_vision.training.methods.lora import resolve_budget


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    train(parse(ClipOptions, argv, __doc__ or ""))


def train(options: ClipOptions) -> dict[str, Any]:
    """Evaluate, adapt, train, save, reload and evaluate again; return the content of summary.json."""
    options = resolve(options)
    accelerator = make_accelerator(options.training)
    say = accelerator.print
    options, run, resume = open_run(options, "clip", accelerator)
    skipped = SkipList(run.skipped if run.writing else None, options.images.strict_data)
    data = read_task(options, skipped)
    class_names = data.class_names if isinstance(data, ImageSplits) else None
    with accelerator.main_process_first():  # it downloads or pretrains; the others then use its files
        options = with_demo_model(options)
        clip = load(options, accelerator.device)
    options = resolve_loss(options, captions=class_names is None)
    options = resolve_metric(options, captions=class_names is None)
    say(f"model: {options.clip.model}{'' if clip.has_weights else ' with RANDOM weights (no --pretrained)'}")
    say(f"images: {data}{skipped}")
    for note in data.notes:
        say(f"note: {note}")
    truncated = truncated_captions(data, clip.tokenize) if isinstance(data, PairSplits) else 0
    if truncated:
        say(f"note: {truncated} captions are longer than the model's context and are truncated")

    set_seed(options.training.seed)
    exam = Exam(clip, read_tests(options, data, skipped), options, skipped)
    if options.evaluation.eval_only:
        return evaluate(options, clip, exam, run, accelerator)
    before = exam.take(clip)
    options = resolve_budget(options, clip.model, adapter_targets)
    if options.speed.gradient_checkpointing:
        checkpoint_towers(clip.model, options)
    classifier, adaptation = adapt(clip, class_names, options)
    say(f"zero-shot: {before}\n\n{adaptation.report}\n")
    path = run.adapter if run.writing else None
    task = make_task(clip, data, classifier, adaptation, options, skipped, accelerator.num_processes, path)
    if options.speed.torch_compile:
        task.loss.compile()
    speed = fit(task, options, data, run, accelerator, resume)
    task.loss.requires_grad_(False)  # PyTorch chooses kernels by this flag: use those of the reloaded model
    after = exam.take(clip, classifier)
    accelerator.wait_for_everyone()  # until the file that every process now reads is written
    difference = check_reload(options, accelerator.device, exam, after, run)
    scales = take_scales(options, accelerator.device, exam, run.adapter)
    summary: dict[str, Any] = {}
    if run.writing:
        measured = Measured(exam, before, after, scales, truncated)
        summary = write_results(run, options, adaptation, measured, speed, difference)
        say(closing_words(run, before, after, summary, loading_code(run, options, adaptation)))
    finish(run, accelerator, speed.steps)
    return summary


def evaluate(
    options: ClipOptions, clip: LoadedClip, exam: Exam, run: RunFolder, accelerator: Accelerator
) -> dict[str, Any]:
    """Evaluate the model, also with the adapter if one is given; return the content of summary.json."""
    before, after = exam.take(clip), None
    scales: list[tuple[float, Results]] = []
    if options.evaluation.adapter is not None:
        path = Path(options.evaluation.adapter)
        after = exam.take(clip, reload(clip, exam.class_names, options, path))
        scales = take_scales(options, accelerator.device, exam, path)
    run.write_config(options)
    summary: dict[str, Any] = {}
    if run.writing:
        summary = write_evaluation(run, options, Measured(exam, before, after, scales))
        with_adapter = f"\nwith {options.evaluation.adapter}: {after}" if after else ""
        accelerator.print(f"base model: {before}{with_adapter}\n\nresults: {run.path}")
    finish(run, accelerator, step=0)
    return summary


def make_task(
    clip: LoadedClip,
    data: Splits,
    classifier: ClipClassifier | None,
    adaptation: Adaptation,
    options: ClipOptions,
    skipped: SkipList,
    processes: int,
    path: Path | None,
) -> ClassPromptTask | ContrastiveTask:
    """Return the task for the training loop: the chosen loss, on data with classes or with captions."""
    transform = clip.training_transform(data.augment)
    if isinstance(data, PairSplits):
        pairs = data.select("train", transform, clip.tokenize, skipped)
        val = data.select("val", clip.eval_transform, clip.tokenize, skipped, draw=False)
        training = options.training

        def recalls() -> dict[str, float]:
            return retrieval_features(clip.model, val, training.batch_size, training.workers).values

        return ContrastiveTask(clip, adaptation, pairs, recalls, options, processes, path)
    assert classifier is not None
    train = data.select("train", transform, skipped)
    by_prompts = ClassPromptTask(
        classifier, adaptation, train, data.select("val", clip.eval_transform, skipped), options, processes, path
    )
    if options.loss.loss == "class-prompts":
        return by_prompts
    captions = class_captions(data, options.images.templates).select("train", transform, clip.tokenize, skipped)
    return ContrastiveTask(clip, adaptation, captions, by_prompts.evaluate, options, processes, path)


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
        images = replace(options.images, data=options.evaluation.retention_data, val_data=None, test_data=None)
        tests["retention"] = read_evaluation(images, skipped, wanted=images.eval_split)
        if isinstance(tests["retention"], ImageSplits):
            require_words(tests["retention"], images.data)
    return tests


def with_demo_model(options: ClipOptions) -> ClipOptions:
    """Set the model to the digits CLIP if none was chosen, pretraining it first if it is not cached."""
    if options.clip.model is not None:
        return options
    folder = demo_clip.demo_model_folder(options.clip.cache_dir)
    return replace(options, clip=replace(options.clip, model=f"local-dir:{folder}"))


def load(options: ClipOptions, device: torch.device) -> LoadedClip:
    """Load the base model; a linear probe on adapted features also loads the given adapter."""
    assert options.clip.model is not None
    clip = load_clip(options.clip.model, options.clip.pretrained, options.training.seed)
    placed(clip.model, device, options.speed.channels_last)
    adapter = options.evaluation.adapter
    if adapter is not None and not options.evaluation.eval_only:
        if put_on(clip.model, Path(adapter)) is not None:
            raise ValueError(f"--adapter {adapter} is itself a linear classifier: it has no features to train on")
    return clip


def take_scales(options: ClipOptions, device: torch.device, exam: Exam, path: Path) -> list[tuple[float, Results]]:
    """Evaluate the model at every requested scale of the adapter."""
    results = []
    for scale in options.evaluation.scales:
        clip = load(options, device)
        results.append((scale, exam.take(clip, reload(clip, exam.class_names, options, path, scale)).results))
    return results


def check_reload(options: ClipOptions, device: torch.device, exam: Exam, trained: Answers, run: RunFolder) -> float:
    """Load the saved file into a fresh base model and compare its logits with the trained model's.

    Returns the largest difference. Raises RuntimeError if it exceeds rounding error.
    """
    fresh = load(options, device)
    logits = exam.predict(fresh, reload(fresh, exam.class_names, options, run.adapter))
    difference = (logits - trained.logits).abs().max().item()
    return check_equal(difference, trained.logits.abs().max().item(), run)


if __name__ == "__main__":
    main()
