"""The options of data: what every script can be told of its splits, and the images of train_clip.py."""

from dataclasses import dataclass
from typing import Literal

from randlora_vision.training.data.class_names import read_templates

DIGIT_PAIRS = "digits-pairs"


@dataclass(frozen=True)
class SplitOptions:
    """Which images are for training, and which are held out."""

    shots: int | None = None
    """Train on so many images of every class, drawn with --split-seed; split.json lists them."""
    train_fraction: float = 1.0
    """Train on this part of the training images (of every class, where there are classes), drawn and listed
    likewise."""
    val_fraction: float = 0.2
    """Part held out for validation where the data has no split for it: of every class; of image-text pairs
    at most 1000 images."""
    split_seed: int = 0
    """Seed of these choices, apart from --seed so that seeds are compared on the same images."""
    strict_data: bool = False
    """Stop at an unreadable image. Otherwise it is skipped, counted and listed in skipped.txt."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val-fraction must be between 0 and 1, got {self.val_fraction}")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"--train-fraction must be above 0 and at most 1, got {self.train_fraction}")
        if self.shots is not None and self.shots < 1:
            raise ValueError(f"--shots must be 1 or more, got {self.shots}")
        if self.shots is not None and self.train_fraction != 1:
            raise ValueError("--shots and --train-fraction both choose the training images: give one")


@dataclass(frozen=True)
class SourceOptions:
    """Where the images come from, and what comes with them."""

    data: str | None = None
    """A folder of class folders, or of train/ and val/ or test/ with class folders in each; a .csv or .tsv file
    with a column of paths and one of captions or labels; WebDataset shards: one .tar, 'train-{000..012}.tar',
    'train-*.tar' or a folder of them; torchvision:NAME; hf:NAME, hf:NAME:CONFIG, or a folder that Hugging Face's
    save_to_disk wrote. After the last two, @SPLIT takes one split only. digits-pairs: the embedded digits with
    captions. Left out: the embedded digits, all ten, background and foreground swapped."""
    val_data: str | None = None
    """Validation data, given in the same ways (of several splits: that for validation, else for testing)."""
    data_root: str | None = None
    """Where torchvision and Hugging Face's datasets keep their files (torchvision has no place of its own)."""
    download: bool = False
    """Allow torchvision and Hugging Face's datasets to fetch what is not on the disk."""
    image_column: str | None = None
    """The column of paths or images. Left out: image, filepath, path or the like."""
    caption_column: str | None = None
    """The column of captions (in shards a key of the .json files). Left out: caption, text or title, if there."""
    label_column: str | None = None
    """The column of classes (in shards a key of the .json files), which makes it data with classes. Left out:
    where there are no captions, label or class."""

    def __post_init__(self) -> None:
        if self.label_column and self.caption_column:
            raise ValueError("--label-column and --caption-column: images are trained with one of the two, give one")
        if self.val_data and self.embedded:
            raise ValueError("--val-data needs --data: the embedded digits have a validation split")

    @property
    def embedded(self) -> bool:
        """Whether the data are the embedded digits."""
        return self.data in (None, DIGIT_PAIRS)


@dataclass(frozen=True)
class ImageOptions(SplitOptions, SourceOptions):  # a dataclass lists the fields of the last one first
    """The images and the words for them."""

    class_names: str | None = None
    """The words for the classes: a file, JSON or one name a line, in the order of the labels (class folders:
    sorted); or JSON with a name for every folder; or imagenet, for open_clip's names of the 1000 classes.
    Left out: the data's own."""
    templates: tuple[str, ...] = ()
    """Prompts, each with {} for the class name; files of them, one a line or JSON; openai or simple, for
    open_clip's 80 and 7. Left out: 'a photo of a {}.' (five on the digits)."""
    prompts: Literal["average", "sample"] = "sample"
    """In training, of several templates: their averaged features, or one template drawn per class and
    step (cheaper when the text tower learns). Evaluation always averages."""

    def __post_init__(self) -> None:
        SourceOptions.__post_init__(self)
        SplitOptions.__post_init__(self)
        read_templates(self.templates)  # refuses what is none
