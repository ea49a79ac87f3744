"""What every experiment shares: the protocol, the loop, checkpoints, metrics, the command line."""

from jaxarch.run.command import main
from jaxarch.run.load import load
from jaxarch.run.protocol import (
    Batch,
    ConfigError,
    Experiment,
    Hypers,
    Index,
    Mean,
    Metrics,
    RunError,
    State,
    check_least,
    check_not_negative,
    checked_by,
)

__all__ = [
    "Batch",
    "ConfigError",
    "Experiment",
    "Hypers",
    "Index",
    "Mean",
    "Metrics",
    "RunError",
    "State",
    "check_least",
    "check_not_negative",
    "checked_by",
    "load",
    "main",
]
