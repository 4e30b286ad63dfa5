"""One step of training beside what people would use instead: a table of seconds, tokens/s, memory and start-up.

    python tests/peers.py --config configs/gsm8k.yaml --set model.name=DIR --only ours ours-two trl trl-vllm --steps 5

    ours      one attempt a problem, sampled and trained: the work of the peers
    ours-two  a Stage II step: both attempts
    trl       TRL's GRPOTrainer over an Unsloth model (transformers + PEFT on a CPU), rollouts by model.generate
    trl-vllm  the same, rollouts by Unsloth's vLLM

All get the same prompts in the same order, LoRA, rollouts a step, token budget, reward, KL weight, learning rate and
sampling, each in a process of its own. Only model.gradient_checkpointing `auto` means another thing to TRL: true.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
PEERS = ("ours", "ours-two", "trl", "trl-vllm")
MARK = "PEER-FIGURES "  # begins the one line of a child's output that is its result
COLUMNS = ["s/step", "completion tokens/s", "torch peak GiB", "device GiB", "start-up s", "first step s"]


class Clock:
    """Seconds and completion tokens of each step, and the most device memory seen in use, by whatever process."""

    def __init__(self, torch: Any, started: float):
        self.cuda, self.started, self.startup, self.device_bytes = torch.cuda, started, None, 0
        self.seconds, self.tokens = [], []

    def look(self) -> None:
        if self.cuda.is_available():
            self.cuda.synchronize()
            free, total = self.cuda.mem_get_info()
            self.device_bytes = max(self.device_bytes, total - free)

    def begin(self) -> None:
        self.look()
        self.startup = self.startup or time.time() - self.started
        self.tokens.append(0)
        self.start = time.perf_counter()

    def end(self) -> None:
        self.look()
        self.seconds.append(time.perf_counter() - self.start)

    def figures(self) -> dict[str, Any]:
        """The first step, which compiles and warms up, stands alone."""
        median, speed = statistics.median(self.seconds[1:]), sum(self.tokens[1:]) / sum(self.seconds[1:])
        memory = [self.cuda.max_memory_allocated() / 2**30, self.device_bytes / 2**30]  # zeros on a CPU
        cells = [median, speed, *(gib or None for gib in memory), self.startup, self.seconds[0]]
        return dict(zip(COLUMNS, cells, strict=True)) | {"seconds": self.seconds, "tokens": self.tokens}


def run_ours(train: Any, config: Any, tokenizer: Any, examples: list, clock: Clock, single: bool) -> None:
    """Our step: roll out, improve. `single`: sample and train attempt 1 alone."""
    policy, size = train.load_policy(config, tokenizer), config.train.stage2_batch_size
    optimizer = train.torch.optim.AdamW(policy.trainable.values(), lr=config.train.learning_rate, weight_decay=0.0)
    if single:
        train.stage_terms = lambda stage, r1, r2, settings: [(r1, settings.beta1)]
    for first in range(0, len(examples), size):
        rows = [example for example in examples[first : first + size] for _ in range(config.train.num_generations)]
        clock.begin()
        attempts = train.roll_out(policy, rows, config, config.train.generation_temperature, str(first), 2 - single)
        clock.look()
        clock.tokens[-1] = sum(len(completion) for attempt in attempts for completion in attempt.completions)
        train.improve(policy, optimizer, attempts * 2 if single else attempts, 2, config)
        clock.end()


def run_trl(train: Any, config: Any, tokenizer: Any, examples: list, clock: Clock, vllm: bool, batch: int) -> None:
    """TRL's step on the model as train.py loads it, timed by a callback; the reward function counts the tokens."""
    import trl  # after train, which has imported Unsloth where there is a GPU

    gpu, settings = train.DEVICE.type != "cpu", config.train
    if vllm and not (gpu and train.importlib.util.find_spec("vllm")):
        raise RuntimeError("needs vLLM and a GPU")
    config.model.fast_inference = vllm
    if not gpu:  # TRL's own is a Triton kernel
        trl.trainer.utils._ChunkedLogProbFunction = SimpleNamespace(apply=plain_log_probs)
    _, think_prefix = train.attempt2_bridge(tokenizer, config)
    load, dtype = (train.load_with_unsloth, "bfloat16") if gpu else (train.load_with_transformers, "float32")
    model, *_ = load(config, getattr(train.torch, dtype))
    if not gpu and model.num_parameters() < 2**24:  # as load_policy does for ours: else TRL's threads wait
        train.torch.set_num_threads(1)
    rollouts = settings.stage2_batch_size * settings.num_generations
    batch = batch if rollouts % batch == 0 else rollouts
    rows = [{"prompt": train.chat_text(tokenizer, config, [{"role": "user", "content": example.question}]),
             "target": example.target} for example in examples]

    def reward(completions: list[str], completion_ids: list[list[int]], target: list[str], **_: Any) -> list[float]:
        clock.look()
        clock.tokens[-1] += sum(map(len, completion_ids))
        return train.grade([think_prefix + text for text in completions], target, config.reward)[0]

    timer = train.transformers.TrainerCallback()
    timer.on_step_begin, timer.on_step_end = lambda *_, **__: clock.begin(), lambda *_, **__: clock.end()
    more = dict(use_vllm=True, vllm_mode="colocate", vllm_importance_sampling_correction=False) if vllm else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            output_dir=folder, num_train_epochs=1, num_iterations=1, per_device_train_batch_size=batch,
            gradient_accumulation_steps=rollouts // batch, num_generations=settings.num_generations,
            max_completion_length=settings.max_new_tokens_attempt1, temperature=settings.generation_temperature,
            top_p=1.0, top_k=0, beta=settings.beta1, learning_rate=settings.learning_rate, weight_decay=0.0,
            max_grad_norm=settings.max_grad_norm, lr_scheduler_type="constant", warmup_steps=0, optim="adamw_torch",
            loss_type="grpo", scale_rewards="none", mask_truncated_completions=False, shuffle_dataset=False,
            bf16=gpu, use_cpu=not gpu, gradient_checkpointing=bool(config.model.gradient_checkpointing),
            seed=settings.seed, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, **more,
        )
        trl.GRPOTrainer(model=model, reward_funcs=[reward], args=arguments, processing_class=tokenizer,
                        train_dataset=train.datasets.Dataset.from_list(rows), callbacks=[timer]).train()


def plain_log_probs(hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, *_: Any) -> tuple:
    """Log-probs of the targets [N] and entropies [N], in the place of TRL's kernel on a CPU."""
    log_probs = ((hidden @ weight.T + (0 if bias is None else bias)) / temperature).float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).detach()
    return log_probs.gather(-1, targets[:, None])[:, 0], entropy, None, None, None


def child(args: argparse.Namespace) -> None:
    """Runs one peer in this process and prints its figures, or its error, as one line of JSON."""
    try:
        import train

        config, clock = train.read_config(args.config, args.set), Clock(train.torch, args.started)
        if config.train.num_generations == 1:  # GRPO needs a group
            config.train.num_generations, config.train.stage2_batch_size = 2, config.train.stage2_batch_size // 2
        tokenizer, rows = train.load_tokenizer(config), args.steps * config.train.stage2_batch_size
        examples, _ = train.load_examples(config, tokenizer)
        given = (train, config, tokenizer, [examples[row % len(examples)] for row in range(rows)], clock)
        if args.child.startswith("ours"):
            run_ours(*given, single=args.child == "ours")
        else:
            run_trl(*given, vllm=args.child == "trl-vllm", batch=args.trl_batch)
        result = clock.figures()
    except Exception as error:  # becomes the peer's row
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[-1]}"}
    print("\n" + MARK + json.dumps(result), flush=True)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A peer's figures from a process of its own; {"error": why} where it has none."""
    command = [sys.executable, __file__, "--child", name, "--started", str(time.time()), "--config", args.config,
               "--steps", str(args.steps), "--trl-batch", str(args.trl_batch), "--set", *args.set]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process, late = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True), ""
        try:
            process.wait(args.limit)
        except subprocess.TimeoutExpired:
            late = f"not done after {args.limit:g} s: "
        finally:
            with suppress(ProcessLookupError):  # also what it has started, such as vLLM's engine
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        lines = ["no output", *(line.strip() for line in log if line.strip())]
    found = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    result = json.loads(found[-1]) if found else {"error": f"{late or f'exit {process.returncode}: '}{lines[-1]}"}
    if "error" in result:
        print(f"The end of {name}'s output:", *lines[-40:], sep="\n", file=sys.stderr, flush=True)
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """The installed versions and a markdown table; a peer without figures shows why."""
    found = {package.name: package.version for package in importlib.metadata.distributions()}
    versions = [f"{name} {found.get(name, '(none)')}" for name in ("torch", "transformers", "trl", "unsloth", "vllm")]
    lines = [", ".join(versions), "", "| peer | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, result in results.items():
        cells = ["-" if result.get(key) is None else f"{result[key]:.3g}" for key in COLUMNS]
        cells[1] = cells[1] if "error" in result else f"{result[COLUMNS[1]]:.0f}"
        cells[0] = result.get("error", cells[0]).replace("|", "/")[:300]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY.SUB=VALUE")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--steps", type=int, default=5, help="at least 2: the first is not counted")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a peer may take")
    parser.add_argument("--trl-batch", type=int, default=64, help="rollouts that TRL trains on at once")
    parser.add_argument("--out", type=Path, help="also write the table there")
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: at least 2")
    if args.child:
        child(args)
        return 0
    results: dict[str, dict[str, Any]] = {}
    for name in args.only:
        results[name] = measure(name, args)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        if args.out:
            args.out.write_text(table(results) + "\n", encoding="utf-8")
    print(table(results), flush=True)
    return int(any("error" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
