"""Adapt a timm image classifier to your images with RandLoRA.

accelerate launch train_scripts/train_classifier.py

accelerate launch train_scripts/train_classifier.py --data FOLDER --model vit_base_patch16_224 --pretrained

Without arguments, it trains on handwritten digits that need no download. Adapters are added to the backbone, the
classifier head is trained in full, and both are saved in one file. The run folder contains that file, the metrics,
the figures and the settings.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import set_seed

from randlora_vision.demos import classifier as demo_classifier
from randlora_vision.errors import user_errors
from randlora_vision.training.classifier.data import read_images
from randlora_vision.training.classifier.evaluation import Answers, Exam, write_results
from randlora_vision.training.classifier.methods import adapt, adapter_targets, head_parameters
from randlora_vision.training.classifier.models import LoadedClassifier, load_classifier, with_own_head
from randlora_vision.training.classifier.options import ClassifierOptions, resolve
from randlora_vision.training.classifier.task import ClassifierTask
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.evaluation.results import check_equal, closing_words
from randlora_vision.training.harness.accelerators import make_accelerator
from randlora_vision.training.harness.fit import finish, fit, open_run
from randlora_vision.training.harness.memory import checkpoint_activations, placed
from randlora_vision.training.harness.options import parse
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.methods.adaptation import Adaptation
from randlora_vision.training.methods.lora import resolve_budget


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    train(parse(ClassifierOptions, argv, __doc__ or ""))


def train(options: ClassifierOptions) -> dict[str, Any]:
    """Evaluate, adapt, train, save, reload and evaluate again; return the content of summary.json."""
    options = resolve(options)
    training = options.training
    accelerator = make_accelerator(training)
    say = accelerator.print
    options, run, resume = open_run(options, "classifier", accelerator)
    skipped = SkipList(run.skipped if run.writing else None, options.data.strict_data)
    with accelerator.main_process_first():  # it downloads or pretrains; the others then use its files
        splits, original = read_images(options, skipped)
        options = with_demo_model(options)
        loaded = load_classifier(options.model, len(splits.class_names), training.seed)
    model = placed(loaded.model, accelerator.device, options.speed.channels_last)
    say(f"model: {options.model.model}{'' if loaded.has_weights else ' with RANDOM weights (no --pretrained)'}")
    say(f"images: {splits}{skipped}")
    for note in splits.notes:
        say(f"note: {note}")

    set_seed(training.seed)
    exam = Exam(splits, original, loaded.eval_transform, skipped, training.batch_size, training.workers)
    before = take_before(options, loaded, exam, original is not None, accelerator.device)
    options = resolve_budget(options, model, adapter_targets)
    head_numbers = sum(parameter.numel() for _, parameter in head_parameters(model))
    if options.speed.gradient_checkpointing:
        checkpoint_activations(model, "the backbone")
    adaptation = adapt(model, options)
    say(f"before: {before or NO_HEAD}\n\n{adaptation.report}\n")

    task = ClassifierTask(
        model,
        adaptation,
        train=splits.select("train", loaded.training_transform(splits, options.augment), skipped),
        val=splits.select("val", loaded.eval_transform, skipped),
        classes=len(splits.class_names),
        options=options,
        processes=accelerator.num_processes,
        path=run.adapter if run.writing else None,
    )
    if options.speed.torch_compile:
        task.loss.compile()
    speed = fit(task, options, splits, run, accelerator, resume)
    model.requires_grad_(False)  # PyTorch chooses kernels by this flag: use those of the reloaded model
    after = exam.take(model)
    summary: dict[str, Any] = {}
    if run.writing:
        difference = check_reload(options, accelerator.device, adaptation, exam, after, run)
        summary = write_results(run, options, adaptation, head_numbers, exam, before, after, speed, difference)
        code = loaded.code + adaptation.loading_code(run.adapter)
        say(closing_words(run, before or NO_HEAD, after, summary, code))
    finish(run, accelerator, speed.steps)
    return summary


NO_HEAD = "not measured (the classifier head is new)"


def with_demo_model(options: ClassifierOptions) -> ClassifierOptions:
    """Set the model to the digits ViT if none was chosen, pretraining it first if it is not cached."""
    if options.model.model is not None:
        return options
    folder = demo_classifier.demo_model_folder(options.model.cache_dir)
    return replace(options, model=replace(options.model, model=f"local-dir:{folder}", pretrained=True))


def take_before(
    options: ClassifierOptions, loaded: LoadedClassifier, exam: Exam, demo: bool, device: torch.device
) -> Answers | None:
    """Evaluate the base model with the pretrained head; None if that head is for other classes."""
    if demo:  # its head has five of the ten classes
        return exam.take(with_own_head(options.model, options.training.seed).to(device))
    return None if loaded.fresh_head else exam.take(loaded.model)


def check_reload(
    options: ClassifierOptions,
    device: torch.device,
    adaptation: Adaptation,
    exam: Exam,
    trained: Answers,
    run: RunFolder,
) -> float:
    """Load the saved file into a fresh base model and return the largest difference between logits."""
    loaded = load_classifier(options.model, len(exam.class_names), options.training.seed)
    fresh = placed(loaded.model, device, options.speed.channels_last)
    adaptation.load(fresh, run.adapter)
    difference = (exam.predict(fresh) - trained.logits).abs().max().item()
    return check_equal(difference, trained.logits.abs().max().item(), run)


if __name__ == "__main__":
    main()
