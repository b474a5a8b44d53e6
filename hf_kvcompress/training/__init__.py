"""Training of the learned score: teachers that say what tokens turn out to be worth, and the fit."""

from .fit import LayerReport, Trained, train_policy

__all__ = ["LayerReport", "Trained", "train_policy"]
