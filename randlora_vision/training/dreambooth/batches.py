"""Training batches of captioned images for a denoiser: pixels, or cached latents.

Cached values are stored under the index of their item, so that no change of order can pair them with the caption of
another item.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from randlora_vision.training.data.batches import worker_count
from randlora_vision.training.data.decode import WHITE, Colour, Note
from randlora_vision.training.data.pictures import Picture, open_picture
from randlora_vision.training.dreambooth.buckets import BucketBatches, Size, fit
from randlora_vision.training.dreambooth.captions import Variants
from randlora_vision.training.dreambooth.families import Encoded, Family
from randlora_vision.training.harness.seeding import seed_everything


class DiffusionBatch(TypedDict):
    """A batch of B items with the same size."""

    inputs: Tensor
    """Pixels (B, 3, h, w) between -1 and 1, or moments of latents (B, 2 C, H, W); float32."""
    captions: Tensor
    """Indices into the list of prompts (B,)."""
    prior: Tensor
    """Whether an item is for prior preservation (B,), bool."""
    sizes: Tensor
    """Original size, top left corner of the crop, and size after cropping (B, 6), height first."""


Entry = tuple[Tensor, Tensor, int, bool]  # input, sizes, caption, prior


@dataclass(frozen=True)
class Item:
    """An image with the index of its caption in the list of prompts, and its bucket."""

    image: Picture
    caption: int
    bucket: Size
    prior: bool
    background: Colour = WHITE
    variants: Variants | None = None  # of the caption

    def draw_caption(self) -> int:
        """Return the index of the caption for training."""
        return self.caption if self.variants is None else self.variants.draw()


def read_picture(image: Picture, background: Colour = WHITE, note: Note = lambda rule: None) -> Image.Image:
    """Return the image as upright RGB (see `open_picture`). Raises ValueError if it cannot be read."""
    try:
        return open_picture(image, background, note)
    except OSError as error:
        raise ValueError(f"cannot read the image {image}: {error}") from error


class CaptionedPixels(Dataset):
    """Items as pixels; without `center_crop`, every access draws a new random crop."""

    def __init__(self, items: Sequence[Item], center_crop: bool) -> None:
        self.items = list(items)
        self.center_crop = center_crop

    def __len__(self) -> int:
        return len(self.items)

    def entry(self, index: int) -> Entry:
        """Return an item with its own caption."""
        item = self.items[index]
        pixels, sizes = fit(read_picture(item.image, item.background), item.bucket, self.center_crop)
        return pixels, sizes, item.caption, item.prior

    def __getitem__(self, index: int) -> Entry:
        """Return an item with a caption for training."""
        pixels, sizes, _, prior = self.entry(index)
        return pixels, sizes, self.items[index].draw_caption(), prior


class CachedLatents(Dataset):
    """The same items, each cropped and encoded once; caches the distribution from which latents are drawn."""

    def __init__(self, data: CaptionedPixels, family: Family, seed: int) -> None:
        self.items = data.items
        self.entries: list[Entry] = []
        for index in range(len(data)):
            seed_everything("crop", seed, index)
            pixels, sizes, caption, prior = data.entry(index)
            self.entries.append((family.moments(pixels[None])[0].cpu(), sizes, caption, prior))

    def __len__(self) -> int:
        return len(self.entries)

    def entry(self, index: int) -> Entry:
        """Return an item with its own caption."""
        return self.entries[index]

    def __getitem__(self, index: int) -> Entry:
        """Return an item with a caption for training."""
        moments, sizes, _, prior = self.entries[index]
        return moments, sizes, self.items[index].draw_caption(), prior


def collate(entries: Sequence[Entry]) -> DiffusionBatch:
    """Stack items into a batch."""
    inputs, sizes, captions, prior = zip(*entries, strict=True)
    return DiffusionBatch(
        inputs=torch.stack(inputs),
        captions=torch.tensor(captions),
        prior=torch.tensor(prior),
        sizes=torch.stack(sizes),
    )


def diffusion_batches(
    data: CaptionedPixels | CachedLatents, batch_size: int, batches: int, seed: int, workers: int | None
) -> "DataLoader[DiffusionBatch]":
    """Return a loader of exactly `batches` batches, each with `batch_size` instance items and as many prior items."""
    buckets, prior = [item.bucket for item in data.items], [item.prior for item in data.items]
    return DataLoader(
        data,
        batch_sampler=BucketBatches(buckets, prior, batch_size, batches, seed),
        collate_fn=collate,
        num_workers=worker_count(workers, decoding=isinstance(data, CaptionedPixels)),
        pin_memory=torch.cuda.is_available(),
    )


class Prompts:
    """Encodings of a list of prompts: cached, or computed with gradients if text encoders are trained."""

    def __init__(self, family: Family, texts: Sequence[str], trained: bool, at_once: int = 16) -> None:
        self.family = family
        self.texts = list(texts)
        self.cached: Encoded | None = None
        if not trained:
            with torch.no_grad():
                parts = [family.encode(self.texts[i : i + at_once]) for i in range(0, len(self.texts), at_once)]
            self.cached = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    def __call__(self, places: Tensor) -> Encoded:
        """Return the encodings (B, ...) of the prompts at indices `places` (B,), on the device of the denoiser."""
        if self.cached is None:
            return self.family.encode([self.texts[place] for place in places.tolist()])
        chosen = places.cpu()
        return {name: table[chosen].to(self.family.device) for name, table in self.cached.items()}
