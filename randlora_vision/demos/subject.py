"""The embedded subject, a robot in five images, and a measure of how well it is learnt."""

import torch
from torch import Tensor
from torch.nn import functional as F

from randlora_vision.demos.emoji import BACKGROUNDS, SUBJECT, drawings, on_background, placed, prompt_of, subject_images
from randlora_vision.training.dreambooth.options import SubjectOptions
from randlora_vision.training.dreambooth.prior import balance
from randlora_vision.training.dreambooth.samples import Draws, Sampler
from randlora_vision.training.dreambooth.subject import Subject

_SAMPLES = 20
_EVERY = 3  # pictures of every third emoji: a few seconds at every evaluation


def demo_subject(options: SubjectOptions) -> Subject:
    """Return the training images."""
    assert options.instance_prompt is not None
    images = subject_images()
    return Subject("robots", list(images), [options.instance_prompt] * len(images))


class Judge:
    """Measures a pipeline by the drawing that its pictures are nearest to; their seeds have no other use."""

    def __init__(self, sampler: Sampler, subject_prompt: str, seed: int, text_trained: bool) -> None:
        places = list(BACKGROUNDS) * (_SAMPLES // len(BACKGROUNDS))
        others = [name for name in drawings() if name != SUBJECT][::_EVERY]
        self._asked = [(SUBJECT, place) for place in places] + [(name, "white") for name in others]
        prompts = [placed(subject_prompt, place) for place in places] + [prompt_of(name) for name in others]
        self._draws = Draws(sampler, prompts, range(10_000 + seed, 10_000 + seed + len(prompts)), text_trained)

    def __call__(self) -> dict[str, float]:
        """Return the shares of pictures that are recognised as what their prompts ask for.

        `subject` is that of the subject's prompt, on white and on the four backgrounds that the training images do not
        have; `emoji_kept` that of the names of other emoji. `balance` is the harmonic mean of both. The numbers of
        pictures are among the values.
        """
        right = [found == asked for found, asked in zip(recognise(self._draws()), self._asked, strict=True)]
        learnt, kept = right[:_SAMPLES], right[_SAMPLES:]
        shares = {"subject": sum(learnt) / len(learnt), "emoji_kept": sum(kept) / len(kept)}
        counts = {"subject_pictures": len(learnt), "emoji_pictures": len(kept)}
        return {**shares, "balance": balance(*shares.values()), **counts}


def recognise(pictures: Tensor) -> list[tuple[str, str]]:
    """Return the emoji and the background that each picture (B, 3, 32, 32), between 0 and 1, is nearest to.

    The distance is that of the pixels; emoji are also moved by a pixel.
    """
    names, held = list(drawings()), torch.stack(list(drawings().values()))
    padded, side = F.pad(held, (1, 1, 1, 1)), held.shape[-1]
    moved = torch.stack([padded[..., y : y + side, x : x + side] for y in range(3) for x in range(3)])
    distances = []
    for place in BACKGROUNDS:
        candidates = on_background(moved, place).flatten(2)  # moves, emoji, numbers of a picture
        to_all = torch.cdist(pictures.flatten(1), candidates.flatten(0, 1))
        distances.append(to_all.unflatten(1, candidates.shape[:2]).amin(1))
    nearest = torch.cat(distances, dim=1).argmin(1)
    places = list(BACKGROUNDS)
    return [(names[index % len(names)], places[index // len(names)]) for index in nearest.tolist()]
