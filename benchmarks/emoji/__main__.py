"""Trains the pipeline of the emoji demo, and writes what ships with the package.

python -m benchmarks.emoji DATA

74 MB come from the npm registry, through `npm`, unless DATA/archives holds them already. The training takes about 25
minutes of one core, and continues where it was interrupted. What is written ships in randlora_vision/demos/noto.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from benchmarks import command_line
from benchmarks.emoji.drawings import read_drawings, write_drawings
from benchmarks.emoji.pipeline import build, make_tokenizer
from benchmarks.emoji.teach import Teaching, teach
from randlora_vision.demos.emoji import BACKGROUNDS, SUBJECT, on_background, placed, prompt_of
from randlora_vision.errors import user_errors

_SHIPPED = Path(__file__).parents[2] / "randlora_vision" / "demos" / "noto"


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train and write."""
    parser = command_line.parser("emoji", __doc__)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the download and of the unfinished training")
    parser.add_argument("--output", type=Path, default=_SHIPPED, help="folder of the pipeline and the drawings")
    parser.add_argument("--steps", type=int, default=Teaching.steps, help="training steps")
    arguments = parser.parse_args(argv)
    data, output = arguments.data, arguments.output
    drawings = read_drawings(data)
    output.mkdir(parents=True, exist_ok=True)
    write_drawings(drawings, output)
    known = {name: picture for name, picture in drawings.items() if name != SUBJECT}
    stacked = torch.stack(list(known.values()))
    pictures = torch.stack([on_background(stacked, place) for place in BACKGROUNDS], dim=1)
    prompts = [[placed(prompt_of(name), place) for place in BACKGROUNDS] for name in known]
    tokenizer = data / "tokenizer"
    if not tokenizer.is_dir():  # an interrupted training goes on with the same tokens
        make_tokenizer(prompt for row in prompts for prompt in row).save_pretrained(tokenizer)
    torch.manual_seed(0)
    pipe = build(CLIPTokenizer.from_pretrained(tokenizer))
    teach(pipe, 2 * pictures - 1, prompts, Teaching(steps=arguments.steps), data / "unfinished.ckpt")
    pipe.transformer.half()
    pipe.save_pretrained(output / "pipeline")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
