"""The options of train_dreambooth.py and their defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from randlora_vision.training.dreambooth.objectives import ObjectiveOptions
from randlora_vision.training.harness.options import (
    FREE,
    AdapterOptions,
    CheckpointOptions,
    RunOptions,
    TrainingOptions,
    also,
)

Method = Literal["randlora", "lora", "full"]
DemoFamily = Literal["unet", "flow"]
_DEMO_LR: Mapping[Method, float] = {"randlora": 1e-3, "lora": 3e-3, "full": 5e-4}
_LR: Mapping[Method, float] = {"randlora": 1e-4, "lora": 1e-4, "full": 5e-6}
_DEMO_RANK: Mapping[Method, int] = {"randlora": 8, "lora": 4}
_RANK: Mapping[Method, int] = {"randlora": 32, "lora": 8}
_ALPHA_PER_RANK: Mapping[Method, float] = {"randlora": 20.0, "lora": 2.0}


@dataclass(frozen=True)
class PipelineOptions:
    """The pipeline."""

    pretrained_model_name_or_path: str | None = None
    """A diffusers pipeline: a folder written by save_pretrained, or a name on the Hugging Face Hub. Stable Diffusion
    1.5, 2, XL and 3, and Flux are supported. By default, a tiny pipeline pretrained on handwritten digits."""
    revision: str | None = None
    """Revision of the pipeline on the Hub."""
    variant: str | None = None
    """Variant of the weights, such as fp16."""
    family: DemoFamily = "unet"
    """Which tiny pipeline to use by default: a UNet with noise prediction, or a transformer with flow matching."""
    train_text_encoder: bool = False
    """Also adapt the CLIP text encoders."""
    text_encoder_lr: float | None = None
    """Peak learning rate of the text encoders. Defaults to --lr."""
    max_sequence_length: int | None = None
    """Maximum prompt length for T5, in tokens (Stable Diffusion 3, Flux). Defaults to that of the pipeline."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: uses less memory and more time."""
    torch_compile: bool = False
    """Compile the forward and backward passes of the denoiser with torch.compile; pictures are sampled without it."""
    cache_dir: str | None = None
    """Folder that caches the tiny pipelines. Defaults to $RANDLORA_CACHE, or randlora_vision in the user's cache."""

    def __post_init__(self) -> None:
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            raise ValueError("--text-encoder-lr needs --train-text-encoder")
        _above("--text-encoder-lr", self.text_encoder_lr)
        _above("--max-sequence-length", self.max_sequence_length)


@dataclass(frozen=True)
class SubjectOptions:
    """The images to learn, their captions, and prior preservation."""

    instance_data_dir: str | None = None
    """A folder of images. A caption in a text file next to an image (name.txt) or in metadata.jsonl in the folder
    (file_name, text) takes precedence over --instance-prompt."""
    dataset_name: str | None = None
    """A Hugging Face dataset instead of a folder: a name on the Hub, or a folder written by save_to_disk."""
    image_column: str = "image"
    """The image column of the dataset."""
    caption_column: str | None = None
    """The caption column of the dataset. By default, all images use --instance-prompt."""
    instance_prompt: str | None = None
    """The caption of images without a separate caption, such as 'a photo of sks dog'."""
    with_prior_preservation: bool = False
    """Also train on images of the class, so that the model does not forget the class."""
    class_data_dir: str | None = None
    """A folder of class images. If it has too few, the base pipeline generates more and saves them there. Defaults to
    class_images in the run folder."""
    class_prompt: str | None = None
    """The caption of the class images, such as 'a photo of a dog'."""
    num_class_images: int = 100
    """Number of class images."""
    prior_loss_weight: float = 1.0
    """Weight of the loss on the class images."""
    sample_batch_size: int | None = None
    """Batch size for generating class images and validation pictures. Defaults to 4 (32 for the digits)."""
    resolution: int | None = None
    """Side of the square to which images are cropped; automatic buckets have about the same area. Defaults to that of
    the pipeline."""
    aspect_ratio_buckets: str | None = None
    """Sizes from which to choose for each image: 'height,width;height,width', or auto."""
    center_crop: bool = False
    """Crop images at the center instead of at random."""
    cache_latents: bool = True
    """Encode every image once before training; a random crop is then the same at every step."""

    def __post_init__(self) -> None:
        if self.instance_data_dir and self.dataset_name:
            raise ValueError("--instance-data-dir and --dataset-name both choose the images: give one")
        if self.caption_column and not self.dataset_name:
            raise ValueError("--caption-column needs --dataset-name")
        if self.with_prior_preservation and not self.class_prompt:
            raise ValueError("--with-prior-preservation needs --class-prompt")
        if not self.with_prior_preservation and (self.class_data_dir or self.class_prompt):
            raise ValueError("--class-data-dir and --class-prompt need --with-prior-preservation")
        for name in ("num_class_images", "sample_batch_size", "resolution"):
            _above(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.prior_loss_weight < 0:
            raise ValueError(f"--prior-loss-weight must be 0 or more, got {self.prior_loss_weight}")


@dataclass(frozen=True)
class ValidationOptions:
    """The pictures that are generated at every evaluation."""

    validation_prompt: tuple[str, ...] = ()
    """One or more prompts. By default, no pictures are generated."""
    num_validation_images: int = 4
    """Pictures per prompt."""
    num_inference_steps: int | None = None
    """Sampling steps. Defaults to those of the pipeline."""
    validation_guidance_scale: float | None = None
    """Guidance scale for sampling. Defaults to that of the pipeline."""

    def __post_init__(self) -> None:
        _above("--num-validation-images", self.num_validation_images)
        _above("--num-inference-steps", self.num_inference_steps)


@dataclass(frozen=True)
class HubOptions:
    """The Hugging Face Hub."""

    push_to_hub: bool = False
    """Upload the adapter with a model card after training; requires a login (hf auth login, or HF_TOKEN)."""
    hub_model_id: str | None = None
    """The repository to upload to: OWNER/NAME."""

    def __post_init__(self) -> None:
        if self.push_to_hub != (self.hub_model_id is not None):
            raise ValueError("--push-to-hub and --hub-model-id OWNER/NAME go together")


@dataclass(frozen=True)
class DreamBoothAdapterOptions(AdapterOptions):
    """What is trained."""

    method: Method = "randlora"
    """RandLoRA, PEFT's LoRA in the diffusers file format, or full fine-tuning."""
    target_modules: tuple[str, ...] = ()
    """Which weights of the denoiser to adapt: one preset or regular expression, or several name suffixes. Defaults to
    the attention weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            raise ValueError("--budget is not supported here: choose the size of LoRA with --rank")


@dataclass(frozen=True)
class DreamBoothTrainingOptions(TrainingOptions):
    """How it is trained."""

    batch_size: Annotated[int, also("--train-batch-size")] = 4
    """Instance images per forward call and process; with prior preservation, as many class images are added."""
    eval_every: Annotated[int, also("--validation-steps")] = 100
    """Steps between evaluations, which include pictures if there is a --validation-prompt. The model is always
    evaluated before the first and after the last step."""
    best_metric: str = "loss"
    """The metric that selects the best state. The loss is that of the training instance images at fixed noise."""
    use_8bit_adam: bool = False
    """Use AdamW of bitsandbytes with 8-bit states."""

    def __post_init__(self) -> None:
        if self.use_8bit_adam:
            if self.optimizer not in ("adamw", _ADAM_8BIT):
                raise ValueError("--use-8bit-adam and --optimizer both choose the optimiser: give one")
            object.__setattr__(self, "optimizer", _ADAM_8BIT)
        super().__post_init__()


_ADAM_8BIT = "bnbadamw8bit"


@dataclass(frozen=True)
class DreamBoothOptions:
    """All options of train_dreambooth.py."""

    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    subject: SubjectOptions = field(default_factory=SubjectOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    adapter: DreamBoothAdapterOptions = field(default_factory=DreamBoothAdapterOptions)
    training: DreamBoothTrainingOptions = field(default_factory=DreamBoothTrainingOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions, metadata=FREE)
    run: RunOptions = field(default_factory=RunOptions, metadata=FREE)
    hub: HubOptions = field(default_factory=HubOptions, metadata=FREE)

    def __post_init__(self) -> None:
        if self.hub.push_to_hub and (self.embedded or self.adapter.method != "randlora"):
            raise ValueError("--push-to-hub is for RandLoRA on your own pipeline")

    @property
    def embedded(self) -> bool:
        """Whether the subject is the embedded one."""
        return self.subject.instance_data_dir is None and self.subject.dataset_name is None


def resolve(options: DreamBoothOptions) -> DreamBoothOptions:
    """Return `options` with the defaults filled in, except those that depend on the pipeline."""
    pipeline, subject, adapter, training = options.pipeline, options.subject, options.adapter, options.training
    embedded, method = options.embedded, adapter.method
    if embedded != (pipeline.pretrained_model_name_or_path is None):
        missing = "--instance-data-dir or --dataset-name" if embedded else "--pretrained-model-name-or-path"
        raise ValueError(f"{missing} is missing: your own images and your own pipeline go together")
    if not embedded and subject.instance_prompt is None and subject.dataset_name and not subject.caption_column:
        raise ValueError("captions are missing: give --instance-prompt or --caption-column")
    if adapter.rank is None and method in _RANK:
        adapter = replace(adapter, rank=(_DEMO_RANK if embedded else _RANK)[method])
    if adapter.alpha is None and adapter.rank is not None and method in _ALPHA_PER_RANK:
        adapter = replace(adapter, alpha=_ALPHA_PER_RANK[method] * adapter.rank)
    lr = training.lr or (_DEMO_LR if embedded else _LR)[method]
    steps = training.steps or (300 if embedded else 500)
    if embedded:
        subject, options = _demo_subject(subject), replace(options, validation=_demo_validation(options.validation))
        pipeline = replace(pipeline, max_sequence_length=pipeline.max_sequence_length or 16)
    subject = replace(subject, sample_batch_size=subject.sample_batch_size or (32 if embedded else 4))
    if pipeline.train_text_encoder:
        pipeline = replace(pipeline, text_encoder_lr=pipeline.text_encoder_lr or lr)
    return replace(
        options,
        pipeline=pipeline,
        subject=subject,
        adapter=adapter,
        training=replace(training, lr=lr, steps=steps),
    )


def _demo_subject(subject: SubjectOptions) -> SubjectOptions:
    return replace(
        subject,
        instance_prompt=subject.instance_prompt or "a photo of sks digit",
        with_prior_preservation=True,
        class_prompt=subject.class_prompt or "a photo of a digit",
    )


def _demo_validation(validation: ValidationOptions) -> ValidationOptions:
    return replace(
        validation,
        validation_prompt=validation.validation_prompt
        or ("a photo of sks digit", "a photo of the digit seven", "a photo of the digit two"),
        num_inference_steps=validation.num_inference_steps or 20,
        validation_guidance_scale=validation.validation_guidance_scale or 3.0,
    )


def model_title(options: DreamBoothOptions) -> str:
    """Return a short name of the pipeline, without the path of its folder."""
    path = options.pipeline.pretrained_model_name_or_path
    return Path(path).name if path else f"the digits pipeline ({options.pipeline.family})"


def _above(flag: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise ValueError(f"{flag} must be above 0, got {value}")
