"""Loading of a pipeline that can be trained."""

import contextlib
import difflib
import os
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from randlora_vision.errors import reason_of, without_logs
from randlora_vision.skeletons import shapes_only
from randlora_vision.training.dreambooth.families import FAMILIES, Family
from randlora_vision.training.dreambooth.objectives import ObjectiveOptions
from randlora_vision.training.dreambooth.offload import Place
from randlora_vision.training.dreambooth.quantization import Quantization, denoiser_from_gguf, quantized


def load_family(
    path: str,
    options: ObjectiveOptions,
    max_sequence_length: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    quantize: Quantization | None = None,
    gguf_file: str | None = None,
    text_first: bool = False,
    offload_to: Place | None = None,
    vae: str | None = None,
) -> Family:
    """Load a pipeline and return its family; the VAE stays in float32.

    With `text_first`, the denoiser is on the meta device until `Family.load_denoiser`, so that the text encoders can be
    used and dropped before. `offload_to` says where `Family.offload` puts it.

    With `quantize`, the denoiser and the text encoders that are not trained are quantised; GGUF is for the denoiser
    alone, which comes from `gguf_file`. `vae` is the folder or the name of another VAE of the same class.

    Raises ValueError for an unsupported pipeline class or denoiser, and if the pipeline cannot be quantised so here;
    OSError if diffusers finds no pipeline.
    """
    kind, index = family_class(path, revision)
    import diffusers

    special: dict[str, Any] = {}
    if vae is not None:
        special["vae"] = getattr(diffusers, index["vae"][1]).from_pretrained(vae)
    names = kind.denoisers_in(index)
    for name in names:
        if not index.get(name) or index[name][0] is None:
            raise ValueError(f"{path} is a {kind.pipeline} without its {name}")
    config = None
    if quantize == "gguf" and len(names) > 1:
        raise ValueError(f"--gguf-file holds one denoiser, but this {kind.pipeline} has two: {' and '.join(names)}")
    if quantize not in (None, "gguf"):
        texts = kind.quantized_texts([name for name, home in index.items() if home and home != [None, None]])
        config = special["quantization_config"] = quantized(quantize, names, texts, dtype)

    def denoiser(name: str) -> nn.Module:
        cls = getattr(diffusers, index[name][1])
        if quantize == "gguf":
            assert gguf_file is not None
            return denoiser_from_gguf(cls, gguf_file, path, name, dtype)
        packing = None if config is None else config.quant_mapping[name]
        origin = {"subfolder": name, "revision": revision, "variant": variant}
        with _without_loading_bars():
            return cls.from_pretrained(path, torch_dtype=dtype, quantization_config=packing, **origin)

    def ready(name: str) -> nn.Module:
        return denoiser(name).requires_grad_(False).eval()

    for name in names if text_first else ():
        cls = getattr(diffusers, index[name][1])
        empty = without_values(cls, path, name, {"revision": revision} if revision else {})
        special[name] = nn.Module.to(empty, dtype)  # that of diffusers warns
    if quantize == "gguf" and not text_first:
        special[names[0]] = denoiser(names[0])
    pipeline = getattr(diffusers, kind.pipeline)  # `DiffusionPipeline` would load an optional denoiser that is given
    with _without_loading_bars():
        pipe = pipeline.from_pretrained(
            path,
            revision=revision,
            variant=variant,
            dtype={"default": dtype, "vae": torch.float32},
            **{**_left_out(index), **kind.loading, **special},
        )
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    family = kind(pipe, options, max_sequence_length)
    family.offload_to = offload_to
    if text_first:
        family.denoisers_later = {name: partial(ready, name) for name in names}
    return family


def without_values(cls: Any, path: str, name: str, options: Mapping[str, Any]) -> nn.Module:
    """Return the component `name` of the pipeline at `path`, of class `cls`, on the meta device."""
    from accelerate import init_empty_weights

    if hasattr(cls, "load_config"):  # a model of diffusers
        with init_empty_weights():
            return cls.from_config(cls.load_config(path, subfolder=name, **options))
    config = cls.config_class.from_pretrained(path, subfolder=name, **options)
    with shapes_only():  # accelerate's way would untie tied weights
        return cls(config)


def family_class(path: str, revision: str | None = None) -> tuple[type[Family], Mapping[str, Any]]:
    """Return the family of a pipeline and the content of its model_index.json; raises as `load_family` does."""
    try:
        with without_logs():  # such as notes on the installed torchao
            from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ValueError(f"diffusers is needed: pip install 'randlora_vision[diffusers]' ({error})") from error
    if not os.path.isdir(path) and (os.path.exists(path) or path.startswith((".", "/", "~"))):
        single = path.endswith((".safetensors", ".ckpt"))
        remedy = (
            ": convert it once, with `from_single_file` of its pipeline class and `save_pretrained`" if single else ""
        )
        what = f"--pretrained-model-name-or-path {path} is not a pipeline folder written by save_pretrained"
        raise ValueError(what + remedy)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers passes an argument that huggingface_hub no longer has
            index = DiffusionPipeline.load_config(path, revision=revision)
    except OSError as error:
        if os.path.isdir(path):
            raise
        raise ValueError(
            f"cannot read the pipeline {path}: there is no such folder, and it was not found on the Hugging Face Hub. "
            f"Check the name and the connection, or give a folder written by save_pretrained ({reason_of(error)})"
        ) from error
    name = index.get("_class_name")
    family = FAMILIES.get(str(name))
    if family is None:
        raise ValueError(
            f"{path} is a {name}, which cannot be trained; the nearest that can is {nearest(str(name))}; supported "
            f"pipelines: {', '.join(sorted(FAMILIES))}"
        )
    return family, index


@contextlib.contextmanager
def _without_loading_bars() -> Iterator[None]:
    """Hide the bars of diffusers and transformers for reading files; those of downloads stay."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub import utils
    from transformers.utils import logging as of_transformers

    of_downloads: Any = utils
    downloads = not of_downloads.are_progress_bars_disabled()
    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()  # and, in some versions, those of downloads
    try:
        if downloads:
            of_downloads.enable_progress_bars()
        yield
    finally:
        of_diffusers.enable_progress_bar()
        of_transformers.enable_progress_bar()
        if not downloads:
            of_downloads.disable_progress_bars()


def _left_out(index: Mapping[str, Any]) -> dict[str, None]:
    """Return the components that the pipeline was saved without, such as the T5 of Stable Diffusion 3."""
    return {part: None for part, home in index.items() if home == [None, None]}


def to_leave_out(path: str, revision: str | None) -> list[str]:
    """Return the components that `from_pretrained` must be given as None, because the pipeline was saved without."""
    import diffusers

    kind, index = family_class(path, revision)
    optional = getattr(diffusers, kind.pipeline)._optional_components
    return [part for part in _left_out(index) if part not in optional and part not in kind.loading]


def nearest(name: str) -> str:
    """Return the supported pipeline whose name is most like `name`: the longest that it begins with, if any."""
    kind = name.removesuffix("Pipeline")
    begins = [family for family in FAMILIES if kind.startswith(family.removesuffix("Pipeline"))]
    return max(begins, key=len) if begins else difflib.get_close_matches(name, FAMILIES, 1, 0)[0]
