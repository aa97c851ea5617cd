"""The drawings of Noto emoji that the demo's pipeline is taught, and the one that it is not.

Drawings are pictures (4, 32, 32) between 0 and 1: colours multiplied by the opacity, and the opacity.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.quality.data import EMOJI
from randlora_vision.demos.emoji import PIXELS, SUBJECT, on_background

_COLUMNS = 12
_SUBJECT_MOVES = ((0, 0), (1, 0), (0, 1), (-1, 0), (0, -1))


def read_drawings(folder: Path) -> dict[str, Tensor]:
    """Return the drawings by the names in names.json, the subject last; download Google's emoji into `folder` first."""
    table = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
    names = {short: published or short for group in table.values() for short, published in group.items()}
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    with tarfile.open(EMOJI["google"].get(archives)) as held:
        members = {member.name: member for member in held.getmembers()}

        def content(name: str) -> bytes:
            file = held.extractfile(members[name])
            assert file is not None, name
            return file.read()

        rows = json.loads(content("package/emoji.json"))
        files = {
            f"{row['name'] or row['short_name']}".lower().replace("_", " "): row["image"] for row in reversed(rows)
        }
        return {
            short: _small(content(f"package/img/google/64/{files[published]}"))
            for short, published in [*names.items(), (SUBJECT, "robot face")]
        }


def write_drawings(drawings: dict[str, Tensor], folder: Path) -> None:
    """Write drawings.png and drawings.json, and the images of the subject."""
    rows = -(-len(drawings) // _COLUMNS)
    sheet = np.zeros((rows * PIXELS, _COLUMNS * PIXELS, 4), np.uint8)
    for number, picture in enumerate(drawings.values()):
        row, column = (PIXELS * place for place in divmod(number, _COLUMNS))
        straight = torch.cat([picture[:3] / picture[3:].clamp(min=1 / 255), picture[3:]])
        sheet[row : row + PIXELS, column : column + PIXELS] = _bytes(straight)
    Image.fromarray(sheet, "RGBA").save(folder / "drawings.png", optimize=True)
    (folder / "drawings.json").write_text(json.dumps(list(drawings), indent=2) + "\n", encoding="utf-8")
    (folder / "subject").mkdir(exist_ok=True)
    padded = F.pad(drawings[SUBJECT], (1, 1, 1, 1))
    for number, (down, right) in enumerate(_SUBJECT_MOVES):
        moved = padded[:, 1 - down : 1 - down + PIXELS, 1 - right : 1 - right + PIXELS]
        Image.fromarray(_bytes(on_background(moved, "white"))).save(folder / "subject" / f"{number}.png", optimize=True)


def _bytes(picture: Tensor) -> np.ndarray:
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _small(picture: bytes) -> Tensor:
    """Return a drawing of 64 x 64 pixels at half the size: the mean of the premultiplied pixels."""
    values = np.asarray(Image.open(io.BytesIO(picture)).convert("RGBA")).astype(np.float32)
    values[..., :3] *= values[..., 3:] / 255
    side = values.shape[0] // PIXELS
    values = values.reshape(PIXELS, side, PIXELS, side, 4).mean((1, 3))
    return torch.from_numpy(values.round()).permute(2, 0, 1) / 255
