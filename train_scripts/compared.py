"""The training scripts that compare.py and run_recipes.py run, and the runs of a comparison."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from randlora_vision.files import bundle
from randlora_vision.files.atomic import fingerprint, write_json
from randlora_vision.files.untrusted import read_json
from randlora_vision.json_values import check_object
from randlora_vision.train_scripts import train_classifier, train_clip, train_dreambooth
from randlora_vision.training.classifier.defaults import DEFAULTS as CLASSIFIER_DEFAULTS
from randlora_vision.training.classifier.options import ClassifierAdapterOptions, ClassifierOptions
from randlora_vision.training.classifier.timm_flags import TIMM
from randlora_vision.training.clip.defaults import DEFAULTS as CLIP_DEFAULTS
from randlora_vision.training.clip.open_clip_flags import OPEN_CLIP
from randlora_vision.training.clip.options import ClipAdapterOptions, ClipOptions
from randlora_vision.training.dreambooth.defaults import DEFAULTS as DREAMBOOTH_DEFAULTS
from randlora_vision.training.dreambooth.diffusers_flags import DIFFUSERS
from randlora_vision.training.dreambooth.options import DreamBoothAdapterOptions, DreamBoothOptions
from randlora_vision.training.evaluation.comparison import LABELS, Summaries, Summary
from randlora_vision.training.evaluation.curves import HEADLINES, evaluations
from randlora_vision.training.harness.checkpoints import FOLDER, list_checkpoints
from randlora_vision.training.harness.flags import Table
from randlora_vision.training.harness.options import AdapterOptions, Method
from randlora_vision.training.harness.progress import smaller_is_better
from randlora_vision.training.harness.run_folder import RunFolder, plain_settings
from randlora_vision.training.methods.defaults import ScriptDefaults
from randlora_vision.training.methods.rivals import rank_for_shapes

Rate = float | Literal["auto"] | None  # None: the default of the method

SIZED = ("lora", "dora", "vera", "nola")  # their rank is chosen to train about as many numbers as RandLoRA does


@dataclass(frozen=True)
class Script:
    """A training script that can be compared with itself.

    Attributes:
        options: Its options.
        adapter: The group of them that holds the method.
        train: Trains; returns the content of summary.json.
        flags: Flags of other scripts that it knows.
        defaults: Its defaults.
        budget: Whether it chooses the rank of a method by the option `budget`.
    """

    options: Any
    adapter: Any
    train: Callable[[Any], Summary]
    flags: Table
    defaults: ScriptDefaults
    budget: bool = True

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that it has."""
        return get_type_hints(self.adapter)["method"].__args__


SCRIPTS: Mapping[str, Script] = {
    "clip": Script(ClipOptions, ClipAdapterOptions, train_clip.train, OPEN_CLIP, CLIP_DEFAULTS),
    "classifier": Script(
        ClassifierOptions, ClassifierAdapterOptions, train_classifier.train, TIMM, CLASSIFIER_DEFAULTS
    ),
    "dreambooth": Script(
        DreamBoothOptions,
        DreamBoothAdapterOptions,
        train_dreambooth.train,
        DIFFUSERS,
        DREAMBOOTH_DEFAULTS,
        budget=False,  # the weights are known only once the pipeline is loaded
    ),
}


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        script: The training script.
        options: Its options, with the settings of RandLoRA.
        folder: Where the run folders are.
        methods: The methods.
        seeds: The seeds of the bases, the order of the images and the augmentation.
        rates: Peak learning rates by method; of several, the first seed chooses the best on the validation images.
        go_on: Keep finished runs of the same comparison.
        settings: Settings of the adapter by method, in place of those that follow from RandLoRA's.
        final_rate: Rates end at this part of their peak; at that of the options if it is 0.
    """

    script: Script
    options: Any
    folder: Path
    methods: Sequence[Method]
    seeds: Sequence[int] = (0,)
    rates: Mapping[str, Sequence[Rate]] = field(default_factory=dict)
    go_on: bool = False
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    final_rate: float = 0.0

    def run(self) -> dict[str, list[Summary]]:
        """Train what is missing; return the summaries of each method at its best rate, by seed."""
        summaries: dict[str, list[Summary]] = {}
        for method in self.methods:
            print(f"\n=== {LABELS[method]}", flush=True)
            rates = self.rates.get(method) or (None,)
            tried = {rate: self._train(method, rate, self.seeds[0], summaries) for rate in rates}
            best = max(tried, key=lambda rate: self._validation(method, rate)) if len(rates) > 1 else rates[0]
            if len(rates) > 1:
                print(f"best rate of {method} by what is measured during training: {best}", flush=True)
            rest = [self._train(method, best, seed, summaries) for seed in self.seeds[1:]]
            summaries[method] = [tried[best], *rest]
        return summaries

    def folder_of(self, method: str, rate: Rate, seed: int) -> Path:
        """Return the run folder, which is that of the method alone where it has one run."""
        rates = self.rates.get(method) or (None,)
        names = [
            method,
            *([f"lr-{rate}"] if len(rates) > 1 else []),
            *([f"seed-{seed}"] if len(self.seeds) > 1 else []),
        ]
        return self.folder.joinpath(*names)

    def given(self, method: Method, rate: Rate, seed: int, earlier: Summaries) -> Any:
        """Return the options of one run; `earlier` has the runs of RandLoRA, whose size others follow."""
        training = replace(self.options.training, lr=rate or self.options.training.lr, seed=seed)
        if self.final_rate and isinstance(rate, float):
            training = replace(training, min_lr=rate * self.final_rate)
        return replace(self.options, adapter=self._adapter(method, earlier), training=training)

    def _train(self, method: Method, rate: Rate, seed: int, earlier: Summaries) -> Summary:
        path, options = self.folder_of(method, rate, seed), self.given(method, rate, seed, earlier)
        given = {key: value for key, value in plain_settings(options).items() if key not in ("run", "checkpoints")}
        same = _fingerprint_of(path) == fingerprint(given)
        if self.go_on and same and (summary := _summary_of(path)) is not None:
            print(f"kept: {path}", flush=True)
            return {**summary, "folder": str(path)}
        resuming = self.go_on and same and bool(list_checkpoints(path / FOLDER))
        checkpoints = replace(options.checkpoints, resume="latest" if resuming else None)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / _GIVEN, {"options": fingerprint(given)})
        run = replace(options.run, output_dir=str(path), overwrite=not resuming)
        return {**self.script.train(replace(options, run=run, checkpoints=checkpoints)), "folder": str(path)}

    def _adapter(self, method: Method, earlier: Summaries) -> AdapterOptions:
        own, given = self.settings.get(method, {}), self.options.adapter
        if method == "randlora":
            return replace(given, **own)
        shared = {
            name: getattr(given, name) for name in ("target_modules", "head_lr", "probe_lr") if hasattr(given, name)
        }
        if method == "linear-probe":
            shared.pop("probe_lr", None)  # its rate is that of the method
        if method in SIZED:
            shared["exclude_modules"] = given.exclude_modules
        if method in SIZED and "rank" not in own and "randlora" in earlier:
            first = earlier["randlora"][0]
            size = ("budget", first["trained_numbers"]) if self.script.budget else ("rank", _lora_rank_like(first))
            shared.update([size])
        return self.script.adapter(method=method, **{**shared, **own})

    def _validation(self, method: str, rate: Rate) -> float:
        """Return the last value of the first metric below that was measured, larger if better."""
        metrics = RunFolder(self.folder_of(method, rate, self.seeds[0])).read_metrics()
        names = (*HEADLINES, "balance", "loss")
        name, value = next((name, values[-1]) for name in names if (values := evaluations(metrics, name)[1]))
        return -value if smaller_is_better(name) else value


def _lora_rank_like(run: Summary) -> int:
    """Return the rank of a LoRA that trains about as many numbers as a run of RandLoRA did, on the same weights."""
    parts = bundle.read(RunFolder(Path(run["folder"])).adapter).values()
    shapes = [target.shape for part in parts for target in part.targets]
    return rank_for_shapes("lora", shapes, run["trained_numbers"])


_GIVEN = "comparison.json"  # in a run folder: the fingerprint of the options


def _fingerprint_of(path: Path) -> str | None:
    file = path / _GIVEN
    return check_object(read_json(file), {"options": str}, file)["options"] if file.is_file() else None


def _summary_of(path: Path) -> Summary | None:
    file = RunFolder(path).summary
    return read_json(file) if file.is_file() else None
