"""Every error that a person can meet, as one tree.

The message says what was wrong, where, and what is allowed. `api` turns the request errors into HTTP
bodies, `cli` turns the start-up errors into one line on stderr and exit code 2.
"""

from __future__ import annotations


class Dsv4Error(Exception):
    """Base of all errors raised on purpose."""

    status = 500  # HTTP status when it reaches a client
    exit_code = 1  # process exit code when it reaches the command line


class InvalidRequest(Dsv4Error):
    """The client sent something that cannot be served. `param` names the offending field."""

    status = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFound(InvalidRequest):
    """The request names a model that this server does not serve."""

    status = 404


class QueueFull(Dsv4Error):
    """More requests wait than the server is configured to hold."""

    status = 429


class ShuttingDown(Dsv4Error):
    """The server drains: it finishes what runs and takes nothing new."""

    status = 503


class EngineUnavailable(Dsv4Error):
    """The engine process is not there (starting, died, restarting)."""

    status = 503


class ConfigError(Dsv4Error):
    """A configuration (config.json, recipe, flag) is wrong. Ends the process with exit code 2."""

    exit_code = 2


class CheckpointError(Dsv4Error):
    """A checkpoint is missing, damaged, or of another architecture. Ends the process with exit code 2."""

    exit_code = 2


class CapacityError(ConfigError):
    """The memory budget cannot hold what was asked for."""


class KernelUnavailable(ConfigError):
    """No kernel of the chosen device takes this model. Names the argument and what is supported."""
