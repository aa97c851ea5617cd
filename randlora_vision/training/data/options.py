"""Data options: the splits, shared by every script, and the images of train_clip.py."""

from dataclasses import dataclass, field
from typing import Literal

from randlora_vision.errors import reason_of
from randlora_vision.training.data.class_names import read_templates
from randlora_vision.training.data.decode import parse_colour
from randlora_vision.training.option_fields import AT_LEAST_1, INSIDE, PART, PLACE, RARE, Options

DIGIT_PAIRS = "digits-pairs"


@dataclass(frozen=True)
class SplitOptions(Options):
    """Which images are for training, and which are held out."""

    shots: int | None = field(default=None, metadata=AT_LEAST_1)
    """Train on this many images per class (all, where a class has fewer), drawn with --split-seed; split.json lists
    them."""
    train_fraction: float = field(default=1.0, metadata=RARE | PART)
    """Train on this fraction of the training images (of every class, where there are classes), drawn and listed
    in the same way."""
    val_fraction: float = field(default=0.2, metadata=RARE | INSIDE)
    """Fraction held out for validation where the data has no validation split: of every class, or of the
    image-text pairs (at most 1000 images)."""
    split_seed: int = field(default=0, metadata=RARE)
    """Seed of these choices, separate from --seed so that seeds are compared on the same images."""
    strict_data: bool = field(default=False, metadata=RARE)
    """Stop at an unreadable image. By default it is skipped, counted and listed in skipped.txt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots is not None and self.train_fraction != 1:
            raise ValueError("--shots and --train-fraction both choose the training images: give only one")


@dataclass(frozen=True)
class SourceOptions(Options):
    """The source of the images and of their captions or classes."""

    data: str | None = field(default=None, metadata=PLACE)
    """A folder of class folders, or of train/ and val/ or test/ with class folders in each; a folder of images with
    captions beside them (.txt, .caption) or in metadata.jsonl or .csv; a .csv or .tsv file with a column of paths and
    one of captions or labels; WebDataset shards: one .tar, 'train-{000..012}.tar', 'train-*.tar', several of these
    joined by ::, or a folder of them; torchvision:NAME; timm:NAME (torch/cifar10, hfds/ORG/NAME); hf:NAME,
    hf:NAME:CONFIG, or a folder written by Hugging Face's save_to_disk. After torchvision: and hf: names, @SPLIT
    selects a single split. digits-pairs: the embedded digits with captions. Default: all ten embedded digits, with
    background and foreground swapped."""
    val_data: str | None = field(default=None, metadata=PLACE)
    """Validation data, in any of the forms of --data. If it has splits, its validation (else test) split is used."""
    test_data: str | None = field(default=None, metadata=PLACE)
    """Test data, in any of the forms of --data. If it has splits, its test (else validation) split is used. Without it
    and without a test split in --data, only validation figures are reported."""
    split_folders: tuple[str, ...] = field(default=(), metadata=RARE)
    """Which folders in --data are its splits: train=Fit test=Final, or none if all of them are classes. By default,
    folders with usual names (Training, val, test_set...) that contain class folders."""
    streaming: bool = field(default=False, metadata=RARE)
    """Read the shards of --data in order while training goes on, instead of images from their middle: also compressed
    shards, and shards at any URL that webdataset or fsspec opens (s3, gs, http, hf, pipe:COMMAND). Needs --val-data,
    which is not streamed, and --epoch-images."""
    background: str = field(default="white", metadata=RARE)
    """The colour on which transparent pixels are composed, such as black or #808080."""
    data_root: str | None = field(default=None, metadata=PLACE | RARE)
    """Folder where torchvision, timm and Hugging Face's datasets keep their files (required for torchvision's)."""
    download: bool = False
    """Allow torchvision, timm and Hugging Face's datasets to download what is not on disk."""
    image_column: str | None = field(default=None, metadata=RARE)
    """The column of paths or images. Default: image, filepath, path or a similar name."""
    caption_column: str | None = field(default=None, metadata=RARE)
    """The column of captions (in shards, a key of the .json files). Default: caption, text or title, if present."""
    label_column: str | None = field(default=None, metadata=RARE)
    """The column of classes (in shards, a key of the .json files); the data then has classes, not captions.
    Default: label or class, if there are no captions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_column and self.caption_column:
            raise ValueError("--label-column and --caption-column exclude each other: give only one")
        if self.streaming and not self.val_data:
            raise ValueError("--streaming needs --data, and --val-data with images that are not streamed")
        if self.streaming and self.split_folders:
            raise ValueError("--streaming reads shards: leave --split-folders out")
        parse_colour(self.background)
        if (self.val_data or self.test_data) and self.embedded:
            raise ValueError("--val-data and --test-data need --data: the embedded digits already have all splits")

    def cannot_open(self, what: str, error: Exception) -> ValueError:
        """Return the error for data that another library cannot open, with a hint if it may not download it."""
        hint = "" if self.download else "; --download allows downloading it"
        return ValueError(f"cannot open {what}: {reason_of(error)}{hint}")

    @property
    def embedded(self) -> bool:
        """Whether the data are the embedded digits."""
        return self.data in (None, DIGIT_PAIRS)


@dataclass(frozen=True)
class DataOptions(SplitOptions, SourceOptions):  # a dataclass lists the fields of the last base first
    """The images, and which of them are for training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming and (self.shots is not None or self.train_fraction != 1):
            raise ValueError("--shots and --train-fraction need images that are counted: leave --streaming out")


@dataclass(frozen=True)
class ImageOptions(DataOptions):
    """The images, their class names and the prompts."""

    class_names: str | None = None
    """Class names: a file with a name for every class folder or label (JSON, or two columns in a .csv, .tsv or text
    file); a list (JSON, or one name per line) in the order of the labels, or by number where the labels are numbers;
    or imagenet, for open_clip's names of the 1000 classes. Default: the names in the data."""
    eval_split: Literal["train", "val", "test", "all"] | None = field(default=None, metadata=RARE)
    """What --eval-only measures of --data, and every evaluation of --retention-data. Default: its own test split, else
    its own validation split, else all of it. train and val are cut as in training if the data has no such split."""
    templates: tuple[str, ...] = ()
    """Prompts, each with {} for the class name; files of prompts (JSON, or one per line); openai or simple, for
    open_clip's 80 or 7 prompts. Default: those of CLIP's authors for well-known data sets (torchvision:GTSRB...), five
    prompts on the digits, else 'a photo of a {}.'."""
    prompts: Literal["average", "sample"] = field(default="sample", metadata=RARE)
    """How training uses several templates: average their features, or sample one template per class and step
    (cheaper when the text tower is trained). Evaluation always averages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        read_templates(self.templates)  # raises for invalid templates
