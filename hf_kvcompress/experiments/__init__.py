"""Experiments: prompts through several caches, with memory, speed, quality and a report of each."""

from .builtin import builtin_experiments
from .experiment import Experiment, read_experiments
from .report import ExperimentReport
from .run import run_experiments
from .summary import Summary

__all__ = [
    "Experiment",
    "ExperimentReport",
    "Summary",
    "builtin_experiments",
    "read_experiments",
    "run_experiments",
]
