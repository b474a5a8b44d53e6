"""Tables of a report: by layer, by threshold, by cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import Any

from .views import NAMES

MB = 2**20


@dataclass(frozen=True)
class Table:
    """A header, rows of text, and what they show."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.header)
        body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in self.rows)
        return f"<table><caption>{escape(self.caption)}</caption><tr>{head}</tr>{body}</table>"


def mean_of(rows: Sequence[Mapping[str, Any]], name: str, metric: str = "cosine", value: str = "mean") -> float | None:
    """Mean over heads of one number of a distribution; None where no head has it."""
    found = [row["compared"][name][metric][value] for row in rows if name in row["compared"]]
    return fmean(found) if found else None


def layer_table(found: Mapping[str, Any]) -> Table:
    """By layer and kind: nearest cosines beside the baseline, repeated text, channels."""
    rows = []
    for shape in found["model"]["layers"]:
        for kind in found["kinds"]:
            own = [r for r in found["heads"] if r["layer"] == shape["layer"] and r["kind"] == kind]
            beyond = [r["beyond_baseline"]["within"] for r in own if r["beyond_baseline"]["within"] is not None]
            rows.append(
                [
                    str(shape["layer"]),
                    shape["kind"] if shape["window"] is None else f"{shape['kind']} {shape['window']}",
                    NAMES[kind],
                    _pair(own, "nearest_within"),
                    _pair(own, "nearest_across"),
                    f"{fmean(beyond):.0%}" if beyond else "",
                    _number(mean_of(own, "repeated_within")),
                    f"{sum(r['duplicates'] for r in own):,}",
                    f"{fmean(r['channels']['effective_rank'] for r in own):.0f} of {own[0]['channels']['channels']}",
                    f"{fmean(r['channels']['outlier_ratio'] for r in own):.1f}",
                    f"{fmean(r['channels']['code_entropy'] for r in own):.2f}",
                ]
            )
    header = (
        "layer", "attention", "numbers", "nearest earlier page (baseline)", "nearest in other prompts (baseline)",
        "beyond baseline", "repeated text", "exact duplicates", "effective rank", "outlier ratio", "bits of a code",
    )  # fmt: skip
    caption = "Mean cosine of pages without the channels' mean, by layer; in brackets the same tokens in random places."
    return Table(caption, header, rows)


def savings_table(found: Mapping[str, Any]) -> Table:
    """By scope and threshold: what could be saved at most, and what CPACCache took and cost."""
    measured = {
        scope: _by_threshold(found["measured"][key]) for scope, key in (("within", "alone"), ("batch", "batch"))
    }
    rows = []
    for own in found["savings"]["total"]:
        taken = measured[own["scope"]].get(own["threshold"])
        plain = _codec_row(found, own["scope"])
        rows.append(
            [
                "each prompt by itself" if own["scope"] == "within" else "prompts in one batch",
                f"{own['threshold']:g}",
                f"{own['pages']:,}",
                f"{own['alike'] / max(own['pages'], 1):.1%} ({own['alike_shuffled'] / max(own['pages'], 1):.1%})",
                f"{own['duplicates']:,}",
                f"{own['saved_share']:.1%}",
                f"{taken['pages_shared']:.1%}" if taken else "",
                f"{1 - taken['nbytes'] / plain['nbytes']:.1%}" if taken and plain else "",
                f"{taken['perplexity'] / plain['perplexity'] - 1:+.2%}" if taken and plain else "",
                f"{taken['kl']:.4f} ({plain['kl']:.4f})" if taken and plain else "",
            ]
        )
    header = (
        "pages are shared by", "cosine of at least", "packed pages", "alike (baseline)", "exact", "could save",
        "CPAC shared", "CPAC saved", "perplexity by it", "KL (codec alone)",
    )  # fmt: skip
    caption = (
        "Sharing pages, on top of 4 bits. Left, an estimate: pages with a similar base, and the share of the packed "
        "bytes that 1-bit differences to it would save, metadata counted, errors not looked at. Right: measured "
        "through CPACCache, which takes a page only at no more error than its codec makes; of all bytes that it holds, "
        "with the room that shared pages give back."
    )
    return Table(caption, header, rows)


def measured_table(found: Mapping[str, Any]) -> Table:
    """Caches that were run."""
    rows = []
    for scope, own in found["measured"].items():
        for row in own:
            rows.append(
                [
                    "each prompt by itself" if scope == "alone" else "prompts in one batch",
                    row["cache"],
                    f"{row['nbytes'] / MB:.2f}",
                    f"{row['ratio']:.2f}",
                    f"{row['perplexity']:.2f}",
                    f"{row['perplexity_change']:+.2%}",
                    f"{row['kl']:.4f}",
                    f"{row['top1_agreement']:.3f}",
                    f"{row['scored']:,}",
                ]
            )
    header = ("prompts", "cache", "MB", "ratio", "perplexity", "change", "KL", "top-1", "positions")
    caption = (
        "Measured: the last tokens of each prompt are read through a cache that holds the others. Ratio: against the "
        "uncompressed cache, every tensor counted. KL in nats, against the uncompressed model."
    )
    return Table(caption, header, rows)


def similar_table(found: Mapping[str, Any]) -> Table:
    """The pairs of pages that most heads find alike."""
    rows = [
        [
            NAMES[row["kind"]],
            _place(row["page"]),
            _place(row["other"]),
            f"{row['mean_cosine']:.2f}",
            f"{row['share_of_heads']:.0%}",
            f"{row['jaccard_tokens']:.2f}",
            row["text"],
        ]
        for row in found["similar_pages"]
    ]
    header = ("numbers", "page", "is like", "cosine", "in heads", "Jaccard of tokens", "text of the page")
    return Table("Pages that stand out from the baseline in most heads, the most similar first.", header, rows)


def _by_threshold(rows: Sequence[Mapping[str, Any]]) -> dict[float, Mapping[str, Any]]:
    found = {}
    for row in rows:
        if row["pages_shared"] is not None:
            found[row["spec"]["settings"]["similarity_threshold"]] = row
    return found


def _codec_row(found: Mapping[str, Any], scope: str) -> Mapping[str, Any] | None:
    """The cache without sharing, measured at the same place."""
    rows = found["measured"]["alone" if scope == "within" else "batch"]
    return next((row for row in rows if row["cache"] == "balanced"), None)


def _place(place: Mapping[str, Any]) -> str:
    return f"{place['prompt']}, {place['start']:,}-{place['end'] - 1:,}"


def _pair(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    value, baseline = mean_of(rows, name), mean_of(rows, f"{name}_shuffled")
    return "" if value is None else f"{value:.2f} ({_number(baseline)})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
