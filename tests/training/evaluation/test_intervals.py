"""Confidence intervals, against the definition: the proportions that a score test at 5% does not reject."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from randlora_vision.training.evaluation.intervals import intervals, wilson


@pytest.mark.parametrize(("right", "samples"), [(0, 1), (1, 1), (0, 18), (17, 18), (5, 80), (400, 400), (123, 999)])
def test_the_ends_are_where_the_score_test_changes_its_answer(right: int, samples: int) -> None:
    quantile = Normal(0.0, 1.0).icdf(torch.tensor(0.975, dtype=torch.float64)).item()
    for end in wilson(right / samples, samples):
        if 1e-9 < end < 1 - 1e-9:
            score = (right / samples - end) / (end * (1 - end) / samples) ** 0.5
            assert abs(score) == pytest.approx(quantile, abs=1e-6)
    low, high = wilson(right / samples, samples)
    assert 0 <= low <= right / samples <= high <= 1 and high - low > 0


def test_only_proportions_have_intervals() -> None:
    values = {"top1": 0.5, "top5": 1.0, "loss": 2.0, "samples": 10}
    drawn = {"subject": 0.5, "subject_likeness": 0.3, "prior_drift": 0.1, "subject_pictures": 16}
    assert intervals(drawn) == {"subject": list(wilson(0.5, 16))}  # the others are not proportions
    assert set(intervals(values)) == {"top1", "top5"} and intervals(values)["top1"] == list(wilson(0.5, 10))
    recalls = {"image_to_text_r1": 0.5, "text_to_image_r1": 0.25, "mean_recall": 0.4, "images": 4, "captions": 20}
    assert intervals(recalls) == {
        "image_to_text_r1": list(wilson(0.5, 4)),
        "text_to_image_r1": list(wilson(0.25, 20)),
    }
