"""One engine a process over one shared tier of prefixes; prompts are divided, answers come back in order.

    torchrun --nproc_per_node 2 eval/serve_ranks.py --model MODEL --shared redis://localhost:6379/0 \\
        --system "Answer in one sentence." --prompts prompts.txt --json answers.json

Each process has the whole model, on its own GPU where there are any. The first one reads the system prompt and puts its
compressed cache into the shared tier (a Redis server, an fsspec URL, or a folder that all see); the others fetch it.
Without torchrun it is one process.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvcompress as kvc


def serve(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    shared: str,
    system: str = "",
    codec: str = "eqrot4",
    max_tokens: int = 64,
    **settings: Any,
) -> tuple[list[str], list[dict[str, Any]]]:
    """Answers to all prompts, in order, and a report of every process; settings are the engine's."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    folder = "://" not in shared
    store = kvc.PrefixCache(**{"disk" if folder else "remote": shared})
    engine = kvc.PagedAttentionEngine(model, tokenizer, prefix_cache=store, codec=codec, **settings)
    if system and rank == 0:
        store.add_prefix(system)  # named prefixes are written to the tiers at once
    if world > 1:
        dist.barrier()
    own = engine.generate([system + prompt for prompt in prompts[rank::world]], max_tokens=max_tokens)
    report = {"rank": rank, "prompts": len(own), **engine.report(), "prefixes": store.store.stats.to_dict()}
    store.close()
    gathered: list[Any] = [(own, report)]
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, (own, report))
    answers = [gathered[number % world][0][number // world] for number in range(len(prompts))]
    return answers, [told for _, told in gathered]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shared", required=True, help="a folder, redis://... or any URL that fsspec knows")
    parser.add_argument("--prompts", type=Path, required=True, help="a file with a prompt a line")
    parser.add_argument("--system", default="", help="what all prompts begin with")
    parser.add_argument("--codec", default="eqrot4")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--memory-gb", type=float, help="of each engine's pool")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")  # only small objects go between the processes
    model = AutoModelForCausalLM.from_pretrained(options.model).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    settings = {} if options.memory_gb is None else {"memory_gb": options.memory_gb}
    answers, reports = serve(
        model,
        tokenizer,
        options.prompts.read_text().splitlines(),
        options.shared,
        options.system,
        options.codec,
        options.max_tokens,
        **settings,
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        for answer in answers:
            print(answer)
        for own in reports:
            known = own["prefixes"]
            told = f"{own['tokens_per_second']:.1f} tokens/s, {known['tokens_reused']} prompt tokens reused"
            print(f"rank {own['rank']}: {own['prompts']} prompts, {told}, {known['tokens_fetched']} of them fetched")
        if options.json:
            options.json.write_text(json.dumps({"answers": answers, "reports": reports}, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
