"""Trains the recall model from scratch and writes its weights.

    OMP_NUM_THREADS=1 python eval/train_recall_model.py --out recall_data

A shared CPU core does it in about 40 minutes. The sequences grow from 64 to 640 tokens: lookups form on the short ones,
where almost every token is a question or an answer. The loss is on answers, and lightly on filler.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_kvcompress.integrations.recall_model import load_recall_model, recall
from hf_kvcompress.integrations.recall_tasks import BOS, FILLER, FIRST_TRAINING_SEED, TASKS, VOCABULARY

#: share of the run at which a stage ends, its sequence lengths (the last one most often)
STAGES = ((0.12, (64,)), (0.22, (64, 128)), (0.42, (128, 256)), (1.01, (256, 640)))
MIXTURE = {
    "dense": 0.22,
    "filler": 0.12,
    "near": 0.18,
    "rule": 0.15,
    "blocks": 0.12,
    "mentioned": 0.11,
    "dormant": 0.05,
    "needle": 0.05,
}
FILLER_WEIGHT = 0.05


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, help="plan the run by the clock instead of by steps")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--lr", type=float, default=0.02, help="of the matrices; the rest gets a sixth of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def new_model() -> LlamaForCausalLM:
    """Three layers, eight query heads on four KV heads; random weights, then `wire`."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        # most channels must hardly turn over 640 tokens, or a key is not recognised from far away
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        attention_bias=True,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    wire(model)
    return model


@torch.no_grad()
def wire(model: LlamaForCausalLM) -> None:
    """Starts the attention near what lookups need, after mimetic initialisation (2305.09828).

    From plain random weights (with a RoPE base of 10,000) no lookup formed in 450 steps. So two KV heads of layer 0
    begin by looking one and two tokens back, through their biases, and layer 1 by comparing its token with what they
    bring, and by copying.
    The weights behind are random projections; training does the rest.
    """
    config, (first, second, *_) = model.config, [layer.self_attn for layer in model.model.layers]
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    turns = model.model.rotary_emb.inv_freq

    def heads(index: int) -> slice:
        return slice(index * group * size, (index + 1) * group * size)

    def projection() -> torch.Tensor:
        return nn.init.orthogonal_(torch.empty(size, config.hidden_size))

    read, *writes = [projection() for _ in range(3)]
    for index in range(config.num_key_value_heads):
        keys, queries = slice(index * size, (index + 1) * size), heads(index)
        if index < 2:
            q, k = torch.zeros(size), torch.zeros(size)
            for pair, strength in enumerate((5.5, 5.5, 3.0)):
                angle = turns[pair] * (index + 1)
                k[pair] = strength
                q[pair], q[pair + size // 2] = strength * angle.cos(), -strength * angle.sin()
            first.k_proj.bias[keys], first.q_proj.bias[queries] = k, q.repeat(group)
            first.v_proj.weight[keys] = read
            first.o_proj.weight[:, queries] = writes[index].mT.repeat(1, group) / group
        # value tokens know their key, one back, and their book, two back; the question's key knows its book
        book = index >= 2
        second.k_proj.weight[keys] = writes[0] + writes[1] * book
        second.q_proj.weight[queries] = (read + writes[0] * book).repeat(group, 1)
        copied = projection()
        second.v_proj.weight[keys] = copied
        second.o_proj.weight[:, queries] = copied.mT.repeat(1, group) / group


class Muon:
    """Momentum whose update is made orthogonal. Lookups form in far fewer steps than with AdamW."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.momenta = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for weight, momentum in zip(self.weights, self.momenta, strict=True):
            assert weight.grad is not None
            momentum.lerp_(weight.grad, 0.05)
            update = orthogonal(weight.grad.lerp(momentum, 0.95))
            scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
            weight.mul_(1 - 0.01 * lr).sub_(update, alpha=lr * scale)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrix, roughly: five Newton-Schulz steps."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix) / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def sequence(task: str, seed: int, length: int) -> tuple[list[int], list[int], list[float]]:
    """Ids, targets and loss weights of one training sequence. A quarter of it is questions."""
    questions = length // 16
    size = {"rule": 3, "blocks": 5}.get(task, 4)
    sample = TASKS[task].make(seed, length - questions * size, questions)
    ids = sample.context[0].tolist() + sample.stretch[0].tolist()
    known = dict(sample.hints)
    for question, answer in zip(sample.questions, sample.answers, strict=True):
        ids += question[0].tolist()
        known.update({len(ids) - 1 + i: token for i, token in enumerate(answer)})
        ids += answer
    ids = (ids + [0] * length)[:length]
    targets = ids[1:] + [0]
    weights = [FILLER_WEIGHT if target in FILLER else 0.0 for target in targets]
    for at, token in known.items():
        if at < length:
            targets[at], weights[at] = token, 1.0
    return ids, targets, weights


def batch(rng: np.random.Generator, step: int, length: int, tokens: int) -> tuple[list[str], list[torch.Tensor]]:
    """The task of each row; ids, targets and weights, `[B, T]` each."""
    count = tokens // length
    names = rng.choice(list(MIXTURE), count, p=list(MIXTURE.values())).tolist()
    first = FIRST_TRAINING_SEED + step * 1024
    rows = [sequence(name, first + i, length) for i, name in enumerate(names)]
    return names, [torch.tensor(column) for column in zip(*rows, strict=True)]


def rate(done: float) -> float:
    """Learning rate by the share of the run: warm-up, level, down to zero."""
    return min(1.0, done / 0.01, (1 - done) / 0.5) if done < 1 else 0.0


def save(model: Any, folder: Path) -> None:
    """Writes the weights in bfloat16, and leaves the model as it is."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)


def report(folder: Path, length: int, seeds: int) -> str:
    """Recall of the written weights, a task each."""
    model = load_recall_model(folder)
    shares = {
        name: recall(model, lambda: DynamicCache(config=model.config), task, range(seeds), length, step=64)
        for name, task in TASKS.items()
    }
    return " ".join(f"{name} {share:.3f}" for name, share in shares.items())


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    model = new_model()
    hidden = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    rest = [weight for name, weight in model.named_parameters() if weight.ndim == 1 or "embed" in name]
    muon = Muon(hidden)
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    start = said = time.monotonic()
    step, done = 0, 0.0
    tally = {name: np.zeros(2) for name in MIXTURE}
    while done < 1:
        lengths = next(lengths for end, lengths in STAGES if done < end)
        length = lengths[-1] if rng.random() < 0.75 else lengths[0]
        names, (ids, targets, weights) = batch(rng, step, length, options.tokens)
        logits = model(input_ids=ids, use_cache=False).logits
        used = weights > 0
        loss = nn.functional.cross_entropy(logits[used], targets[used], reduction="none")
        (loss * weights[used]).sum().div(weights.sum()).backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        for group in adam.param_groups:
            group["lr"] = options.lr / 6 * rate(done)
        adam.step()
        muon.step(options.lr * rate(done))
        model.zero_grad()
        right = torch.zeros_like(weights)
        right[used] = (logits.detach()[used].argmax(-1) == targets[used]).float()
        for name, hits, asked in zip(names, (right * (weights == 1)).sum(1), (weights == 1).sum(1), strict=True):
            tally[name] += np.array([float(hits), float(asked)])
        step += 1
        elapsed = time.monotonic() - start
        done = elapsed / 60 / options.minutes if options.minutes else step / options.steps
        if step % 50 == 0:
            shares = " ".join(f"{name} {hits / max(asked, 1):.2f}" for name, (hits, asked) in tally.items())
            print(f"step {step:5} {done:5.1%} {elapsed:5.0f} s  T {length:3}  {shares}", flush=True)
            tally = {name: np.zeros(2) for name in MIXTURE}
        if time.monotonic() - said > 240:
            save(model, options.out)
            print(f"  recall at 256: {report(options.out, 256, 2)}", flush=True)
            said = time.monotonic()
    save(model, options.out)
    print(f"recall at 512: {report(options.out, 512, 20)}", flush=True)


if __name__ == "__main__":
    main()
