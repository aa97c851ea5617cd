"""Aspect-ratio buckets: their sizes, fitting images into them, and batches from a single bucket."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Sampler
from torchvision.transforms.functional import pil_to_tensor

Size = tuple[int, int]  # height, width
# Width / height of the automatic buckets: the usual portrait and landscape formats of photographs and screens.
_RATIOS = (1.0, 4 / 5, 5 / 4, 3 / 4, 4 / 3, 2 / 3, 3 / 2, 9 / 16, 16 / 9, 1 / 2, 2.0)


def parse_buckets(text: str | None, resolution: int, multiple: int) -> list[Size]:
    """Return the buckets for an option: "height,width;height,width;...", "auto", or None for one square.

    Automatic buckets have about resolution * resolution pixels. Raises ValueError for a side that is not a multiple
    of `multiple`.
    """
    if text == "auto":
        sides = (((resolution**2 / ratio) ** 0.5, (resolution**2 * ratio) ** 0.5) for ratio in _RATIOS)
        rounded = ((max(1, round(h / multiple)) * multiple, max(1, round(w / multiple)) * multiple) for h, w in sides)
        return list(dict.fromkeys(rounded))
    if text is None:
        buckets = [(resolution, resolution)]
        flag = f"--resolution {resolution}"
    else:
        flag = f"--aspect-ratio-buckets {text}"
        try:
            buckets = [(int(h), int(w)) for h, w in (pair.split(",") for pair in text.split(";"))]
        except ValueError:
            raise ValueError(f"{flag}: expected height,width;height,width;... or auto") from None
    if any(side < 1 or side % multiple for bucket in buckets for side in bucket):
        raise ValueError(f"{flag}: the sides must be multiples of {multiple} for this model")
    return buckets


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket that crops least from an image of this size (height, width); the first one in a tie."""
    ratio = size[1] / size[0]
    return max(buckets, key=lambda bucket: min(ratio / (bucket[1] / bucket[0]), (bucket[1] / bucket[0]) / ratio))


def fit(image: Image.Image, bucket: Size, center_crop: bool) -> tuple[Tensor, Tensor]:
    """Scale an image to cover the bucket and crop it, at the center or at a position from Python's `random`.

    Returns the pixels (3, h, w), float32 between -1 and 1, and six integers: the original size, the top left corner of
    the crop, and the size of the bucket, height first.
    """
    height, width = bucket
    scaled = _cover(image, image.size, bucket)
    room = (scaled.height - height, scaled.width - width)
    top, left = (side // 2 if center_crop else random.randint(0, side) for side in room)
    pixels = pil_to_tensor(scaled.crop((left, top, left + width, top + height))).float() / 127.5 - 1
    return pixels, torch.tensor([image.height, image.width, top, left, height, width])


def fit_frames(frames: Sequence[Image.Image], bucket: Size, center_crop: bool) -> tuple[Tensor, Tensor]:
    """Scale and crop the frames of a clip alike, as `fit` an image; return the pixels (3, F, h, w) and its integers."""
    first, sizes = fit(frames[0], bucket, center_crop)
    return torch.stack([first, *(fit_like(frame, sizes) * 2 - 1 for frame in frames[1:])], dim=1), sizes


def fit_like(other: Image.Image, sizes: Tensor) -> Tensor:
    """Crop a mask or another image of these proportions as `fit` cropped the image, which returned `sizes`.

    Returns (1 or 3, h, w), float32 between 0 and 1.
    """
    image_height, image_width, top, left, height, width = sizes.tolist()
    scaled = _cover(other, (image_width, image_height), (height, width))
    return pil_to_tensor(scaled.crop((left, top, left + width, top + height))).float() / 255


def _cover(image: Image.Image, size: tuple[int, int], bucket: Size) -> Image.Image:
    """Resize an image as one of this size (width, height) is resized to cover the bucket."""
    (width, height), (least_height, least_width) = size, bucket
    scale = max(least_height / height, least_width / width)
    new = max(least_width, round(width * scale)), max(least_height, round(height * scale))
    return image.resize(new, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BILINEAR)


class BucketBatches(Sampler[list[int]]):
    """Sample a fixed number of batches, each with `batch_size` instance items of one bucket.

    If there are prior items, each batch also contains `batch_size` prior items of the same bucket, after the instance
    items. The order of the instance items depends only on the seed. Items left over at the end of a pass over the data
    are used in the next pass, so every batch is full. Prior items cycle independently within each bucket.
    """

    def __init__(
        self, buckets: Sequence[tuple[int, ...]], prior: Sequence[bool], batch_size: int, batches: int, seed: int
    ) -> None:
        self.buckets = buckets
        self.instances = [index for index, is_prior in enumerate(prior) if not is_prior]
        self.priors: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, is_prior in enumerate(prior):
            if is_prior:
                self.priors[buckets[index]].append(index)
        self.instances_at_once = batch_size
        self.batches = batches
        self.seed = seed
        self.divisible = len(set(buckets)) == 1  # whether smaller batches, in order, add up to the same ones
        # accelerate needs these attributes to split the batches between processes.
        self.batch_size = 2 * batch_size if self.priors else batch_size
        self.drop_last = False

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        order = random.Random(self.seed)
        waiting: dict[tuple[int, ...], list[int]] = defaultdict(list)
        priors = {bucket: _round_and_round(items, f"{self.seed} {bucket}") for bucket, items in self.priors.items()}
        made = 0
        while made < self.batches:
            for index in order.sample(self.instances, len(self.instances)):
                bucket = self.buckets[index]
                waiting[bucket].append(index)
                if len(waiting[bucket]) == self.instances_at_once and made < self.batches:
                    chosen = waiting.pop(bucket)
                    yield chosen + [next(priors[bucket]) for _ in chosen if priors]
                    made += 1


def _round_and_round(items: Sequence[int], seed: str) -> Iterator[int]:
    order = random.Random(seed)
    while True:
        yield from order.sample(items, len(items))
