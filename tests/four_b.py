"""What a 4B model takes under configs/math.yaml, in bf16 and 4-bit, on the whole card and held to a part of it.

    python tests/four_b.py --tokenizer Qwen2.5-1.5B-Instruct --folder qwen3-4b --set dataset.name=DATA --total 600

Qwen3-4B's shape with random weights: memory and speed are real, what it says is noise. A process a case. Worst: every
row as long as the budgets let it be; usual: prompts of 150 tokens, attempts of 400. The most telling comes first, and a
row is printed and in --out as soon as it is measured, so a limit costs only what comes after it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
COLUMNS = ("case", "what", "rows", "seconds", "peak GiB", "card GiB", "micro_tokens", "checkpointing", "notes")
QWEN3_4B = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=262144,
                rope_parameters={"rope_type": "default", "rope_theta": 5e6})  # fmt: skip
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, max_position_embeddings=4096)  # fmt: skip


def write_model(folder: str, tokenizer: str, small: bool) -> None:
    """A Qwen3 of random weights in bf16, with somebody's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    shape = SMALL | {"vocab_size": len(tokenizer)} if small else QWEN3_4B
    config = Qwen3Config(**shape, rms_norm_eps=1e-6, tie_word_embeddings=True, dtype=torch.bfloat16,
                         eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    model.tie_weights()
    for name, weight in model.named_parameters():
        # norms away from 1, so that one left out would show
        torch.nn.init.uniform_(weight, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def attempts_of(train: Any, policy: Any, rows: int, lengths: tuple[int, int, int]) -> list[Any]:
    """Both attempts at `rows` problems in random tokens: of the prompt, of attempt 1, of attempt 2."""
    rng = random.Random(0)
    special = set(policy.tokenizer.all_special_ids)
    ids = [i for i in range(min(len(policy.tokenizer), 50000)) if i not in special]
    prompts, first, second = ([rng.choices(ids, k=length) for _ in range(rows)] for length in lengths)
    longer = [prompt + completion + policy.bridge for prompt, completion in zip(prompts, first, strict=True)]
    return [train.Attempt(prompts=before, completions=completions, texts=[""] * rows, answers=[""] * rows,
                          rewards=[rng.random() for _ in range(rows)], correct=[False] * rows, flexible=[False] * rows,
                          truncated=[True] * rows, sampled_log_probs=None, seconds=0.0)
            for before, completions in ((prompts, first), (longer, second))]  # fmt: skip


def hold_to(gigabytes: float) -> None:
    """The card as one of so many GiB, also to whoever asks what is free. CUDA's own context comes on top."""
    import torch

    _, whole = torch.cuda.mem_get_info()
    limit = int(gigabytes * 2**30)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole))
    real = torch.cuda.mem_get_info
    torch.cuda.mem_get_info = lambda *_, **__: (min(real()[0], max(0, limit - torch.cuda.memory_reserved())), limit)


def tell(*row: Any) -> None:
    """A row for the parent, as a line of JSON; the last columns may be left out."""
    print("ROW " + json.dumps(dict.fromkeys(COLUMNS, "") | dict(zip(COLUMNS, row, strict=False))), flush=True)


def run_case(case: dict[str, Any], args: argparse.Namespace) -> None:
    """Tells a row for each thing measured in this process."""
    import torch

    import train

    train.QUIET, cuda = True, train.DEVICE.type == "cuda"
    card = torch.cuda.mem_get_info if cuda else lambda: (0, 0)
    if case["memory_gb"] and cuda:
        hold_to(case["memory_gb"])
    extras = ["train.importance_clip=2", "train.max_new_tokens_attempt1=64", "train.max_new_tokens_attempt2=64"]
    config = train.read_config(str(ROOT / "configs/math.yaml"), [
        f"model.name={args.folder}", f"model.load_in_4bit={str(case['load_in_4bit']).lower()}", "wandb_project=null",
        *args.set, *(extras if case["extras"] else [])])  # fmt: skip
    budgets, policy = config.train, None
    auto = config.model.gradient_checkpointing == "auto"

    def measure(what: str, rows: int, work: Any) -> Any:
        """The result of work(), None if it failed. Tells the row; its notes are a result of text or what went wrong."""
        result = None
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            result = work()
            if cuda:
                torch.cuda.synchronize()
            notes = result if isinstance(result, str) else ""
        except Exception as error:  # out of memory, or a fault of this measurement alone
            traceback.print_exc()
            notes = f"{type(error).__name__}: {train.first_line(error)}"
        seconds, (free, whole) = time.perf_counter() - start, card()
        made = result if what == "load" else policy
        on = (cuda and made and not made.recompute) if auto else config.model.gradient_checkpointing
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        tell(
            case["name"],
            what,
            rows,
            f"{seconds:.2f}",
            f"{peak:.2f}",
            f"{(whole - free) / 2**30:.2f}",
            made.micro_tokens if made else "",
            ("off", "on")[bool(on)] if made else "",
            notes,
        )
        return result

    tokenizer = train.load_tokenizer(config)
    examples, _ = train.load_examples(config, tokenizer)
    policy = measure("load", 0, lambda: train.load_policy(config, tokenizer))
    if policy is None:
        return
    counts = {s: args.rows or getattr(budgets, f"stage{s}_batch_size") * budgets.num_generations for s in (1, 2)}
    problems = [examples[i % len(examples)] for i in range(max(counts.values()))]

    def optimizer() -> Any:
        return torch.optim.AdamW(policy.trainable.values(), lr=budgets.learning_rate, weight_decay=0.0)

    if case["extras"]:
        adam, rng = optimizer(), random.Random(0)
        for step in range(5):

            def work(step: int = step) -> str:
                attempts = train.roll_out(policy, problems, config, budgets.generation_temperature, f"extras/{step}")
                for attempt in attempts:  # noise earns nothing
                    attempt.rewards = [rng.random() for _ in problems]
                update = train.improve(policy, adam, attempts, 2, config)
                return "loss {loss:.4f}, logprob_drift {logprob_drift}, skipped {skipped}".format(**update)

            measure(f"importance_clip 2, step {step + 1}", len(problems), work)
        measure("decoder against generate", 8, lambda: against_generate(train, policy, problems))
        return
    if policy.decoder:  # no token ends an attempt
        policy.decoder.eos.fill_(-1)
    policy.eos_token_ids = []

    def roll_out() -> str:
        attempts = train.roll_out(policy, problems, config, budgets.generation_temperature, "four_b")
        tokens = sum(len(completion) for attempt in attempts for completion in attempt.completions)
        return f"{tokens / sum(attempt.seconds for attempt in attempts):,.0f} tokens/s"

    most = (budgets.max_prompt_length_attempt1, budgets.max_new_tokens_attempt1, budgets.max_new_tokens_attempt2)
    usual, prompts = tuple(map(min, most, (150, 400, 400))), [problem.prompt for problem in problems]

    def update(stage: int, what: str, lengths: tuple[int, int, int], rows: int) -> None:
        attempts = attempts_of(train, policy, rows, lengths)
        tokens = len(attempts[1].prompts[0]) + lengths[2]
        measure(f"update, stage {stage}, {what}: rows of {tokens} tokens", rows,
                lambda: train.improve(policy, optimizer(), attempts, stage, config) and None)  # fmt: skip

    update(2, "warm-up", usual, 2)
    update(2, "worst", most, counts[2])
    measure("warm-up: 16 tokens a row", len(prompts), lambda: train.sample(policy, prompts, 16, 1.0, "warm-up"))
    measure("rollout, full budgets", len(problems), roll_out)
    for stage, what, lengths in ((2, "usual", usual), (1, "worst", most), (1, "usual", usual)):
        update(stage, what, lengths, counts[stage])


def against_generate(train: Any, policy: Any, problems: list[Any]) -> str:
    """Greedy rows of the decoder beside model.generate's, where they part, and its log-probs beside the update's."""
    import torch

    with torch.no_grad():
        for name, weight in policy.trainable.items():
            if "lora_B" in name:  # an adapter that does something
                weight.normal_(std=0.01)
        prompts = [problems[i % len(problems)].prompt for i in range(8)]
        decoded, log_probs = policy.decoder.generate(prompts, 64, 0.0, 0)
        again = train.completion_log_probs(policy, prompts, decoded, 1.0).cpu()
        apart = (torch.tensor(sum(log_probs, [])) - again).abs()
        decoder, policy.decoder = policy.decoder, None
        generated, _ = train.sample(policy, prompts, 64, 0.0, "greedy")
        policy.decoder = decoder
        gaps = []  # a close call that rounding decides, or an error?
        for prompt, a, b in zip(prompts, decoded, generated, strict=True):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            if at is not None:
                pair = train.completion_log_probs(policy, [prompt + a[:at]] * 2, [[a[at]], [b[at]]], 1.0)
                gaps.append((pair[0] - pair[1]).abs().item())
    parting = f", the others part where two tokens are at most {max(gaps):.4f} nats apart" if gaps else ""
    return (f"{sum(a == b for a, b in zip(decoded, generated, strict=True))} of 8 greedy rows equal{parting}; "
            f"decoder and update log-probs {apart.mean():.5f} apart (mean), {apart.max():.4f} (max)")  # fmt: skip


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The most telling first."""
    held = f"{args.memory_gb:g} GiB"
    order = [("4-bit", held), ("bf16", "whole card"), ("bf16", "extras"), ("bf16", held), ("4-bit", "whole card")]
    made = [dict(name=f"{kind}, {what}", load_in_4bit=kind == "4-bit", extras=what == "extras",
                 memory_gb=args.memory_gb if what == held else 0) for kind, what in order]  # fmt: skip
    made = made[1:3] if args.small else made
    return [case for case in made if not args.only or any(text in case["name"] for text in args.only)]


def run(command: list[str], seconds: float, take: Callable[[dict[str, Any]], None]) -> str:
    """Gives `take` each row that a process tells, as it tells it. Why it ended before its end, "" if it did not."""
    start, done = time.monotonic(), False
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace", start_new_session=True)

    def stop() -> None:
        with suppress(ProcessLookupError):  # with all that it has started
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith("ROW ") and line.endswith("}\n"):
                take(json.loads(line[4:]))
            elif done := line == "END\n":  # not to wait for its clearing up
                break
            else:
                print(line, end="", file=sys.stderr, flush=True)
    finally:
        timer.cancel()
        stop()
        code = process.wait()
    if done:
        return ""
    return f"not done in {seconds:.0f} s" if time.monotonic() - start >= seconds else f"exit {code}"


def child(args: argparse.Namespace) -> None:
    """Writes the model or runs one case; what is wrong with the whole of it is a row."""
    case = None if args.child == "write" else json.loads(args.child)
    try:
        if case:
            run_case(case, args)
        else:
            write_model(args.folder, args.tokenizer, args.small)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no message"]
        tell(case["name"] if case else "writing the model", "all", *[""] * 6, f"{type(error).__name__}: {lines[0]}")
    print("END", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="a real tokenizer with a chat template")
    parser.add_argument("--folder", required=True, metavar="DIR", help="where the model is written, unless it is there")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY.SUB=VALUE", help="override keys")
    parser.add_argument("--memory-gb", type=float, default=24, help="the smaller card, in GiB")
    parser.add_argument("--rows", type=int, help="rows a step, where the config's batch is too many")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases whose name has one of these: bf16, 4-bit, ...")
    parser.add_argument("--limit", type=float, default=420, help="seconds a case")
    parser.add_argument("--total", type=float, default=float("inf"), help="seconds for all: a case gets what is left")
    parser.add_argument("--small", action="store_true", help="a tiny model, bf16 cases of the whole device alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table goes here too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else a case would go on without us
    end, again = time.monotonic() + args.total, [sys.executable, __file__, *sys.argv[1:], "--child"]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    print("\n".join(lines), flush=True)

    def take(row: dict[str, Any]) -> None:
        lines.append("| " + " | ".join(str(row[column]).replace("|", "/") for column in COLUMNS) + " |")
        print(lines[-1], flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    plan = [(case["name"], json.dumps(case)) for case in cases(args)]
    if not (Path(args.folder) / "tokenizer_config.json").exists():  # what is written last
        plan.insert(0, ("writing the model", "write"))
    for name, task in plan:
        left = end - time.monotonic()
        fault = run([*again, task], min(args.limit, left), take) if left > 0 else "not run: no time left"
        if fault:
            take(dict.fromkeys(COLUMNS, "") | {"case": name, "notes": fault})
    return 0


if __name__ == "__main__":
    sys.exit(main())
