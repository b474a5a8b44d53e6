"""What the generated tasks ask, and that the context holds the answers where it should."""

import pytest

from hf_kvcompress.harness.drafts import BUILDERS
from hf_kvcompress.harness.tasks import recall_tasks, text_tasks
from hf_kvcompress.scoring import standard_text

from ..tiny_model import byte_tokenizer

LENGTH = 900
TOKENIZER = byte_tokenizer()


def sample(name, seed=0, length=LENGTH):
    (task,) = text_tasks(TOKENIZER, standard_text(), length, [name])
    return task.make(seed)


def texts(found):
    asked = [(TOKENIZER.decode(q.ids[0]), TOKENIZER.decode(q.target[0])) for q in found.questions]
    return TOKENIZER.decode(found.context[0]), asked


@pytest.mark.parametrize("name", BUILDERS)
def test_a_right_answer_scores_and_stands_in_the_context(name):
    found = sample(name)
    context, asked = texts(found)
    stretch = 0 if found.stretch is None else found.stretch.shape[1]
    assert found.context.shape[0] == 1
    most = 40 if name in ("common-words", "frequent-words", "pairs") else 0  # these end with a whole word
    assert LENGTH - most <= found.context.shape[1] + stretch <= LENGTH
    for question, (_, answer) in zip(found.questions, asked, strict=True):
        assert question.score(question.target[0].tolist()) == 1 and question.score([1] * 9) == 0
        assert question.new_tokens >= question.target.shape[1] and not question.is_open
        for part in answer.strip().split(", "):
            assert part in context


@pytest.mark.parametrize("name", [*BUILDERS, "needle@0.5"])
def test_a_sample_follows_from_its_seed(name):
    assert texts(sample(name, 3)) == texts(sample(name, 3)) != texts(sample(name, 4))


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_needle_at_a_depth(depth):
    context, [(question, answer)] = texts(sample(f"needle@{depth:g}", length=2000))
    at = context.index(question)
    assert abs(at / 2000 - depth) < 0.15 and context[at:].startswith(f"{question}{answer}.")
    assert len(recall_tasks([f"needle@{depth:g}"], 128)[0].make(0).questions) == 1


def test_pairs_are_dense_and_each_key_stands_once():
    for seed in range(4):
        context, [(question, answer)] = texts(sample("pairs", seed))
        lines = context.strip().splitlines()
        assert all(line.count(":") == 1 for line in lines) and len({line.split(":")[0] for line in lines}) == len(lines)
        assert f"{question}{answer}" in lines


def test_near_keys_differ_in_one_word():
    context, [(question, answer)] = texts(sample("near"))
    colour, word = question.strip(": \n").split()
    told = [line for line in context.splitlines() if line.endswith(tuple("0123456789")) and ": " in line]
    assert len(told) == 12 and f"{colour} {word}:{answer}" in told
    assert sum(f" {word}:" in line for line in told) == 2 and sum(line.startswith(colour) for line in told) == 6


def test_a_rule_stands_first_and_is_asked_for_first():
    found = sample("rule", length=1200)
    context, [(first, colour), (second, number)] = texts(found)
    assert found.sequential and context.startswith(f"Rule: only the{colour} numbers count.")
    assert first == "\n\nRule: only the" and second.startswith(f"\n\nThe{colour} number of")
    assert f"{second.strip()}{number}." in context


def test_blocks_come_again_and_again():
    context, [(notice, rest), (number, value)] = texts(sample("blocks", length=2400))
    assert context.count(notice.strip() + rest) == 4 and context.count(number.strip() + value) == 1


def test_a_dormant_needle_is_asked_for_after_a_stretch_of_prose():
    found = sample("dormant")
    context, [(question, answer)] = texts(found)
    assert found.stretch.shape == (1, LENGTH // 4) and found.context.shape[1] == LENGTH - LENGTH // 4
    assert question.strip() + answer in context and answer.strip() not in TOKENIZER.decode(found.stretch[0])


@pytest.mark.parametrize("name", ["nedle", "needle@", "needle@2", "turns@0.5"])
def test_an_unknown_task_is_named(name):
    with pytest.raises(ValueError, match=f"tasks: expected names among needle, .* got '{name}'"):
        text_tasks(TOKENIZER, standard_text(), LENGTH, [name])
    with pytest.raises(ValueError, match=f"tasks: expected names among needle, .* got '{name}'"):
        recall_tasks([name])


def test_a_near_name_is_offered():
    with pytest.raises(ValueError, match="did you mean 'needle'"):
        text_tasks(TOKENIZER, standard_text(), LENGTH, ["nedle"])
