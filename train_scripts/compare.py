"""Compare RandLoRA, LoRA with about as many trained parameters, full fine-tuning and others on one task.

python train_scripts/compare.py --output-dir runs/demo

Takes its own options, and those of train_clip.py, or of another script with --script classifier or dreambooth. Each
method is trained with every seed in a run folder of its own. Results of an earlier comparison in the output folder are
overwritten, unless --go-on is given.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from randlora_vision.errors import user_errors
from randlora_vision.files.atomic import write_json, write_text
from randlora_vision.train_scripts.compared import SCRIPTS, SIZED, Comparison, Rate, Script
from randlora_vision.training.dreambooth.options import DreamBoothOptions
from randlora_vision.training.evaluation.comparison import LABELS, draw, table
from randlora_vision.training.harness.options import parse

_REMARK = """\
Learning rates were chosen on validation images.
The gap between LoRA and RandLoRA reflects convergence within a short budget, not a limit of LoRA: in our trials
it was three points after these 250 steps and less than one after 600 (--steps 600).
Every method makes the base model forget part of what it could do before: see the original task, upright digits."""


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
    if own.script == "dreambooth":
        _check_dreambooth(options)
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


def _check_dreambooth(options: DreamBoothOptions) -> None:
    """Raise ValueError unless training follows and both the subject and the rest are measured."""
    if options.pipeline.dry_run:
        raise ValueError("the comparison trains: for --dry-run, call train_dreambooth.py itself")
    drawn, subject = options.validation, options.subject
    asked = drawn.num_prior_images and (drawn.validation_prompt or drawn.prior_prompt or drawn.likeness_encoder)
    if not (options.embedded or subject.with_prior_preservation or asked):
        raise ValueError(
            "nothing would measure what is lost of other prompts: give --validation-prompt or --prior-prompt, or "
            "--with-prior-preservation with --class-prompt"
        )


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
    parser.add_argument("--script", choices=SCRIPTS, default="clip", help="whose script: train_clip.py and so on")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=LABELS,
        default=["randlora", "lora", "full"],
        metavar="METHOD",
        help=f"of {', '.join(LABELS)}; without a rank of their own, {', '.join(SIZED)} train about as many numbers as "
        "RandLoRA",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="seeds of every method")
    parser.add_argument(
        "--rates",
        nargs="+",
        default=[],
        metavar="METHOD=RATE,RATE",
        help="learning rates; of several, the first seed chooses the best on the validation images (dreambooth: by the "
        "balance if it is measured, else the loss)",
    )
    parser.add_argument(
        "--go-on",
        action="store_true",
        help="keep the finished runs of the same comparison, and resume a stopped one from its last checkpoint",
    )
    return parser


if __name__ == "__main__":
    main()
