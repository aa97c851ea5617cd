"""Load any open_clip model with its transforms and tokenizer, with errors that a user can act on."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose

from randlora_vision.errors import failures, without_logs
from randlora_vision.files.untrusted import read_json
from randlora_vision.json_values import check_object
from randlora_vision.names import close_matches
from randlora_vision.skeletons import without_draws


@dataclass(frozen=True)
class LoadedClip:
    """An open_clip model with its transforms and tokenizer."""

    model: nn.Module
    train_transform: Callable[[Image.Image], Tensor]
    eval_transform: Callable[[Image.Image], Tensor]
    tokenize: Callable[[Sequence[str]], Tensor]  # texts -> (texts, context) int64
    has_weights: bool

    def training_transform(
        self, augment: Callable[[Image.Image], Image.Image] | None
    ) -> Callable[[Image.Image], Tensor]:
        """Return the transform for training images: the model's own, or `augment` and then the evaluation transform."""
        return Compose([augment, self.eval_transform]) if augment else self.train_transform


def load_clip(
    name: str,
    pretrained: str | None,
    seed: int,
    changes: Mapping[str, Any] | None = None,
    augmentation: Mapping[str, Any] | None = None,
) -> LoadedClip:
    """Load a frozen open_clip model by name, `hf-hub:`, `local-dir:` or configuration file.

    `changes` are arguments of open_clip's factory that replace the model's own values: force_image_size (pixels),
    force_patch_dropout, image_mean, image_std, image_interpolation and image_resize_mode. `augmentation` replaces
    open_clip's augmentation settings.

    Without pretrained weights, the model is initialised randomly from `seed`, so the same call gives the
    same model. Raises ValueError for an unknown model or tag, with close matches, and for weights that
    do not fit or cannot be fetched.
    """
    import open_clip

    known = _model_name(name)
    schema, _ = open_clip.factory.parse_model_name(known)
    if schema is None:
        _check_pretrained(known, pretrained)
    elif pretrained:
        raise ValueError(f"--pretrained {pretrained}: {schema} models come with their own weights, leave it out")
    weights = f" with weights {pretrained!r}" if pretrained else ""
    has_weights = bool(pretrained or schema)

    def create() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(seed)
        return open_clip.create_model_and_transforms(
            known,
            pretrained=pretrained,
            device=torch.get_default_device(),
            **(changes or {}),
            aug_cfg=dict(augmentation or {}),
        )

    # open_clip also logs its failures through the root logger; one message is enough.
    with (
        failures(f"open_clip cannot load the model {name!r}{weights}"),
        without_logs(logging.ERROR),
        torch.random.fork_rng(devices=[]),
    ):
        with without_draws() if has_weights else nullcontext():
            model, train, evaluate = create()
        values = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
        if has_weights and any(tensor.isnan().any() for tensor in values):  # the file lacks some
            model, train, evaluate = create()
        tokenize = open_clip.get_tokenizer(known)
    drops = any(isinstance(part, open_clip.transformer.PatchDropout) for part in model.modules())
    if (changes or {}).get("force_patch_dropout") and not drops:
        raise ValueError(f"--force-patch-dropout: the model {name!r} does not drop patches, leave it out")
    model.requires_grad_(False)
    return LoadedClip(model, train, evaluate, tokenize, has_weights=has_weights)


def _model_name(name: str) -> str:
    """Return the name of the model in open_clip, registering a configuration file first."""
    import open_clip

    if name.endswith(".json"):
        return _register(Path(name))
    schema, _ = open_clip.factory.parse_model_name(name)
    names = open_clip.list_models()
    if schema is None and name.replace("/", "-") not in names:
        close = close_matches(name, names, cutoff=0.5) or close_matches(name.upper(), names)
        hint = f"; {close}" if close else ""
        raise ValueError(
            f"open_clip has no model {name!r}{hint} (python -c 'import open_clip; print(open_clip.list_models())' "
            "lists them all; hf-hub:ORG/REPO, local-dir:FOLDER and a .json configuration work too)"
        )
    return name


def _register(path: Path) -> str:
    import open_clip

    config = read_json(path)
    kinds = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    check_object(config, kinds, f"{path} is not an open_clip model configuration")
    if open_clip.get_model_config(path.stem) not in (None, config):
        raise ValueError(f"open_clip already has another model named {path.stem!r}: rename {path}")
    open_clip.add_model_config(path)
    return path.stem


def _check_pretrained(name: str, pretrained: str | None) -> None:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None or pretrained in tags or os.path.isfile(pretrained):
        return
    which = close_matches(pretrained, tags) or f"it has: {', '.join(tags) or 'none'}"
    raise ValueError(f"{pretrained!r} is neither a file nor a tag of {name}; {which}")
