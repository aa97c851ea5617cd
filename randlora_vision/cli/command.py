"""The `randlora` command: its arguments, and the functions that handle them."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from randlora_vision.cli import actions
from randlora_vision.cli.models import HELP
from randlora_vision.errors import user_errors

_EXIT_CODES = "exit codes: 0 success, 1 a check failed, 2 bad input (one line on stderr)"


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument like any other error: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help)")


@user_errors
def run(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the subcommand."""
    arguments = vars(_parser().parse_args(argv))
    raise SystemExit(arguments.pop("action")(**arguments))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="randlora", description="Train, inspect, verify, convert and merge RandLoRA adapters.", epilog=_EXIT_CODES
    )
    # Handled before the libraries of the command are imported (cli/__init__.py); listed here for --help.
    parser.add_argument(
        "--version",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the versions of randlora_vision and its hosts, and exit",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # Likewise: doctor reports missing libraries, and the scripts have options of their own.
    commands.add_parser("doctor", help="show versions and devices, and check every installed host", add_help=False)
    commands.add_parser("train", help="train clip, classifier or dreambooth: start a script", add_help=False)

    info = _command(commands, "info", actions.info, "show the settings, layers, norms and ranks of an adapter file")
    info.add_argument("file", help="an adapter file")
    info.add_argument(
        "--all", dest="each", action="store_true", help="show every layer, not groups of layers that repeat"
    )
    info.add_argument("--plot", metavar="PNG", help="plot the singular values of every update")

    targets = _command(commands, "targets", actions.targets, "show what would be adapted in a model; loads no weights")
    targets.add_argument("model", help=HELP)
    targets.add_argument("--component", help="component of a diffusers pipeline; default: its unet or transformer")
    targets.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="names, a regular expression or a preset; default: all-linear",
    )
    targets.add_argument("--exclude-modules", nargs="+", metavar="NAME", default=[], help="names never to adapt")
    targets.add_argument(
        "--rank", type=int, default=32, help="rank of one base (32); a larger one trains fewer numbers"
    )
    _model_args(targets)

    merge = _command(commands, "merge", actions.merge, "write a checkpoint with the adapter merged into the weights")
    merge.add_argument("base", help=HELP)
    merge.add_argument("adapter", help="an adapter file, or a RandLora folder written by PEFT")
    merge.add_argument("output", help="a .safetensors file; for a pipeline, a new folder")
    merge.add_argument("--weights", help="for timm, a .safetensors file or 'pretrained'; for open_clip, a file or tag")
    _model_args(merge)

    convert = _command(
        commands, "convert", actions.convert, "convert an adapter to PEFT, LoRA or LyCORIS, or from PEFT to our file"
    )
    convert.add_argument("adapter", metavar="in", help="an adapter file, or a RandLora folder written by PEFT")
    convert.add_argument("output", metavar="out", help="a .safetensors file; for peft and lora-peft, a folder")
    convert.add_argument("--to", required=True, choices=actions.CONVERSIONS, help="the format to write")
    convert.add_argument("--model", required=True, metavar="MODEL", help=HELP)
    convert.add_argument("--rank", type=int, help="lora-*: rank of every layer")
    convert.add_argument("--energy", type=float, help="lora-*: share of every update's squared norm to keep")
    _model_args(convert)

    verify = _command(commands, "verify", actions.verify, "check that a file is intact and finite, and fits a model")
    verify.add_argument("adapter", metavar="file", help="an adapter file, or a RandLora folder written by PEFT")
    verify.add_argument("--model", required=True, metavar="MODEL", help=HELP)
    _model_args(verify)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, action: object, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=_EXIT_CODES)
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON on stdout")
    parser.set_defaults(action=action)
    return parser


def _model_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-args", metavar="JSON", help="further arguments for timm.create_model")
