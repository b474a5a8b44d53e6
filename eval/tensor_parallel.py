"""A tensor-parallel model with a compressed cache: every rank packs the heads that it has.

    torchrun --nproc_per_node 2 eval/tensor_parallel.py --model MODEL --preset small --prompt "Once upon a time"

The number of processes must divide the model's key-value heads. It runs on CPUs (gloo) as on GPUs.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import hf_kvcompress as kvc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    # `tp_plan="auto"` as an argument of its own does the same, but transformers calls that deprecated
    model = AutoModelForCausalLM.from_pretrained(options.model, distributed_config=DistributedConfig(tp_plan="auto"))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    cache = kvc.CompressedCache(model.config, preset=options.preset)
    with kvc.enable(model):  # every rank takes the same steps: the model's layers add up what the ranks have
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=options.max_tokens, do_sample=False)
    held: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(held, cache.nbytes)
    if dist.get_rank() == 0:
        print(tokenizer.decode(out[0], skip_special_tokens=True))
        print(f"{cache.stats()['compression_ratio']:.1f} times smaller; bytes of each rank: {held}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
