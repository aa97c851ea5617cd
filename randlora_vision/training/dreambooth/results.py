"""The end of a DreamBooth run: figures and summary in the run folder, and the closing message."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.dreambooth.families import Family
from randlora_vision.training.dreambooth.loading import to_leave_out
from randlora_vision.training.dreambooth.methods import PipelineAdaptation
from randlora_vision.training.dreambooth.options import DreamBoothSettings, model_title
from randlora_vision.training.evaluation.curves import plot_curves
from randlora_vision.training.evaluation.intervals import intervals, samples_of
from randlora_vision.training.evaluation.model_card import Base, commit_of
from randlora_vision.training.evaluation.results import summarise
from randlora_vision.training.harness.fit import EVALUATED
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.harness.task import Speed


def base_model(settings: DreamBoothSettings, family: Family) -> Base:
    """Return the base pipeline, for the card."""
    path, revision = settings.pipeline.pretrained_model_name_or_path, settings.pipeline.revision
    task = "text-to-image" if family.takes is None else "image-to-image"  # the Hub has no name for inpainting
    if family.frame_rate is not None:
        task = "text-to-video"
    if path is None or Path(path).exists():
        return Base("diffusers", task, model_title(settings))
    return Base("diffusers", task, path, path, commit_of(path, revision))


def loading_code(
    run: RunFolder, settings: DreamBoothSettings, path: str, family: Family, adaptation: PipelineAdaptation, prompt: str
) -> list[str]:
    """Return the Python code that rebuilds the adapted pipeline, whose base is at `path`, and draws a picture."""
    given = {"revision": settings.pipeline.revision, "variant": settings.pipeline.variant}
    words = "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)
    words += "".join(f", {name}=None" for name in to_leave_out(path, settings.pipeline.revision))
    prompt = next(iter(settings.validation.validation_prompt), prompt)
    lines = [
        "from diffusers import DiffusionPipeline",
        f"pipe = DiffusionPipeline.from_pretrained({path!r}{words})",
    ]
    if (vae := settings.pipeline.pretrained_vae_model_name_or_path) is not None:
        lines.append(f"pipe.register_modules(vae=type(pipe.vae).from_pretrained({vae!r}))")
    if (kind := settings.objective.prediction_type) is not None:
        new = f"type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type={kind!r})"
        lines.append(f"pipe.scheduler = {new}")
    return [
        *lines,
        *adaptation.loading_code(run.adapter),
        _drawing(family, prompt, settings.pipeline.max_sequence_length),
    ]


def _drawing(family: Family, prompt: str, length: int | None) -> str:
    if family.frame_rate is not None:
        return f"clip = pipe(prompt={prompt!r}, num_frames={family.num_frames}).frames[0]"
    given = f", max_sequence_length={length}" if length and "max_sequence_length" in family.text_options else ""
    if family.takes is None:
        return f"picture = pipe({prompt!r}{given}).images[0]"
    shown = {"mask": "image=image, mask_image=mask", "image": "image=image", "images": "image=[image]"}[family.takes]
    return f"picture = pipe(prompt={prompt!r}, {shown}{given}).images[0]  # PIL images of your own"


_SAME = 2 / 255  # for pixels in [0, 1]: allows for half-precision rounding; a different adapter differs far more


def write_results(
    run: RunFolder,
    settings: DreamBoothSettings,
    adaptation: PipelineAdaptation,
    speed: Speed,
    reload_difference: float,
    skipped: SkipList,
) -> dict[str, Any]:
    """Write the remaining files of the run folder except the samples; return the content of summary.json."""
    method, title = settings.adapter.method, model_title(settings)
    metrics = run.read_metrics()
    losses = {"loss": "instance images, fixed noise", "prior_loss": "class images, fixed noise"}
    plot_curves(metrics, f"{method} on {title}", run.curves, losses, _LINES)
    measured = [line for line in metrics if line["split"] == EVALUATED]
    before, after = _values(measured[0]), _values(measured[-1])
    summary = {
        **summarise(run, method, title, adaptation, speed, reload_difference, skipped),
        "before": before,
        "after": after,
        "confidence": {"before": intervals(before), "after": intervals(after)},
    }
    run.write(run.summary, summary)
    return summary


def _values(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("step", "split")}


_SHARES = {
    "subject": "robots for the prompts of the subject",
    "emoji_kept": "the right emoji for their names",
}
"""Fractions of pictures, measured in the demo alone."""
_LINES = {
    **_SHARES,
    "subject_likeness": "likeness to the subject",
    "prior_likeness": "other prompts: likeness to the base",
    "prior_drift": "other prompts: pixel drift",
}
"""The measures of the subject and the prior that are drawn, all between 0 and 1, with their labels."""


def in_words(values: Mapping[str, float]) -> str:
    """Return the metrics of an evaluation as text."""
    words = f"loss {values['loss']:.4f} on the subject"
    if "prior_loss" in values:
        words += f", {values['prior_loss']:.4f} on its class"
    if "prior_likeness" in values:
        words += f", likeness to the subject {values['subject_likeness']:.3f}"
    shares = ", ".join(
        f"{text} {values[name]:.0%} of {samples_of(name, values)}" for name, text in _SHARES.items() if name in values
    )
    return f"{words}; {shares}" if shares else words


def lost_words(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Return a line on what training has changed for prompts that are not the subject's, if it was measured."""
    words = []
    if "prior_drift" in after:
        words.append(
            f"{after['prior_pictures']} pictures of other prompts differ by {after['prior_drift']:.3f} from the base's "
            "at equal seeds (root mean square, pixels from 0 to 1)"
        )
    if "prior_likeness" in after:
        words.append(f"their likeness to the base's is {after['prior_likeness']:.3f}")
    if "emoji_kept" in after:
        low, high = intervals(after)["emoji_kept"]
        words.append(
            f"{_SHARES['emoji_kept']} {before['emoji_kept']:.0%} -> {after['emoji_kept']:.0%} of "
            f"{samples_of('emoji_kept', after)} pictures (95% interval {low:.0%} to {high:.0%})"
        )
    return [f"prior:  {'; '.join(words)}"] if words else []


def check_same(difference: float, run: RunFolder) -> float:
    """Return the largest pixel difference of the reloaded pipeline; raise RuntimeError if it is visible."""
    if not difference <= _SAME:
        raise RuntimeError(f"{run.adapter} does not reproduce the trained pipeline: a pixel differs by {difference}")
    return difference
