"""Quantised base models: diffusers' and transformers' own configurations for the parts of a pipeline."""

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import torch

Quantization = Literal["bnb-nf4", "bnb-int8", "torchao-int8", "gguf"]

_LIBRARY = {"bnb-nf4": "bitsandbytes", "bnb-int8": "bitsandbytes", "torchao-int8": "torchao", "gguf": "gguf"}
BYTES_PER_WEIGHT = {"bnb-nf4": 0.5 + 4 / 64, "bnb-int8": 1.0, "torchao-int8": 1.0, "gguf": 1.0}
"""Bytes for a weight of a linear layer, with the scales of blocks of 64 but not those of rows; at most, for GGUF."""


def require_library(kind: Quantization) -> None:
    """Raise ValueError if the library or the device that quantises in this way is missing."""
    library = _LIBRARY[kind]
    if importlib.util.find_spec(library) is None:
        raise ValueError(f"--quantize {kind} needs {library}, which is not installed: pip install {library}")
    if library == "bitsandbytes" and not torch.cuda.is_available():
        raise ValueError(
            f"--quantize {kind}: diffusers quantises with bitsandbytes on a GPU only; torchao-int8 runs here"
        )


def quantized(kind: Quantization, denoisers: Sequence[str], texts: Sequence[str], dtype: torch.dtype) -> Any:
    """Return the `quantization_config` for loading a pipeline whose denoisers and texts are quantised.

    Args:
        kind: How; a GGUF file is no such configuration: see `denoiser_from_gguf`.
        denoisers: The names of the denoisers.
        texts: The names of the text encoders.
        dtype: The precision in which the layers compute.
    """
    from diffusers.quantizers import PipelineQuantizationConfig

    require_library(kind)
    return PipelineQuantizationConfig(
        quant_mapping={
            **{denoiser: _config(kind, "diffusers", dtype) for denoiser in denoisers},
            **{text: _config(kind, "transformers", dtype) for text in texts},
        }
    )


def _config(kind: Quantization, library: str, dtype: torch.dtype) -> Any:
    host: Any = importlib.import_module(library)
    if kind == "bnb-nf4":
        return host.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=False
        )
    if kind == "bnb-int8":
        return host.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return host.TorchAoConfig(Int8WeightOnlyConfig())


def denoiser_from_gguf(cls: Any, file: str, path: str, subfolder: str, dtype: torch.dtype) -> Any:
    """Load a denoiser from a GGUF file, with the configuration that the pipeline at `path` has for it."""
    import diffusers

    require_library("gguf")
    return cls.from_single_file(
        file,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
        config=path,
        subfolder=subfolder,
        torch_dtype=dtype,
    )
