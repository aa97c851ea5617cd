"""Training batches of captioned images and clips for a denoiser: pixels, or cached latents.

Cached values are stored under the index of their item, so that no change of order can pair them with the caption of
another item.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypedDict

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from randlora_vision.training.data.batches import worker_count
from randlora_vision.training.data.decode import WHITE, Colour
from randlora_vision.training.data.pictures import Picture, open_picture
from randlora_vision.training.data.video import Clip
from randlora_vision.training.dreambooth.buckets import BucketBatches, Size, fit, fit_frames, fit_like
from randlora_vision.training.dreambooth.captions import Variants
from randlora_vision.training.dreambooth.families import Encoded, Family, Takes
from randlora_vision.training.dreambooth.given import as_given, random_mask
from randlora_vision.training.dreambooth.kept import Kept, hash_of, identity
from randlora_vision.training.harness.seeding import seed_everything

_MASKS = 16  # random masks of an image whose latents are cached


class DiffusionBatch(TypedDict):
    """A batch of B items with the same size."""

    inputs: Tensor
    """Pixels (B, 3, h, w), of clips (B, 3, F, h, w), between -1 and 1, or moments of latents (B, 2 C, ...); float32."""
    captions: Tensor
    """Indices into the list of prompts (B,)."""
    prior: Tensor
    """Whether an item is for prior preservation (B,), bool."""
    sizes: Tensor
    """Original size, top left corner of the crop, and size after cropping (B, 6), height first."""
    masks: Tensor
    """The weight of the error in each pixel (B, 1, h, w), between 0 and 1; (B, 1, 1, 1) where no item has a mask."""
    seeds: Tensor
    """The seed of the noise of each item (B,), int64."""
    given: Tensor
    """What a family `takes`: masks (B, 1, h, w) or images (B, 3, h, w), or its `condition` of them beside moments; for
    other families (B, 0)."""


class Entry(NamedTuple):
    """One item of a batch; see `DiffusionBatch`."""

    inputs: Tensor
    sizes: Tensor
    caption: int
    prior: bool
    mask: Tensor
    given: Tensor
    seed: int = 0


@dataclass(frozen=True)
class Item:
    """An image or a clip with the index of its caption in the list of prompts, and its bucket."""

    image: Picture
    caption: int
    bucket: Size
    prior: bool
    background: Colour = WHITE
    variants: Variants | None = None  # of the caption
    mask: Image.Image | None = None  # of the image's proportions, mode L: white where its error counts
    given: Sequence[Picture] = ()  # the mask of inpainting, of the image's proportions, or the images to edit

    @property
    def kind(self) -> tuple[int, ...]:
        """What the items of a batch have in common: the number of frames, and the size."""
        return (self.image.frames if isinstance(self.image, Clip) else 1, *self.bucket)

    def draw_caption(self) -> int:
        """Return the index of the caption for training."""
        return self.caption if self.variants is None else self.variants.draw()


def read_picture(image: Picture, background: Colour = WHITE) -> Image.Image:
    """Return the image as upright RGB (see `open_picture`). Raises ValueError if it cannot be read."""
    try:
        return open_picture(image, background)
    except OSError as error:
        raise ValueError(f"cannot read the image {image}: {error}") from error


class CaptionedPixels:
    """Items as pixels; without `center_crop`, every access draws a new random crop."""

    def __init__(self, items: Sequence[Item], center_crop: bool, takes: Takes = None) -> None:
        self.items = list(items)
        self.center_crop = center_crop
        self.takes = takes
        self.masked = any(item.mask is not None for item in items)

    def __getitem__(self, index: int) -> Entry:
        """Return an item with its own caption."""
        item = self.items[index]
        pixels, sizes = self._fitted(item)
        mask = torch.ones(1, *(item.bucket if self.masked else (1, 1)))
        if item.mask is not None:
            mask = fit_like(item.mask, sizes)
        return Entry(pixels, sizes, item.caption, item.prior, mask, self.given(item, sizes))

    def _fitted(self, item: Item) -> tuple[Tensor, Tensor]:
        if not isinstance(item.image, Clip):
            return fit(read_picture(item.image, item.background), item.bucket, self.center_crop)
        try:
            frames = item.image.read(self.center_crop)
        except OSError as error:
            raise ValueError(f"cannot read the video {item.image}: {error}") from error
        return fit_frames(frames, item.bucket, self.center_crop)

    def given(self, item: Item, sizes: Tensor) -> Tensor:
        """Return the mask or the image to edit, cropped as the image was; a mask that is drawn covers a part of it."""
        if self.takes is None:
            return torch.zeros(0)
        if not item.given:
            return random_mask(item.bucket)
        return as_given([read_picture(image, item.background) for image in item.given], sizes, self.takes)


class CachedLatents:
    """The same items, each cropped and encoded once; caches the distribution from which latents are drawn."""

    def __init__(self, data: CaptionedPixels, family: Family, seed: int, kept: Kept | None = None) -> None:
        self.items = data.items
        self.entries: list[Entry] = []
        self.conditions: list[list[Tensor]] = []  # several for an item with random masks
        vae = identity([family.pipe.vae]) if kept else ""
        for index in range(len(data.items)):
            seed_everything("crop", seed, index)
            entry = data[index]
            pixels = entry.inputs[None]
            if kept is None:
                moments = family.moments(pixels)[0].cpu()
            else:
                key = ("moments", family.pipeline, vae, hash_of(pixels))
                moments = kept(key, partial(_moments, family, pixels))["moments"]
            self.entries.append(entry._replace(inputs=moments))
            if data.takes:
                drawn = 0 if data.items[index].given else _MASKS - 1
                chosen = [entry.given, *(random_mask(data.items[index].bucket) for _ in range(drawn))]
                self.conditions.append([self._condition(family, pixels, given, vae, kept) for given in chosen])

    @staticmethod
    def _condition(family: Family, pixels: Tensor, given: Tensor, vae: str, kept: Kept | None) -> Tensor:
        def make() -> Encoded:
            return {"condition": family.condition(pixels, given[None])[0].cpu()}

        key = ("condition", family.pipeline, vae, hash_of(pixels), hash_of(given))
        return (make() if kept is None else kept(key, make))["condition"]

    def __getitem__(self, index: int) -> Entry:
        """Return an item with its own caption."""
        entry = self.entries[index]
        return entry._replace(given=random.choice(self.conditions[index])) if self.conditions else entry


Items = CaptionedPixels | CachedLatents
Place = tuple[int, int]  # the number of a sample among those of its kind in the whole training, and its item


def seeded_entry(data: Items, index: int, *key: int | str) -> Entry:
    """Return an item whose crop and noise depend only on `key`, with Python's `random` in a state that does too."""
    random.seed(repr(key))
    return data[index]._replace(seed=random.getrandbits(62))


class Samples(Dataset):
    """The items with a caption for training, indexed by `Place`; the place and the seed determine what is random."""

    def __init__(self, data: Items, seed: int) -> None:
        self.data = data
        self.seed = seed

    def __len__(self) -> int:
        return len(self.data.items)

    def __getitem__(self, place: Place) -> Entry:
        number, index = place
        item = self.data.items[index]
        entry = seeded_entry(self.data, index, "sample", self.seed, item.prior, number)
        return entry._replace(caption=item.draw_caption())


class Numbered(Sampler[list[Place]]):
    """Batches of places, which are the same however many batches the samples of an optimiser step come in."""

    def __init__(self, batches: BucketBatches, prior: Sequence[bool]) -> None:
        self.batches = batches
        self.prior = prior
        self.divisible = batches.divisible
        # accelerate needs these attributes to split the batches between processes.
        self.batch_size = batches.batch_size
        self.drop_last = False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Place]]:
        numbers = {prior: itertools.count() for prior in (False, True)}
        for batch in self.batches:
            yield [(next(numbers[self.prior[index]]), index) for index in batch]


def collate(entries: Sequence[Entry]) -> DiffusionBatch:
    """Stack items into a batch."""
    inputs, sizes, captions, prior, masks, given, seeds = zip(*entries, strict=True)
    return DiffusionBatch(
        inputs=torch.stack(inputs),
        captions=torch.tensor(captions),
        prior=torch.tensor(prior),
        sizes=torch.stack(sizes),
        masks=torch.stack(masks),
        seeds=torch.tensor(seeds),
        given=torch.stack(given),
    )


def diffusion_batches(
    data: Items, batch_size: int, batches: int, seed: int, workers: int | None
) -> "DataLoader[DiffusionBatch]":
    """Return a loader of exactly `batches` batches, each with `batch_size` instance items and as many prior items."""
    kinds, prior = [item.kind for item in data.items], [item.prior for item in data.items]
    return DataLoader(
        Samples(data, seed),
        batch_sampler=Numbered(BucketBatches(kinds, prior, batch_size, batches, seed), prior),
        collate_fn=collate,
        num_workers=worker_count(workers, decoding=isinstance(data, CaptionedPixels)),
        pin_memory=torch.cuda.is_available(),
    )


class Prompts:
    """Encodings of a list of prompts: cached, or computed with gradients if text encoders are trained."""

    def __init__(
        self, family: Family, texts: Sequence[str], trained: bool, at_once: int = 16, kept: Kept | None = None
    ) -> None:
        self.family = family
        self.texts = list(texts)
        self.cached: Encoded | None = None
        if not trained:
            some = [self.texts[i : i + at_once] for i in range(0, len(self.texts), at_once)]
            with torch.no_grad():
                parts = [family.encode(texts) for texts in some] if kept is None else self._kept(some, kept)
            self.cached = {name: _joined([part[name] for part in parts]).cpu() for name in parts[0]}

    def _kept(self, some: Sequence[list[str]], kept: Kept) -> list[Encoded]:
        family = self.family
        names = [name for name in family.pipe.components if name.startswith(("text_encoder", "tokenizer"))]
        texts_by = identity(getattr(family.pipe, name) for name in names)
        options = sorted(family.text_options.items())
        return [
            kept(("prompts", family.pipeline, texts_by, options, texts), partial(family.encode, texts))
            for texts in some
        ]

    def __call__(self, places: Tensor) -> Encoded:
        """Return the encodings (B, ...) of the prompts at indices `places` (B,), on the device of the denoiser."""
        if self.cached is None:
            return self.family.encode([self.texts[place] for place in places.tolist()])
        chosen = places.cpu()
        return {name: table[chosen].to(self.family.device) for name, table in self.cached.items()}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate encodings (B, T, ...), the shorter texts padded with zeros."""
    if parts[0].ndim < 2 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(list(parts))
    return pad_sequence([text for part in parts for text in part], batch_first=True)


def _moments(family: Family, pixels: Tensor) -> Encoded:
    return {"moments": family.moments(pixels)[0]}
