"""transformers: presets for vision towers, text towers, language models and projectors, and checkpoints of the Trainer.

    inject(model, RandLoRAConfig(rank=32, target_modules="transformers:language"))
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[AdapterCheckpoints()])

The presets follow the configuration of a model, not its name:

- ``transformers:vision``: the attention and MLP weights of the vision tower: a model of images alone (ViT, DINOv2,
  DINOv3), the image tower of CLIP or SigLIP, or the one of a vision-language model. If its body has more weights in
  convolutions than in linear layers (ResNet), its ungrouped convolutions are adapted too.
- ``transformers:text``: the attention and MLP weights of a text encoder: BERT, T5, or the text tower of CLIP or SigLIP.
- ``transformers:language``: the attention and MLP weights of a language model that generates text, alone (Llama, Qwen)
  or in a vision-language model (SmolVLM, Qwen-VL, LLaVA, PaliGemma).
- ``transformers:projector``: what connects them: the projector, connector, merger or Q-Former of a vision-language
  model, the projections of CLIP into the shared space.

No preset includes embeddings, classifiers, ``lm_head``, poolers that only add an unused output, or matrices that are
too narrow to be projections. Join presets by calling their functions, for example
``target_modules=language_targets(model) + projector_targets(model)``.

Layers whose output a model does not use (the last one of LLaVA's vision tower, by ``vision_feature_layer``) are skipped
with that reason in the report. Experts whose weights are packed into one three-dimensional parameter cannot be adapted.

`AdapterCheckpoints` makes the Trainer's checkpoints hold the trained numbers alone. To write a model that loads without
this package, call ``merge(model)``, then ``model.save_pretrained(folder)``.
"""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from randlora_vision.injection.candidates import CONVOLUTION, PARAMETER, Candidate, candidates
from randlora_vision.integrations.presets import towers as _towers
from randlora_vision.layers.peft_around import plain_modules

if TYPE_CHECKING:
    from randlora_vision.integrations._trainer import AdapterCheckpoints as AdapterCheckpoints

# What reads pixels or tokens, adds positions, or summarises for an output of its own.
_OUTSIDE = re.compile(r"(?i)embed|pooler|position_bias|rel(ative)?_pos")
# What joins a vision tower and a language model, inside one of them (Qwen's merger) or beside them.
_JOINT = re.compile(r"(?i)project(or|ion)|connector|merger|resampler|q_?former|aligner|abstractor")
_VISION, _LANGUAGE = re.compile(r"(?i)vision|image|visual"), re.compile(r"(?i)text|language|llm")


def vision_targets(model: nn.Module) -> list[str]:
    """Return the attention and MLP weights of the vision tower, in the model's order."""
    parts = _Parts(model)
    path = parts.need(parts.vision, "vision", "vision tower")
    tower = path if parts.backbone is None else parts.backbone
    prefix = f"{tower}." if tower else ""
    matrices = _towers.by_majority(_towers.body(model.get_submodule(tower), ()))
    found = {f"{prefix}{matrix.name}" for matrix in matrices}
    if tower != path:  # a detector or segmenter: its own layers, too
        found |= {name for name in parts.blocks(path) if not _inside(name, tower)}
    # The attention pooling of SigLIP summarises for the shared space, which a language model does not read.
    unread = f"{prefix}head" if parts.generates else None
    return [c.name for c in parts.within(path) if c.name in found and not (unread and _inside(c.name, unread))]


def text_targets(model: nn.Module) -> list[str]:
    """Return the attention and MLP weights of the text encoder, in the model's order."""
    parts = _Parts(model)
    return parts.blocks(parts.need(None if parts.generates else parts.text, "text", "text encoder"))


def language_targets(model: nn.Module) -> list[str]:
    """Return the attention and MLP weights of the language model, in the model's order."""
    parts = _Parts(model)
    return parts.blocks(parts.need(parts.text if parts.generates else None, "language", "language model"))


def projector_targets(model: nn.Module) -> list[str]:
    """Return the weights that connect the vision tower with the text, in the model's order."""
    parts = _Parts(model)
    found = [c.name for c in parts.everything if parts.joint(c.name) and (c.kind != PARAMETER or "weight" in c.name)]
    if not found:
        raise ValueError(f"transformers:projector: this {type(model).__name__} has no projector; {parts.available()}")
    return found


PRESETS: Mapping[str, Callable[[nn.Module], list[str]]] = {
    "vision": vision_targets,
    "text": text_targets,
    "language": language_targets,
    "projector": projector_targets,
}


class _Parts:
    """The towers of a model of transformers, found by their configurations.

    Attributes:
        vision: The path of the vision tower; "" for the whole model, None if it has none.
        backbone: The path of the backbone in a detector or segmenter, None for other models.
        text: The path of the text encoder or language model, likewise.
        generates: True if the text part is a language model.
        everything: The candidates outside heads, with two sides of at least 16.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "sub_configs") or not hasattr(model, "main_input_name"):
            raise ValueError(
                f"the transformers presets need a model of transformers, got {type(model).__name__}; for other models, "
                "list the target_modules"
            )
        self.paths = dict(plain_modules(model))
        parts = {name: getattr(config, name, None) for name in config.sub_configs}
        if {"encoder", "decoder"} == parts.keys() and model.main_input_name == "pixel_values":  # TrOCR and others
            parts = {"vision": parts["encoder"], "text": parts["decoder"]}
        self.vision = self._tower([part for name, part in parts.items() if _VISION.search(name)])
        self.text = self._tower([part for name, part in parts.items() if _LANGUAGE.search(name)])
        self.backbone = self._tower([part for name, part in parts.items() if "backbone" in name])
        if self.vision is None and self.text is None:
            alone = "vision" if model.main_input_name == "pixel_values" else "text"
            setattr(self, alone, "")
        self.generates = self.text is not None and _can_generate(model)
        self.everything = [
            c for c in candidates(model) if not c.head and c.shape is not None and min(c.shape) >= _towers.NARROWEST
        ]

    def need(self, path: str | None, preset: str, what: str) -> str:
        """Return `path`, or raise ValueError if the model has no such part."""
        if path is None:
            raise ValueError(
                f"transformers:{preset}: this {type(self.model).__name__} has no {what}; {self.available()}"
            )
        return path

    def available(self) -> str:
        """Return the presets that fit the model, for a message."""
        text = "language" if self.generates else "text"
        names = [name for name, path in (("vision", self.vision), (text, self.text)) if path is not None]
        names += ["projector"] if any(self.joint(c.name) for c in self.everything) else []
        return f"use {' or '.join(f'transformers:{name}' for name in names)}"

    def within(self, path: str) -> list[Candidate]:
        """Return the candidates in a tower, without embeddings and what connects it with the other."""
        return [
            c
            for c in self.everything
            if _inside(c.name, path)
            and c.kind != PARAMETER
            and not any(_OUTSIDE.search(part) for part in c.name.split("."))
            and not self.joint(c.name)
        ]

    def blocks(self, path: str) -> list[str]:
        """Return the names of the linear weights in the layers of a text part."""
        return [
            c.name
            for c in self.within(path)
            if c.kind != CONVOLUTION
            and any(isinstance(self.paths[parent], nn.ModuleList) for parent in _towers.parents(c.name))
        ]

    def joint(self, name: str) -> bool:
        """True for a weight that connects the towers: by its name, but not inside the layers of a tower."""
        components = self._repeated(name).split(".")
        if self.vision is None or self.text is None or any("embed" in part for part in components):
            return False
        if any(_JOINT.search(part) for part in components):
            return True
        return not any(_inside(name, tower) for tower in (self.vision, self.text))

    def _repeated(self, name: str) -> str:
        """The path of a weight up to the first list of layers of a tower: their `projection`s are their own."""
        parents = [path for path in reversed(list(_towers.parents(name)))]
        first = next((path for path in parents if isinstance(self.paths.get(path), nn.ModuleList)), None)
        return name if first is None else first

    def _tower(self, configs: list[Any]) -> str | None:
        """The outermost module with one of these configurations."""
        kinds = {type(config) for config in configs if config is not None}
        found = (path for path, module in self.paths.items() if path and type(getattr(module, "config", None)) in kinds)
        return min(found, key=lambda path: path.count("."), default=None)


def _can_generate(model: Any) -> bool:
    return callable(getattr(model, "generate", None)) and model.can_generate()


def _inside(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def __getattr__(name: str) -> Any:
    if name == "AdapterCheckpoints":  # the Trainer takes seconds to import, which presets do not need
        from randlora_vision.integrations._trainer import AdapterCheckpoints

        return AdapterCheckpoints
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
