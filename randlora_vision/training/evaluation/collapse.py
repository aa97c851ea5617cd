"""Signs of a training that has failed, in one line with the remedy."""

import math
from collections.abc import Sequence

from randlora_vision.names import counted, printable
from randlora_vision.training.evaluation.accuracy import Scores
from randlora_vision.training.evaluation.curves import Metrics, series
from randlora_vision.training.harness.options import Training

_ABOVE = 1.05  # a loss that is higher by less is within the noise of batches
_ROSE = 1.1  # by this factor, from its lowest value so far


def collapse_warning(
    scores: Scores, names: Sequence[str], task: str, metrics: Metrics, training: Training, entropy: bool = True
) -> str | None:
    """Return what is wrong with a trained classifier, or None.

    That is one answer for all images of the `task` ("test" or "validation"), or, if the loss is the plain cross
    `entropy`, a training loss above that of guessing (see `high_loss_warning`).
    """
    answers = scores.confusion.sum(dim=0).nonzero().flatten().tolist()
    if len(answers) == 1 and int((scores.confusion.sum(dim=1) > 0).sum()) > 1:
        answer = names[answers[0]] if answers[0] < len(names) else f"class {answers[0]}"
        return one_answer_warning(answer, int(scores.confusion.sum()), task, metrics, training)
    return high_loss_warning(metrics, training, len(names)) if entropy else None


def one_answer_warning(answer: str, images: int, task: str, metrics: Metrics, training: Training) -> str:
    """Return the warning that a model answers all images alike; unless its loss rose, the rate may also be too low."""
    _, losses = series(metrics, "train", "loss")
    rose = any(loss > _ROSE * min(losses[: place + 1]) for place, loss in enumerate(losses))
    either = f"try --lr {training.lr / 3:.1g}, or if the training loss has hardly fallen, a higher one or more --steps"
    remedy = _remedy(training) if rose else either
    return f"the model answers {printable(answer)!r} for all {counted(images, f'{task} image')}; {remedy}"


def high_loss_warning(metrics: Metrics, training: Training, choices: int) -> str | None:
    """Return a warning if, after the warmup, the training loss was 5% above its start and above ln(choices), or None.

    That is the loss of guessing among so many classes, or among the pairs of a step.
    """
    steps, losses = series(metrics, "train", "loss")
    later = [loss for step, loss in zip(steps, losses, strict=True) if step > training.warmup]
    guessing = math.log(choices) if choices > 1 else math.inf
    if not later or max(later) <= _ABOVE * max(guessing, losses[0]):
        return None
    return (
        f"after the warmup, the training loss rose to {max(later):.2f}, above that of guessing, "
        f"ln({choices}) = {guessing:.2f}; {_remedy(training)}"
    )


def _remedy(training: Training) -> str:
    return f"--lr {training.lr:g} is probably too high: try --lr {training.lr / 3:.1g} or a longer --warmup-fraction"
