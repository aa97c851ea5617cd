"""The warning of a collapsed training appears exactly when one of its two signs does."""

import math

import pytest
import torch

from randlora_vision.training.evaluation.accuracy import Scores
from randlora_vision.training.evaluation.collapse import collapse_warning
from randlora_vision.training.harness.options import Training

TRAINING = Training(lr=0.003, steps=100)  # 10 steps of warmup
NAMES = ["ant", "bee", "cow"]
GUESSING = math.log(3)


def warning(confusion, losses, **changes):
    metrics = [{"step": step, "split": "train", "loss": loss} for step, loss in losses.items()]
    scores = Scores(torch.tensor(confusion), 1.0, None)
    return collapse_warning(scores, NAMES, "test", metrics, TRAINING, **changes)


GOOD = [[5, 1, 0], [0, 6, 0], [1, 0, 5]]
ONE_ANSWER = [[0, 6, 0], [0, 6, 0], [0, 6, 0]]


def test_one_answer_for_everything_after_the_loss_rose():
    assert warning(ONE_ANSWER, {5: 1.0, 50: 0.5, 60: 0.6}) == (
        "the model answers 'bee' for all 18 test images; --lr 0.003 is probably too high: "
        "try --lr 0.001 or a longer --warmup-fraction"
    )


@pytest.mark.parametrize("losses", [{5: 1.0, 50: 0.5}, {5: 1.1, 50: 1.12}, {5: 1.1}, {}])
def test_one_answer_without_a_loss_that_rose(losses):
    found = warning(ONE_ANSWER, losses)
    assert found.endswith("; try --lr 0.001, or if the training loss has hardly fallen, a higher one or more --steps")


def test_an_answer_outside_of_the_classes_of_the_data():
    assert "answers 'class 3' for all 2 test images" in warning([[0, 0, 0, 1], [0, 0, 0, 1]], {5: 1.0})


def test_a_loss_above_that_of_guessing_after_the_warmup():
    found = warning(GOOD, {5: 1.2, 15: 1.4, 50: 0.5})
    assert found.startswith("after the warmup, the training loss rose to 1.40, above that of guessing, ln(3) = 1.10; ")


@pytest.mark.parametrize(
    ("confusion", "losses"),
    [
        (GOOD, {5: 1.0, 15: 0.9, 50: 0.5}),
        (GOOD, {5: 9.0, 10: 1.2, 15: 0.9}),  # within the warmup
        (GOOD, {5: 1.099, 15: 1.101, 50: 1.102}),  # the noise of batches around guessing
        (GOOD, {5: 2.5, 15: 1.9, 50: 1.3}),  # a base model that is worse than guessing, and gets better
        ([[0, 0, 0], [0, 6, 0], [0, 0, 0]], {5: 1.0, 15: 0.9}),  # images of one class only, and all right
        (GOOD, {}),
    ],
)
def test_no_warning(confusion, losses):
    assert warning(confusion, losses) is None


def test_other_losses_have_another_value_of_guessing():
    assert warning(GOOD, {5: 1.2, 15: 1.4}, entropy=False) is None
    assert warning(ONE_ANSWER, {5: 1.2, 15: 1.4}, entropy=False)
