"""Teach a diffusion pipeline a subject or a style from a few images, with RandLoRA.

accelerate launch --quiet train_scripts/train_dreambooth.py

accelerate launch --quiet train_scripts/train_dreambooth.py --pretrained-model-name-or-path FOLDER_OR_HUB_NAME
--instance-data-dir IMAGES --instance-prompt "a photo of sks dog" --validation-prompt "a photo of sks dog on a beach"

Supports the pipelines listed in docs/diffusion.md: Stable Diffusion, Flux, Qwen-Image, Z-Image and others. Without
arguments, a tiny Stable Diffusion 3, which draws emoji, learns a new one, with no download. The run folder contains the
adapter, metrics, pictures and settings.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from randlora_vision.demos.emoji import demo_pipeline_folder
from randlora_vision.demos.subject import Judge, demo_subject
from randlora_vision.errors import user_errors
from randlora_vision.training.data.decode import parse_colour
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.dreambooth.buckets import Size, parse_buckets
from randlora_vision.training.dreambooth.class_images import ClassImages
from randlora_vision.training.dreambooth.clips import at_the_rate_of
from randlora_vision.training.dreambooth.defaults import DEFAULTS, resolve
from randlora_vision.training.dreambooth.diffusers_flags import DIFFUSERS
from randlora_vision.training.dreambooth.dry_run import measure
from randlora_vision.training.dreambooth.families import Family
from randlora_vision.training.dreambooth.loading import load_family
from randlora_vision.training.dreambooth.methods import (
    PipelineAdaptation,
    adapt,
    checkpoint_activations,
    trained_components,
)
from randlora_vision.training.dreambooth.options import DreamBoothOptions, DreamBoothSettings, model_title
from randlora_vision.training.dreambooth.pictures import Album, write_base_pictures
from randlora_vision.training.dreambooth.prior import prior_measure
from randlora_vision.training.dreambooth.results import (
    base_model,
    check_same,
    in_words,
    loading_code,
    lost_words,
    write_results,
)
from randlora_vision.training.dreambooth.samples import Autocast, Gallery, Sampler, largest_difference
from randlora_vision.training.dreambooth.shown import Shown, images_shown
from randlora_vision.training.dreambooth.subject import read_subject, require_given
from randlora_vision.training.dreambooth.task import Measure, TrainingSet, make_material, make_task
from randlora_vision.training.evaluation.model_card import write_card
from randlora_vision.training.evaluation.publishing import check_login, publish
from randlora_vision.training.evaluation.results import closing_words
from randlora_vision.training.harness.accelerators import make_accelerator
from randlora_vision.training.harness.epochs import in_steps
from randlora_vision.training.harness.fit import EVALUATED, finish, fit, open_run
from randlora_vision.training.harness.options import parse
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.harness.trackers import report_pictures
from randlora_vision.training.methods.adaptation import start


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    train(parse(DreamBoothOptions, argv, __doc__ or "", DIFFUSERS, DEFAULTS.help()))


def train(options: DreamBoothOptions) -> dict[str, Any]:
    """Sample, adapt, train with samples along the way, save and reload; return the content of summary.json."""
    check_login(options.hub)
    settings = resolve(options)
    if settings.pipeline.dry_run:
        base, dtype = base_of(settings)
        print(measure(base, settings, dtype))
        return {}
    # Some adapters get no gradient: text queries in a last block, layers of text encoders after the one that is used.
    accelerator = make_accelerator(settings.training, unused_parameters=True)
    device, say = accelerator.device, accelerator.print
    settings, run, resume = open_run(settings, "dreambooth", accelerator)
    skipped = SkipList(run.skipped if run.writing else None)
    subject = demo_subject(settings.subject) if settings.embedded else read_subject(settings.subject, skipped)
    with accelerator.main_process_first():  # it downloads; the others then use its files
        family = load(settings, device)
    trained_components(family, settings)  # raises before anything is made
    buckets = parse_buckets(
        settings.subject.aspect_ratio_buckets,
        settings.subject.resolution or family.default_resolution,
        family.size_multiple,
    )
    # Text is encoded first, and the denoiser loaded when the text encoders are gone, unless they are trained.
    set_seed(settings.training.seed)
    require_given(subject, family.takes, family.pipeline, settings.subject)
    subject = at_the_rate_of(family, subject, settings.subject.num_frames, skipped)
    shown = images_shown(subject, settings.validation.validation_image, family.takes, buckets[0])
    sampler = make_sampler(family, settings, buckets[0], accelerator.autocast, shown)
    folder = Path(settings.subject.class_data_dir or run.class_images)
    of_class = ClassImages(settings.subject, folder, sampler, accelerator, skipped)
    data = TrainingSet(subject, of_class.images, buckets)
    settings = in_steps(settings, max(len(subject.images), len(of_class.images)), accelerator.num_processes)
    say(f"pipeline: {model_title(settings)}, a {type(family.pipe).__name__}\nimages: {data}{skipped}")

    background = parse_colour(settings.subject.background)
    prior = prior_measure(sampler, settings, subject.captions[0], subject.images, background) if run.writing else None
    measures: list[Measure] = [prior] if prior else []
    if settings.embedded:
        measures.append(make_judge(sampler, settings))
    gallery = make_gallery(sampler, settings, subject.captions[0])
    material = make_material(family, data, settings)
    if material.note:
        say(material.note)
    if not settings.pipeline.train_text_encoder:
        family.drop_text_encoders()
    family.load_denoiser()
    family.offload()
    of_class.make()
    if prior:
        prior.begin()
    pictures = bool(settings.validation.validation_prompt) and run.writing
    if pictures and resume is None:
        write_base_pictures(run, gallery)
    adaptation = adapt(family, settings)
    start(adaptation, settings.adapter, resume is not None)
    say(f"\n{adaptation.report}\n{DEFAULTS.rank_note(options.adapter, options.embedded)}")
    path = run.adapter if run.writing else None
    task = make_task(family, adaptation, material, settings, accelerator.num_processes, path, measures)
    if settings.pipeline.gradient_checkpointing or settings.pipeline.offload_base:
        checkpoint_activations(getattr(family.pipe, name) for name in trained_components(family, settings))
    if settings.pipeline.torch_compile:
        task.loss.compile()
    album = Album(
        run,
        subject.images,
        gallery,
        adaptation,
        lambda step, paths: report_pictures(accelerator, step, paths),
        background,
    )
    speed = fit(task, settings, data, run, accelerator, resume, after_save=album.show if pictures else None)

    task.loss.requires_grad_(False)  # PyTorch chooses kernels by this flag: use those of the reloaded pipeline
    summary: dict[str, Any] = {}
    if run.writing:
        trained = gallery.draw()
        family.release()
        difference = check_reload(settings, device, accelerator.autocast, adaptation, run, gallery, trained)
        if pictures:
            album.finish([line["step"] for line in run.read_metrics() if line["split"] == EVALUATED])
        summary = write_results(run, settings, adaptation, speed, difference, skipped)
        before, after = in_words(summary["before"]), in_words(summary["after"])
        after = "\n".join([after, *lost_words(summary["before"], summary["after"])])
        code = loading_code(run, settings, base_of(settings)[0], family, adaptation, subject.captions[0])
        same = "a fresh pipeline, it gives the same pictures (largest pixel difference"
        say(closing_words(run, before, after, summary, code, same))
        card = partial(write_card, run, base_model(settings, family), subject.name, settings.training, summary, code)
    finish(run, accelerator, speed.steps)
    if run.writing:
        publish(run, settings.hub, card, say)
    return summary


def base_of(settings: DreamBoothSettings) -> tuple[str, torch.dtype]:
    """Return the base pipeline, and half precision if training uses it and the method does not train the base."""
    pipeline = settings.pipeline
    path = pipeline.pretrained_model_name_or_path
    if path is None:
        path = str(demo_pipeline_folder())
    halves = {"fp16": torch.float16, "bf16": torch.bfloat16} if settings.adapter.method != "full" else {}
    return path, halves.get(settings.training.mixed_precision, torch.float32)


def load(settings: DreamBoothSettings, device: torch.device) -> Family:
    """Load the base pipeline."""
    pipeline = settings.pipeline
    path, dtype = base_of(settings)
    family = load_family(
        path,
        settings.objective,
        pipeline.max_sequence_length,
        pipeline.revision,
        pipeline.variant,
        dtype,
        pipeline.quantize,
        pipeline.gguf_file,
        text_first=not pipeline.train_text_encoder,
        offload_to=pipeline.offload_base,
        vae=pipeline.pretrained_vae_model_name_or_path,
    )
    family.num_frames = settings.subject.num_frames
    family.move(device)
    return family


def make_sampler(
    family: Family, settings: DreamBoothSettings, size: Size, autocast: Autocast, shown: Shown | None
) -> Sampler:
    """Return a sampler with the validation settings."""
    validation = settings.validation
    return Sampler(
        family,
        size,
        settings.subject.sample_batch_size,
        autocast,
        validation.num_inference_steps,
        validation.validation_guidance_scale,
        shown,
    )


def make_gallery(sampler: Sampler, settings: DreamBoothSettings, caption: str) -> Gallery:
    """Return the validation gallery; without validation prompts, one picture of `caption` for the final check."""
    prompts = settings.validation.validation_prompt
    each = settings.validation.num_validation_images if prompts else 1
    seed, trained = settings.training.seed, settings.pipeline.train_text_encoder
    return Gallery(sampler, prompts or (caption,), each, seed, trained)


def make_judge(sampler: Sampler, settings: DreamBoothSettings) -> Judge:
    """Return the measure of how well the embedded subject is learnt and how much of the rest is kept."""
    prompt, trained = settings.subject.instance_prompt, settings.pipeline.train_text_encoder
    assert prompt is not None
    return Judge(sampler, prompt, settings.training.seed, trained)


def check_reload(
    settings: DreamBoothSettings,
    device: torch.device,
    autocast: Autocast,
    adaptation: PipelineAdaptation,
    run: RunFolder,
    gallery: Gallery,
    trained: list[list[torch.Tensor]],
) -> float:
    """Load the saved file into a fresh pipeline; return the largest difference between pixels."""
    fresh = load(settings, device)
    sampler = make_sampler(fresh, settings, gallery.sampler.size, autocast, gallery.sampler.shown)
    same = make_gallery(sampler, settings, gallery.prompts[0])
    if not settings.pipeline.train_text_encoder:
        fresh.drop_text_encoders()
    fresh.load_denoiser()
    adaptation.load(fresh.pipe, run.adapter)
    fresh.offload()
    return check_same(largest_difference(same.draw(), trained), run)


if __name__ == "__main__":
    main()
