"""One training step beside what people would use instead: a table of seconds, tokens/s, memory and start-up.

    python tests/peers.py --config configs/gsm8k.yaml --only trl ours --limit 300 --out FILE

    ours      one attempt a problem, sampled and trained: the work of the peer
    ours-two  a Stage II step: both attempts
    trl       TRL's GRPOTrainer over the model as train.py loads it (with Unsloth on a GPU), rollouts by its generate

All get the same prompts in the same order, LoRA, rollouts a step, token budget, reward, KL weight, learning rate and
sampling, each in a process of its own, whose output is in peers-NAME.log beside --out. The first step, which compiles,
stands alone. UNSLOTH_COMPILE_DISABLE=partial: for TRL Unsloth's log-probs would compile for many minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
PEERS = ("ours", "ours-two", "trl")
COLUMNS = ("s/step", "completion tokens/s", "peak GiB", "start-up s", "first step s")
SETTINGS = {"PYTHONUNBUFFERED": "1", "WANDB_MODE": "disabled", "UNSLOTH_COMPILE_DISABLE": "partial"}


class Clock:
    """Tells the parent the seconds, completion tokens and peak memory of each step, as a line of JSON."""

    def __init__(self, torch: Any, started: float):
        self.cuda, self.started = torch.cuda, started
        self.wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def begin(self) -> None:
        self.wait()
        self.start, self.tokens = time.time(), 0

    def end(self) -> None:
        self.wait()
        step = {"seconds": time.time() - self.start, "tokens": self.tokens, "before": self.start - self.started}
        print(f"\nSTEP {json.dumps(step | {'peak': self.cuda.max_memory_allocated() / 2**30})}", flush=True)


def run_ours(train: Any, config: Any, tokenizer: Any, examples: list, clock: Clock, alone: bool) -> None:
    """Our own training step. `alone`: attempt 1 is sampled and trained alone."""
    from single_attempt import train_first_attempts

    policy, rate = train.load_policy(config, tokenizer), config.train.learning_rate
    size = config.train.stage2_batch_size
    optimizer = train.torch.optim.AdamW(policy.trainable.values(), lr=rate, weight_decay=0.0)
    with train_first_attempts(train) if alone else nullcontext():
        for first in range(0, len(examples), size):
            clock.begin()
            batch = examples[first : first + size]
            _, conversations = train.training_step(policy, optimizer, batch, 2, first, rate, config)
            clock.tokens = sum(len(turn.completion) for c in conversations for turn in c[: 2 - alone])
            clock.end()


def run_trl(train: Any, config: Any, tokenizer: Any, examples: list, clock: Clock) -> None:
    """TRL's step on the model as train.py loads it, timed by a callback; the reward function counts the tokens."""
    import trl  # after train, which has imported Unsloth where there is a GPU

    settings, wanted, gpu = config.train, config.reward, train.DEVICE.type != "cpu"
    _, think_prefix = train.attempt2_bridge(tokenizer, config)
    model, *_ = train.load_model(config)
    if not gpu:
        trl.trainer.utils._ChunkedLogProbFunction = SimpleNamespace(apply=plain_log_probs)  # theirs is a Triton kernel
        train.torch.set_num_threads(1)  # as load_policy does for small models
    extract = train.answer_reader(wanted.answer_extractor, wanted.match)
    rows = [{"prompt": tokenizer.decode(e.prompt), "target": e.target} for e in examples]

    def reward(completions: list[str], completion_ids: list[list[int]], target: list[str], **_: Any) -> list[float]:
        clock.tokens += sum(map(len, completion_ids))
        texts = [think_prefix + text for text in completions]
        return train.rewards.compute_rewards(wanted.fn, wanted.weights, wanted.module, texts, target, extract)

    def end(*_: Any, **__: Any) -> None:
        clock.end()
        trust_packing(model)

    timer = train.transformers.TrainerCallback()
    timer.on_step_begin, timer.on_step_end = lambda *_, **__: clock.begin(), end
    rollouts = settings.stage2_batch_size * settings.num_generations
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            output_dir=folder, num_train_epochs=1, num_iterations=1, per_device_train_batch_size=rollouts,
            gradient_accumulation_steps=1, num_generations=settings.num_generations,
            max_completion_length=settings.max_new_tokens_attempt1, temperature=settings.generation_temperature,
            top_p=1.0, top_k=0, beta=settings.beta1, learning_rate=settings.learning_rate, weight_decay=0.0,
            max_grad_norm=train.MAX_GRAD_NORM, lr_scheduler_type="constant", warmup_steps=0, optim="adamw_torch",
            loss_type="grpo", scale_rewards="none", mask_truncated_completions=False, shuffle_dataset=False,
            bf16=gpu, use_cpu=not gpu, gradient_checkpointing=bool(config.model.gradient_checkpointing),
            seed=settings.seed, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        made = train.datasets.Dataset.from_list(rows)
        how = {"args": arguments, "processing_class": tokenizer, "train_dataset": made, "callbacks": [timer]}
        trl.GRPOTrainer(model=model, reward_funcs=[reward], **how).train()


def trust_packing(model: Any) -> None:
    """Unsloth checks its packed passes whenever a batch is longer than all before it: often at first, seldom later."""
    for name, value in list(vars(model).items()):
        if name.endswith(("_verified_T", "_verified_seg")):
            setattr(model, name, 2**31)
        elif name.startswith("_unsloth_prefix_grouper") and name.endswith("_verified") and isinstance(value, dict):
            value.update(dict.fromkeys(value, (2**31, 2**31)))


def plain_log_probs(hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, *_: Any) -> tuple:
    """Log-probs of the targets [N] and entropies [N], in the place of TRL's kernel on a CPU."""
    log_probs = ((hidden @ weight.T + (0 if bias is None else bias)) / temperature).float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).detach()
    return log_probs.gather(-1, targets[:, None])[:, 0], entropy, None, None, None


def child(args: argparse.Namespace) -> int:
    """Runs one peer in this process."""
    import train

    config, clock = train.read_config(args.config, args.set), Clock(train.torch, args.started)
    config.train.oversample = 1
    if config.train.num_generations == 1:  # GRPO needs a group
        config.train.num_generations, config.train.stage2_batch_size = 2, config.train.stage2_batch_size // 2
    tokenizer, rows = train.load_tokenizer(config), args.steps * config.train.stage2_batch_size
    examples, *_ = train.load_examples(config, tokenizer)
    given = (train, config, tokenizer, [examples[row % len(examples)] for row in range(rows)], clock)
    run_trl(*given) if args.child == "trl" else run_ours(*given, alone=args.child == "ours")
    return 0


def measure(name: str, args: argparse.Namespace, log: Path) -> list[str]:
    """A peer's row of the table, from a process of its own, however it ends."""
    command = [sys.executable, __file__, "--child", name, "--started", str(time.time()), *sys.argv[1:]]
    with log.open("w") as output:
        how = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=SETTINGS | os.environ, **how)
    try:
        end = f"exit {process.wait(args.limit)}"
    except subprocess.TimeoutExpired:
        end = f"ended after {args.limit:g} s"
    finally:
        with suppress(ProcessLookupError):  # with what it has started
            os.killpg(process.pid, signal.SIGKILL)
    lines = log.read_text(errors="replace").splitlines()
    steps = [json.loads(line.removeprefix("STEP ")) for line in lines if line.startswith("STEP {") and line[-1] == "}"]
    if len(steps) < args.steps:
        print(f"The end of {name}'s output:", *lines[-40:], sep="\n", file=sys.stderr, flush=True)
    if len(steps) < 2:
        return [name, *["-"] * len(COLUMNS), f"{len(steps)} ({end})"]
    first, *later = [step["seconds"] for step in steps]
    speed, peak = sum(step["tokens"] for step in steps[1:]) / sum(later), max(step["peak"] for step in steps)
    figures = f"{statistics.median(later):.2f} {speed:.0f} {peak:.1f} {steps[0]['before']:.0f} {first:.1f}"
    return [name, *figures.split(), f"{len(steps)} ({end})"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY.SUB=VALUE")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--steps", type=int, default=3, help="at least 2: the first stands alone")
    parser.add_argument("--limit", type=float, default=240, help="seconds that a peer may take")
    parser.add_argument("--out", type=Path, default=Path("peers.md"), help="where the table goes")
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else a peer would go on without us
    table = [["peer", *COLUMNS, "steps"], ["---"] * (len(COLUMNS) + 2)]
    for name in args.only:
        table.append(measure(name, args, args.out.with_name(f"peers-{name}.log")))
        args.out.write_text("".join(f"| {' | '.join(row)} |\n" for row in table), encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"), end="")
    return int(any("-" in row for row in table[2:]))


if __name__ == "__main__":
    sys.exit(main())
