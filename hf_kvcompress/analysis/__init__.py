"""How redundant the keys and values of a model are on given prompts: reports and plots."""

from .analyze import analyze
from .prompts import Prompt, read_prompts
from .report import AnalysisReport

__all__ = ["AnalysisReport", "Prompt", "analyze", "read_prompts"]
