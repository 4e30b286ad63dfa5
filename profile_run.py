#!/usr/bin/env python3
"""Measures a config before it is run: lengths, answer extraction, speed and memory of one optimizer step.

    python profile_run.py --config configs/gsm8k.yaml --n 64             # lengths, budgets, tokens/s, seconds, memory
    python profile_run.py --config configs/gsm8k.yaml --n 64 --compare   # the same rollout through model.generate too
    python profile_run.py --config configs/gsm8k.yaml --decode 32 128    # decoding alone at these batch sizes
    python profile_run.py --samples outputs/score-gsm8k                  # what a finished run's corrections look like
    python profile_run.py --ask outputs/score-gsm8k "A pen costs 3 dollars. What do 7 cost?"    # both attempts at it

Nothing is trained: the update runs with a learning rate of 0. Figures are for this model, these prompts, this card.
"""

from __future__ import annotations

import argparse
import difflib
import json
import random
import shutil
import statistics
import sys
import textwrap
import time
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path
from unittest import mock

REPEATS = 3
CARDS = {  # dense bf16 TFLOP/s and memory TB/s by their data sheets; the first name found in the device's counts
    "H200": (989, 4.8), "H100 PCIe": (756, 2.0), "H100 NVL": (835, 3.9), "H100": (989, 3.35), "A100": (312, 2.0),
    "L40S": (362, 0.864), "RTX 4090": (165, 1.01), "RTX 3090": (71, 0.936),
}  # fmt: skip


def percentiles(values: list[int]) -> str:
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] for q in (0.5, 0.9, 0.99, 1)]
    return "p50 {} p90 {} p99 {} max {}".format(*at)


def round_up(tokens: float, step: int = 32) -> int:
    return int(-(-tokens // step) * step)


def tokens_inside(texts: list[str], tag: str, tokenizer) -> list[int]:
    """Tokens between <tag> and </tag> (or the end) of each text that has the tag."""
    parts = [text.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0] for text in texts if f"<{tag}>" in text]
    return [len(ids) for ids in tokenizer(parts, add_special_tokens=False)["input_ids"]] if parts else []


def report_lengths(attempts, policy, config, longest: int) -> None:
    """Percentiles, the think/answer split, failures, and budgets for what was seen; `longest`: tokens of any prompt."""
    for number, attempt in enumerate(attempts, 1):
        count = len(attempt.texts)
        print(f"\nAttempt {number} ({count} rollouts)")
        print(f"  prompt tokens      {percentiles([len(p) for p in attempt.prompts])}")
        print(f"  completion tokens  {percentiles([len(c) for c in attempt.completions])}")
        for tag in ("think", "answer"):
            inside = tokens_inside(attempt.texts, tag, policy.tokenizer)
            split = f"{percentiles(inside)} (in {len(inside)})" if inside else "no such tag"
            print(f"  <{tag}> tokens".ljust(21) + split)
        unanswered = attempt.answers.count("")
        print(
            f"  cut off by the budget {sum(attempt.truncated) / count:.1%}, no answer {unanswered / count:.1%}, "
            f"correct {sum(attempt.correct) / count:.1%} (in any format {sum(attempt.flexible) / count:.1%}), "
            f"mean reward {sum(attempt.rewards) / count:.3f}"
        )
    print(
        "\nRecommended budgets (completions: 99th percentile and a tenth; one that cut off more than 1% is doubled; "
        "prompts:\nthe longest of all train and test rows that max_prompt_length_attempt1 lets in now)"
    )
    budgets = []
    for number, attempt in enumerate(attempts, 1):
        lengths = sorted(map(len, attempt.completions))
        now = getattr(config.train, f"max_new_tokens_attempt{number}")
        cut = sum(attempt.truncated) / len(lengths) > 0.01
        budgets.append(2 * now if cut else min(now, round_up(1.1 * lengths[round(0.99 * (len(lengths) - 1))])))
        print(f"  train.max_new_tokens_attempt{number}: {budgets[-1]} (now {now})")
    prompt1 = round_up(longest)
    prompt2 = round_up(prompt1 + budgets[0] + len(policy.bridge))
    print(f"  train.max_prompt_length_attempt1: {prompt1} (now {config.train.max_prompt_length_attempt1})")
    print(f"  train.max_prompt_length_attempt2: {prompt2} (now {config.train.max_prompt_length_attempt2})")
    print(f"  model.max_seq_length: {prompt2 + budgets[1]} (now {config.model.max_seq_length})")


def peak_memory(train) -> float:
    """GiB at the highest since the last call; 0 without CUDA."""
    import torch

    if train.DEVICE.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def timed(train, work) -> tuple[float, object]:
    """Seconds of work(), the device waited for, and its result."""
    start = now(train)
    result = work()
    return now(train) - start, result


def now(train) -> float:
    """Seconds on a clock, read when the device has done all it was given."""
    if train.DEVICE.type == "cuda":
        __import__("torch").cuda.synchronize()
    return time.perf_counter()


def time_rollout(train, policy, examples, config, name: str) -> tuple[float, list]:
    """Prints the median of REPEATS rollouts after a first one; returns it with the last attempts."""
    temperature = config.train.generation_temperature
    first, attempts = timed(train, lambda: train.roll_out(policy, examples, config, temperature, "profile/0"))
    peak_memory(train)
    runs = [
        timed(train, lambda i=i: train.roll_out(policy, examples, config, temperature, f"profile/{i}"))
        for i in range(1, REPEATS + 1)
    ]
    seconds = statistics.median(run[0] for run in runs)
    rates, steps = [], []
    for _, attempts in runs:
        sampling = sum(a.seconds for a in attempts)
        rates.append(sum(len(c) for a in attempts for c in a.completions) / sampling)
        steps.append(1e3 * sampling / sum(max(map(len, a.completions)) for a in attempts))
    print(
        f"{name:<42} {len(examples):>5} rows {statistics.median(rates):>9,.0f} tokens/s "
        f"{statistics.median(steps):>8.2f} ms/token step {seconds:>8.2f} s (first {first:.2f} s) "
        f"{peak_memory(train):>7.2f} GiB"
    )
    return seconds, attempts


def compare_static_cache(train, policy, examples, config) -> None:
    """transformers' generate with a static cache and its compiled step, where the model takes it."""
    generate = policy.model.generate
    policy.model.generate = partial(generate, cache_implementation="static")
    print("generate, static cache: its compilation can take minutes; Ctrl-C leaves it out", flush=True)
    try:
        time_rollout(train, policy, examples, config, "generate, static cache, compiled")
    except KeyboardInterrupt:
        print(f"{'generate, static cache, compiled':<42} interrupted")
    except Exception as error:  # Unsloth's models refuse a static cache
        print(f"{'generate, static cache, compiled':<42} does not run here: {train.first_line(error)}")
    finally:
        policy.model.generate = generate


def time_decoding(train, policy, examples, sizes: list[int], new_tokens: int, name: str) -> None:
    """Decodes exactly `new_tokens` tokens a row, EOS ignored, at each batch size: medians of REPEATS after a first."""
    eos, policy.eos_token_ids = policy.eos_token_ids, []
    engine = policy.engine
    policy.engine = engine and partial(train.engine_samples, policy.model, [])
    held = policy.decoder.eos.clone() if policy.decoder else None
    if policy.decoder:
        policy.decoder.eos.fill_(-1)
    for size in sizes:
        prompts = [examples[i % len(examples)].prompt for i in range(size)]
        first, _ = timed(train, lambda p=prompts: train.sample(policy, p, new_tokens, 1.0, "decode/0"))
        peak_memory(train)
        seconds = statistics.median(
            timed(train, lambda p=prompts, i=i: train.sample(policy, p, new_tokens, 1.0, f"decode/{i}"))[0]
            for i in range(1, REPEATS + 1)
        )
        print(
            f"{name:<42} {size:>5} rows {size * new_tokens / seconds:>9,.0f} tokens/s "
            f"{1e3 * seconds / new_tokens:>8.2f} ms/token step {seconds:>8.2f} s (first {first:.2f} s) "
            f"{peak_memory(train):>7.2f} GiB",
            flush=True,
        )
    policy.eos_token_ids, policy.engine = eos, engine
    if policy.decoder:
        policy.decoder.eos.copy_(held)


def split_step(train, policy, optimizer, step) -> tuple[dict[str, float], Counter]:
    """Runs step(): seconds by part, the device waited for around each, which sum to the whole; and by part the tokens
    that went through the model, pads left out (token steps are not counted)."""
    import torch

    seconds, tokens, running = Counter(), Counter(), ["the rest"]
    backbone = getattr(policy.model.get_base_model(), policy.model.get_base_model().base_model_prefix)

    def lap() -> None:
        nonlocal since
        since, before = now(train), since
        seconds[running[-1]] += since - before

    def watch(owner, attribute: str, name) -> None:
        function = getattr(owner, attribute)

        def watched(*args, **kwargs):
            lap()
            running.append(name(args))
            try:
                return function(*args, **kwargs)
            finally:
                lap()
                running.pop()

        stack.enter_context(mock.patch.object(owner, attribute, watched))

    def prefill(args) -> str:
        tokens["prefill"] += sum(map(len, args[1]))
        return "prefill"

    def count(_module, _args, given) -> None:
        tokens[running[-1]] += int((given["input_ids"] != policy.pad_token_id).sum())

    with ExitStack() as stack:
        if policy.decoder:
            watch(train.Decoder, "_prefill", prefill)
            watch(train.Decoder, "_continue", lambda _: "token steps")
        else:
            watch(train, "sample", lambda _: "sampling")
        watch(train, "grade", lambda _: "grading")
        watch(
            train,
            "completion_log_probs",
            lambda _: "policy forward" if torch.is_grad_enabled() else "reference forward",
        )
        watch(torch.Tensor, "backward", lambda _: "backward")
        watch(optimizer, "step", lambda _: "optimizer")
        stack.callback(backbone.register_forward_pre_hook(count, with_kwargs=True).remove)
        since = now(train)
        step()
        lap()
    return seconds, tokens


def least_seconds(policy, attempts, tokens: Counter, tflops: float, terabytes: float) -> dict[str, float]:
    """What each part must take: the FLOPs of its matrix products at the card's peak; for the token steps the weights
    and the K/V that each reads. Left out: attention's own products and LoRA's, a few percent of short rows."""
    import torch

    model, config, head = policy.model.get_base_model(), policy.model.config, policy.model.get_output_embeddings()
    linears = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and module is not head
    ]
    body, top = sum(m.in_features * m.out_features for m in linears), head.weight.numel()
    made = sum(len(c) for a in attempts for c in a.completions)
    recomputed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    flops = {  # a LoRA's backward pass has the products of a forward one: base weights have no gradient
        "prefill": 2 * body * tokens["prefill"],
        "reference forward": 2 * body * tokens["reference forward"] + 2 * top * made,
        "policy forward": 2 * body * tokens["policy forward"] + 4 * top * made,  # the head's gradient is made with it
        "backward": 2 * body * tokens["policy forward"] * (2 if recomputed else 1),
    }
    steps = sum(max(map(len, a.completions)) - 1 for a in attempts)
    weights = sum(m.weight.numel() * m.weight.element_size() for m in [*linears, head])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * head.weight.element_size()
    read = sum(len(c) * (len(p) + len(c) / 2) for a in attempts for p, c in zip(a.prompts, a.completions, strict=True))
    limits = {part: count / tflops / 1e12 for part, count in flops.items()}
    return limits | {"token steps": (steps * weights + read * slot) / terabytes / 1e12}


def print_split(train, policy, optimizer, examples, config, card: str) -> None:
    """A Stage II step part by part, each beside its limit on a card of CARDS: the median one of REPEATS, each with
    samples of its own. (One alone may start the grader's worker; the same samples again would be graded from a cache.)
    """
    runs = []
    for i in range(REPEATS):
        attempts = []

        def step(attempts=attempts, seed=f"profile/split/{i}") -> None:
            attempts += train.roll_out(policy, examples, config, config.train.generation_temperature, seed)
            train.improve(policy, optimizer, attempts, 2, config)

        runs.append((*split_step(train, policy, optimizer, step), attempts))
    seconds, tokens, attempts = sorted(runs, key=lambda run: sum(run[0].values()))[REPEATS // 2]
    tflops, terabytes = next((figures for name, figures in CARDS.items() if name in card), (None, None))
    limits = least_seconds(policy, attempts, tokens, tflops, terabytes) if tflops else {}
    total = sum(seconds.values())
    print(f"\nWhere it goes: the median of {REPEATS} more, the device waited for around each part, so a little slower")
    for part in [*(part for part in seconds if part != "the rest"), "the rest"]:
        limit = f"   limit {limits[part]:.3f} s" if part in limits else ""
        print(f"  {part:<18} {seconds[part]:>9.3f} s {seconds[part] / total:>5.0%}{limit}")
    print(f"  {'step':<18} {total:>9.3f} s")
    if limits:
        print(
            f"Limits: matrix products at {tflops} TFLOP/s (attention's own left out), in token steps weights and K/V "
            f"read at {terabytes} TB/s"
        )


KINDS = (
    "unanswered -> correct", "wrong -> correct", "correct -> unanswered", "correct -> wrong", "wrong, repeated",
    "wrong, another wrong answer", "wrong -> unanswered", "unanswered -> wrong", "still unanswered", "still correct",
    "copied, wrong", "copied, unanswered", "copied, correct",
)  # fmt: skip
KINDS_WITHOUT_ANSWERS = ("corrected (i->c)", "broken (c->i)", "changed, still wrong", "changed, still right", "copied")


def kind_of(row: dict) -> str:
    """What became of a pair, one of `KINDS`; "copied" is word for word, "repeated" the same answer in other words."""
    from reward_function import answers_match, outcomes

    before, after = outcomes(*([row[f"{key}_attempt{n}"] for n in (1, 2)] for key in ("correct", "answer")))
    if before != after:
        return f"{before} -> {after}"
    if row["text_attempt1"] == row["text_attempt2"]:
        return f"copied, {after}"
    if after != "wrong":
        return f"still {after}"
    same = answers_match(row["answer_attempt1"], row["answer_attempt2"])
    return "wrong, repeated" if same else "wrong, another wrong answer"


def kind_without_answers(row: dict) -> str:
    before, after = row["correct_attempt1"], row["correct_attempt2"]
    if before != after:
        return "corrected (i->c)" if after else "broken (c->i)"
    if row["text_attempt1"] == row["text_attempt2"]:
        return "copied"
    return "changed, still right" if after else "changed, still wrong"


def extractor_of(folder: Path):
    """The run's answer extractor if it is a shipped one, else None."""
    import yaml

    from reward_function import ANSWER_EXTRACTORS

    with suppress(OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return ANSWER_EXTRACTORS[yaml.safe_load((folder / "config.yaml").read_text())["reward"]["answer_extractor"]]
    return None


def find_answers(row: dict, extract) -> bool:
    """Are both answers in the row? Where an older version left none, they are extracted and added."""
    from reward_function import given_answer

    for n in (1, 2):
        if f"answer_attempt{n}" not in row and extract:
            row[f"answer_attempt{n}"] = given_answer(row[f"text_attempt{n}"], row.get(f"truncated_attempt{n}"), extract)
    return {"answer_attempt1", "answer_attempt2"} <= row.keys()


def show_samples(folder: Path, checkpoint: str | None, most: int) -> int:
    """Prints the evaluated pairs of a run by kind: how many of each, then some side by side with a word diff."""
    try:
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        print(f"--samples {folder}: samples.jsonl cannot be read: {error.strerror}", file=sys.stderr)
        return 2
    evaluated: dict[str, list[dict]] = {}
    for line in lines:
        with suppress(ValueError):  # a line that a kill cut short
            row = json.loads(line)
            if row["event"] == "eval" and "eval_only" not in row:
                evaluated.setdefault(row["checkpoint"], []).append(row)
    if not evaluated or (checkpoint and checkpoint not in evaluated):
        known = ", ".join(evaluated) or "nothing yet"
        wanted = f"evaluation {checkpoint}" if checkpoint else "evaluation"
        print(f"--samples {folder}: no {wanted}; evaluated: {known}", file=sys.stderr)
        return 2
    checkpoint = checkpoint or list(evaluated)[-1]
    rows = evaluated[checkpoint]
    extract = extractor_of(folder)
    answered = all([find_answers(row, extract) for row in rows])
    kinds: dict[str, list[dict]] = {kind: [] for kind in (KINDS if answered else KINDS_WITHOUT_ANSWERS)}
    for row in rows:
        kinds[kind_of(row) if answered else kind_without_answers(row)].append(row)
    print(f"{folder}, {checkpoint}: {len(rows)} rows")
    for kind, members in kinds.items():
        print(f"{len(members):>6}  {kind}")
    pretrain, rng = evaluated.get("pretrain", []), random.Random(0)
    if checkpoint != "pretrain" and [row["question"] for row in pretrain] == [row["question"] for row in rows]:
        gains = [b["correct_attempt2"] - a["correct_attempt1"] for a, b in zip(pretrain, rows, strict=True)]
        means = sorted(statistics.fmean(rng.choices(gains, k=len(gains))) for _ in range(2000))
        print(
            f"attempt 2 here minus attempt 1 before training: {statistics.fmean(gains):+.3f} "
            f"(95% interval {means[50]:+.3f} to {means[1949]:+.3f}, bootstrap over rows)"
        )
    for kind, members in kinds.items():
        for row in members[:most]:
            print(f"\n=== {kind}: target {row['target'].splitlines()[-1][-60:]!r}\n{row['question'].strip()}")
            print(side_by_side(row["text_attempt1"], row["text_attempt2"]))
    return 0


def side_by_side(first: str, second: str) -> str:
    """Two texts in two columns; words that only one of them has stand in [-...-] and {+...+}."""
    a, b = (text.replace("\n", " \n ").split(" ") for text in (first, second))
    marked: tuple[list[str], list[str]] = [], []
    for change, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for words, column, marks in ((a[a0:a1], marked[0], "[-{}-]"), (b[b0:b1], marked[1], "{{+{}+}}")):
            column += [w if change == "equal" or not w.strip() else marks.format(w) for w in words]
    width = max(20, (shutil.get_terminal_size((120, 0)).columns - 3) // 2)
    columns = [
        [part for line in " ".join(words).split("\n") for part in textwrap.wrap(line, width) or [""]]
        for words in marked
    ]
    return "\n".join(f"{left:<{width}} | {right}" for left, right in zip_longest(*columns, fillvalue=""))


def ask(folder: Path, questions: list[str], adapter: Path | None, overrides: list[str]) -> int:
    """Puts questions to a run's adapter: those given, else those typed in one after the other, till an empty line."""
    import train

    try:
        if not folder.is_dir():
            raise train.UserError(f"--ask {folder}: no such folder; give a run's, such as outputs/NAME")
        file = str(folder / "config.yaml")
        config = train.read_config(file, overrides)
        adapter = adapter or train.newest_checkpoint(folder)
        if not adapter:
            raise train.UserError(f"--ask {folder}: no adapter has been saved yet; give one with --adapter DIR")
        # The base model may lie elsewhere now; that it is another would show in the shapes of its weights.
        others = [override for override in overrides if not override.startswith("model.name=")]
        train.check_adapter(adapter, train.read_config(file, others))
        tokenizer = train.load_tokenizer(config)
        policy = train.load_policy(config, tokenizer, adapter)
        print(f"{config.model.name} with {adapter}", flush=True)
        for number, question in enumerate(questions):
            answer(train, policy, config, question, f"ask/{number}")
    except train.UserError as error:
        print(str(error).replace("--resume-adapter", "--adapter").replace("--config", "--ask"), file=sys.stderr)
        return 2
    while not questions:
        try:
            question = input("\nQuestion (an empty line ends): ").strip()
        except (EOFError, KeyboardInterrupt):
            question = ""
        if not question:
            print()
            break
        try:
            answer(train, policy, config, question, "ask")
        except train.UserError as error:  # too long; the next one may not be
            print(error, file=sys.stderr)
    return 0


def answer(train, policy, config, question: str, seed: str) -> None:
    """Prints both attempts at a question, as an evaluation would sample them. Raises UserError where it is too long."""
    examples = train.encode_rows([(question, "")], "asked", config, policy.tokenizer)
    attempts = train.roll_out(policy, examples, config, config.eval.generation_temperature, seed)
    print(f"\n=== question\n{question}")
    for number, attempt in enumerate(attempts, 1):
        if number == 2:
            print(f"=== correction prompt\n{config.prompts.self_correction.strip()}")
        cut = ", cut off by the budget" if attempt.truncated[0] else ""
        print(f"=== attempt {number} ({len(attempt.completions[0])} tokens{cut})\n{attempt.texts[0].strip()}")
    first, second = (attempt.texts[0].strip() for attempt in attempts)
    print("=== what changed\n" + ("nothing" if first == second else side_by_side(first, second)))
    tokens = sum(len(attempt.completions[0]) for attempt in attempts)
    seconds = sum(attempt.seconds for attempt in attempts)
    print(f"=== {tokens} tokens in {seconds:.2f} s: {tokens / seconds:,.0f} tokens/s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="the config to measure")
    parser.add_argument("--samples", type=Path, metavar="RUN_DIR", help="print a run's corrections instead")
    parser.add_argument("--checkpoint", help="with --samples: pretrain, stage1 or stage2; the last one if not given")
    parser.add_argument("--ask", type=Path, metavar="RUN_DIR", help="put questions to a run's last adapter instead")
    parser.add_argument("question", nargs="*", help="with --ask; without one they are typed in")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="with --ask: any other saved adapter")
    parser.add_argument("--show", type=int, default=3, help="with --samples: pairs of each kind")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY.SUB=VALUE", help="override keys")
    parser.add_argument("--n", type=int, default=32, help="problems of one optimizer step")
    parser.add_argument("--compare", action="store_true", help="time model.generate too, also with a static cache")
    parser.add_argument("--decode", type=int, nargs="+", metavar="ROWS", help="time decoding alone at these batches")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens a row for --decode")
    args = parser.parse_args()
    if args.samples:
        return show_samples(args.samples, args.checkpoint, args.show)
    if args.ask:
        return ask(args.ask, args.question, args.adapter, args.set)
    if args.question or args.adapter:
        parser.error("questions and --adapter go with --ask RUN_DIR")
    if not args.config:
        parser.error("--config FILE is needed, or --samples RUN_DIR, or --ask RUN_DIR")
    if args.n < 2 or args.tokens < 1 or min(args.decode or [1]) < 1:
        parser.error("--n: needs at least 2 problems; --decode and --tokens at least 1")

    import train

    try:
        config = train.read_config(args.config, args.set)
        tokenizer = train.load_tokenizer(config)
        pool, test = train.load_examples(config, tokenizer)
        longest = max(len(example.prompt) for example in pool + test)
        loading, policy = timed(train, lambda: train.load_policy(config, tokenizer))
    except train.UserError as error:
        print(error, file=sys.stderr)
        return 2
    import torch

    card = torch.cuda.get_device_name() if train.DEVICE.type == "cuda" else train.DEVICE.type
    examples = pool[: args.n]
    print(
        f"{config.model.name} on {card}, loaded in {loading:.1f} s; {len(examples)} problems x "
        f"{config.train.num_generations} rollouts\n"
    )
    examples = [example for example in examples for _ in range(config.train.num_generations)]
    name = "vLLM" if policy.engine else "built-in decoder" if policy.decoder else "generate, as loaded"
    if args.decode:
        print(f"Decoding {args.tokens} tokens a row, prefill included, EOS ignored; medians of {REPEATS}")
        time_decoding(train, policy, pool, args.decode, args.tokens, name)
        if args.compare and policy.decoder:
            decoder, policy.decoder = policy.decoder, None
            time_decoding(train, policy, pool, args.decode, args.tokens, "generate, as loaded")
            policy.decoder = decoder
        print("\nOne Stage II step: both attempts at the config's budgets, EOS respected")
    rollout, attempts = time_rollout(train, policy, examples, config, name)
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=0.0, weight_decay=0.0)
    first, _ = timed(train, lambda: train.improve(policy, optimizer, attempts, 2, config))
    peak_memory(train)
    updates = [timed(train, lambda: train.improve(policy, optimizer, attempts, 2, config))[0] for _ in range(REPEATS)]
    update, total = statistics.median(updates), rollout + statistics.median(updates)
    tokens = sum(len(p) + len(c) for p, c in zip(attempts[-1].prompts, attempts[-1].completions, strict=True))
    print(
        f"{'update, both attempts and the reference':<42} {len(examples):>5} rows {tokens / update:>9,.0f} tokens/s "
        f"{update:>31.2f} s (first {first:.2f} s) {peak_memory(train):>7.2f} GiB"
    )
    print(f"one Stage II step: {total:.2f} s, rollout {rollout / total:.0%}, update {update / total:.0%}")
    print_split(train, policy, optimizer, examples, config, card)
    if args.compare and policy.engine:  # last: the decoder moves the weights, so that there are two copies of them
        reason = train.why_not_decodable(policy.model)
        if reason:
            print(f"built-in decoder: does not run here: {reason}")
        else:
            policy.engine, policy.decoder = None, train.Decoder(policy.model, policy.eos_token_ids, policy.pad_token_id)
            if args.decode:
                time_decoding(train, policy, pool, args.decode, args.tokens, "built-in decoder")
            time_rollout(train, policy, examples, config, "built-in decoder")
    elif args.compare:
        if policy.decoder:
            policy.decoder.release()
            policy.decoder = None
            peer, _ = time_rollout(train, policy, examples, config, "generate, as loaded")
            print(f"the same step with it: {peer + update:.2f} s, {(peer + update) / total:.1f} times as long")
        compare_static_cache(train, policy, examples, config)
    report_lengths(attempts, policy, config, longest)
    return 0


if __name__ == "__main__":
    from reward_function import RewardError

    try:
        sys.exit(main())
    except RewardError as error:
        print(f"reward.fn: {error}", file=sys.stderr)
        sys.exit(2)
