"""The committed recall model and its tasks."""

import json

import pytest
import torch
from transformers import DynamicCache

from hf_kvcompress.integrations.recall_model import FOLDER, load_recall_model, recall
from hf_kvcompress.integrations.recall_tasks import (
    BOOKS,
    BOS,
    FIRST_TRAINING_SEED,
    KEYS,
    LENGTH,
    RULES,
    TASKS,
    VALUES,
    VOCABULARY,
    needle,
)


@pytest.fixture(scope="module")
def model():
    return load_recall_model()


def test_the_weights_are_small_and_have_several_kv_heads(model):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * 2**20
    assert json.loads((FOLDER / "config.json").read_text())["num_key_value_heads"] >= 4
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    assert model.dtype == torch.float32 and not model.training


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_full_cache_answers(model, task):
    share = recall(model, lambda: DynamicCache(config=model.config), task, range(8), step=32)
    assert share >= 0.95, f"{task.name}: {share:.1%}"


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_is_found_at_any_depth(model, depth):
    task = needle(depth)
    assert task.name == f"needle@{depth:g}"
    assert recall(model, lambda: DynamicCache(config=model.config), task, range(8)) >= 0.95


def test_without_its_context_the_model_guesses(model):
    class Forgetful(DynamicCache):
        """Keeps the first token only."""

        def update(self, keys, values, layer_idx, *args, **kwargs):
            full = super().update(keys, values, layer_idx, *args, **kwargs)
            layer = self.layers[layer_idx]
            layer.keys, layer.values = layer.keys[:, :, :1], layer.values[:, :, :1]
            return full

    assert recall(model, lambda: Forgetful(config=model.config), TASKS["dense"], range(4)) < 0.3


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("length", [64, 200, LENGTH])
def test_samples_follow_their_seed(task, length):
    one, two, other = task.make(3, length), task.make(3, length), task.make(4, length)
    assert torch.equal(one.context, two.context) and torch.equal(one.stretch, two.stretch)
    assert one.answers == two.answers and one.hints == two.hints
    assert all(torch.equal(a, b) for a, b in zip(one.questions, two.questions, strict=True))
    assert not torch.equal(one.context, other.context)
    assert one.context.shape[1] + one.stretch.shape[1] == length
    assert len(one.questions) == len(one.answers) == task.questions
    assert int(one.context[0, 0]) == BOS and int(one.context.max()) < VOCABULARY


@pytest.mark.parametrize("name", ["needle", "dense", "filler", "turns", "mentioned", "near", "dormant"])
def test_answers_stand_behind_their_book_and_key(name):
    sample = TASKS[name].make(0)
    ids = sample.context[0].tolist()
    for question, answer in zip(sample.questions, sample.answers, strict=True):
        _, book, key = question[0].tolist()
        assert book in BOOKS and key in KEYS and answer[0] in VALUES
        found = [ids[i + 2] for i in range(len(ids) - 2) if ids[i : i + 2] == [book, key] and ids[i + 2] in VALUES]
        assert found == answer


def test_the_rule_says_which_book_counts():
    sample = TASKS["rule"].make(0)
    ids = sample.context[0].tolist()
    rule = BOOKS[ids[1] - RULES.start]
    assert sample.answers[::2] == [[rule]] * 4
    for question, answer in zip(sample.questions[1::2], sample.answers[1::2], strict=True):
        books = {ids[i - 1]: ids[i + 1] for i, token in enumerate(ids) if token == int(question)}
        assert len(books) == 2 and [books[rule]] == answer


def test_bad_arguments_are_named(model):
    with pytest.raises(ValueError, match="length must be at least 32, got 8"):
        TASKS["dense"].make(0, 8)
    with pytest.raises(ValueError, match="seeds must name at least one context"):
        recall(model, DynamicCache, TASKS["dense"], [])
    with pytest.raises(ValueError, match="step must be at least 1, got 0"):
        recall(model, DynamicCache, TASKS["dense"], [0], step=0)


def test_training_never_sees_the_seeds_of_evaluation():
    assert FIRST_TRAINING_SEED > 10_000
