"""Tasks that tell policies apart: lookups in the trained recall model, pass keys and two questions in a real one.

    python eval/policy_tasks.py --on recall --seeds 24 --json results/tasks.json
    python eval/policy_tasks.py --on text --policies oracle,streaming,h2o,snapkv,random

A context is read in one go and compressed; only then come the questions. A task counts where the full cache answers
at least 90 % of them. All policies have the same protections, so only the score differs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from transformers import DynamicCache

import hf_kvcompress as kvc
from hf_kvcompress.integrations.recall_model import ask, load_recall_model, prefill, recall
from hf_kvcompress.integrations.recall_tasks import LENGTH, TASKS, RecallTask, Sample
from hf_kvcompress.scoring import decode, hide_passkey, standard_text, tokenize
from hf_kvcompress.scoring.oracle import FutureAttention, future_attention

ADMITTED = 0.9
RECALL = {"page_size": 8, "residual_length": 8, "sink_length": 4, "recent": 0.25, "codec": "identity"}
TEXT = {"page_size": 8, "residual_length": 32, "sink_length": 4, "recent": 0.25, "codec": "identity"}
DEPTHS = [round(0.1 * tenth, 1) for tenth in range(1, 10)]
#: the first question stands before the compression, where a policy that looks at queries can see it
SECOND = "\n\nThe number of the house is {key}. Remember it. {key} is the number of the house.\n\n"
SECOND_QUESTION = "\n\nThe number of the house is"


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--on", choices=("recall", "text"), default="recall")
    parser.add_argument("--weights", help="folder of the recall model; by default the one in the package")
    parser.add_argument("--seeds", type=int, default=16, help="contexts of a task")
    parser.add_argument("--tables", default="tasks,likelihood,dormant,rule,questions", help="of the recall model")
    parser.add_argument("--fractions", default="0.5,0.25,0.1", help="parts of the tokens that stay")
    parser.add_argument("--tokens", type=int, default=2000, help="of a prompt with a pass key")
    return parser.parse_args()


# -- the recall model ----------------------------------------------------------------------------------------------

Settings = dict[str, Any]


def recall_future(model: Any, task: RecallTask, sample: Sample) -> FutureAttention:
    """Attention that the questions, with their right answers, pay to an uncompressed context."""
    texts = [torch.cat([q, torch.tensor([a])], 1) for q, a in zip(sample.questions, sample.answers, strict=True)]
    cache = prefill(model, DynamicCache(config=model.config), sample, step=8)
    return future_attention(model, cache, [torch.cat(texts, 1)] if task.sequential else texts, step=2)


def share(model: Any, task: RecallTask, seeds: int, settings: Settings | None) -> float:
    """Part of the answers that are right; `settings` of a cache, None for an uncompressed one."""
    right = 0.0
    for seed in range(seeds):
        own = dict(settings or {})
        if own.get("policy") == common.ORACLE:
            own |= common.policy_settings(common.ORACLE, recall_future(model, task, task.make(seed, LENGTH)))

        def make(own: Settings = own) -> Any:
            if settings is None:
                return DynamicCache(config=model.config)
            return kvc.CompressedCache(model.config, **{**RECALL, **own})

        right += recall(model, make, task, [seed], step=8)
    return right / seeds


def likelihood(model: Any, tasks: Sequence[str], seeds: int, settings: Settings | None) -> dict[str, float]:
    """Perplexity of the right answers, and KL to the uncompressed model at their places, over all contexts of tasks."""
    losses, divergences = [], []
    for task, seed in ((TASKS[name], seed) for name in tasks for seed in range(seeds)):
        sample = task.make(seed, LENGTH)
        own = dict(settings or {})
        if own.get("policy") == common.ORACLE:
            own |= common.policy_settings(common.ORACLE, recall_future(model, task, sample))
        caches = [DynamicCache(config=model.config)]
        if settings is not None:
            caches.append(kvc.CompressedCache(model.config, **{**RECALL, **own}))
        caches = [prefill(model, cache, sample, step=8) for cache in caches]
        for question, answer in zip(sample.questions, sample.answers, strict=True):
            ids, wanted = torch.cat([question, torch.tensor([answer])], 1), torch.tensor(answer)
            logs = []
            for cache in caches:
                own_cache = cache if task.sequential else copy.deepcopy(cache)
                logits = model(ids, past_key_values=own_cache).logits[0, -len(answer) - 1 : -1]
                logs.append(logits.double().log_softmax(-1))
            losses.append(-logs[-1].gather(1, wanted[:, None])[:, 0])
            divergences.append((logs[0].exp() * (logs[0] - logs[-1])).sum(-1))
    return {"ppl": torch.cat(losses).mean().exp().item(), "kl": torch.cat(divergences).mean().item()}


def two_questions(model: Any, seeds: int, settings: Settings | None) -> tuple[float, float]:
    """The context ends with a question. Afterwards that one is asked again, and others, each on a copy of the cache."""
    right, asked = torch.zeros(2), torch.zeros(2)
    for seed in range(seeds):
        sample = TASKS["filler"].make(seed, LENGTH)
        first, *others = zip(sample.questions, sample.answers, strict=True)
        for question, _ in (first, *others[:3]):  # each in turn is the one that the context ends with
            cache = DynamicCache(config=model.config)
            if settings is not None:
                cache = kvc.CompressedCache(model.config, **{**RECALL, **settings})
            model(torch.cat([sample.context, question], 1), past_key_values=cache, logits_to_keep=1)
            for other, expected in (first, *others[:3]):
                kind = int(other is not question)
                right[kind] += ask(model, copy.deepcopy(cache), other, len(expected)) == expected
                asked[kind] += 1
    again, another = (right / asked).tolist()
    return again, another


def on_recall(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every policy on every task, and the tables that need settings of their own."""
    model = load_recall_model(args.weights) if args.weights else load_recall_model()
    rows: list[dict[str, Any]] = []

    def tell(table: str, name: str, kept: str, columns: dict[str, float]) -> None:
        rows.append({"table": table, "cache": name, "kept": kept, **columns})
        print(f"{table:14} {kept:>5} {name:28}", *(f"{c} {v:.2f} " for c, v in columns.items()), flush=True)

    def tasks_of(settings: Settings | None, tasks: Sequence[str]) -> dict[str, float]:
        return {task: share(model, TASKS[task], args.seeds, settings) for task in tasks}

    parts = [float(part) for part in args.fractions.split(",")]
    tables = args.tables.split(",")
    with torch.inference_mode(), kvc.enable(model):
        full = tasks_of(None, list(TASKS))
        tell("tasks", "full cache", "100%", full)
        admitted = [task for task, found in full.items() if found >= ADMITTED]
        if "tasks" in tables:
            for codec in ("eqrot4", "eqrot3", "eqrot2", "int4", "int2"):
                tell("tasks", f"{codec}, nothing evicted", "100%", tasks_of({"codec": codec}, admitted))
            own = {name: {"policy": name, "policy_options": learned_options(args, name)} for name in common.names(args)}
            for part in parts:
                for name, settings in {**own, **VARIED}.items():
                    tell("tasks", name, f"{part:.0%}", tasks_of({"budget": part, **settings}, admitted))
        if "likelihood" in tables:
            tell("likelihood", "full cache", "100%", likelihood(model, admitted, args.seeds, None))
            for part in parts:
                for name in common.names(args):
                    own = {"budget": part, "policy": name, "policy_options": learned_options(args, name)}
                    tell("likelihood", name, f"{part:.0%}", likelihood(model, admitted, args.seeds, own))
        for table, task, entrants in (("dormant", "dormant", DORMANT), ("rule", "rule", RULE)):
            for part in parts if table in tables and task in admitted else ():
                for name, settings in entrants.items():
                    found = share(model, TASKS[task], args.seeds, {"budget": part, **settings})
                    tell(table, name, f"{part:.0%}", {task: found})
        if "questions" in tables:
            again, another = two_questions(model, args.seeds, None)
            tell("two questions", "full cache", "100%", {"again": again, "another": another})
            for part in parts:
                for name, settings in QUESTIONS.items():
                    again, another = two_questions(model, args.seeds, {"budget": part, **settings})
                    tell("two questions", name, f"{part:.0%}", {"again": again, "another": another})
    return rows


def learned_options(args: argparse.Namespace, name: str) -> dict[str, str]:
    return {"weights": str(args.learned)} if name == "learned" else {}


VARIED: dict[str, Settings] = {
    "snapkv, adaptive heads": {"policy": "snapkv", "head_budget": "adaptive"},
    "h2o, adaptive heads": {"policy": "h2o", "head_budget": "adaptive"},
    "h2o, merged values": {"policy": "h2o", "merge": True},
    "keydiff, adaptive heads": {"policy": "keydiff", "head_budget": "adaptive"},
}
DORMANT: dict[str, Settings] = {
    f"{name}{', demoted to ' + to if to else ', deleted'}": {"policy": name, "demote_to": to}
    for name in ("streaming", "h2o", "random")
    for to in (None, "int2", "int4", "eqrot2", "cpu")
}
RULE: dict[str, Settings] = {
    f"{name}, {'pinned' if pin else 'not pinned'}": {"policy": name, "sink_length": 0, "pin": pin}
    for name in ("streaming", "h2o", "snapkv", "keydiff", "random")
    for pin in ((), ((0, 2),))
}
QUESTIONS: dict[str, Settings] = {
    "snapkv, 4 queries": {"policy": "snapkv", "policy_options": {"window_size": 4, "kernel_size": 1}},
    "snapkv": {"policy": "snapkv"},
    "expected, 4 queries": {"policy": "expected", "policy_options": {"n_queries": 4}},
    "tova": {"policy": "tova"},
    "h2o": {"policy": "h2o"},
    "keydiff": {"policy": "keydiff"},
    "random": {"policy": "random"},
}


DEMOTED: dict[str, Settings] = {
    f"h2o, demoted to {to}": {"policy": "h2o", "demote_to": to, "fetch_pages": 8} for to in ("int2", "eqrot2", "cpu")
}


# -- a real model --------------------------------------------------------------------------------------------------


def on_text(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Pass keys by depth, then two questions on one cache."""
    model, tokenizer = common.load(args)
    haystack = tokenize(tokenizer, standard_text(), args.tokens, model.device)
    rows: list[dict[str, Any]] = []
    with kvc.enable(model):
        for depth_index, depth in enumerate(DEPTHS):
            hidden = hide_passkey(tokenizer, haystack, depth, depth_index)
            prompt = common.Prompt(model, hidden.prompt)

            def found(make: Callable[[], Any], hidden: Any = hidden, prompt: Any = prompt) -> tuple[bool, list[int]]:
                got = decode(model, prompt.last, hidden.question, lambda: prompt.into(make()), 8)
                return hidden.found_in(tokenizer.decode(got.tokens)), got.tokens

            exact, tokens = found(lambda: DynamicCache(config=model.config))
            answered = torch.cat([hidden.question, torch.tensor([tokens[:-1]], device=model.device)], 1)
            future = prompt.future([answered], step=1)
            rows.append({"table": "passkey", "cache": "full cache", "kept": 1.0, "depth": depth, "found": exact})
            for part in map(float, args.fractions.split(",")):
                scored = {n: common.policy_settings(n, future, args.learned) for n in common.names(args)}
                for name, own in {**scored, **DEMOTED}.items():
                    settings = {**TEXT, **own, "budget": part, "sliding": "exact"}
                    got, _ = found(lambda settings=settings: kvc.CompressedCache(model.config, **settings))
                    rows.append({"table": "passkey", "cache": name, "kept": part, "depth": depth, "found": got})
            print(f"depth {depth}", flush=True)
        rows += two_keys(model, tokenizer, haystack, args)
    print_passkeys(rows)
    return rows


def two_keys(model: Any, tokenizer: Any, haystack: torch.Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Two numbers in one prompt, which ends with the question for the first; the second is asked for afterwards."""
    rows = []
    device = model.device

    def ids(text: str) -> torch.Tensor:
        return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)

    for seed in range(4):
        hidden = hide_passkey(tokenizer, haystack[:, : args.tokens // 2], 0.6, seed)
        other = "".join(reversed(hidden.key))
        sentence, rest = ids(SECOND.format(key=other)), haystack[:, args.tokens // 2 :]
        middle = rest.shape[1] // 2
        context = torch.cat([hidden.prompt, rest[:, :middle], sentence, rest[:, middle:], hidden.question], 1)
        prompt = common.Prompt(model, context)

        def answers(make: Callable[[], Any], prompt: common.Prompt = prompt) -> list[str]:
            cache, given = prompt.into(make()), []
            for question in (prompt.last, ids(SECOND_QUESTION)):
                tokens = ask(model, cache, question, 7)
                given.append("".join(tokenizer.decode(tokens).split()))
            return given

        entrants = {"full cache": (1.0, lambda: DynamicCache(config=model.config))}
        for part in map(float, args.fractions.split(",")):
            for name in [name for name in common.names(args) if name != common.ORACLE]:
                own = common.policy_settings(name, None, args.learned)
                settings = {**TEXT, **own, "budget": part, "sliding": "exact"}
                entrants[f"{name} {part}"] = (part, lambda s=settings: kvc.CompressedCache(model.config, **s))
        for name, (part, make) in entrants.items():
            first, second = answers(make)
            row = {"table": "two questions", "cache": name.split(" 0")[0], "kept": part, "seed": seed}
            rows.append({**row, "first": first.startswith(hidden.key), "second": second.startswith(other)})
    return rows


def print_passkeys(rows: list[dict[str, Any]]) -> None:
    kinds = dict.fromkeys((row["kept"], row["cache"]) for row in rows)
    lines = []
    for kept, name in kinds:
        own = {r["depth"]: r["found"] for r in rows if (r["kept"], r["cache"], r["table"]) == (kept, name, "passkey")}
        two = [r for r in rows if (r["kept"], r["cache"], r["table"]) == (kept, name, "two questions")]
        marks = (
            ["".join("x" if own[depth] else "." for depth in DEPTHS), f"{sum(own.values())}/{len(own)}"]
            if own
            else ["", ""]
        )
        both = [f"{sum(r[which] for r in two)}/{len(two)}" for which in ("first", "second")] if two else ["", ""]
        lines.append((f"{kept:.0%}", name, *marks, *both))
    print(common.table(("kept", "policy", "depth .1 to .9", "found", "first question", "second"), lines))


def print_shares(rows: list[dict[str, Any]]) -> None:
    """A table each: shares in percent, likelihoods as they are."""
    for name in dict.fromkeys(row["table"] for row in rows):
        chosen = [row for row in rows if row["table"] == name]
        columns = [column for column in chosen[-1] if column not in ("table", "cache", "kept")]
        shape, unit = ("{:.3g}", 1) if name == "likelihood" else ("{:.0f}", 100)
        cells = [[shape.format(unit * r[c]) if c in r else "" for c in columns] for r in chosen]
        lines = [(r["kept"], r["cache"], *own) for r, own in zip(chosen, cells, strict=True)]
        print(f"\n{name}\n\n{common.table(('kept', 'cache', *columns), lines)}")


def main() -> None:
    args = arguments()
    rows = on_recall(args) if args.on == "recall" else on_text(args)
    if args.on == "recall":
        print_shares(rows)
    common.write_report(args, rows=rows)


if __name__ == "__main__":
    main()
