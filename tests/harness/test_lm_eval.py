"""lm-eval through a cache: the control scores what `hf` scores, compression shows, and answers are not mixed up."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="the lm-eval extra is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from hf_kvcompress import cli  # noqa: E402
from hf_kvcompress.integrations.lm_eval import NAME, CompressedHFLM  # noqa: E402

from ..tiny_model import byte_tokenizer, save_tiny  # noqa: E402

ROOT = Path(__file__).parents[2]
PROSE = "The road went on past fields and low walls. Nothing on it changed for a long while. "
PAIRS = [(PROSE * 2 + "It was", end) for end in (" green", " a wall", " o", " the same road")]
PAIRS += [("", "All of it"), ("A", " b"), (PROSE * 3, "The road went on"), ("Short", " one")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<s>"
    tokenizer.save_pretrained(folder)
    return str(folder)


def model(tiny, **settings):
    return CompressedHFLM(tiny, device="cpu", **settings)


def requests(kind, arguments):
    return [Instance(kind, {}, own, index) for index, own in enumerate(arguments)]


def likelihoods(lm):
    return lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)


@pytest.fixture(scope="module")
def plain(tiny):
    return HFLM(tiny, device="cpu")


@pytest.mark.parametrize(
    "settings", [{"score": "split"}, {"score": "chunk", "chunk": 3}, {"score": "step"}, {"cache": "identity"}], ids=str
)
def test_the_control_equals_hf(tiny, plain, settings):
    got = likelihoods(model(tiny, **{"cache": "none", **settings}))
    wanted = likelihoods(plain)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    assert [s for s, _ in got] == pytest.approx([s for s, _ in wanted], abs=1e-3, rel=1e-5)


def test_the_control_equals_hf_in_16_bits(tiny):
    own = CompressedHFLM(tiny, cache="none", device="cpu", dtype="bfloat16")
    hf = HFLM(tiny, device="cpu", dtype="bfloat16")
    assert own.model.dtype == torch.bfloat16
    # rounding in bfloat16 depends on the shapes of a pass: hf differs from itself by as much in another batch size
    got, wanted = likelihoods(own), likelihoods(hf)
    assert [s for s, _ in got] == pytest.approx([s for s, _ in wanted], rel=0.02)


def test_rolling_and_generation_of_the_control_equal_hf(tiny, plain):
    own = model(tiny, cache="none")
    texts = [(PROSE * 2,), ("A short one.",)]
    rolling = [lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), True) for lm in (own, plain)]
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-5)
    ask = [(PROSE, {"until": ["~"], "max_gen_toks": 8}), ("Once", {"until": ["~"], "max_gen_toks": 8})]
    answers = [lm.generate_until(requests("generate_until", ask), True) for lm in (own, plain)]
    assert answers[0] == answers[1] and len(answers[0]) == 2


def test_compression_shows_in_every_kind_of_request(tiny):
    exact, packed = (model(tiny, cache=cache) for cache in ("none", "int2:page_size=8,residual_length=8"))
    pairs = [(a, b) for a, b in zip(likelihoods(exact), likelihoods(packed), strict=True)]
    far = [abs(a[0] - b[0]) for a, b in pairs]
    assert min(far[:4]) > 0.05 and far[6] > 0.05, "long contexts are read from packed pages"
    assert far[7] < 1e-4, "five tokens are all exact"
    texts = requests("loglikelihood_rolling", [(PROSE * 2,)])
    assert abs(exact.loglikelihood_rolling(texts, True)[0] - packed.loglikelihood_rolling(texts, True)[0]) > 0.5
    ask = requests("generate_until", [(PROSE * 3, {"until": ["~"], "max_gen_toks": 16})])
    assert exact.generate_until(ask, True) != packed.generate_until(ask, True)


def test_choices_score_together_what_they_score_alone(tiny):
    own = model(tiny, cache="h2o:budget=0.5;codec=int4;page_size=8;residual_length=8", score="chunk", chunk=4)
    assert str(own.spec) == "h2o:budget=0.5,codec=int4,page_size=8,residual_length=8"
    alone = [own.loglikelihood(requests("loglikelihood", [pair]), True)[0] for pair in PAIRS]
    for together, single in zip(likelihoods(own), alone, strict=True):
        assert together[0] == pytest.approx(single[0], rel=1e-4) and together[1] == single[1]


def test_use_cache_keeps_the_answers_of_settings_apart(tiny, tmp_path):
    def ask(cache, lm=None):
        lm = lm or model(tiny, cache=cache)
        return CachingLM(lm, str(tmp_path / "answers.db")).loglikelihood(requests("loglikelihood", PAIRS))

    exact, packed = ask("none"), ask("int2:page_size=8,residual_length=8")
    assert exact != packed and packed == likelihoods(model(tiny, cache="int2:page_size=8,residual_length=8"))
    again = model(tiny, cache="none")
    again._loglikelihood_tokens = lambda *a, **k: pytest.fail("every answer is there")
    assert ask("none", again) == exact


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cache": "balancd"}, "did you mean 'balanced'"),
        ({"score": "whole"}, "score: expected one of split, chunk, step, got 'whole'"),
        ({"chunk": 0}, "chunk: expected a whole number of at least 1, got 0"),
        ({"cache": "h2o:bugdet=1"}, "did you mean 'budget'"),
    ],
)
def test_a_bad_argument_is_named(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        model(tiny, **settings)


def run(*arguments):
    return CliRunner().invoke(cli.build(), ["lm-eval", "run", *arguments])


def results(folder):
    file = next(Path(folder).rglob("results_*.json"))
    return json.loads(file.read_text())


LOCAL = ["--include_path", "eval/tasks", "--device", "cpu", "--batch_size", "1"]


@pytest.fixture
def local(tmp_path, monkeypatch):
    """In the repository's root, with a data set cache of its own and no network."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked: {args}")

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_command_runs_local_tasks_without_a_network(tiny, tmp_path, local):
    tasks = ["--tasks", "kvcompress_facts", "kvcompress_needle", "kvcompress_prose", "--limit", "2"]
    model_args = ["--model_args", f"pretrained={tiny},cache=int4,max_length=2048"]
    result = run(*model_args, *tasks, *LOCAL, "--output_path", str(tmp_path / "out"))
    assert result.exit_code == 0, (result.output, result.exception)
    found = results(tmp_path / "out")
    assert set(found["results"]) == {"kvcompress_facts", "kvcompress_needle", "kvcompress_prose"}
    assert found["config"]["model"] == NAME and found["config"]["kvcompress"]["cache"]["head"] == "int4"


def test_a_mistake_is_one_sentence(tiny, local, capfd):
    result = run("--model_args", f"pretrained={tiny},cache=balancd", "--tasks", "kvcompress_prose", *LOCAL)
    assert result.exit_code == 2 and "did you mean 'balanced'" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "task, message",
    [
        ("output_type: [\n", "Tasks not found: mistaken"),
        ("dataset_kwargs:\n  data_files: missing.jsonl\noutput_type: loglikelihood_rolling\ntest_split: train\n"
         "doc_to_text: ''\ndoc_to_target: '{{x}}'\n", "missing.jsonl"),
    ],
)  # fmt: skip
def test_a_task_file_with_a_mistake_is_one_sentence(tiny, tmp_path, local, task, message):
    (tmp_path / "mistaken.yaml").write_text(f"task: mistaken\ndataset_path: json\n{task}")
    own = ["--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "1"]
    result = run("--model_args", f"pretrained={tiny},cache=none", "--tasks", "mistaken", *own)
    assert result.exit_code == 2 and message in result.stderr.splitlines()[-1]


def test_two_processes_share_the_requests(tiny, tmp_path, local):
    arguments = ["--model_args", f"pretrained={tiny},cache=int4,max_length=2048", "--tasks", "kvcompress_facts",
                 "--limit", "5", "--log_samples", *LOCAL]  # fmt: skip
    assert run(*arguments, "--output_path", str(tmp_path / "1")).exit_code == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "hf_kvcompress", "lm-eval", "run", *arguments, "--output_path", str(tmp_path / "2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    found = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        samples = next(folder.rglob("samples_*.jsonl")).read_text().splitlines()
        rows = sorted((json.loads(line) for line in samples), key=lambda row: row["doc_id"])
        found.append([[float(response[0][0]) for response in row["resps"]] for row in rows])
    assert [len(row) for row in found[0]] == [len(row) for row in found[1]] == [4] * 5
    assert sum(found[1], []) == pytest.approx(sum(found[0], []), rel=1e-5)
    # the first process shows its bar: three of the five questions, with four choices each
    assert "12/12 [" in done.stderr and "20/20 [" not in done.stderr, done.stderr[-3000:]
