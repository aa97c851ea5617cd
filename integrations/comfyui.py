"""A node of ComfyUI that loads RandLoRA adapters: copy this one file into its folder ``custom_nodes``.

It needs nothing of this library, only torch, numpy and safetensors, which ComfyUI has: as a single file, it is longer
than others and draws the bases itself. Adapter files belong in ``models/loras``. The update of a weight is computed
when ComfyUI patches that weight; only the random bases are kept.

Shapes: O out, I in, M the larger and m the smaller of them, R rank, N bases, K = N R.
"""

import base64
import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

try:
    from comfy.weight_adapter import WeightAdapterBase
except ImportError:  # outside of ComfyUI
    WeightAdapterBase = object

Tensors = dict[str, Tensor]
_A, _B = 0, 1
_LARGEST = 2**24  # bytes of the decompressed target list


class Spec(NamedTuple):
    """What determines the bases: the kind, the seed, and the sizes of A (rank, narrow) and B (wide, columns)."""

    kind: str
    seed: int
    rank: int
    narrow: int
    wide: int
    columns: int


class RandLoRAWeight(WeightAdapterBase):
    """The update of one weight: s B diag(lambda) A diag(gamma), summed over the bases.

    ComfyUI copies an adapter with other tensors by its two arguments.

    Args:
        loaded_keys: The names of the tensors in the file.
        weights: lambda (R, N), gamma (N, m), the shape (O, I), s = alpha / rank, the spec of the bases, and A and B if
            the file holds them.
    """

    name = "randlora"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    def delta(self, device: torch.device) -> Tensor:
        """Return the update (O, I), float32."""
        lam, gamma, shape, scale, spec, given = self.weights
        lam, gamma = (tensor.to(device, torch.float32) for tensor in (lam, gamma))
        rank, count = lam.shape
        sizes = (rank, min(shape), max(shape), rank * count)
        a, b = (tensor.to(device) for tensor in (given or _bases(Spec(*spec), *sizes)))
        wide, narrow = max(shape), min(shape)
        af = (lam[:, :, None] * a[:rank, None, :narrow] * gamma[None]).reshape(-1, narrow)
        update = scale * (b[:wide, : rank * count].float() @ af)
        return update if shape[0] >= shape[1] else update.t()

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """Add the update to a weight in place, as ComfyUI asks of its adapters, and return the weight."""
        update = self.delta(weight.device)
        if update.numel() != weight.numel():
            raise ValueError(
                f"RandLoRA: {key} has the shape {tuple(weight.shape)}, but the adapter is for {self.weights[2]}"
            )
        weight += function(strength * update.reshape(weight.shape)).to(weight.dtype)
        return weight

    def calculate_shape(self, key: str) -> None:
        """Return None: the weight keeps its shape."""


def read(path: str) -> dict[str, dict[str, RandLoRAWeight]]:
    """Return component -> layer -> its update; the component is "" in a file for the denoiser alone.

    Raises:
        ValueError: If this is not an adapter file, was altered, or needs the library.
    """
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    version = metadata.get("format_version")
    if metadata.get("format") != "randlora_vision" or version not in ("1", "2", "3"):
        raise ValueError(f"{path} is not a RandLoRA adapter file of format version 1 to 3")
    if version != "2":
        _check(path, tensors, metadata, version)
    if version == "1" or version == "3" and "parts" not in metadata:
        return {"": _part(path, tensors, metadata)}
    parts: dict[str, dict[str, str]] = json.loads(metadata["parts"])
    split = {
        part: {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")}
        for part in parts
    }
    for part, held in parts.items() if version == "2" else ():
        _check(path, split[part], held, version)
    return {part: _part(path, split[part], held) for part, held in parts.items()}


def _part(path: str, tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, RandLoRAWeight]:
    if any(name.startswith("saved.") for name in tensors):
        raise ValueError(f"{path} also holds layers that were trained in full: export it with randlora export")
    about = json.loads(metadata["bases"])
    spec = Spec(**{name: about[name] for name in Spec._fields})
    given = (tensors["bases.A"].float(), tensors["bases.B"].float()) if spec.kind == "stored" else None
    if given is None and spec.kind not in _DRAWN and spec.kind != "structured":
        raise ValueError(f"{path} has bases of kind {spec.kind!r}, which PEFT draws: export it with randlora export")
    packed = base64.b64decode(metadata["targets"], validate=True)
    listed = json.loads(zlib.decompressobj().decompress(packed, _LARGEST))
    places: dict[str, Any] = {}
    found = {}
    for name, out, into, rank, alpha in listed:
        group = f"{rank}x{math.ceil(min(out, into) / rank)}.{min(out, into)}"
        place = next(places.setdefault(group, itertools.count()))
        pair = (tensors[f"lambda.{group}"][place], tensors[f"gamma.{group}"][place])
        keys = {f"lambda.{group}", f"gamma.{group}"}
        found[name] = RandLoRAWeight(keys, (*pair, (out, into), alpha / rank, tuple(spec), given))
    return found


def _check(path: str, tensors: Tensors, metadata: Mapping[str, str], version: str) -> None:
    """Raise ValueError unless the content has its checksum: a CRC-32, or a SHA-256 before version 3."""
    newest = version == "3"
    name, key = ("CRC-32", "crc32") if newest else ("SHA-256", "sha256")
    value, digest = 0, hashlib.sha256()
    for part in _summed(tensors, metadata, ("parts",) if newest else ()):
        if newest:
            value = zlib.crc32(part, value)
        else:
            digest.update(part)
    found = f"{value:08x}" if newest else digest.hexdigest()
    if metadata.get(key) != found:
        raise ValueError(f"{path} was altered or damaged after it was written: its {name} does not match")


def _summed(tensors: Tensors, metadata: Mapping[str, str], more: tuple[str, ...]) -> Iterator[bytes | memoryview]:
    for key in ("format", "format_version", "config", "bases", "targets", *more):
        yield f"{key}={metadata.get(key)}\n".encode(errors="surrogatepass")
    for name in sorted(tensors):
        tensor = tensors[name]
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _bases(spec: Spec, rank: int, narrow: int, wide: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return A and B; structured ones depend on the shape of the layer, the others are parts of the largest."""
    if spec.kind == "structured":
        return _structured(spec.seed, rank, narrow, wide, columns)
    return _drawn(spec)


@lru_cache(2)
def _drawn(spec: Spec) -> tuple[Tensor, Tensor]:
    draw, words_per_row, dtype = _DRAWN[spec.kind]

    def matrix(which: int, rows: int, columns: int) -> Tensor:
        count = words_per_row(columns)
        drawn = [draw(_words(spec.seed, which, row, count), spec.narrow)[:columns] for row in range(rows)]
        return torch.from_numpy(np.stack(drawn).astype(dtype))

    a, b = matrix(_A, spec.rank, spec.narrow), matrix(_B, spec.wide, spec.columns)
    return a, b


def _words(seed: int, matrix: int, row: int, count: int) -> np.ndarray:
    """The first 64-bit words of the stream of a row: Philox's counter starts at (matrix, row)."""
    return np.random.Philox(key=seed, counter=((matrix << 64) | row) << 128).random_raw(count)


def _halves(raw: np.ndarray) -> np.ndarray:
    return raw.astype("<u8").view("<u4")


def _uniform(raw: np.ndarray, narrow: int) -> np.ndarray:
    integers = 2 * (_halves(raw) >> 8).astype(np.int32) + np.int32(1 - 2**24)
    return integers.astype(np.float32) * np.float32(math.sqrt(3) / 2**24)


def _normal(raw: np.ndarray, narrow: int) -> np.ndarray:
    sums = raw.astype("<u8").view("<u2").reshape(-1, 12).sum(1, dtype=np.int32) - np.int32(6 * 0xFFFF)
    return sums.astype(np.float32) * np.float32(1 / math.sqrt(2**32 - 1))


def _ternary(density: Callable[[int], float]) -> Callable[[np.ndarray, int], np.ndarray]:
    def draw(raw: np.ndarray, narrow: int) -> np.ndarray:
        limit = round(density(narrow) / 2 * 2**32)
        bits = _halves(raw).astype(np.int64)
        signs = (bits < limit).astype(np.float32) - (bits >= 2**32 - limit)
        return signs * np.float32(math.sqrt(1 / density(narrow)))

    return draw


def _two_per_word(columns: int) -> int:
    return (columns + 1) // 2


_DRAWN: dict[str, tuple[Callable[[np.ndarray, int], np.ndarray], Callable[[int], int], Any]] = {
    "uniform": (_uniform, _two_per_word, np.float32),
    "normal": (_normal, lambda columns: 3 * columns, np.float32),
    "sparse": (_ternary(lambda narrow: 1 / 3), _two_per_word, np.float32),
    "very_sparse": (_ternary(lambda narrow: 1 / math.sqrt(narrow)), _two_per_word, np.float32),
}
"""Kind -> the numbers of a row from its words, how many words a row takes, and the type."""


@lru_cache(64)
def _structured(seed: int, rank: int, narrow: int, wide: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return A (R, m) and B (M, K), composed of Hadamard matrices with random signs; int8."""
    classes = 1 << (rank - 1).bit_length()
    q = _hadamard(seed, _A, 1, rank, classes).repeat(math.ceil(narrow / classes), axis=1)[:, :narrow]
    a = q * _signs(_words(seed, _A, 0, narrow))
    b = min((2**power for power in range(columns.bit_length() + 1)), key=lambda b: _cost(b, wide, columns))
    inner, outer = math.ceil(columns / b), math.ceil(wide / b)
    between = _signs(_words(seed, _B, 0, inner * b)).reshape(inner, b)
    core = _hadamard(seed, _B, 1, b, b)
    drawn: Iterable[np.ndarray] = (_hadamard(seed, _B, row, outer, inner) for row in itertools.count(2))
    left = next(left for left in drawn if all(_is_full(part) for part in (left, left[:-1])))
    # B[(q, p), (n, k)] = left[p, n] between[n, q] core[q, k], where the last values of q lack the last p.
    whole = np.einsum("pn,nq,qk->qpnk", left, between, core).reshape(b, outer, inner * b)
    full = wide - b * (outer - 1)
    rows = np.concatenate([whole[:full].reshape(-1, inner * b), whole[full:, :-1].reshape(-1, inner * b)])
    return torch.from_numpy(a.astype(np.float32)), torch.from_numpy(np.ascontiguousarray(rows[:, :columns]))


def _cost(b: int, wide: int, columns: int) -> int:
    return b * math.ceil(columns / b) * (b + math.ceil(wide / b))


def _signs(raw: np.ndarray) -> np.ndarray:
    return np.where(raw >> np.uint64(63), 1, -1).astype(np.int8)


def _hadamard(seed: int, matrix: int, row: int, rows: int, columns: int) -> np.ndarray:
    order = 1 << (max(rows, columns) - 1).bit_length()
    raw = _words(seed, matrix, row, 3 * order)
    some_rows = np.argsort(raw[:order], kind="stable")[:rows]
    some_columns = np.argsort(raw[order : 2 * order], kind="stable")[:columns]
    bits = some_rows[:, None] & some_columns[None]
    for shift in (32, 16, 8, 4, 2, 1):  # the parity of the bits set in both
        bits = bits ^ (bits >> shift)
    return ((1 - 2 * (bits & 1)) * _signs(raw[2 * order :])[:rows, None]).astype(np.int8)


def _is_full(matrix: np.ndarray) -> bool:
    """Return whether the rank modulo a prime is the smaller side, which implies that the rank is."""
    prime, rank = 2**31 - 1, 0
    left = matrix.astype(np.int64) % prime
    for column in range(left.shape[1]):
        below = np.flatnonzero(left[rank:, column])
        if len(below):
            left[[rank, rank + below[0]]] = left[[rank + below[0], rank]]
            left[rank] = left[rank] * pow(int(left[rank, column]), -1, prime) % prime
            left[rank + 1 :] = (left[rank + 1 :] - left[rank + 1 :, column, None] * left[rank]) % prime
            rank += 1
            if rank == left.shape[0]:
                return True
    return rank == min(left.shape)


def patches(
    layers: Mapping[str, RandLoRAWeight], component: str, known: Mapping[str, Any]
) -> dict[Any, RandLoRAWeight]:
    """Return the updates by the keys of ComfyUI's model, which `known` gives for the names of LoRA files.

    Raises:
        ValueError: If the model has no weight for a layer.
    """
    found, missing = {}, []
    for layer, update in layers.items():
        key = next((known[name] for name in _names(component, layer) if name in known), None)
        if key is None:
            missing.append(layer)
        else:
            found[key] = update
    if missing:
        more = f" and {len(missing) - 1} others" if missing[1:] else ""
        raise ValueError(f"RandLoRA: this model has no {component or 'layer'} {missing[0]}{more}: is it another model?")
    return found


def _names(component: str, layer: str) -> list[str]:
    flat = layer.replace(".", "_")
    if not component.startswith("text_encoder"):
        names = [f"transformer.{layer}", f"lora_unet_{flat}", f"lora_transformer_{flat}", f"diffusion_model.{layer}"]
        return [*names, f"diffusion_model.{_of_wan(layer)}"]
    number = component.removeprefix("text_encoder").strip("_") or "1"
    return [f"{component}.{layer}", f"{component}.text_model.{layer}", f"lora_te{number}_{flat}"]


_WAN = (("attn1.", "self_attn."), ("attn2.", "cross_attn."), ("to_out.0", "o"), ("add_k_proj", "k_img"),
        ("add_v_proj", "v_img"), ("to_", ""), ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"))  # fmt: skip
"""Layers of Wan in diffusers and in ComfyUI, which knows them under its own names alone."""


def _of_wan(layer: str) -> str:
    for theirs, own in _WAN:
        layer = layer.replace(theirs, own)
    return layer


_EXPERTS = {"all": None, "high": "transformer", "low": "transformer_2"}
"""Component of a pipeline with a denoiser for high and another one for low noise."""


class LoadRandLoRA:
    """The node: model and clip in, patched clones out."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  # ComfyUI's name
        """Return the inputs."""
        import folder_paths

        strength = ("FLOAT", {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01})
        return {
            "required": {
                "model": ("MODEL",),
                "adapter": (folder_paths.get_filename_list("loras"),),
                "strength_model": strength,
                "strength_clip": strength,
            },
            "optional": {"clip": ("CLIP",), "noise": (list(_EXPERTS),)},
        }

    def load(
        self,
        model: Any,
        adapter: str,
        strength_model: float,
        strength_clip: float,
        clip: Any = None,
        noise: str = "all",
    ) -> tuple[Any, Any]:
        """Return clones of the model and of the clip with the adapter's patches.

        `noise` says which model this is, if there is one for high and one for low noise (Wan 2.2).
        """
        import comfy.lora
        import folder_paths

        parts = read(folder_paths.get_full_path_or_raise("loras", adapter))
        denoisers = [component for component in parts if not component.startswith("text_encoder")]
        fitting = [name for name in denoisers if name in (_EXPERTS[noise] or name, "")]
        if len(fitting) > 1 or denoisers and not fitting:
            raise ValueError(
                f"RandLoRA: {adapter} adapts {', '.join(denoisers)}: choose which noise this model is for, high "
                "(transformer) or low (transformer_2), and give the other model a node of its own"
            )
        parts = {name: layers for name, layers in parts.items() if name in fitting or name not in denoisers}
        model, clip = model.clone(), None if clip is None else clip.clone()
        for component, layers in parts.items():
            if component.startswith("text_encoder"):
                if clip is None:
                    raise ValueError(f"RandLoRA: {adapter} also adapts {component}: connect the clip")
                known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
                clip.add_patches(patches(layers, component, known), strength_clip)
            else:
                known = comfy.lora.model_lora_keys_unet(model.model, {})
                model.add_patches(patches(layers, component, known), strength_model)
        return model, clip


NODE_CLASS_MAPPINGS = {"LoadRandLoRA": LoadRandLoRA}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadRandLoRA": "Load RandLoRA"}
