"""The images of train_classifier.py: embedded digits, class folders, datasets by timm's name, few shots of them."""

from pathlib import Path

from randlora_vision.training import demo_classifier, digits
from randlora_vision.training.class_folders import read_class_folders
from randlora_vision.training.classifier_datasets import read_dataset
from randlora_vision.training.classifier_options import ClassifierOptions, DataOptions
from randlora_vision.training.few_shots import training_part
from randlora_vision.training.images import ImageSplits, SkipList


def read_images(options: ClassifierOptions, skipped: SkipList) -> tuple[ImageSplits, ImageSplits | None]:
    """Return the images to adapt to, and those of the task that the base model already does, if known."""
    original = None
    if options.embedded and options.model.model is None:
        original = digits.read_digits(demo_classifier.KNOWN_DIGITS)
    return training_part(_read(options.data, skipped), options.data), original


def _read(data: DataOptions, skipped: SkipList) -> ImageSplits:
    if data.dataset is not None:
        return read_dataset(data, data.dataset)
    if data.data is None:
        return digits.read_digits(inverted=True)
    return read_class_folders(Path(data.data), data.val_fraction, data.split_seed, skipped)
