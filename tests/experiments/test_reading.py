"""Files of experiments: what is read, and mistakes by line and field."""

import json

import pytest

from hf_kvcompress.experiments import Experiment, builtin_experiments, read_experiments
from hf_kvcompress.experiments.experiment import DEFAULT_CACHES
from hf_kvcompress.experiments.lines import read_json

ONE = """[
  {
    "name": "one",
    "model": "recall",
    "prompts": [[16, 17, 18]],
    "max_tokens": 4
  }
]
"""


def file_of(tmp_path, text):
    file = tmp_path / "experiments.json"
    file.write_text(text)
    return file


def test_every_field_is_read(tmp_path):
    (tmp_path / "more.txt").write_text("A line.\n\nAnother one.\n")
    fields = {
        "name": "all of it",
        "model": "some/model",
        "prompts": ["A text.", [1, 2, 3]],
        "prompts_file": "more.txt",
        "max_tokens": 9,
        "temperature": 0.5,
        "max_model_len": 100,
        "caches": ["balanced", "h2o:budget=0.25"],
        "seed": 3,
        "dtype": "float32",
    }
    (found,) = read_experiments(file_of(tmp_path, json.dumps({"experiments": [fields]})))
    assert found.prompts == ("A text.", (1, 2, 3), "A line.", "Another one.")
    assert (found.name, found.model, found.max_tokens, found.max_model_len) == ("all of it", "some/model", 9, 100)
    assert (found.temperature, found.seed, found.dtype) == (0.5, 3, "float32")
    assert found.caches == ("balanced", "h2o:budget=0.25")
    assert Experiment(**json.loads(json.dumps(found.to_dict()))) == found


def test_what_is_left_out_has_defaults(tmp_path):
    file = file_of(tmp_path, '[{"name": "a", "prompts": ["Hello."]}]')
    (found,) = read_experiments(file, model="recall", caches=["tiny"])
    assert found.model == "recall" and found.caches == ("tiny",) and found.temperature == 0
    assert read_experiments(file)[0].caches == DEFAULT_CACHES and "balanced" in DEFAULT_CACHES


@pytest.mark.parametrize(
    "before, after, message",
    [
        ('"max_tokens": 4', '"max_tokens": "many"', "line 6, field 'max_tokens': expected a whole number of at least"),
        ('"max_tokens": 4', '"max_tokens": true', "line 6, field 'max_tokens': expected a whole number"),
        (
            '"max_tokens"',
            '"max_token"',
            "line 6, field 'max_token': expected one of name, .*; did you mean 'max_tokens'?",
        ),
        ('"one"', '"../one"', "line 3, field 'name': expected letters, digits"),
        ('"one",', '"one", "name": "two",', "line 3, field 'name': expected it once"),
        ('"recall"', '""', "line 4, field 'model': expected the name or folder"),
        ("[[16, 17, 18]]", "[]", "line 5, field 'prompts': expected a list of one prompt or more"),
        ("[[16, 17, 18]]", '["  "]', "line 5, field 'prompts': expected a list of one prompt"),
        ("[[16, 17, 18]]", "[[16, -1]]", "line 5, field 'prompts': expected a list of one prompt"),
        ('"prompts"', '"prompts_file": "none.txt", "prompts"', "line 5, field 'prompts_file': expected a file, got"),
        (
            '"max_tokens": 4',
            '"temperature": -1',
            "line 6, field 'temperature': expected a number of at least 0, got -1",
        ),
        ('"max_tokens": 4', '"caches": ["balancd"]', "line 6, field 'caches': .*did you mean 'balanced'"),
        ('"max_tokens": 4', '"caches": "balanced"', "line 6, field 'caches': expected a list of one cache"),
        ('"max_tokens": 4', '"dtype": "int8"', "line 6, field 'dtype': expected auto, bfloat16"),
        ('"prompts": [[16, 17, 18]],', "", "line 2, field 'prompts': expected it, got name, model, max_tokens"),
        ('"recall",', '"recall"', "line 5, column 5, after field 'model': expected JSON, got: Expecting ',' delimiter"),
        ("]\n", "", "line 8, column 1, after field 'max_tokens': expected JSON"),
        (ONE, "", "line 1, column 1: expected JSON"),
        (ONE, "[]", "line 1, field 'experiments': expected a list of one experiment or more, got an empty list"),
        (ONE, "3", "line 1, field 'experiments': expected a list of one experiment or more, got int"),
        (ONE, "[3]", "experiment 1: expected an object, got int"),
        (ONE, '{"experiments": [],\n "other": 1}', "line 2, field 'other': expected 'experiments' alone"),
    ],
)
def test_a_mistake_is_told_by_line_and_field(tmp_path, before, after, message):
    assert before in ONE
    text = after if before == ONE else ONE.replace(before, after) if before != "]\n" else ONE.rstrip()[:-1]
    with pytest.raises(ValueError, match="^experiments.json: " + message):
        read_experiments(file_of(tmp_path, text))


def test_two_of_one_name_are_told(tmp_path):
    text = '[{"name": "a", "prompts": ["x y"]},\n {"name": "A", "prompts": ["x y"]}]'
    with pytest.raises(ValueError, match="line 2, field 'name': expected each once, got 'A'"):
        read_experiments(file_of(tmp_path, text))


def test_lines_are_those_of_values():
    found = read_json('{"a":\n {"b": [1,\n {"c": "\\n"}]},\n"d": null}', "text")
    assert found.line == 1 and found.lines == {"a": 2, "d": 4}
    assert found["a"].lines == {"b": 2} and found["a"]["b"][1].line == 3
    assert found == {"a": {"b": [1, {"c": "\n"}]}, "d": None}


def test_python_callers_get_the_same_checks():
    with pytest.raises(ValueError, match="max_tokens: expected a whole number of at least 2, got 0"):
        Experiment("a", ["x"], max_tokens=0)
    with pytest.raises(ValueError, match="did you mean 'balanced'"):
        Experiment("a", ["x"], caches=["balancd"])


@pytest.mark.parametrize("model", [None, "recall"])
@pytest.mark.parametrize("quick", [False, True])
def test_built_in_ones(model, quick):
    found = builtin_experiments(model, quick, seed=5)
    assert [one.name for one in found] == ["general", "repetitive", "code"]
    assert all(one.seed == 5 and (len(one.prompts) == 1 or not quick) for one in found)
    repeated = found[1].prompts[0 if quick or model else 1]
    some = 100 if model else 300
    assert repeated[50 : 50 + some] in [repeated[at : at + some] for at in range(51, len(repeated))], "it comes twice"
