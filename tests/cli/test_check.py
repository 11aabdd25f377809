"""`dsv4serve check` says what is, and exits as it should."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4_kernels import cpu
from dsv4serve.cli.main import main

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-random"


def test_prints_plans_and_verifies_the_embedded_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "pro, 4 x GB300",
        "flash, 2 x H200",
        "projection",
        "bytes per slot",
        "sparse_attention",
        "C for float32, else reference",
        "is right",
    ):
        assert expected in text


def test_says_when_the_c_kernels_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "library", None)
    assert main(["check"]) == 0
    text = capsys.readouterr().out
    assert "C kernels are not built" in text
    assert "C for float32" not in text


def test_golden_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--golden", str(GOLDEN)]) == 0
    assert capsys.readouterr().out.count("passed") == 2


def test_golden_fails_when_a_number_is_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors", "expected.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path)
    expected = load_file(tmp_path / "expected.safetensors")
    expected["logits_last32"][3, 5] += 1e-4
    expected["mtp_draft_argmax"][7] += 1
    save_file({name: torch.clone(value) for name, value in expected.items()}, tmp_path / "expected.safetensors")
    assert main(["check", "--golden", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("FAILED") == 2


def test_a_folder_without_vectors_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--golden", str(tmp_path)]) == 2
    assert "expected.safetensors" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(GOLDEN / "config.json", tmp_path)
    whole = (GOLDEN / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1000])
    assert main(["check", "--model", str(tmp_path), "--numerics", "exact"]) == 2
    assert "model.safetensors" in capsys.readouterr().err
