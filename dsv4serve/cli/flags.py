"""EngineConfig as command-line flags: generated from its fields, so that flag, environment and recipe cannot differ."""

from __future__ import annotations

import argparse
import enum
from pathlib import Path
from typing import Any, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dsv4serve.config import EngineConfig, load_engine_config


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add --recipe and one flag per field of EngineConfig. Values are checked by EngineConfig, not by argparse."""
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="YAML file of settings; environment and flags win (default: none)"
    )
    group = parser.add_argument_group(
        "engine settings", "each is also DSV4_NAME in the environment and name: in a recipe"
    )
    for name, field in EngineConfig.model_fields.items():
        flag = "--" + name.replace("_", "-")
        settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(field)}
        if field.annotation is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["metavar"] = _metavar(field)
            if get_origin(field.annotation) is tuple:
                settings["action"] = "append"
        group.add_argument(flag, **settings)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The configuration of parsed flags, the environment and --recipe. Raises ConfigError."""
    flags = {name: getattr(args, name) for name in EngineConfig.model_fields if hasattr(args, name)}
    return load_engine_config(flags, args.recipe)


def _help(field: FieldInfo) -> str:
    default = "the embedded demo" if field.default is PydanticUndefined else field.default
    if isinstance(default, enum.Enum):
        default = default.value
    if default in ("", ()):
        default = "none"
    return f"{field.description} (default: {default})".replace("%", "%%")


def _metavar(field: FieldInfo) -> str:
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "{" + ",".join(member.value for member in kind) + "}"
    return {int: "N", float: "X", Path: "DIR"}.get(kind, "TEXT") if isinstance(kind, type) else "TEXT"
