"""A loaded timm classifier: how images are prepared for it, and the code that repeats it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import Compose

from randlora_vision.training.classifier.copies import Copies
from randlora_vision.training.classifier.options import AugmentOptions, ClassifierModel
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.pictures import Transform
from randlora_vision.training.evaluation.model_card import Base, commit_of

_SHOWN = 20  # class names in the code of the printed summary


@dataclass(frozen=True)
class LoadedClassifier:
    """A timm model with its data configuration and the code that creates it."""

    model: nn.Module
    data_config: Mapping[str, Any]
    code: list[str]  # the Python lines that create `model`
    has_weights: bool
    fresh_head: bool

    @property
    def eval_transform(self) -> Transform:
        """The evaluation transform of timm."""
        from timm.data import create_transform

        return self._for_channels(create_transform(**self._colour_config))

    @property
    def _colour_config(self) -> dict[str, Any]:
        """The data configuration for colour images; that of a grey model normalises every colour alike."""
        config = dict(self.data_config)
        if self.channels == 1:
            config["input_size"] = (3, *config["input_size"][1:])
            config |= {name: (sum(config[name]) / len(config[name]),) * 3 for name in ("mean", "std")}
        return config

    @property
    def channels(self) -> int:
        """The number of channels of the images that the model takes."""
        return int(self.data_config["input_size"][0])

    def using_code(self, class_names: Sequence[str]) -> list[str]:
        """Return the Python lines that apply `model` to a picture, prepared as for evaluation."""
        transform = f"timm.data.create_transform(**{dict(self._colour_config)!r})"
        lines = ["from PIL import Image", f"transform = {transform}"]
        picture = 'transform(Image.new("RGB", (224, 224)))'
        if self.channels == 1:
            lines.append("from randlora_vision.training.classifier.loaded import to_grey")
            picture = f"to_grey({picture})"
        if len(class_names) <= _SHOWN:
            lines.append(f"answers = {list(class_names)!r}")
        return [
            *lines,
            "model.eval()",
            "with torch.no_grad():",
            f"    logits = model({picture}[None])  # or Image.open(FILE)",
            f"print({'answers[int(logits.argmax())]' if len(class_names) <= _SHOWN else 'int(logits.argmax())'})",
        ]

    def base(self, chosen: ClassifierModel) -> Base:
        """Return the base model, for the card."""
        config = getattr(self.model, "pretrained_cfg", None) or {}
        repository = str(config.get("hf_hub_id") or "") if chosen.pretrained else ""
        name, _, revision = repository.partition("@")
        local = chosen.model.startswith("local-dir:") or not name
        tag = f".{config['tag']}" if config.get("tag") and "." not in chosen.title and not local else ""
        commit = None if local else commit_of(name, revision or None)
        return Base("timm", "image-classification", chosen.title + tag, None if local else name, commit)

    def _for_channels(self, transform: Transform) -> Transform:
        """Return a transform of colour images, followed by their conversion to grey (ITU-R 601) for a grey model."""
        return transform if self.channels == 3 else Compose([transform, to_grey])

    def training_transform(self, splits: ImageSplits, augment: AugmentOptions) -> Transform:
        """Return the training transform: timm's, or the augmentation that belongs to the data if none was requested."""
        from timm.data import create_transform

        if _is_own(splits, augment):
            assert splits.augment is not None
            if augment.aug_splits:
                return Copies(Compose([]), splits.augment, self.eval_transform, self.eval_transform, augment.aug_splits)
            return Compose([splits.augment, self.eval_transform])
        config = {name: value for name, value in self._colour_config.items() if name not in ("crop_pct", "crop_mode")}
        try:
            arguments = {**config, "is_training": True, **_timm_arguments(augment)}
            if augment.aug_splits:
                crop, change, last = create_transform(**arguments, separate=True)
                first = create_transform(**{**arguments, "re_prob": 0.0}, separate=True)[2] if augment.resplit else last
                return Copies(crop, change, self._for_channels(last), self._for_channels(first), augment.aug_splits)
            transform: Transform = create_transform(**arguments)
        except Exception as error:  # assertions and others, for a string that timm cannot parse
            raise ValueError(f"timm cannot create the --auto-augment {augment.auto_augment!r}: {error}") from error
        return self._for_channels(transform)

    def preprocessing(self, splits: ImageSplits, augment: AugmentOptions, background: str) -> dict[str, dict[str, Any]]:
        """Return what a run folder keeps: how images are prepared, in timm's words."""
        own = {"augmentation of the data": str(splits.augment)} if _is_own(splits, augment) else None
        evaluation = {**self.data_config, "background": background}
        return {"evaluation": evaluation, "training": own or _timm_arguments(augment)}


def _is_own(splits: ImageSplits, augment: AugmentOptions) -> bool:
    """Return whether the training images get the augmentation that belongs to the data."""
    chosen = augment.auto_augment or augment.random_erasing or augment.no_aug
    return splits.augment is not None and not chosen


def _timm_arguments(augment: AugmentOptions) -> dict[str, Any]:
    if augment.no_aug:
        return {"no_aug": True}
    return {
        **({"interpolation": augment.train_interpolation} if augment.train_interpolation else {}),
        "scale": augment.scale,
        "ratio": augment.ratio,
        "hflip": augment.hflip,
        "vflip": augment.vflip,
        "color_jitter": augment.color_jitter,
        "auto_augment": augment.auto_augment,
        "re_prob": augment.random_erasing,
        "re_mode": augment.erasing_mode,
        "re_count": augment.erasing_count,
    }


def to_grey(image: Tensor) -> Tensor:
    """Return the brightness (1, H, W) of a colour image (3, H, W) whose channels are normalised alike."""
    return (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0, keepdim=True)
