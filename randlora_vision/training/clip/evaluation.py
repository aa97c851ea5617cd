"""Evaluation of a CLIP model before and after training, on the task and on other data sets.

Shapes: P sampled pictures, C classes.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from randlora_vision.integrations._open_clip_models import LoadedClip
from randlora_vision.training.clip.classifier import ClipClassifier
from randlora_vision.training.clip.options import ClipSettings
from randlora_vision.training.clip.retrieval import Features, retrieval_features
from randlora_vision.training.data.batches import evaluation_batches
from randlora_vision.training.data.labelled import ImageSplits, sample_pictures
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.splits import Splits
from randlora_vision.training.evaluation.grids import Found, Prediction, list_predictions
from randlora_vision.training.evaluation.results import Measured, Results, task_name

_PICTURES = 96  # sampled; those drawn are chosen among them
_FOUND = 12


@dataclass(frozen=True)
class ClipMeasured(Measured):
    """The results of a CLIP model; the logits of data with captions (P, P) are for each picture's first caption."""

    features: Mapping[str, Features]  # for the tests with captions

    @cached_property
    def results(self) -> Results:
        """The metrics of each test."""
        values = {**super().results, **{name: features.values for name, features in self.features.items()}}
        return {name: values[name] for name in self.tasks}


class Evaluation:
    """The final split of the task (zero-shot, or retrieval for captions) and of others, with a sample of pictures."""

    def __init__(
        self, clip: LoadedClip, tests: Mapping[str, Splits], settings: ClipSettings, skipped: SkipList
    ) -> None:
        """Prepare the tests. `tests` maps a name to its data; the first is the task."""
        self.tests = tests
        self.skipped = skipped
        self.templates = settings.images.templates
        self.batch_size, self.workers = settings.training.batch_size, settings.training.workers
        self.tasks = {name: test.name for name, test in tests.items()}
        self.splits = {name: task_name(test.final) for name, test in tests.items()}
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

    def run(self, clip: LoadedClip, classifier: ClipClassifier | None = None) -> ClipMeasured:
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
        return ClipMeasured(self.tasks, self.splits, scores, self.predict(clip, classifier), features)

    @torch.no_grad()
    def predict(self, clip: LoadedClip, classifier: ClipClassifier | None = None) -> Tensor:
        """Return the logits of the sample of pictures, in eval mode, in float32 on the CPU."""
        if self.class_names is not None:
            return (classifier or ClipClassifier(clip, self.class_names, self.templates)).predict(self.images)
        return ClipClassifier(clip, self.captions, ["{}"]).predict(self.images)

    def predictions(self, before: ClipMeasured | None, after: ClipMeasured) -> Sequence[Prediction]:
        """Return the sample of pictures with both predictions, for data with classes."""
        assert self.class_names is not None
        was = before.logits if before else None
        return list_predictions(self.pictures, self.truths, self.class_names, was, after.logits)

    def found(self, before: ClipMeasured | None, after: ClipMeasured) -> Sequence[Found]:
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
