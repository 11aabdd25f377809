"""`dsv4serve generate` through its private engine process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dsv4serve.cli.main import main

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-random"


@pytest.mark.e2e
def test_input_ids_reproduce_the_golden_continuation(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = load_file(GOLDEN / "expected.safetensors")
    (tmp_path / "ids.json").write_text(json.dumps([expected["input_ids"].tolist(), [5, 6, 7]]))
    out = tmp_path / "logits.safetensors"
    flags = [
        "--model",
        str(GOLDEN),
        "--numerics",
        "exact",
        "--max-tokens",
        "64",
        "--ignore-eos",
        "--log-level",
        "error",
    ]
    flags += ["--input-ids", str(tmp_path / "ids.json"), "--logits-out", str(out), "--prompt-logits", "32"]
    assert main(["generate", *flags]) == 0
    first, second = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert first["token_ids"] == expected["greedy_ids"].tolist()
    assert (first["finish_reason"], first["num_prompt_tokens"], first["index"]) == ("length", 330, 0)
    assert (second["num_prompt_tokens"], len(second["token_ids"])) == (3, 64)
    rows = load_file(out)
    assert (rows["0.output"] - expected["greedy_logits"]).abs().max() < 5e-5
    assert (rows["0.prompt"] - expected["logits_last32"]).abs().max() < 5e-5
    assert rows["1.prompt"].shape == (3, 512)


@pytest.mark.e2e
def test_text_prompts_and_a_prompt_that_is_too_long(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("The sea\n" + "word " * 9000 + "\n")
    flags = ["--prompt-file", str(tmp_path / "prompts.txt"), "--max-tokens", "5", "--log-level", "error"]
    assert main(["generate", *flags]) == 1
    captured = capfd.readouterr()
    good, bad = (json.loads(line) for line in captured.out.splitlines())
    assert good["text"]
    assert bad["finish_reason"] == "error"
    assert "8192" in bad["error"]
    assert "prompt 1" in captured.err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["x", "--max-tokens", "0"], "--max-tokens is 0"),
        (["x", "--top-p", "1.5"], "--top-p is 1.5"),
        (["--input-ids", "missing.json"], "missing.json"),
        (["x", "--model", str(GOLDEN)], "tokenizer.json"),
    ],
)
def test_wrong_use_is_exit_code_2(flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *flags]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "5", "[[]]", '["a"]', "[[1, -1]]", "[[true]]", "[[1.5]]"])
def test_wrong_ids_are_exit_code_2(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ids.json"
    path.write_text(text)
    assert main(["generate", "--input-ids", str(path)]) == 2
    assert "ids.json" in capsys.readouterr().err
