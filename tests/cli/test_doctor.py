"""`randlora doctor` tells what works and what does not; `randlora train` starts the scripts."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import randlora_vision.cli.doctor as doctor
from randlora_vision.cli import main
from randlora_vision.cli.doctor import HOSTS, _check, _devices
from randlora_vision.train_scripts import train_clip


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert isinstance(left.value.code, int)
    return left.value.code


def test_every_host_passes_without_the_libraries_of_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)  # an import of it raises ModuleNotFoundError
    assert run("doctor", "--json", "--device", "cpu") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["versions"]["timm"] == timm.__version__ and found["devices"] == _devices()
    assert {check["host"]: check["result"] for check in found["checks"]} == dict.fromkeys([*HOSTS, "train"], "passed")
    assert all("reloaded, merged" in check["detail"] for check in found["checks"][:-1])


class Forgetful(nn.Linear):
    """Draws other weights whatever the seed: an adapter cannot be reloaded into it."""

    def __init__(self) -> None:
        super().__init__(3 * 32 * 32, 16)
        self.weight.data.add_(id(self) % 97 / 97)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Forgetful, "RuntimeError: the reloaded adapter differs by"),
        (nn.Identity, "ValueError: target_modules='all-linear' leaves nothing to adapt"),
        (lambda: (_ for _ in ()).throw(ImportError("libfoo.so:\n not found")), "ImportError: libfoo.so: not found"),
    ],
)
def test_failures_are_reported_in_one_line(build, expected: str, monkeypatch, capsys) -> None:
    broken = replace(HOSTS["torch"], build=build, run=lambda model, device: model(doctor._images(device).flatten(1)))
    monkeypatch.setattr(doctor, "HOSTS", {"torch": HOSTS["torch"], "broken": broken})
    assert run("doctor", "--device", "cpu") == 1
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("FAILED")]
    assert line.startswith(f"FAILED   broken        {expected}")
    assert "2 passed, 1 failed, 0 not installed" in printed


def test_hosts_do_not_interrupt_the_list(caplog: pytest.LogCaptureFixture) -> None:
    def build() -> nn.Module:
        warnings.warn("this library is old", FutureWarning, stacklevel=1)
        logging.getLogger("host").warning("another library is missing")
        return HOSTS["torch"].build()

    check = _check("loud", replace(HOSTS["torch"], build=build), torch.device("cpu"))
    assert check.result == "passed" and not caplog.records
    logging.getLogger("host").warning("after the check")
    assert [record.message for record in caplog.records] == ["after the check"]


def test_a_missing_host_is_no_failure() -> None:
    check = _check("timm", replace(HOSTS["timm"], module="not_there"), torch.device("cpu"))
    assert (check.result, check.detail) == ("missing", "pip install 'randlora_vision[timm]'")


def test_train_starts_the_scripts_with_their_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    given = []
    monkeypatch.setattr(train_clip, "main", given.append)
    assert main(["train", "clip", "--data", "FOLDER", "--steps", "3"]) is None
    assert given == [["--data", "FOLDER", "--steps", "3"]]
    assert run("train", "flux") == 2
    assert capsys.readouterr().err == (
        "error: there is no script 'flux': randlora train starts clip, classifier, dreambooth\n"
    )
    assert run("train") == 2
    assert "usage: randlora train {clip,classifier,dreambooth}" in capsys.readouterr().err
    assert run("train", "--help") == 0
    monkeypatch.setitem(sys.modules, "randlora_vision.train_scripts.train_dreambooth", None)
    assert run("train", "dreambooth") == 2
    assert "pip install 'randlora_vision[train]'" in capsys.readouterr().err


def test_mistakes_in_the_options_of_a_script_are_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "classifier", "--no-such-option") == 2
    assert "no-such-option" in capsys.readouterr().err
