"""Adapt a CLIP model to an image classification task with RandLoRA.

accelerate launch train_scripts/train_clip.py

accelerate launch train_scripts/train_clip.py --data FOLDER --model ViT-B-32 --pretrained laion2b_s34b_b79k

Without arguments: handwritten digits that need no download. The features of the class prompts are the
classifier, and the loss is the cross entropy of the images against them. The run folder holds the
adapter, metrics, pictures and settings.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from randlora_vision.training import demo_clip, digits
from randlora_vision.training.checkpoints import find_checkpoint
from randlora_vision.training.class_folders import read_class_folders
from randlora_vision.training.clip_exam import Answers, Exam
from randlora_vision.training.clip_models import LoadedClip, load_clip
from randlora_vision.training.clip_options import ClipOptions, resolve
from randlora_vision.training.clip_results import loading_code, write_results
from randlora_vision.training.clip_task import ClassPromptTask, adapt, reload, resolve_budget
from randlora_vision.training.errors import user_errors
from randlora_vision.training.fitting import fit
from randlora_vision.training.images import ImageSplits, SkipList
from randlora_vision.training.loop import make_accelerator
from randlora_vision.training.methods import Adaptation
from randlora_vision.training.options import parse
from randlora_vision.training.results import check_equal, closing_words
from randlora_vision.training.run_folder import RunFolder, open_run_folder


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    train(parse(ClipOptions, argv, __doc__ or ""))


def train(options: ClipOptions) -> dict[str, Any]:
    """Measure, adapt, train, measure again, save, reload; return what summary.json holds."""
    options = resolve(options)
    accelerator = make_accelerator(options.training)
    say = accelerator.print
    resume, run_options = find_checkpoint(options.checkpoints, options.run)
    # Not to be resumed again by whoever feeds config.yaml back.
    options = replace(options, run=run_options, checkpoints=replace(options.checkpoints, resume=None))
    run = open_run_folder(options.run, "clip", accelerator.is_main_process, resuming=resume is not None)
    skipped = SkipList(run.skipped if run.writing else None, options.images.strict_data)
    splits, original = read_images(options, skipped)
    with accelerator.main_process_first():  # which downloads or pretrains, the others find it done
        options = with_demo_model(options)
        clip = load(options, accelerator.device)
    say(f"model: {options.clip.model}{'' if clip.has_weights else ' with RANDOM weights (no --pretrained)'}")
    say(f"images: {splits}" + (f"; skipped {skipped.count()} unreadable ones" if skipped.count() else ""))

    set_seed(options.training.seed)
    exam = Exam(clip, splits, original, options, skipped)
    before = exam.take()
    options = resolve_budget(options, clip.model)
    classifier, adaptation = adapt(clip, splits.class_names, options)
    say(f"zero-shot: {before}\n\n{adaptation.report}\n")
    task = ClassPromptTask(
        classifier,
        adaptation,
        train=splits.select("train", clip.training_transform(splits.augment), skipped),
        val=splits.select("val", clip.eval_transform, skipped),
        options=options,
        processes=accelerator.num_processes,
        path=run.adapter if run.writing else None,
    )
    speed = fit(task, options, splits, run, accelerator, resume, task.own_lr())
    classifier.requires_grad_(False)  # PyTorch chooses kernels by it: now those of the reloaded model
    after = exam.take(classifier)
    summary: dict[str, Any] = {}
    if run.writing:
        difference = check_reload(options, accelerator.device, adaptation, exam, after, run)
        summary = write_results(run, options, adaptation, exam, before, after, speed, difference)
        say(closing_words(run, before, after, summary, loading_code(run, options, adaptation)))
    accelerator.end_training()
    accelerator.free_memory()
    return summary


def read_images(options: ClipOptions, skipped: SkipList) -> tuple[ImageSplits, ImageSplits | None]:
    """Return the images to adapt to, and those of the task that the base model already does, if known."""
    images = options.images
    if images.data is None:
        return digits.read_digits(inverted=True), digits.read_digits(demo_clip.KNOWN_DIGITS)
    return read_class_folders(Path(images.data), images.val_fraction, images.split_seed, skipped), None


def with_demo_model(options: ClipOptions) -> ClipOptions:
    """Name the digits CLIP, pretrained first where it is not in the cache, if no model was chosen."""
    if options.clip.model is not None:
        return options
    folder = demo_clip.demo_model_folder(options.clip.cache_dir)
    return replace(options, clip=replace(options.clip, model=f"local-dir:{folder}"))


def load(options: ClipOptions, device: torch.device) -> LoadedClip:
    """Load the base model."""
    assert options.clip.model is not None
    clip = load_clip(options.clip.model, options.clip.pretrained, options.training.seed)
    clip.model.to(device)
    return clip


def check_reload(
    options: ClipOptions,
    device: torch.device,
    adaptation: Adaptation,
    exam: Exam,
    trained: Answers,
    run: RunFolder,
) -> float:
    """Load the saved file into a fresh base model and compare its logits with the trained model's.

    Returns the largest difference; raises RuntimeError when it is more than rounding.
    """
    fresh = reload(load(options, device), exam.class_names, options, adaptation, run.adapter)
    logits = fresh.predict(exam.images)
    difference = (logits - trained.logits).abs().max().item()
    return check_equal(difference, trained.logits.abs().max().item(), run)


if __name__ == "__main__":
    main()
