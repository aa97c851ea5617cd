"""What is measured before and after training: accuracy on the task, and on what the model could do before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from randlora_vision.training.clip_classifier import ClipClassifier
from randlora_vision.training.clip_models import LoadedClip
from randlora_vision.training.clip_options import ClipOptions
from randlora_vision.training.images import ImageSplits, SkipList, evaluation_batches, sample_pictures
from randlora_vision.training.plots import Prediction
from randlora_vision.training.results import accuracies

_PICTURES = 32

Results = dict[str, dict[str, float]]  # by the name of the test: top1, top5, loss


@dataclass(frozen=True)
class Answers:
    """What a classifier makes of the test images."""

    tasks: Mapping[str, str]  # what each test is of
    results: Results
    logits: Tensor  # of the sample of pictures (P, C)

    def __str__(self) -> str:
        return accuracies(self.tasks, self.results)


class Exam:
    """The test split, a sample of its pictures, and where there is one the test split of the original task."""

    def __init__(
        self,
        clip: LoadedClip,
        splits: ImageSplits,
        original: ImageSplits | None,
        options: ClipOptions,
        skipped: SkipList,
    ) -> None:
        self.clip = clip
        self.skipped = skipped
        self.original = original
        self.tasks = {"test": splits.name, **({"original": original.name} if original else {})}
        self.class_names = splits.class_names
        self.templates = options.images.templates
        batch_size, workers = options.training.batch_size, options.training.workers
        test = splits.select("test", clip.eval_transform, skipped)
        self._test = evaluation_batches(test, batch_size, workers)
        if original:
            kept = original.select("test", clip.eval_transform, skipped)
            self._original = evaluation_batches(kept, batch_size, workers)
        self.pictures, self.truths = sample_pictures(test, _PICTURES)
        self.images = torch.stack([clip.eval_transform(picture) for picture in self.pictures])

    def take(self, classifier: ClipClassifier | None = None) -> Answers:
        """Measure a classifier over the model, by default the zero-shot one."""
        classifier = classifier or ClipClassifier(self.clip, self.class_names, self.templates)
        results = {"test": classifier.evaluate(self._test)}
        if self.original:
            prompted = ClipClassifier(self.clip, self.original.class_names, self.templates)
            results["original"] = prompted.evaluate(self._original)
        return Answers(self.tasks, results, classifier.predict(self.images))

    def predictions(self, before: Answers, after: Answers) -> Sequence[Prediction]:
        """Return the sample of pictures with both answers."""
        names = self.class_names
        return [
            Prediction(picture, names[truth], names[was], names[now])
            for picture, truth, was, now in zip(
                self.pictures,
                self.truths,
                before.logits.argmax(dim=1).tolist(),
                after.logits.argmax(dim=1).tolist(),
                strict=True,
            )
        ]
