"""The end of a CLIP run: figures and summary in the run folder, and the closing message."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from randlora_vision.training.clip.evaluation import ClipMeasured, Evaluation
from randlora_vision.training.clip.options import ClipSettings
from randlora_vision.training.evaluation.collapse import collapse_warning, high_loss_warning, one_answer_warning
from randlora_vision.training.evaluation.curves import HEADLINES, plot_curves, plot_scales
from randlora_vision.training.evaluation.grids import plot_found
from randlora_vision.training.evaluation.intervals import intervals
from randlora_vision.training.evaluation.model_card import Base, commit_of
from randlora_vision.training.evaluation.results import (
    Results,
    confidence,
    headline,
    log_results,
    plot_results,
    summarise,
)
from randlora_vision.training.harness.distributed import process_and_processes
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.harness.task import Speed
from randlora_vision.training.methods.adaptation import Adaptation

_SHOWN = 20  # class names in the code of the printed summary


@dataclass(frozen=True)
class RunResults:
    """All evaluation results of a run."""

    evaluation: Evaluation
    before: ClipMeasured
    after: ClipMeasured | None  # None if only the base model was evaluated
    scales: Sequence[tuple[float, Results]] = ()  # between the base model and the adapted one
    truncated_captions: int = 0

    @property
    def last(self) -> ClipMeasured:
        """The results after training, or those of the base model if nothing was trained."""
        return self.after or self.before

    def record(self) -> dict[str, Any]:
        """Return the content for summary.json."""
        names = self.evaluation.class_names
        found = {"before": self.before, "after": self.after}
        scores = {
            when: measured.scores[self.evaluation.task]
            for when, measured in found.items()
            if names is not None and measured is not None
        }
        per_class = (
            {
                "per_class": {when: dict(zip(names or (), s.per_class, strict=True)) for when, s in scores.items()},
                "per_class_samples": dict(zip(names or (), next(iter(scores.values())).counts, strict=True)),
                "per_class_confidence": {
                    when: dict(zip(names or (), s.class_intervals(), strict=True)) for when, s in scores.items()
                },
            }
            if scores
            else {}
        )
        results = {when: measured.results if measured else None for when, measured in found.items()}
        return {
            "tasks": self.evaluation.tasks,
            "splits": self.evaluation.splits,
            **results,
            **confidence(results),
            **(per_class or {"truncated_captions": self.truncated_captions}),
            **({"scales": [_at_scale(*found) for found in self.scales]} if self.scales else {}),
        }


def _at_scale(scale: float, results: Results) -> dict[str, Any]:
    found = {name: intervals(values) for name, values in results.items()}
    return {"scale": scale, **results, "confidence": found}


def write_results(
    run: RunFolder,
    settings: ClipSettings,
    adaptation: Adaptation,
    measured: RunResults,
    speed: Speed,
    reload_difference: float,
) -> dict[str, Any]:
    """Write the remaining files of the run folder after training; return the content of summary.json."""
    assert measured.after is not None
    log_results(run, measured.before.results, measured.after.results, speed.steps)
    method, title = settings.adapter.method, settings.clip.title
    metrics, names, task = run.read_metrics(), measured.evaluation.class_names, measured.evaluation.task
    plot_curves(metrics, f"{method} on {title}", run.curves)
    _draw(run, measured, "before and after training")
    warning = None
    if names is not None:
        entropy = settings.loss.loss == "class-prompts"
        warning = collapse_warning(measured.after.scores[task], names, task, metrics, settings.training, entropy)
    elif (answer := measured.after.features[task].only_answer()) is not None:
        images = len(measured.after.features[task].images)
        warning = one_answer_warning(answer, images, task, metrics, settings.training)
    elif settings.loss.loss == "clip":
        training = settings.training
        pairs = training.batch_size * training.gradient_accumulation_steps * process_and_processes()[1]
        warning = high_loss_warning(metrics, training, pairs)
    summary = {
        **summarise(run, method, title, adaptation, speed, reload_difference, measured.evaluation.skipped),
        "warning": warning,
        **measured.record(),
    }
    run.write(run.summary, summary)
    return summary


def write_evaluation(run: RunFolder, settings: ClipSettings, measured: RunResults) -> dict[str, Any]:
    """Write the run folder of an evaluation-only run; return the content of summary.json."""
    for name, values in measured.last.results.items():
        run.log(0, name, values)
    _draw(run, measured, "without and with the adapter" if measured.after else "of the base model")
    summary = {
        "method": "evaluation",
        "model": settings.clip.title,
        "adapter": settings.evaluation.adapter,
        **measured.record(),
        "skipped_images": measured.evaluation.skipped.count(),
        "changed": measured.evaluation.skipped.changes(),
    }
    run.write(run.summary, summary)
    return summary


def _draw(run: RunFolder, measured: RunResults, when: str) -> None:
    evaluation, last = measured.evaluation, measured.last
    before = measured.before if measured.after else None
    if evaluation.class_names is None:
        title = f"{evaluation.task.capitalize()} images and nearest captions {when}"
        plot_found(evaluation.found(before, last), title, run.predictions)
    else:
        scores = last.scores[evaluation.task]
        plot_results(run, evaluation.predictions(before, last), scores, evaluation.class_names, evaluation.task, when)
    if measured.scales:
        lines = {
            task: [headline(results[name]) for _, results in measured.scales] for name, task in evaluation.tasks.items()
        }
        kind = HEADLINES["mean_recall" if evaluation.class_names is None else "top1"]
        scales, title = [scale for scale, _ in measured.scales], f"{kind.capitalize()} between base and adapted model"
        plot_scales(scales, lines, kind, title, run.scales)


def base_of(settings: ClipSettings) -> Base:
    """Return the base model, for the card."""
    import open_clip

    chosen = settings.clip
    schema, name = open_clip.factory.parse_model_name(chosen.model)
    weights = open_clip.get_pretrained_cfg(chosen.title, chosen.pretrained or "")
    repository = name if schema == "hf-hub" else weights.get("hf_hub", "").strip("/")
    title = f"{chosen.title} ({chosen.pretrained})" if chosen.pretrained else chosen.title
    task = "zero-shot-image-classification"
    return Base("open_clip", task, title, repository or None, commit_of(repository) if repository else None)


def loading_code(
    run: RunFolder, settings: ClipSettings, adaptation: Adaptation, class_names: Sequence[str] | None
) -> list[str]:
    """Return the Python code that rebuilds the adapted model and applies it to a picture."""
    name, pretrained = settings.clip.model, settings.clip.pretrained
    lines = ["import open_clip, torch", "from PIL import Image"]
    if name.endswith(".json"):
        lines.append(f"open_clip.add_model_config({name!r})")
        name = settings.clip.title
    weights = f", pretrained={pretrained!r}" if pretrained else ""
    weights += "".join(f", {name}={value!r}" for name, value in settings.clip.changes.items())
    if not weights and ":" not in name:
        lines.append(f"torch.manual_seed({settings.training.seed})  # random weights")
    lines.append(f"model, _, preprocess = open_clip.create_model_and_transforms({name!r}{weights})")
    lines.append(f"tokenizer = open_clip.get_tokenizer({name!r})")
    if settings.evaluation.adapter is not None:
        lines.append("from randlora_vision.training.clip.load import load_trained")
        lines.append(f"load_trained(model, {settings.evaluation.adapter!r})")
    together = settings.adapter.probe_lr is not None
    if together:
        lines.append("from randlora_vision.training.clip.load import load_trained")
        lines.append(f"class_features = load_trained(model, {str(run.adapter)!r})")
    else:
        lines += adaptation.loading_code(run.adapter)
    lines += ["model.eval()", 'picture = preprocess(Image.new("RGB", (224, 224)))[None]  # or Image.open(FILE)']
    if class_names is None:
        lines.append('texts, answers = tokenizer(["a cat", "a dog"]), ["a cat", "a dog"]  # or yours')
        features = "model.encode_text(texts, normalize=True).T"
    else:
        lines.append(f"answers = {_words(class_names, run)}")
        features = "class_features.T"
        if settings.adapter.method != "linear-probe" and not together:
            lines.append(f"templates = {list(settings.images.templates)!r}")
            features = "open_clip.build_zero_shot_classifier(model, tokenizer, answers, templates)"
    return [
        *lines,
        "with torch.no_grad():",
        f"    classes = {features}",
        "    logits = model.logit_scale.exp() * model.encode_image(picture, normalize=True) @ classes",
        "print(answers[logits.argmax()])",
    ]


def _words(class_names: Sequence[str], run: RunFolder) -> str:
    """Return Python code for the class names: a list, or where it would be long, the record of the run."""
    if len(class_names) <= _SHOWN:
        return repr(list(class_names))
    return f"list(__import__('json').load(open({str(run.summary)!r}))['per_class_samples'])"
