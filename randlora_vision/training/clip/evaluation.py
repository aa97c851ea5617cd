"""Evaluation of a CLIP model before and after training, on the task and on other data sets.

Shapes: P sampled pictures, C classes.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from randlora_vision.integrations._open_clip_models import LoadedClip
from randlora_vision.training.clip.classifier import ClipClassifier
from randlora_vision.training.clip.options import ClipOptions
from randlora_vision.training.clip.retrieval import Features, retrieval_features
from randlora_vision.training.data.captioned import PairSplits
from randlora_vision.training.data.labelled import ImageSplits, evaluation_batches, sample_pictures
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.evaluation.accuracy import Scores
from randlora_vision.training.evaluation.plots import Found, Prediction
from randlora_vision.training.evaluation.results import Results, in_words

_PICTURES = 32
_FOUND = 12
Splits = ImageSplits | PairSplits


@dataclass(frozen=True)
class Answers:
    """The results of a model on the tests."""

    tasks: Mapping[str, str]  # test -> name of its data
    scores: Mapping[str, Scores]  # for the tests with classes
    features: Mapping[str, Features]  # for the tests with captions
    logits: Tensor  # for the sample of pictures: (P, C), or (P, P) against the first caption of each picture
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        values = {name: scores.values for name, scores in self.scores.items()}
        values |= {name: features.values for name, features in self.features.items()}
        object.__setattr__(self, "results", {name: values[name] for name in self.tasks})

    def __str__(self) -> str:
        return in_words(self.tasks, self.results)


class Exam:
    """The test (or else validation) split of the task and of others, and a sample of the task's pictures.

    Data with classes is evaluated by zero-shot classification, data with captions by retrieval.
    """

    def __init__(self, clip: LoadedClip, tests: Mapping[str, Splits], options: ClipOptions, skipped: SkipList) -> None:
        """Prepare the tests. `tests` maps a name to its data; the first is the task."""
        self.tests = tests
        self.skipped = skipped
        self.templates = options.images.templates
        self.batch_size, self.workers = options.training.batch_size, options.training.workers
        self.tasks = {name: test.name for name, test in tests.items()}
        self.transform, self.tokenize = clip.eval_transform, clip.tokenize
        self.task, task = next(iter(tests.items()))
        self.class_names = task.class_names if isinstance(task, ImageSplits) else None
        if isinstance(task, ImageSplits):
            data = task.select(task.final, self.transform, skipped)
            self.pictures, self.truths = sample_pictures(data, _PICTURES)
            self.captions: list[str] = []
        else:
            self.truths, self.pictures, self.captions = [], [], []
            images = task.select(task.final, self.transform, self.tokenize, skipped)
            for index in random.Random(0).sample(range(len(images)), len(images)):
                picture = images.picture(index)
                if picture is not None and len(self.pictures) < _FOUND:
                    self.truths.append(index)
                    self.pictures.append(picture)
                    self.captions.append(images.captions[index][0])
        self.images = torch.stack([self.transform(picture) for picture in self.pictures])

    def take(self, clip: LoadedClip, classifier: ClipClassifier | None = None) -> Answers:
        """Evaluate a model. `classifier`, if given, replaces the zero-shot classifier on a task with classes."""
        scores, features = {}, {}
        for name, test in self.tests.items():
            if isinstance(test, ImageSplits):
                data = test.select(test.final, self.transform, self.skipped)
                own = classifier if name == self.task else None
                judge = own or ClipClassifier(clip, test.class_names, self.templates)
                scores[name] = judge.scores(evaluation_batches(data, self.batch_size, self.workers))
            else:
                pairs = test.select(test.final, self.transform, self.tokenize, self.skipped, draw=False)
                features[name] = retrieval_features(clip.model, pairs, self.batch_size, self.workers)
        return Answers(self.tasks, scores, features, self.predict(clip, classifier))

    @torch.no_grad()
    def predict(self, clip: LoadedClip, classifier: ClipClassifier | None = None) -> Tensor:
        """Return the logits of the sample of pictures, in eval mode, in float32 on the CPU."""
        if self.class_names is not None:
            return (classifier or ClipClassifier(clip, self.class_names, self.templates)).predict(self.images)
        return ClipClassifier(clip, self.captions, ["{}"]).predict(self.images)

    def predictions(self, before: Answers | None, after: Answers) -> Sequence[Prediction]:
        """Return the sample of pictures with both predictions, for data with classes."""
        assert self.class_names is not None
        names = self.class_names
        old = [None] * len(self.truths) if before is None else before.logits.argmax(dim=1).tolist()
        return [
            Prediction(picture, names[truth], None if was is None else names[was], names[now])
            for picture, truth, was, now in zip(
                self.pictures, self.truths, old, after.logits.argmax(dim=1).tolist(), strict=True
            )
        ]

    def found(self, before: Answers | None, after: Answers) -> Sequence[Found]:
        """Return the sample of pictures with their nearest captions, for data with captions."""
        return [
            Found(
                picture,
                caption,
                None if before is None else before.features[self.task].nearest(index),
                after.features[self.task].nearest(index),
            )
            for picture, caption, index in zip(self.pictures, self.captions, self.truths, strict=True)
        ]
