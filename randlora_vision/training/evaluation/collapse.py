"""Signs of a training that has failed, in one line with the remedy."""

import math
from collections.abc import Sequence

from randlora_vision.training.evaluation.accuracy import Scores
from randlora_vision.training.evaluation.curves import Metrics, series
from randlora_vision.training.harness.options import Training


def collapse_warning(
    scores: Scores, names: Sequence[str], task: str, metrics: Metrics, training: Training, entropy: bool = True
) -> str | None:
    """Return what is wrong with a trained classifier, or None.

    That is one answer for all images of the `task` ("test" or "validation"), or a training loss that rose after the
    warmup above its value at the start and, if it is the plain cross `entropy`, above ln(classes), the loss of
    guessing.
    """
    remedy = f"--lr {training.lr:g} is probably too high: try --lr {training.lr / 3:.1g} or a longer --warmup-fraction"
    answers = scores.confusion.sum(dim=0).nonzero().flatten().tolist()
    samples = int(scores.confusion.sum())
    if len(answers) == 1 and int((scores.confusion.sum(dim=1) > 0).sum()) > 1:
        answer = names[answers[0]] if answers[0] < len(names) else f"class {answers[0]}"
        return f"the model answers {answer!r} for all {samples} {task} images; {remedy}"
    steps, losses = series(metrics, "train", "loss")
    later = [loss for step, loss in zip(steps, losses, strict=True) if step > training.warmup]
    guessing = math.log(len(names)) if len(names) > 1 else math.inf
    if entropy and later and max(later) > max(guessing, losses[0]):
        return (
            f"after the warmup, the training loss rose to {max(later):.2f}, above that of guessing, "
            f"ln({len(names)}) = {guessing:.2f}; {remedy}"
        )
    return None
