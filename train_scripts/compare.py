"""Compare RandLoRA, LoRA with about as many trained parameters, full fine-tuning and others on one task.

python train_scripts/compare.py --output-dir runs/demo

Takes its own options, and those of train_clip.py, or of train_classifier.py with --script classifier. Each method is
trained with every seed in a run folder of its own. Results of an earlier comparison in the output folder are
overwritten, unless --go-on is given.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from randlora_vision.errors import user_errors
from randlora_vision.files.atomic import fingerprint, write_json, write_text
from randlora_vision.files.untrusted import read_json
from randlora_vision.json_values import check_object
from randlora_vision.train_scripts import train_classifier, train_clip
from randlora_vision.training.classifier.defaults import DEFAULTS as CLASSIFIER_DEFAULTS
from randlora_vision.training.classifier.options import ClassifierAdapterOptions, ClassifierOptions
from randlora_vision.training.classifier.timm_flags import TIMM
from randlora_vision.training.clip.defaults import DEFAULTS as CLIP_DEFAULTS
from randlora_vision.training.clip.open_clip_flags import OPEN_CLIP
from randlora_vision.training.clip.options import ClipAdapterOptions, ClipOptions
from randlora_vision.training.evaluation.comparison import LABELS, Summaries, Summary, draw, table
from randlora_vision.training.evaluation.curves import HEADLINES, evaluations
from randlora_vision.training.harness.flags import Table
from randlora_vision.training.harness.options import AdapterOptions, Method, parse
from randlora_vision.training.harness.run_folder import RunFolder, plain_settings
from randlora_vision.training.methods.defaults import ScriptDefaults

Rate = float | Literal["auto"] | None  # None: the default of the method

_SIZED = ("lora", "dora", "vera", "nola")  # their rank is chosen to train about as many numbers as RandLoRA does
_REMARK = """\
Learning rates were chosen on validation images.
The gap between LoRA and RandLoRA reflects convergence within a short budget, not a limit of LoRA: in our trials
it was three points after these 250 steps and less than one after 600 (--steps 600).
Every method makes the base model forget part of what it could do before: see the original task, upright digits."""


@dataclass(frozen=True)
class Script:
    """A training script that can be compared with itself.

    Attributes:
        options: Its options.
        adapter: The group of them that holds the method.
        train: Trains; returns the content of summary.json.
        flags: Flags of other scripts that it knows.
        defaults: Its defaults.
    """

    options: Any
    adapter: Any
    train: Callable[[Any], Summary]
    flags: Table
    defaults: ScriptDefaults

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that it has."""
        return get_type_hints(self.adapter)["method"].__args__


SCRIPTS: Mapping[str, Script] = {
    "clip": Script(ClipOptions, ClipAdapterOptions, train_clip.train, OPEN_CLIP, CLIP_DEFAULTS),
    "classifier": Script(
        ClassifierOptions, ClassifierAdapterOptions, train_classifier.train, TIMM, CLASSIFIER_DEFAULTS
    ),
}


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        script: The training script.
        options: Its options, with the settings of RandLoRA.
        folder: Of the run folders.
        methods: The methods.
        seeds: Of the bases, the order of the images and the augmentation.
        rates: Peak learning rates by method; of several, the first seed chooses the best on the validation images.
        go_on: Keep finished runs of the same comparison.
        settings: Of the adapter, by method, instead of those that follow from RandLoRA's.
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
            best = max(tried, key=lambda rate: self._validation(method, rate))
            if len(rates) > 1:
                print(f"best rate of {method} on the validation images: {best}", flush=True)
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
        checkpoints = options.checkpoints
        if self.go_on and same and checkpoints.checkpoint_every:
            checkpoints = replace(checkpoints, resume="latest")
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / _GIVEN, {"options": fingerprint(given)})
        run = replace(options.run, output_dir=str(path), overwrite=True)
        return {**self.script.train(replace(options, run=run, checkpoints=checkpoints)), "folder": str(path)}

    def _adapter(self, method: Method, earlier: Summaries) -> AdapterOptions:
        own, given = self.settings.get(method, {}), self.options.adapter
        if method == "randlora":
            return replace(given, **own)
        shared = {name: getattr(given, name) for name in ("target_modules", "head_lr") if hasattr(given, name)}
        if method in _SIZED:
            shared["exclude_modules"] = given.exclude_modules
        if method in _SIZED and "rank" not in own and "randlora" in earlier:
            shared["budget"] = earlier["randlora"][0]["trained_numbers"]
        return self.script.adapter(method=method, **{**shared, **own})

    def _validation(self, method: str, rate: Rate) -> float:
        metrics = RunFolder(self.folder_of(method, rate, self.seeds[0])).read_metrics()
        return next(values[-1] for name in HEADLINES if (values := evaluations(metrics, name)[1]))


_GIVEN = "comparison.json"  # in a run folder: the fingerprint of the options


def _fingerprint_of(path: Path) -> str | None:
    file = path / _GIVEN
    return check_object(read_json(file), {"options": str}, file)["options"] if file.is_file() else None


def _summary_of(path: Path) -> Summary | None:
    file = RunFolder(path).summary
    return read_json(file) if file.is_file() else None


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train with every method, then write and print the comparison."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    if {"-h", "--help", "--help-all"} & set(words):
        print(parser.format_help())
    own, rest = parser.parse_known_args(words)
    script = SCRIPTS[own.script]
    options = parse(script.options, rest, __doc__ or "", script.flags, script.defaults.help())
    comparison = _comparison(own, script, options)
    summaries = comparison.run()
    folder = comparison.folder
    write_json(folder / "comparison.json", summaries)
    demo = own.script == "clip" and options.images.data is None and list(summaries) == ["randlora", "lora", "full"]
    remark = f" {_REMARK}" if demo else ""
    text = f"{table(summaries)}\n\nThe figures are those before and after training.{remark}\n"
    write_text(folder / "comparison.md", text)
    draw(folder, summaries)
    print(f"\n{text}\nresults: {folder}/comparison.png, comparison.md, comparison.json")
    print(f"run folders of the methods: {', '.join(str(folder / method) for method in summaries)}")


def _comparison(own: argparse.Namespace, script: Script, options: Any) -> Comparison:
    """Return what the command line asks for; raise ValueError for what cannot be compared."""
    if options.adapter.method != "randlora" or options.training.lr is not None or options.training.seed:
        raise ValueError(
            "the comparison runs every method, each with its own learning rate: leave --method, --lr and --seed out, "
            "and give --methods, --rates METHOD=RATE and --seeds instead"
        )
    evaluation = getattr(options, "evaluation", None)
    if evaluation and (evaluation.eval_only or evaluation.adapter is not None):
        raise ValueError("the comparison trains every method from the base model: leave --eval-only and --adapter out")
    if options.checkpoints.resume is not None:
        raise ValueError("the comparison resumes its own runs: give --go-on instead of --resume")
    if options.hub.push_to_hub:
        raise ValueError("the comparison trains several adapters: to upload one, train it with its own script")
    wrong = [method for method in own.methods if method not in script.methods]
    if wrong:
        raise ValueError(f"--methods: train_{own.script}.py has no {wrong[0]}; it has {', '.join(script.methods)}")
    rates = dict(_rates(word) for word in own.rates)
    if unused := sorted(rates.keys() - set(own.methods)):
        raise ValueError(f"--rates: {unused[0]} is not among --methods {' '.join(own.methods)}")
    methods = sorted(dict.fromkeys(own.methods), key=lambda method: method != "randlora")  # the others follow its size
    folder = Path(options.run.output_dir or f"runs/compare-{own.script}")
    return Comparison(script, options, folder, methods, list(dict.fromkeys(own.seeds)), rates, own.go_on)


def _rates(word: str) -> tuple[str, list[Rate]]:
    """Return the method and the rates of METHOD=RATE,RATE."""
    method, _, values = word.partition("=")
    try:
        rates: list[Rate] = ["auto" if value == "auto" else float(value) for value in values.split(",")]
    except ValueError:
        raise ValueError(f"--rates {word}: expected METHOD=RATE or METHOD=RATE,RATE, such as lora=1e-3,3e-3") from None
    return method, rates


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        add_help=False,
        allow_abbrev=False,
        usage="compare.py [options below] [options of the script]",
    )
    parser.add_argument("--script", choices=SCRIPTS, default="clip", help="train_clip.py or train_classifier.py")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=LABELS,
        default=["randlora", "lora", "full"],
        metavar="METHOD",
        help=f"of {', '.join(LABELS)}; without a rank of their own, {', '.join(_SIZED)} train about as many numbers as "
        "RandLoRA",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="seeds of every method")
    parser.add_argument(
        "--rates",
        nargs="+",
        default=[],
        metavar="METHOD=RATE,RATE",
        help="learning rates; of several, the first seed chooses the best on the validation images",
    )
    parser.add_argument(
        "--go-on",
        action="store_true",
        help="keep the finished runs of the same comparison, and resume a stopped one with --checkpoint-every",
    )
    return parser


if __name__ == "__main__":
    main()
