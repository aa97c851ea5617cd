"""Image-text retrieval: features of all images and captions of a split, and recall in both directions.

Shapes: I images, T captions, U distinct texts among them, D shared dimension, Q queries per chunk, K candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from randlora_vision.training.data.batches import evaluation_batches
from randlora_vision.training.data.captioned import CaptionedImages
from randlora_vision.training.data.labelled import NOT_MEASURED
from randlora_vision.training.evaluation.intervals import RECALL_AT
from randlora_vision.training.harness.distributed import measure_all

_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Features:
    """The CLIP features of images and their captions, on the CPU, of unit length and in float32.

    A text is correct for an image if the image has a caption with the same number: this text, or one with the same
    meaning (see `PairBatch`). Texts with equal tokens are a single candidate, however many images they belong to.
    """

    images: Tensor  # (I, D)
    indices: Tensor  # (I,) int64: each image's position in its split
    words: Sequence[str]  # U texts with distinct tokens
    texts: Tensor  # (U, D)
    numbers: Tensor  # (U,) int64: texts with equal numbers have the same meaning
    image_of: Tensor  # (T,) int64: which image (a row) each caption belongs to
    text_of: Tensor  # (T,) int64: which text (a row) each caption is

    def recalls(self) -> dict[str, float]:
        """Return recall@1, @5 and @10 with images and with captions as queries, and the mean of the six."""
        values = {}
        ranks = {"image_to_text": self.text_ranks(), "text_to_image": self.image_ranks()[self.text_of]}
        for direction, places in ranks.items():
            for most in RECALL_AT:
                values[f"{direction}_r{most}"] = (places < most).double().mean().item()
        return {**values, "mean_recall": sum(values.values()) / len(values)}

    @property
    def values(self) -> dict[str, float]:
        """The recalls, and the numbers of queries (`images`, `captions`) and of candidates for an image (`texts`)."""
        counts = {"images": len(self.images), "captions": len(self.text_of), "texts": len(self.texts)}
        return {**self.recalls(), **counts}

    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the image and text features (T, D) of every caption, the numbers of the texts and the images (T,)."""
        return self.images[self.image_of], self.texts[self.text_of], self.numbers[self.text_of], self.image_of

    def text_ranks(self) -> Tensor:
        """Return, for each image (I,), how many wrong texts are at least as near as the nearest correct one."""
        _, meaning = self.numbers.unique(return_inverse=True)

        def right(start: int, end: int) -> Tensor:
            own = self.image_of == torch.arange(start, end)[:, None]
            found = torch.zeros(end - start, len(meaning)).index_add_(1, meaning[self.text_of], own.float())
            return found[:, meaning] > 0

        return _ranks(self.images, self.texts, right)

    def image_ranks(self) -> Tensor:
        """Return, for each text (U,), how many wrong images are at least as near as the nearest correct one."""
        numbers = self.numbers[self.text_of]

        def right(start: int, end: int) -> Tensor:
            same = numbers == self.numbers[start:end, None]
            return torch.zeros(end - start, len(self.images)).index_add_(1, self.image_of, same.float()) > 0

        return _ranks(self.texts, self.images, right)

    def only_answer(self) -> str | None:
        """Return the text that is the nearest one to every image, if there is such a text among several."""
        found = {
            text for part in self.images.split(_QUERIES_AT_ONCE) for text in (part @ self.texts.T).argmax(1).tolist()
        }
        return self.words[found.pop()] if len(found) == 1 and len(self.images) > 1 and len(self.texts) > 1 else None

    def nearest(self, index: int) -> tuple[str, bool]:
        """Return the text nearest to the image at `index` of the split, and whether it is correct."""
        (row,) = (self.indices == index).nonzero().flatten().tolist()
        text = int((self.texts @ self.images[row]).argmax())
        own = self.numbers[self.text_of[self.image_of == row]]
        return self.words[text], bool((own == self.numbers[text]).any())


def _ranks(queries: Tensor, candidates: Tensor, right: Any) -> Tensor:
    """Return, for each query, how many wrong candidates are at least as near as the nearest correct one.

    Ties and NaN count against the model; otherwise a model with equal features for all inputs would reach perfect
    recall. `right(start, end)` returns booleans (Q, K): which candidates are correct for these queries.
    """
    ranks = []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        end = min(start + _QUERIES_AT_ONCE, len(queries))
        similarity = queries[start:end] @ candidates.T
        correct = right(start, end)
        nearest = similarity.masked_fill(~correct, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~(similarity < nearest) & ~correct).sum(dim=1))
    return torch.cat(ranks)


@torch.no_grad()
def retrieval_features(model: Any, data: CaptionedImages, batch_size: int, workers: int | None) -> Features:
    """Encode all images of a split and all their captions. Leaves the model in eval mode.

    Unreadable images are left out together with their captions. The work is split over all processes. Raises
    ValueError if no image can be read.
    """
    model.eval()
    device = next(model.parameters()).device

    def encode_images(batch: Any) -> Sequence[Tensor]:
        features = model.encode_image(batch["images"].to(device), normalize=True)
        return features.float(), batch["indices"].to(device)

    def encode_texts(texts: Sequence[str]) -> Sequence[Tensor]:
        return (model.encode_text(data.tokenize(texts).to(device), normalize=True).float(),)

    images, indices = measure_all(evaluation_batches(data, batch_size, workers), encode_images)
    images, indices = (column[indices != NOT_MEASURED] for column in (images, indices))
    rows = {index: row for row, index in enumerate(indices.tolist())}
    every = data.texts
    captions = [i for i, owner in enumerate(every.images) if owner in rows]
    distinct = {every.tokens[i]: i for i in reversed(captions)}  # the first caption with these tokens
    candidates = sorted(distinct.values())
    places = {every.tokens[i]: place for place, i in enumerate(candidates)}
    words = [every.texts[i] for i in candidates]
    (texts,) = measure_all([words[at : at + batch_size] for at in range(0, len(words), batch_size)], encode_texts)
    return Features(
        images=F.normalize(images, dim=-1),
        indices=indices,
        words=words,
        texts=F.normalize(texts, dim=-1),
        numbers=torch.tensor([every.numbers[i] for i in candidates]),
        image_of=torch.tensor([rows[every.images[i]] for i in captions]),
        text_of=torch.tensor([places[every.tokens[i]] for i in captions]),
    )
