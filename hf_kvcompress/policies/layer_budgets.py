"""How layers share a budget: weights with a mean of one."""

from __future__ import annotations

from collections.abc import Sequence

RULES = "'uniform', 'pyramid', 'pyramid:BETA' or a weight for every evicting layer"


def layer_weights(rule: str | Sequence[float], layers: int) -> list[float]:
    """Weights of `layers` layers, first to last, with a mean of 1.

    Args:
        rule: "uniform"; "pyramid" or "pyramid:BETA" (PyramidKV, arXiv 2406.02069): falling evenly to 1 / BETA at the
            last layer, BETA being 20 by default; or measured weights, one a layer.

    Raises:
        ValueError: an unknown rule, or weights that are too few, too many or not positive.
    """
    if isinstance(rule, str):
        name, _, number = rule.partition(":")
        if name == "uniform" and not number:
            return [1.0] * layers
        try:
            beta = float(number or 20)
        except ValueError:
            beta = 0.0
        if name != "pyramid" or beta < 1:
            raise ValueError(f"layer_budget: expected {RULES} with BETA of at least 1, got {rule!r}")
        if layers == 1:
            return [1.0]
        low = 1 / beta
        return [2 - low - (2 - 2 * low) * layer / (layers - 1) for layer in range(layers)]
    weights = [float(weight) for weight in rule]
    if len(weights) != layers or min(weights, default=1.0) <= 0:
        raise ValueError(
            f"layer_budget: expected {layers} positive weights, one for every evicting layer, got {rule!r}"
        )
    mean = sum(weights) / layers
    return [weight / mean for weight in weights]


def share_tokens(wanted: Sequence[float], least: Sequence[int]) -> list[int]:
    """Tokens of every layer in proportion to `wanted`, none below its `least`; together at most the sum of `wanted`.

    Raises:
        ValueError: the layers need more than that.
    """
    left, shares, free = sum(wanted), list(least), set(range(len(wanted)))
    if sum(least) > left:
        raise ValueError(f"budget: expected at least {sum(least)} tokens over {len(least)} layers, got {left:g}")
    while free:
        unit = left / sum(wanted[layer] for layer in free)
        low = {layer for layer in free if wanted[layer] * unit < least[layer]}
        if not low:
            for layer in free:
                shares[layer] = int(wanted[layer] * unit + 1e-6)
            break
        left -= sum(least[layer] for layer in low)
        free -= low
    return shares
