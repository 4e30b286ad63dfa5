"""One step of training beside what people would use instead: a table of seconds, tokens/s, memory and start-up.

    python tests/peers.py --config configs/gsm8k.yaml --only ours trl --limit 240 trl=300 --out FILE

    ours      one attempt a problem, sampled and trained: the work of the peers
    ours-two  a Stage II step: both attempts
    trl       TRL's GRPOTrainer over an Unsloth model (transformers + PEFT on a CPU), rollouts by model.generate
    trl-vllm  the same, rollouts by Unsloth's vLLM

All get the same prompts in the same order, LoRA, rollouts a step, token budget, reward, KL weight, learning rate and
sampling, each in a process of its own. Only model.gradient_checkpointing `auto` means another thing to TRL: true, and
Unsloth's log-probs are not compiled for TRL (UNSLOTH_COMPILE_DISABLE=partial), which at 64 rollouts takes many minutes.

They run in the order of --only. A peer tells every finished step at once, and the table has what it had told when its
limit ended it; its output is in peers-NAME.log beside --out, or in --logs. Without a network: HF_HUB_OFFLINE=1.
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
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
PEERS = ("ours", "ours-two", "trl", "trl-vllm")
COLUMNS = ["s/step", "completion tokens/s", "torch peak GiB", "device GiB", "start-up s", "first step s"]
# Unbuffered, so that the log can be read while it grows; vLLM tells there what it is starting.
QUIET = dict(PYTHONUNBUFFERED="1", WANDB_MODE="disabled", TQDM_DISABLE="1", HF_HUB_DISABLE_TELEMETRY="1",
             VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="INFO")  # fmt: skip
# Unsloth compiles its log-probs as a loop unrolled over chunks, 4 a rollout: 256 of them had not compiled in 10 minutes
# on a CPU, and on an H100 no first step of TRL ended in 168 s. Eager, the same loop takes a moment.
EAGER_LOG_PROBS = {"UNSLOTH_COMPILE_DISABLE": "partial"}


def tell(kind: str, **values: Any) -> None:
    """A line for the parent: PEER-AT (how far), PEER-STEP or PEER-ERROR, and JSON."""
    print(f"\nPEER-{kind} {json.dumps(values)}", flush=True)


class Clock:
    """Seconds and completion tokens of each step, and the most device memory seen in use, by whatever process."""

    def __init__(self, torch: Any, started: float):
        self.cuda, self.started, self.device_bytes, self.steps, self.tokens = torch.cuda, started, 0, 0, 0

    def at(self, what: str) -> None:
        tell("AT", what=what, seconds=time.time() - self.started)

    def look(self) -> None:
        if self.cuda.is_available():
            self.cuda.synchronize()
            free, total = self.cuda.mem_get_info()
            self.device_bytes = max(self.device_bytes, total - free)

    def begin(self) -> None:
        self.look()
        if not self.steps:
            self.at("start-up")
        self.tokens = 0
        self.start = time.perf_counter()

    def end(self) -> None:
        self.look()
        self.steps += 1
        memory = [self.cuda.max_memory_allocated() / 2**30, self.device_bytes / 2**30]  # zeros on a CPU
        tell("STEP", seconds=time.perf_counter() - self.start, tokens=self.tokens, memory=memory)


def run_ours(train: Any, config: Any, tokenizer: Any, examples: list, clock: Clock, single: bool) -> None:
    """Our step: roll out, improve. `single`: sample and train attempt 1 alone."""
    policy, size = train.load_policy(config, tokenizer), config.train.stage2_batch_size
    clock.at("model loaded")
    optimizer = train.torch.optim.AdamW(policy.trainable.values(), lr=config.train.learning_rate, weight_decay=0.0)
    if single:
        train.stage_terms = lambda stage, r1, r2, settings: [(r1, settings.beta1)]
    for first in range(0, len(examples), size):
        rows = [example for example in examples[first : first + size] for _ in range(config.train.num_generations)]
        clock.begin()
        attempts = train.roll_out(policy, rows, config, config.train.generation_temperature, str(first), 2 - single)
        clock.look()
        clock.tokens = sum(len(completion) for attempt in attempts for completion in attempt.completions)
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
    train.BANNERS.seek(0)
    print(train.BANNERS.read())  # what Unsloth chose belongs in the log
    clock.at("model loaded")
    if not gpu and model.num_parameters() < 2**24:  # as load_policy does for ours: else TRL's threads wait
        train.torch.set_num_threads(1)
    rollouts = settings.stage2_batch_size * settings.num_generations
    batch = batch if rollouts % batch == 0 else rollouts
    rows = [
        {
            "prompt": train.chat_text(tokenizer, config, [{"role": "user", "content": example.question}]),
            "target": example.target,
        }
        for example in examples
    ]

    def reward(completions: list[str], completion_ids: list[list[int]], target: list[str], **_: Any) -> list[float]:
        clock.look()
        clock.tokens += sum(map(len, completion_ids))
        return train.grade([think_prefix + text for text in completions], target, config.reward)[0]

    def end(*_: Any, **__: Any) -> None:
        clock.end()
        trust_packing(model)

    timer = train.transformers.TrainerCallback()
    timer.on_step_begin, timer.on_step_end = lambda *_, **__: clock.begin(), end
    more = dict(use_vllm=True, vllm_mode="colocate", vllm_importance_sampling_correction=False) if vllm else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            output_dir=folder,
            num_train_epochs=1,
            num_iterations=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=rollouts // batch,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_new_tokens_attempt1,
            temperature=settings.generation_temperature,
            top_p=1.0,
            top_k=0,
            beta=settings.beta1,
            learning_rate=settings.learning_rate,
            weight_decay=0.0,
            max_grad_norm=settings.max_grad_norm,
            lr_scheduler_type="constant",
            warmup_steps=0,
            optim="adamw_torch",
            loss_type="grpo",
            scale_rewards="none",
            mask_truncated_completions=False,
            shuffle_dataset=False,
            bf16=gpu,
            use_cpu=not gpu,
            gradient_checkpointing=bool(config.model.gradient_checkpointing),
            seed=settings.seed,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **more,
        )
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=[reward],
            args=arguments,
            processing_class=tokenizer,
            train_dataset=train.datasets.Dataset.from_list(rows),
            callbacks=[timer],
        )
        clock.at("trainer made")
        trainer.train()


def trust_packing(model: Any) -> None:
    """Unsloth compares its packed passes with one pass a row whenever a batch is longer than all before it, which most
    of the first steps are and few of a run. After the first step none is, so that the others are those of a run."""
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


def child(args: argparse.Namespace) -> None:
    """Runs one peer in this process; tells its steps, or its error."""
    try:
        import train

        config, clock = train.read_config(args.config, args.set), Clock(train.torch, args.started)
        clock.at("imports done")
        if config.train.num_generations == 1:  # GRPO needs a group
            config.train.num_generations, config.train.stage2_batch_size = 2, config.train.stage2_batch_size // 2
        tokenizer, rows = train.load_tokenizer(config), args.steps * config.train.stage2_batch_size
        examples, _ = train.load_examples(config, tokenizer)
        given = (train, config, tokenizer, [examples[row % len(examples)] for row in range(rows)], clock)
        if args.child.startswith("ours"):
            run_ours(*given, single=args.child == "ours")
        else:
            run_trl(*given, vllm=args.child == "trl-vllm", batch=args.trl_batch)
    except Exception as error:  # becomes the peer's row
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no message"]
        tell("ERROR", error=f"{type(error).__name__}: {lines[-1]}")


def measure(name: str, args: argparse.Namespace, log: Path, seen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A peer's figures from a process of its own, however it ends; `seen` is given those so far after every step."""
    command = [
        sys.executable,
        __file__,
        "--child",
        name,
        "--started",
        str(time.time()),
        "--config",
        args.config,
        "--steps",
        str(args.steps),
        "--trl-batch",
        str(args.trl_batch),
        "--set",
        *args.set,
    ]
    limit, told = args.limit[name], 0
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=QUIET | (EAGER_LOG_PROBS if name.startswith("trl") else {}) | os.environ,
        )
    deadline = time.monotonic() + limit
    try:
        while process.poll() is None and time.monotonic() < deadline and told < args.steps:  # not for its clearing up
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)
            result = figures(log, args.steps, "running")
            if len(result["seconds"]) > told:
                told = len(result["seconds"])
                seen(result)
        end = f"not done in {limit:g} s" if process.poll() is None else f"exit {process.returncode}"
    finally:
        with suppress(ProcessLookupError):  # also what it has started, such as vLLM's engine
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    result = figures(log, args.steps, end)
    if result["cut"]:
        lines = log.read_text(errors="replace").splitlines()
        print(f"The end of {name}'s output:", *lines[-40:], sep="\n", file=sys.stderr, flush=True)
    return result


def figures(log: Path, wanted: int, end: str) -> dict[str, Any]:
    """What a peer has told so far. "cut" says why there are fewer steps than wanted: its error, or else `end`.

    The first step, which compiles and warms up, stands alone: the median and tokens/s are those of the others."""
    told: dict[str, list] = {"AT": [], "STEP": [], "ERROR": []}
    for line in log.read_text(errors="replace").splitlines():
        kind, _, values = line.removeprefix("PEER-").partition(" ")
        if line.startswith("PEER-") and kind in told and values.endswith("}"):
            told[kind].append(json.loads(values))
    steps, result = told["STEP"], dict.fromkeys(COLUMNS)
    result |= {"seconds": [step["seconds"] for step in steps], "tokens": [step["tokens"] for step in steps], "cut": ""}
    result["start-up s"] = next((at["seconds"] for at in told["AT"] if at["what"] == "start-up"), None)
    if steps:
        memory = [max(gib) or None for gib in zip(*(step["memory"] for step in steps), strict=True)]
        result |= {"first step s": steps[0]["seconds"], "torch peak GiB": memory[0], "device GiB": memory[1]}
    if len(steps) > 1:
        result["s/step"] = statistics.median(result["seconds"][1:])
        result["completion tokens/s"] = sum(result["tokens"][1:]) / sum(result["seconds"][1:])
    if len(steps) < wanted:
        why = told["ERROR"][-1]["error"] if told["ERROR"] else end
        last = "".join(f"; {at['what']} after {at['seconds']:.0f} s" for at in told["AT"][-1:])
        result["cut"] = f"after {len(steps)} of {wanted} steps: {why}{last * (not steps)}"
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """The installed versions and a markdown table. Steps counted: those of the median; why, where they are too few."""
    found = {package.name: package.version for package in importlib.metadata.distributions()}
    versions = [f"{name} {found.get(name, '(none)')}" for name in ("torch", "transformers", "trl", "unsloth", "vllm")]
    head = ["peer", *COLUMNS, "steps counted"]
    lines = [", ".join(versions), "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, result in results.items():
        cells = ["-" if result[key] is None else f"{result[key]:.3g}" for key in COLUMNS]
        cells[1] = cells[1] if result[COLUMNS[1]] is None else f"{result[COLUMNS[1]]:.0f}"
        counted, cut = max(0, len(result["seconds"]) - 1), result["cut"].replace("|", "/")[:300]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{counted}, {cut}" if cut else str(counted)]) + " |")
    return "\n".join(lines)


def limits(words: list[str]) -> dict[str, float]:
    """Seconds of each peer from SECONDS and PEER=SECONDS. Raises ValueError."""
    given = {name: float(seconds) for name, _, seconds in (word.rpartition("=") for word in words)}
    if odd := given.keys() - {"", *PEERS}:
        raise ValueError(f"no peer {min(odd)}")
    return dict.fromkeys(PEERS, 240.0 if "" not in given else given.pop("")) | given


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY.SUB=VALUE")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--steps", type=int, default=3, help="at least 2: the first is not counted")
    parser.add_argument("--limit", nargs="+", default=["240"], metavar="[PEER=]SECONDS", help="that a peer may take")
    parser.add_argument("--trl-batch", type=int, default=64, help="rollouts that TRL trains on at once")
    parser.add_argument("--out", type=Path, help="also write the table there, anew after every step")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="of the peers' output; else beside --out")
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: at least 2")
    if args.child:
        child(args)
        return 0
    try:
        args.limit = limits(args.limit)
    except ValueError as error:
        parser.error(f"--limit: SECONDS or PEER=SECONDS: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else a peer would go on without us
    results: dict[str, dict[str, Any]] = {}

    def note(name: str, result: dict[str, Any]) -> None:
        results[name] = result
        print(f"{name}: {json.dumps(result)}", flush=True)
        if args.out:
            args.out.write_text(table(results) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as nowhere:
        folder = args.logs or (args.out.parent if args.out else Path(nowhere))
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.only:
            note(name, measure(name, args, folder / f"peers-{name}.log", partial(note, name)))
    print(table(results), flush=True)
    return int(any(result["cut"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
