"""A report in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from .tables import mean_of
from .views import NAMES


def title(found: Mapping[str, Any]) -> str:
    """Model and prompts in one line."""
    model, prompts = found["model"], found["prompts"]
    tokens = sum(p["prompt_tokens"] for p in prompts)
    new = sum(p["generated_tokens"] for p in prompts)
    name = model["name"].rstrip("/").rsplit("/", 1)[-1]
    return (
        f"{name}: {len(prompts)} prompts, {tokens:,} tokens read and {new:,} generated, "
        f"{found['text']['pages']:,} pages of {found['settings']['page_size']} tokens a head"
    )


def findings(found: Mapping[str, Any]) -> list[str]:
    """What there is, a sentence each."""
    lines = []
    text = found["text"]
    lines.append(
        f"Text: {text['repeated_within']:.0%} of the pages repeat a passage that stood earlier in their own prompt, "
        f"at any offset, and {text['repeated_across']:.0%} one that stands in another prompt."
    )
    for kind in found["kinds"]:
        rows = [row for row in found["heads"] if row["kind"] == kind]
        lines.append(_of_kind(found, kind, rows))
    for kind, reason in found["left_out"].items():
        lines.append(f"{NAMES[kind].capitalize()} are left out: {reason}.")
    neighbours = found["neighbouring_layers"]
    if neighbours:
        parts = []
        for kind in found["kinds"]:
            own = [row for row in neighbours if row["kind"] == kind]
            if not own:
                continue
            cosine = fmean(row["cosine"]["mean"] for row in own)
            cka, chance = (fmean(row[name] for row in own) for name in ("cka", "cka_shuffled"))
            parts.append(f"{NAMES[kind]} {cosine:.2f} and CKA {cka:.2f} ({chance:.2f} by chance)")
        lines.append("Neighbouring layers, cosine of the same page: " + "; ".join(parts) + ".")
    sampled = sum(p["pages"] - p["pages_held"] for p in found["prompts"])
    if sampled:
        lines.append(f"Of {sum(p['pages'] for p in found['prompts']):,} pages {sampled:,} were left out for memory.")
    return lines


def overview(found: Mapping[str, Any]) -> list[str]:
    """What it is worth, and what to use."""
    lines = []
    for scope, name in (("within", "Sharing similar pages within a prompt"), ("batch", "Between prompts in one batch")):
        rows = [row for row in found["savings"]["total"] if row["scope"] == scope]
        if rows:
            saved = ", ".join(f"{row['saved_share']:.1%} at a cosine of {row['threshold']:g}" for row in rows)
            lines.append(f"{name} could save, by an estimate, of the packed bytes: {saved}.")
    own = found["recommendation"]
    measured = ""
    if own["measured"]:
        measured = (
            f", KL {own['kl']:.4f}, perplexity {own['perplexity_change']:+.1%}, measured on {own['prompts']} prompts "
            f"with {own['tokens']:,} tokens"
        )
    lines.append(f"Recommended: {own['code']}: ratio {own['ratio']:.2f}{measured} ({own['why']}).")
    if own["ratio_at_long"]:
        lines.append(
            f"At {own['long']:,} tokens the planner expects a ratio of {own['ratio_at_long']:.2f} (not measured)."
        )
    return [*lines, *own["also"]]


def _of_kind(found: Mapping[str, Any], kind: str, rows: list[Mapping[str, Any]]) -> str:
    parts = []
    for scope, what in (("within", "the nearest earlier page has"), ("across", "the nearest in other prompts")):
        value, chance = mean_of(rows, f"nearest_{scope}"), mean_of(rows, f"nearest_{scope}_shuffled")
        if value is not None:
            parts.append(f"{what} cosine {value:.2f} ({chance:.2f} in shuffled pages)")
    repeated = mean_of(rows, "repeated_within")
    if repeated is not None:
        parts.append(f"text that stands twice in a prompt {repeated:.2f}")
    return (
        f"{NAMES[kind].capitalize().replace('rope', 'RoPE')}: "
        + (", ".join(parts) or "a single page, nothing to compare it with")
        + "."
    )
