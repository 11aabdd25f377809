import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from dsv4serve.cli import launch
from dsv4serve.cli.flags import add_engine_flags, engine_config
from dsv4serve.cli.main import main
from dsv4serve.config import EngineConfig, LoadFormat
from dsv4serve.engine.supervisor import ready_text
from dsv4serve.types import ConfigError

OTHER_VALUES = {
    "model": (["/models/x"], Path("/models/x")),
    "served_model_name": (["x"], "x"),
    "model_alias": (["claude-*", "--model-alias", "x"], ("claude-*", "x")),
    "load_format": (["dummy"], LoadFormat.DUMMY),
    "device": (["cuda"], "cuda"),
    "numerics": (["exact"], "exact"),
    "expert_activations": (["fp4"], "fp4"),
    "effort_contract": (["0731"], "0731"),
    "developer_role": (["user"], "user"),
    "host": (["0.0.0.0"], "0.0.0.0"),
    "api_key": (["one", "--api-key", "two"], ("one", "two")),
    "api_key_file": (["/keys/a", "--api-key-file", "/keys/b"], (Path("/keys/a"), Path("/keys/b"))),
    "admin_api_key": (["root"], "root"),
    "cors_origin": (["https://a.example"], ("https://a.example",)),
    "memory_fraction": (["0.5"], 0.5),
    "num_draft_tokens": (["3"], 3),
    "draft_mode": (["fixed"], "fixed"),
    "accept_rate_reference": (["0.5"], 0.5),
    "shadow_steps": (["1000"], 1000),
    "log_level": (["debug"], "debug"),
    "log_format": (["json"], "json"),
    "otlp_endpoint": (["http://h:4318/v1/traces"], "http://h:4318/v1/traces"),
}


def parse(*words):
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    return engine_config(parser.parse_args(words))


@pytest.mark.parametrize("name", list(EngineConfig.model_fields))
def test_every_field_is_a_flag(name):
    flag = "--" + name.replace("_", "-")
    if EngineConfig.model_fields[name].annotation is bool:
        others = ["--device", "cuda"] if name == "deterministic" else []
        assert getattr(parse(flag, *others), name) is True
        assert getattr(parse(flag.replace("--", "--no-", 1)), name) is False
    else:
        words, value = OTHER_VALUES.get(name, (["4096"], 4096))
        if name == "frontends":
            words, value = ["3"], 3
        assert getattr(parse(flag, *words), name) == value


def test_a_flag_wins_over_the_environment_and_that_over_a_recipe(monkeypatch, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("port: 1\nfrontends: 2\nmax_step_tokens: 300\n")
    monkeypatch.setenv("DSV4_PORT", "11")
    monkeypatch.setenv("DSV4_FRONTENDS", "12")
    config = parse("--recipe", str(recipe), "--port", "21")
    assert (config.port, config.frontends, config.max_step_tokens) == (21, 12, 300)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "x"], "port.*'x'"),
        (["--port", "65536"], "port.*65535"),
        (["--numerics", "fast"], "numerics.*'exact' or 'official'"),
        (["--deterministic"], "deterministic: .*only for --device cuda"),
        (["--recipe", "/no/such/file"], "/no/such/file"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"port: \xff", "utf-8"),
        (b"port: [", "while parsing"),
        (b"[" * 5000, "recursion"),
        (b"port: 2026-99-99", "month"),  # a date to YAML
        (b"1: 2", "expected a mapping of setting names"),
        (b"- port", "expected a mapping of setting names"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_an_error_that_names_the_file(tmp_path, content, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    with pytest.raises(ConfigError, match=f"recipe .*recipe.yaml: .*{message}"):
        parse("--recipe", str(recipe))


def test_a_setting_that_cannot_be_honoured_ends_with_exit_code_2(capsys):
    assert main(["launch", "--deterministic", "--device", "cpu"]) == 2
    assert "only for --device cuda" in capsys.readouterr().err


def test_a_list_in_the_environment_is_json_and_anything_else_an_error(monkeypatch):
    monkeypatch.setenv("DSV4_API_KEY", '["a", "b"]')
    assert parse().api_key == ("a", "b")
    monkeypatch.setenv("DSV4_API_KEY", "a")
    with pytest.raises(ConfigError, match=r'api_key.*\["KEY"\]'):
        parse()


def test_help_has_description_and_default_of_every_field(capsys):
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    text = " ".join(parser.format_help().split())
    for field in EngineConfig.model_fields.values():
        assert " ".join(field.description.split()) in text
    assert "(default: 8000)" in text


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("gpu7", False)],
)
def test_loopback(host, expected):
    assert launch.is_loopback(host) is expected


def test_the_curl_line_survives_the_shell_whatever_the_model_is_called():
    config = EngineConfig(served_model_name='it\'s "quoted" \\ $HOME', api_key=("secret",))
    first, curl = ready_text(config, "::1", 8000).split("\n")
    assert first == f"dsv4serve ready on http://[::1]:8000 (model {config.model_name})"
    words = shlex.split(curl)
    assert words[:2] == ["curl", "http://[::1]:8000/v1/chat/completions"]
    assert orjson.loads(words[words.index("-d") + 1])["model"] == config.model_name
    assert "secret" not in curl


def test_an_unreachable_checkpoint_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "dsv4serve.cli.main", "launch", "--port", "0", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
