"""The end of a DreamBooth run: figures and summary in the run folder, and the closing message."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.dreambooth.methods import PipelineAdaptation
from randlora_vision.training.dreambooth.options import DreamBoothOptions, model_title
from randlora_vision.training.dreambooth.pictures import plot_losses
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
    options: DreamBoothOptions,
    adaptation: PipelineAdaptation,
    shares: Mapping[str, Shares],
    speed: Speed,
    reload_difference: float,
    skipped: SkipList,
) -> dict[str, Any]:
    """Write the remaining files of the run folder except the samples; return the content of summary.json."""
    method, title = options.adapter.method, model_title(options)
    metrics = run.read_metrics()
    plot_losses(metrics, f"{method} on {title}", run.curves)
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


def closing_words(
    run: RunFolder, adaptation: PipelineAdaptation, shares: Mapping[str, Shares], summary: dict[str, Any]
) -> str:
    """Return the closing message: losses, file, result of the reload check, and code that loads the file."""
    lines = [""]
    for when in ("before", "after"):
        losses = f"loss {summary[when]['loss']:.4f} on the subject"
        if "prior_loss" in summary[when]:
            losses += f", {summary[when]['prior_loss']:.4f} on its class"
        lines.append(f"{when + ':':8}{losses}" + (f"; {shares[when]}" if when in shares else ""))
    lines += [
        f"trained {summary['trained_numbers']:,} numbers for {summary['seconds']:.0f} s at "
        f"{summary['images_per_second']:.0f} images/s",
        f"saved {run.adapter} ({summary['file_bytes']:,} bytes); loaded into a fresh pipeline, it gives the same "
        f"pictures (largest pixel difference: {summary['reload_difference']:.1e})",
        "\nTo use it:",
        *(f"    {line}" for line in adaptation.loading_code(run.adapter)),
        *([f"\npictures: {run.samples}"] if run.samples.exists() else []),
        f"\nresults: {run.path}",
    ]
    return "\n".join(lines)


def check_same(difference: float, run: RunFolder) -> float:
    """Return the largest pixel difference of the reloaded pipeline; raise RuntimeError if it is visible."""
    if not difference <= _SAME:
        raise RuntimeError(f"{run.adapter} does not reproduce the trained pipeline: a pixel differs by {difference}")
    return difference
