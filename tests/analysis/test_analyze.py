"""The whole analysis on a tiny model: what repeats, what does not, and that nothing else decides."""

import copy
import json

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import hf_kvcompress as kvc
from hf_kvcompress.analysis import AnalysisReport, Prompt
from hf_kvcompress.analysis.recommend import recommend
from hf_kvcompress.analysis.tables import mean_of
from hf_kvcompress.integrations.recall_model import load_recall_model

from ..tiny_model import byte_tokenizer, tiny_llama

QUICK = {"max_tokens": 0, "page_size": 16, "measured_prompts": 0}


def random_ids(length, seed=0):
    return torch.randint(250, (1, length), generator=torch.Generator().manual_seed(seed))


def rows(report, kind, layer=0):
    return [row for row in report["heads"] if row["kind"] == kind and row["layer"] == layer]


def test_text_at_two_offsets_is_alike_before_the_rotation_and_not_after():
    passage = random_ids(200)
    prompt = torch.cat([random_ids(30, 1), passage, random_ids(57, 2), passage], dim=1)
    report = kvc.analyze(tiny_llama(), None, [prompt], **QUICK)
    assert report["text"]["repeated_within"] > 0.3 and report["text"]["repeated_across"] == 0
    cosines = {kind: mean_of(rows(report, kind), "repeated_within") for kind in report["kinds"]}
    assert cosines["key_before_rope"] > 0.999 and cosines["value"] > 0.999
    assert cosines["key_after_rope"] < 0.9
    for row in rows(report, "key_before_rope"):
        own = row["compared"]["repeated_within"]
        assert own["relative_l2"]["max"] < 0.01 and own["hamming_signs"]["max"] < 0.01
        assert own["hamming_codes"]["max"] < 0.05 and own["jaccard_channels"]["min"] > 0.99


def test_shuffled_text_is_no_more_alike_than_the_baseline():
    report = kvc.analyze(tiny_llama(), None, [random_ids(1500), random_ids(1500, 1)], **QUICK)
    assert report["text"]["repeated_within"] == report["text"]["repeated_across"] == 0
    for kind in report["kinds"]:
        for scope in ("within", "across"):
            shares = [row["beyond_baseline"][scope] for row in rows(report, kind)]
            assert sum(shares) / len(shares) < 0.06, (kind, scope)
            near, chance = (mean_of(rows(report, kind), f"nearest_{scope}{s}") for s in ("", "_shuffled"))
            assert near == pytest.approx(chance, abs=0.03)
    assert all(row["saved_bytes"] == 0 for row in report["savings"]["total"] if row["threshold"] >= 0.9)


def test_equal_prompts_are_duplicates_and_a_common_beginning():
    report = kvc.analyze(tiny_llama(), None, [random_ids(100), random_ids(100)], **QUICK)
    assert [own["shared_prefix"] for own in report["prompts"]] == [100, 100]
    for row in report["heads"]:
        assert row["duplicates"] == row["pages"] // 2 == 6
        assert row["compared"]["nearest_across"]["cosine"]["min"] > 0.999
    assert "PrefixCache" in report.recommendation["also"][-1]
    assert not report.recommendation["measured"] and "not measured" in report.recommendation["why"]


def test_a_single_page_of_a_single_layer(tmp_path):
    report = kvc.analyze(tiny_llama(num_hidden_layers=1), None, [random_ids(21)], **QUICK)
    assert report["text"]["pages"] == 1 and report["neighbouring_layers"] == []
    assert "Values: a single page, nothing to compare it with." in repr(report)
    assert all(row["compared"] == {} for row in report["heads"])
    assert report["savings"]["total"] == [] and report.save(tmp_path)


def test_equal_arguments_give_equal_reports():
    prompts = ["A quick brown fox. " * 12, Prompt("named", "Another text, which goes on for a while. " * 6)]
    how = {**QUICK, "max_tokens": 12, "measured_prompts": 2, "thresholds": (0.9,)}
    first, second = (kvc.analyze(tiny_llama(), byte_tokenizer(), prompts, **how).to_dict() for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert [own["name"] for own in first["prompts"]] == ["prompt 1", "named"]
    other = kvc.analyze(tiny_llama(), byte_tokenizer(), prompts, **{**how, "seed": 1}).to_dict()
    assert other["heads"] != first["heads"]


def test_caches_are_measured_and_the_smallest_good_one_recommended():
    model = load_recall_model()
    weights = copy.deepcopy(model.state_dict())
    seen = []
    report = kvc.analyze(
        model, None, max_tokens=0, thresholds=(0.9,), target_kl=0.01,
        on_progress=lambda what, done, total: seen.append((what, done, total)),
    )  # fmt: skip
    alone = {row["cache"]: row for row in report["measured"]["alone"]}
    assert list(alone)[:5] == ["uncompressed", "near-lossless", "balanced", "small", "tiny"] and len(alone) == 6
    assert alone["uncompressed"]["ratio"] == 1 and alone["uncompressed"]["kl"] == 0
    ratios = [alone[name]["ratio"] for name in ("near-lossless", "balanced", "small", "tiny")]
    assert ratios == sorted(ratios) and ratios[0] > 1.5
    # the document that comes twice and the batch that begins alike: sharing takes fewer bytes than its codec
    sharing = "CPACCache:similarity_threshold=0.9"
    assert alone[sharing]["pages_shared"] > 0 and alone[sharing]["nbytes"] < alone["balanced"]["nbytes"]
    batch = {row["cache"]: row for row in report["measured"]["batch"]}
    assert batch[sharing]["nbytes"] < 0.9 * batch["balanced"]["nbytes"]
    chosen = report.recommendation
    fits = [row for row in report["measured"]["alone"][1:] if row["kl"] <= 0.01]
    assert chosen["measured"] and chosen["cache"] == max(fits, key=lambda row: row["ratio"])["cache"]
    made = eval(chosen["code"], {"kvc": kvc, "model": model})
    assert isinstance(made, kvc.CompressedCache)
    assert all(0 <= done < total for _, done, total in seen) and {"reading", "layer 0"} <= {what for what, *_ in seen}
    assert all(torch.equal(own, model.state_dict()[name]) for name, own in weights.items())


def test_the_uncompressed_bytes_are_those_of_the_windows():
    config = Gemma3TextConfig(
        vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=24, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval().bfloat16()  # scored in float32, its bytes are those of bfloat16
    report = kvc.analyze(model, None, [random_ids(320)], max_tokens=0, thresholds=(0.9,), measured_prompts=1)
    first = report["measured"]["alone"][0]
    token = 2 * 16 * 2
    assert first["nbytes"] == pytest.approx((320 + 24) * token, abs=token)


def measured_row(cache, ratio, kl, shared=None, **settings):
    spec = {"head": cache, "settings": settings}
    rest = {"perplexity_change": 0.0, "prompts": 2, "tokens": 500, "scored": 99, "nbytes": 1000 / ratio}
    return {"cache": cache, "spec": spec, "ratio": ratio, "kl": kl, "pages_shared": shared, **rest}


def test_what_is_recommended_follows_from_what_was_measured():
    config, first = tiny_llama().config, measured_row("uncompressed", 1, 0)

    def chosen(*rows, batch=(), target=0.01):
        return recommend(config, torch.bfloat16, [first, *rows], batch, [0, 0], [200], target)

    rows = [measured_row("near-lossless", 2, 0.001), measured_row("balanced", 4, 0.003), measured_row("small", 5, 0.02)]
    shares = measured_row("CPACCache", 4.05, 0.003, 0.01, similarity_threshold=0.9)
    assert chosen(*rows, shares)["cache"] == "balanced", "1 % less is a tie"
    shares = measured_row("CPACCache", 4.4, 0.003, 0.2, similarity_threshold=0.9)
    assert chosen(*rows, shares)["code"] == "kvc.CPACCache(model.config, similarity_threshold=0.9)"
    assert chosen(*rows, target=0.05)["cache"] == "small"
    strict = chosen(*rows, target=1e-9)
    assert strict["cache"] == "near-lossless" and "mildest" in strict["why"] and strict["kl"] == 0.001
    also = chosen(*rows, batch=[rows[1], shares])["also"]
    assert "1.10 times fewer bytes than balanced" in also[0]
    assert chosen(*rows, batch=[rows[1], {**shares, "kl": 0.5}])["also"] == [], "not at that cost"


def test_a_model_whose_rotation_is_not_known():
    model = tiny_llama()
    model.config.model_type = "llama-of-tomorrow"
    passage = random_ids(200)
    prompts = [torch.cat([passage, passage], dim=1), random_ids(300, 1)]
    report = kvc.analyze(model, None, prompts, **{**QUICK, "measured_prompts": 1, "thresholds": (0.9,)})
    assert report["kinds"] == ["key_after_rope", "value"] and "rotary pairing" in report["left_out"]["key_before_rope"]
    assert "left out" in repr(report)
    assert report["measured"]["alone"][-1]["spec"]["settings"]["frame"] == "rotated"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": []}, "prompts: expected a list of one prompt or more"),
        ({"prompts": "one text"}, "prompts: expected a list of one prompt or more, got str 'one text'"),
        ({"prompts": ["good " * 20, " \n"]}, "prompt 2: expected a prompt, got an empty one"),
        ({"prompts": [torch.zeros(3)]}, r"prompt 1: expected token ids \[1, T\], got \[3\]"),
        ({"prompts": [7]}, "prompt 1: expected a string or an object with 'prompt', got int"),
        ({"max_tokens": -1}, "max_tokens: expected a whole number of at least 0, got -1"),
        ({"max_pairs": 0}, "max_pairs"),
        ({"page_size": 4}, "page_size"),
        ({"temperature": -0.5}, "temperature"),
        ({"thresholds": [1.5]}, "thresholds: expected cosines above 0 and at most 1"),
        ({"memory": "much"}, "memory: expected bytes, as a whole number or such as '64MB', got 'much'"),
        ({"memory": 0}, "memory"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    how = {"prompts": ["good " * 20], **QUICK, **changes}
    with pytest.raises(ValueError, match=message):
        kvc.analyze(tiny_llama(), byte_tokenizer(), **how)


def test_a_report_is_read_back(tmp_path):
    report = kvc.analyze(tiny_llama(), None, [random_ids(100)], **QUICK)
    report.save(tmp_path)
    for source in (tmp_path, tmp_path / "analysis_report.json"):
        assert AnalysisReport.load(source).to_dict() == json.loads(json.dumps(report.to_dict()))
    with pytest.raises(ValueError, match="schema_version: expected 1, got 2"):
        AnalysisReport.from_dict({**report.to_dict(), "schema_version": 2})
    with pytest.raises(ValueError, match="schema: expected 'hf_kvcompress.analysis', got None"):
        AnalysisReport.from_dict({})
