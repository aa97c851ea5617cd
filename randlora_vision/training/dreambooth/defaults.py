"""The defaults of train_dreambooth.py, which depend on the method and the subject."""

from dataclasses import replace

from randlora_vision.training.dreambooth.options import (
    DreamBoothOptions,
    DreamBoothSettings,
    DreamBoothSubject,
    DreamBoothTraining,
    SubjectOptions,
    ValidationOptions,
)
from randlora_vision.training.methods.defaults import Defaults, ScriptDefaults, with_rank
from randlora_vision.training.option_fields import without

DEFAULTS = ScriptDefaults(
    own={"randlora": Defaults(1e-4, 32), "lora": Defaults(1e-4, 8), "full": Defaults(5e-6)},
    demo={"randlora": Defaults(2e-3, 8), "lora": Defaults(6e-3, 4), "full": Defaults(5e-4)},
    own_steps=500,
    demo_steps=300,
)


_T5_LENGTH = 4  # the demo's pipeline has no T5, and was taught with as many zeros in its place
_SUBJECT = "a sks face"
_CLASS = (
    *("a red heart", "a blue heart", "a yellow circle", "a green square", "a red apple", "a banana", "a strawberry"),
    *("a cat face", "a dog face", "a panda face", "a frog face on a pink background", "a smiling face"),
    *("a crying face", "a skull", "an alien", "a ghost on a blue background", "a rocket", "a present"),
    *("a sunflower", "a hamburger", "a doughnut on a yellow background", "a teddy bear", "a butterfly"),
    "",  # guidance moves all pictures away from this one: if it learns the subject, the others lose what that has
)
"""The prompts of the demo's class images: a part of what its pipeline draws."""


def resolve(options: DreamBoothOptions) -> DreamBoothSettings:
    """Return the options with the defaults filled in, except those that depend on the pipeline."""
    pipeline, subject, adapter, training = options.pipeline, options.subject, options.adapter, options.training
    embedded, validation = options.embedded, options.validation
    if embedded != (pipeline.pretrained_model_name_or_path is None):
        missing = "--instance-data-dir or --dataset-name" if embedded else "--pretrained-model-name-or-path"
        raise ValueError(f"{missing} is missing: your own images and your own pipeline go together")
    if not embedded and subject.instance_prompt is None and subject.dataset_name and not subject.caption_column:
        raise ValueError("captions are missing: give --instance-prompt or --caption-column")
    defaults = DEFAULTS.of(adapter.method, embedded)
    if training.lr == "auto":
        raise ValueError(f"--lr auto has no rule for diffusion models: leave --lr out for the default {defaults.lr:g}")
    lr = training.lr or defaults.lr
    if embedded:
        subject, validation = _demo_subject(subject), _demo_validation(validation)
        pipeline = replace(pipeline, max_sequence_length=pipeline.max_sequence_length or _T5_LENGTH)
    if pipeline.train_text_encoder:
        pipeline = replace(pipeline, text_encoder_lr=pipeline.text_encoder_lr or lr)
    return DreamBoothSettings(
        **without(options, "pipeline", "subject", "adapter", "training", "validation"),
        pipeline=pipeline,
        subject=DreamBoothSubject(
            **without(subject, "sample_batch_size"),
            sample_batch_size=subject.sample_batch_size or (32 if embedded else 4),
        ),
        adapter=with_rank(adapter, defaults.rank),
        training=DreamBoothTraining(
            **without(training, "lr", "steps"), lr=lr, steps=training.steps or DEFAULTS.steps(embedded)
        ),
        validation=validation,
    )


def _demo_subject(subject: SubjectOptions) -> SubjectOptions:
    return replace(
        subject,
        instance_prompt=subject.instance_prompt or _SUBJECT,
        with_prior_preservation=True,
        class_prompt=subject.class_prompt or _CLASS,
    )


def _demo_validation(validation: ValidationOptions) -> ValidationOptions:
    return replace(
        validation,
        validation_prompt=validation.validation_prompt
        or (_SUBJECT, f"{_SUBJECT} on a blue background", "a red heart", "a cat face"),
        num_inference_steps=validation.num_inference_steps or 12,
        validation_guidance_scale=validation.validation_guidance_scale or 2.0,
    )
