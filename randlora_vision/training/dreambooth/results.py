"""The end of a DreamBooth run: figures and summary in the run folder, and the closing message."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.dreambooth.methods import PipelineAdaptation
from randlora_vision.training.dreambooth.options import DreamBoothSettings, model_title
from randlora_vision.training.evaluation.curves import plot_curves
from randlora_vision.training.evaluation.results import summarise
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.harness.task import Speed


@dataclass(frozen=True)
class Shares:
    """Fractions of samples that a classifier of real digits recognises as intended."""

    subject: float
    """For the prompt of the subject: an inverted seven."""
    class_kept: float
    """For the prompt of the class, covered by prior preservation: an upright digit."""
    digits_kept: float
    """For the prompts of the ten digits, not covered by prior preservation: that digit, upright."""

    def __str__(self) -> str:
        return (
            f"inverted sevens for the subject prompt {self.subject:.0%}, upright digits for the class prompt "
            f"{self.class_kept:.0%}, the correct digit for the digit prompts {self.digits_kept:.0%}"
        )


_SAME = 2 / 255  # for pixels in [0, 1]: allows for half-precision rounding; a different adapter differs far more


def write_results(
    run: RunFolder,
    settings: DreamBoothSettings,
    adaptation: PipelineAdaptation,
    shares: Mapping[str, Shares],
    speed: Speed,
    reload_difference: float,
    skipped: SkipList,
) -> dict[str, Any]:
    """Write the remaining files of the run folder except the samples; return the content of summary.json."""
    method, title = settings.adapter.method, model_title(settings)
    metrics = run.read_metrics()
    losses = {"loss": "instance images, fixed noise", "prior_loss": "class images, fixed noise"}
    plot_curves(metrics, f"{method} on {title}", run.curves, losses)
    measured = [line for line in metrics if line["split"] == "val"]
    summary = {
        **summarise(run, method, title, adaptation, speed, reload_difference, skipped),
        "before": _values(measured[0], shares.get("before")),
        "after": _values(measured[-1], shares.get("after")),
    }
    run.write(run.summary, summary)
    return summary


def _values(line: Mapping[str, Any], shares: Shares | None) -> dict[str, float]:
    losses = {name: value for name, value in line.items() if name not in ("step", "split")}
    return {**losses, **(asdict(shares) if shares else {})}


def in_words(losses: Mapping[str, float], shares: Shares | None) -> str:
    """Return the losses and the shares as text."""
    words = f"loss {losses['loss']:.4f} on the subject"
    if "prior_loss" in losses:
        words += f", {losses['prior_loss']:.4f} on its class"
    return f"{words}; {shares}" if shares else words


def check_same(difference: float, run: RunFolder) -> float:
    """Return the largest pixel difference of the reloaded pipeline; raise RuntimeError if it is visible."""
    if not difference <= _SAME:
        raise RuntimeError(f"{run.adapter} does not reproduce the trained pipeline: a pixel differs by {difference}")
    return difference
