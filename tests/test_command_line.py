"""One style over all commands: help, options, endings, JSON."""

import json
import re
from collections import defaultdict
from importlib import import_module
from typing import get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from hf_kvcompress import cli
from hf_kvcompress.commands import common, doctor, errors
from hf_kvcompress.harness import loading
from hf_kvcompress.harness.errors import EXTRA_OF, sentence

from .tiny_model import save_tiny

APP = typer.main.get_command(cli.build())
#: lm-eval's words are its own
COMMANDS = [name for name in APP.commands if name not in cli.PASSED_ON]
OPTIONS = [(name, option) for name in COMMANDS for option in APP.commands[name].params if option.name != "help"]
TEXT = "All work and no play makes for a dull text, says the quick brown fox. " * 70
#: words of every command that end well and soon, on the tiny model
GOOD = {
    "demo": "--model TINY --prompt-tokens 300 --score-tokens 16 --max-tokens 16 --cache int8",
    "doctor": "",
    "plan": "--model TINY --context 1000 --budget 0.5",
    "tune": "--model TINY --target-kl 9 --output OUT --candidates int8 --prompt-tokens 64 --score-tokens 8",
    "calibrate": "--model TINY --output OUT --text TEXT --tokens 256 --length 64",
    "train-policy": "--model TINY --output OUT --text TEXT --tokens 4096 --length 512 --epochs 1 --teacher future",
    "eval": "--model TINY --tasks none --size prompt=64 --size scored=8 --size stepped=0 --size probed=0 "
    "--size generated=4 --size timed=0 --seeds 1 --cache int8",
    "experiments": "--experiments EXPERIMENTS --output-dir OUT",
    "serve-demo": "--model TINY --max-tokens 2",
    "monitor": "--model TINY --prompt TEXT --max-tokens 4 --output-dir OUT",
    "analyze": "--model recall --max-tokens 0 --measured-prompts 0 --output-dir OUT",
}
#: words that are wrong, and what is said
BAD = [
    ("demo", "--model TINY --cache enormous", "cache: expected one of .* got 'enormous'"),
    ("demo", "--depth 2", "Invalid value for '--depth': "),
    ("demo", "--model TINY --dtype int8", "dtype: expected auto, bfloat16, float16, float32, got 'int8'"),
    ("demo", "--model recall", "model: expected one with a tokenizer, got 'recall'"),
    ("demo", "--model no/such", "model: expected a folder or a name on the hub that you may read, got 'no/such'"),
    ("demo", "--model TINY --text none.txt", "text: expected prose, code, a file or datasets:NAME, got 'none.txt'"),
    ("doctor", "--jsn", "No such option"),
    ("plan", "--model TINY --context 0 --budget 1MB", "Invalid value for '--context': "),
    ("plan", "--model no/such --context 9 --budget 1MB", "model: expected a folder"),
    ("plan", "--model TINY --context 9 --budget 1MB --dtype half", "dtype: expected auto"),
    ("tune", "--model TINY --output OUT", "Missing option '--target-kl'"),
    ("tune", "--model TINY --target-kl 1 --output OUT --candidates int8,int7", "keys: expected 8 or 4 or 3 or 2 bits"),
    ("calibrate", "--model TINY --output OUT --text none.txt", "text: expected prose"),
    ("train-policy", "--model TINY --output OUT --teacher past", "teacher: expected 'future', 'replay' or 'both'"),
    ("eval", "--model TINY --suite ful", "suite: expected .* did you mean 'full'"),
    ("analyze", "--model TINY --prompts-file TEXT --max-tokens -1", "Invalid value for '--max-tokens'"),
    ("analyze", "--model TINY --prompts-file EXPERIMENTS", "experiments.json, entry 1: expected a field 'prompt'"),
    ("monitor", "--model TINY --output-dir OUT", "prompt, prompts-file: expected one of them, got none"),
    ("monitor", "--model TINY --prompt TEXT --cache balancd --output-dir OUT", "cache: .* did you mean 'balanced'"),
    ("monitor", "--read TINY", "read: expected a folder that kvcompress monitor wrote"),
    ("experiments", "--experiments none.json", "Invalid value for '--experiments'"),
    ("experiments", "--experiments EXPERIMENTS --quick-test", "quick-test, experiments: expected one of them"),
    ("experiments", "--experiments TEXT", "text.txt: line 1, column 1: expected JSON"),
    ("serve-demo", "--model TINY --prompts-file none.txt", "Invalid value for '--prompts-file'"),
    ("serve-demo", "--model TINY --block-size 12", "block_size: expected one of"),
]  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text(TEXT)
    ids = [16 + i * 7 % 32 for i in range(70)]
    entry = {"name": "a", "model": "recall", "prompts": [ids], "max_tokens": 2, "caches": ["int8"]}
    (folder / "experiments.json").write_text(json.dumps([entry]))
    places = {
        "TINY": str(save_tiny(folder / "tiny")),
        "TEXT": str(folder / "text.txt"),
        "EXPERIMENTS": str(folder / "experiments.json"),
    }

    def fill(text, out):
        return [{**places, "OUT": str(out)}.get(word, word) for word in text.split()]

    return fill


def run(*arguments):
    return CliRunner().invoke(cli.build(), list(arguments))


def kind(name, option):
    """What a command's option is made of: int, str, ..."""
    module = next(module for commands in cli.PANELS.values() for own, module in commands if own == name)
    function = getattr(import_module(f"hf_kvcompress.commands.{module}"), module)
    annotation = get_type_hints(function)[option.name]
    (own,) = set(get_args(annotation) or (annotation,)) - {type(None)}
    return (get_args(own) or (own,))[0]  # repeated or not


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, option", OPTIONS, ids=[f"{name} {option.opts[0]}" for name, option in OPTIONS])
def test_every_option_has_help(name, option):
    assert option.help and option.help[0] != " " and option.help.endswith("."), option.opts
    assert option.opts[0].startswith("--") and option.opts[0] == option.opts[0].lower().replace("_", "-")


def test_an_option_means_the_same_everywhere():
    by_name = defaultdict(list)
    for name, option in OPTIONS:
        by_name[option.opts[0]].append((name, option))
    wrong = []
    for opt, ((first_name, first), *others) in by_name.items():
        for name, option in others:
            if option.help.split()[:2] != first.help.split()[:2]:
                wrong.append(f"{opt} of {name}: {option.help} / {first.help}")
            if kind(name, option) != kind(first_name, first):
                wrong.append(f"{opt} of {name} is another kind of value than that of {first_name}")
    assert not wrong, "\n".join(wrong)
    for one in ("--json", "--quiet", "--device", "--dtype", "--score-dtype", "--seed"):
        assert len({option.help for _, option in by_name[one]}) == 1, one


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_of_its_kind(name):
    options = {option.opts[0] for option in APP.commands[name].params}
    assert "--json" in options, "a machine can read it"
    assert not options & {"--out", "--report", "--caches", "--new-tokens", "--prompts"}, "spelled in one way"
    if "--model" in options and name != "plan":
        assert {"--device", "--quiet"} <= options
        assert "--dtype" in options or name == "experiments", "where each experiment has its own"
    text = APP.commands[name].help
    assert text.splitlines()[0].endswith(".") and len(text.splitlines()[0]) <= 110


def test_help_has_panels_and_a_version():
    result = run("--help")
    assert result.exit_code == 0 and run().output == result.output
    for panel, commands in cli.PANELS.items():
        assert f"─ {panel} ─" in result.output
        for command, _ in commands:
            assert re.search(rf"│ {command} ", result.output), command
    assert "--install-completion" in result.output
    version = run("--version")
    assert version.exit_code == 0 and re.match(r"kvcompress \d+\.\d+\.\d+ \(transformers ", version.stdout)


# -- endings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, text, message", BAD, ids=[f"{name} {text}" for name, text, _ in BAD])
def test_bad_input_is_one_sentence(name, text, message, words, tmp_path):
    result = run(name, *words(text, tmp_path / "out"))
    assert result.exit_code == 2 and result.stdout == ""
    assert re.match(f"kvcompress {name}: ({message})", result.stderr), result.stderr
    assert result.stderr.count("\n") == 1


def test_a_gated_model_says_what_to_do(monkeypatch):
    def gated(name, **kwargs):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at https://...")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", gated)
    result = run("demo", "--model", "some/model")
    assert result.exit_code == 2 and result.stderr == (
        "kvcompress demo: model: expected a folder or a name on the hub that you may read, got 'some/model' (You are "
        "trying to access a gated repo; accept its terms there and sign in with `hf auth login`)\n"
    )


def test_every_command_is_in_the_tables():
    assert set(GOOD) == set(COMMANDS) == {name for name, _, _ in BAD}


def test_an_unknown_command_is_one_sentence():
    result = run("lm-evl")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("kvcompress: No such command 'lm-evl'. Did you mean 'lm-eval'")


@pytest.mark.parametrize(
    "error, code, said",
    [
        (ValueError("tokens: expected 1, got 0\nand more"), 2, "tokens: expected 1, got 0"),
        (FileNotFoundError(2, "No such file", "x"), 2, "[Errno 2] No such file: 'x'"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (MemoryError(), 1, "MemoryError"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "CUDA out of memory. Tried"),
        (errors.Failed("it did not work"), 1, "it did not work"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ModuleNotFoundError("No module named 'pandas'", name="pandas.core"),
            2,
            "pandas.core is not installed: pip install 'hf_kvcompress[plot]'",
        ),
    ],
)
def test_how_a_run_ends(error, code, said, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(doctor, "examine", fail)
    result = run("doctor")
    assert (result.exit_code, result.stderr) == (code, f"kvcompress doctor: {said}\n")


def test_a_bug_is_not_hidden(monkeypatch):
    def fail():
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(doctor, "examine", fail)
    result = run("doctor")
    assert isinstance(result.exception, RuntimeError) and result.exit_code == 1


def test_missing_extras_are_those_of_setup():
    import configparser
    from pathlib import Path

    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    extras = setup["options.extras_require"]
    for module, extra in EXTRA_OF.items():
        assert module.replace("_", "-") in extras[extra].replace("_", "-"), module
    assert sentence(ValueError("")) == "ValueError"


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_json_alone_is_on_stdout(name, words, tmp_path):
    result = run(name, *words(GOOD[name], tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.output
    assert isinstance(json.loads(result.stdout), dict) and len(result.stdout) > 50


def test_json_goes_to_a_file_beside_the_table(tmp_path):
    file = tmp_path / "new" / "doctor.json"
    result = run("doctor", "--json", str(file))
    assert result.exit_code == 0 and "transformers" in result.stdout
    assert json.loads(file.read_text())["versions"]
    assert json.loads(run("doctor", "--json", "-").stdout).keys() == json.loads(file.read_text()).keys()


def test_a_bar_is_silent_where_nobody_looks(capsys):
    with common.bar("reading") as tell:
        tell(1, 2, "[label]")
    assert capsys.readouterr() == ("", "")
