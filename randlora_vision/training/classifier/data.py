"""The images of train_classifier.py, and those of the task that its base model already does."""

from randlora_vision.training.classifier.options import ClassifierOptions
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.read import read_data
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import digits


def read_images(options: ClassifierOptions, skipped: SkipList) -> tuple[ImageSplits, ImageSplits | None]:
    """Return the images, and those of the base model's original task if known; raise ValueError for captions."""
    splits = read_data(options.data, skipped)
    if not isinstance(splits, ImageSplits):
        raise ValueError(f"--data {options.data.data} has captions, not classes: --label-column names the classes")
    known = options.embedded and options.model.model is None
    return splits, digits.read_digits(digits.KNOWN_DIGITS) if known else None
