"""The options of train_dreambooth.py, as given and with the defaults filled in."""

from dataclasses import dataclass, field
from typing import Literal

from randlora_vision.names import short_name
from randlora_vision.training.data.decode import parse_colour
from randlora_vision.training.data.video import require_reader
from randlora_vision.training.dreambooth.objectives import ObjectiveOptions
from randlora_vision.training.dreambooth.pipeline_options import PipelineOptions as PipelineOptions
from randlora_vision.training.harness.options import (
    AdapterOptions,
    CheckpointOptions,
    HubOptions,
    RunOptions,
    Training,
    TrainingOptions,
)
from randlora_vision.training.option_fields import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    FREE,
    PLACE,
    RARE,
    Options,
    needs,
)


@dataclass(frozen=True)
class SubjectOptions(Options):
    """The images to learn, their captions, and prior preservation."""

    instance_data_dir: str | None = field(default=None, metadata=PLACE)
    """A folder of images. A caption in a text file next to an image (name.txt, name.caption) or in metadata.jsonl or
    metadata.csv in the folder (file_name, text) takes precedence over --instance-prompt."""
    dataset_name: str | None = None
    """A Hugging Face dataset instead of a folder: a name on the Hub, or a folder written by save_to_disk."""
    image_column: str = field(default="image", metadata=RARE)
    """The image column of the dataset."""
    caption_column: str | None = field(default=None, metadata=RARE | needs("dataset_name"))
    """The caption column of the dataset. Default: all images use --instance-prompt."""
    instance_prompt: str | None = None
    """The caption of images without a separate caption, such as 'a photo of sks dog'."""
    trigger_word: str | None = field(default=None, metadata=RARE)
    """A word that every caption of the subject begins with, unless it contains it already."""
    shuffle_caption: bool = field(default=False, metadata=RARE)
    """Draw the tags of a caption, separated by commas, in one of 16 orders at every step."""
    keep_tokens: int = field(default=0, metadata=RARE | AT_LEAST_0 | needs("shuffle_caption"))
    """How many tags at the beginning of a caption --shuffle-caption leaves in place (count the trigger word)."""
    caption_dropout_rate: float = field(default=0.0, metadata=RARE | BELOW_1)
    """Fraction of the steps in which an image of the subject is trained with an empty caption."""
    background: str = field(default="white", metadata=RARE)
    """The colour on which transparent pixels are composed, such as black or #808080."""
    mask_data_dir: str | None = field(default=None, metadata=RARE | needs("instance_data_dir"))
    """A folder with a mask for each image of --instance-data-dir, of the same name: the loss counts where it is white
    and does not where it is black. For inpainting: what is white is made anew. Default there: random masks."""
    alpha_mask: bool = field(default=False, metadata=RARE)
    """Let the loss count only where the images of the subject are opaque."""
    cond_data_dir: tuple[str, ...] = field(default=(), metadata=RARE | needs("instance_data_dir"))
    """For a pipeline that edits: a folder with the image to edit for each image of --instance-data-dir, of the same
    name. The caption says what the edit does. Qwen-Image-Edit 2509 and later take several folders."""
    cond_image_column: tuple[str, ...] = field(default=(), metadata=RARE | needs("dataset_name"))
    """The same for --dataset-name: the column of the images to edit, or several."""
    num_frames: int = field(default=1, metadata=RARE | AT_LEAST_1 | needs("instance_data_dir"))
    """For a pipeline of videos: train on clips of so many frames of the videos in --instance-data-dir, at the rate of
    the pipeline, and generate such clips. Wan takes 4k+1 frames, LTX 8k+1. Images are clips of one frame."""
    with_prior_preservation: bool = field(default=False, metadata=needs("class_prompt"))
    """Also train on images of the class, so that the model does not forget the class."""
    class_data_dir: str | None = field(default=None, metadata=PLACE | RARE | needs("with_prior_preservation"))
    """A folder of class images. If it has too few, the base pipeline generates more and saves them there. Default:
    class_images in the run folder."""
    class_prompt: tuple[str, ...] = field(default=(), metadata=needs("with_prior_preservation"))
    """One or more prompts of the class, such as 'a photo of a dog', for which class images are generated in turn.
    Several keep more of what the class contains, and '' among them keeps the empty prompt, which guidance compares
    with. Images with captions beside them keep those; an empty text file is the empty prompt."""
    num_class_images: int = field(default=100, metadata=RARE | ABOVE_0)
    """Number of class images."""
    prior_loss_weight: float = field(default=1.0, metadata=RARE | AT_LEAST_0)
    """Weight of the loss on the class images."""
    sample_batch_size: int | None = field(default=None, metadata=RARE | ABOVE_0)
    """Batch size for generating class images and validation pictures. Default: 4 (32 for the demo)."""
    resolution: int | None = field(default=None, metadata=ABOVE_0)
    """Side of the square to which images are cropped; automatic buckets have about the same area. Default: that of
    the pipeline."""
    aspect_ratio_buckets: str | None = field(default=None, metadata=RARE)
    """Sizes from which to choose for each image: 'height,width;height,width', or auto."""
    center_crop: bool = field(default=False, metadata=RARE)
    """Crop images at the center instead of at random."""
    cache_latents: bool = field(default=True, metadata=RARE)
    """Encode every image once before training; a random crop is then the same at every step."""
    cache_to_disk: str | None = field(default=None, metadata=FREE | RARE | needs("cache_latents"))
    """A folder in which the encodings of images and captions are kept, by their content, for this and other runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_colour(self.background)
        if self.instance_data_dir and self.dataset_name:
            raise ValueError("--instance-data-dir and --dataset-name both choose the images: give only one")
        if self.mask_data_dir and self.alpha_mask:
            raise ValueError("--mask-data-dir and --alpha-mask both choose the masks: give only one")
        if self.num_frames > 1:
            if self.mask_data_dir or self.alpha_mask or self.cond_data_dir or self.with_prior_preservation:
                raise ValueError("--num-frames above 1 is without masks, images to edit and prior preservation")
            require_reader()


@dataclass(frozen=True)
class ValidationOptions(Options):
    """The pictures that are generated at every evaluation."""

    validation_prompt: tuple[str, ...] = ()
    """One or more prompts. Default: no pictures are generated."""
    validation_image: tuple[str, ...] = field(default=(), metadata=RARE)
    """Images to edit, or whose middle to make anew by inpainting, in turn for the pictures. Default: those of the
    training data."""
    num_validation_images: int = field(default=4, metadata=RARE | ABOVE_0)
    """Pictures per prompt."""
    num_inference_steps: int | None = field(default=None, metadata=RARE | ABOVE_0)
    """Sampling steps. Default: those of the pipeline."""
    validation_guidance_scale: float | None = field(default=None, metadata=RARE)
    """Guidance scale for sampling. Default: that of the pipeline."""
    prior_prompt: tuple[str, ...] = field(default=(), metadata=RARE | needs("num_prior_images"))
    """Prompts that are not the subject's, whose pictures should stay those of the base: prior_drift measures by how
    much they change. Default: the class prompts, or else a few everyday ones, if there is a --validation-prompt."""
    num_prior_images: int = field(default=4, metadata=RARE | AT_LEAST_0)
    """Pictures by which the prior is measured at every evaluation, one for each prompt in turn; 0: none."""
    likeness_encoder: str | None = field(default=None, metadata=RARE | needs("num_prior_images"))
    """A model of timm, such as vit_small_patch14_dinov2.lvd142m, in whose features the likeness of the pictures to the
    base's (prior_likeness) and to the instance images (subject_likeness) is measured too. --best-metric balance, the
    harmonic mean of both, then selects a state that has learnt the subject and kept the rest."""


@dataclass(frozen=True)
class DreamBoothAdapterOptions(AdapterOptions):
    """What is trained."""

    method: Literal["randlora", "lora", "full"] = "randlora"
    """RandLoRA, PEFT's LoRA in the diffusers file format, or full fine-tuning."""
    target_modules: tuple[str, ...] = field(default=(), metadata=RARE)
    """Which weights of the denoiser to adapt: one preset or regular expression, or several name suffixes. Default: the
    attention weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            raise ValueError("--budget is not supported here: choose the size of LoRA with --rank")


@dataclass(frozen=True)
class DreamBoothTrainingOptions(TrainingOptions):
    """How it is trained."""

    batch_size: int = field(default=4, metadata=AT_LEAST_1)
    """Instance images per forward call and process; with prior preservation, as many class images are added."""
    eval_every: int = field(default=100, metadata=AT_LEAST_1)
    """Steps between evaluations. They include pictures if there is a --validation-prompt. The model is always
    evaluated before the first and after the last step."""
    best_metric: str = field(default="loss", metadata=RARE)
    """The metric that selects the best state. The loss is that of the training instance images at fixed noise; balance
    needs a --likeness-encoder."""
    use_8bit_adam: bool = False
    """Use AdamW of bitsandbytes with 8-bit states."""

    def __post_init__(self) -> None:
        if self.use_8bit_adam:
            if self.optimizer not in ("adamw", _ADAM_8BIT):
                raise ValueError("--use-8bit-adam and --optimizer both choose the optimiser: give only one")
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
        if self.pipeline.quantize is not None and self.adapter.method == "full":
            raise ValueError("--quantize is for a frozen base: give --method randlora or lora")
        if self.pipeline.offload_base is not None and self.adapter.method != "randlora":
            raise ValueError("--offload-base is for --method randlora, whose adapters stay beside offloaded weights")

    @property
    def embedded(self) -> bool:
        """Whether the subject is the embedded one."""
        return self.subject.instance_data_dir is None and self.subject.dataset_name is None


@dataclass(frozen=True, kw_only=True)
class DreamBoothSubject(SubjectOptions):
    """The images to learn, with the defaults filled in."""

    sample_batch_size: int


@dataclass(frozen=True, kw_only=True)
class DreamBoothTraining(DreamBoothTrainingOptions, Training):
    """How it is trained, with the defaults filled in."""

    steps: int = field(metadata=FREE)
    lr: float


@dataclass(frozen=True, kw_only=True)
class DreamBoothSettings(DreamBoothOptions):
    """All options with the defaults filled in, except those that depend on the pipeline."""

    subject: DreamBoothSubject
    training: DreamBoothTraining


def model_title(options: DreamBoothOptions) -> str:
    """Return a short name of the pipeline, without the path of its folder."""
    path = options.pipeline.pretrained_model_name_or_path
    return short_name(path) if path else "the emoji pipeline"
