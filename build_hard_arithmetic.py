#!/usr/bin/env python3
"""Builds a hard arithmetic task for one model: makes problems, has the model answer greedily, keeps its failures.

    python build_hard_arithmetic.py --config configs/arithmetic.yaml --digits 5 --n-train 200 --n-eval 50 --out hard

"Hard" is relative to the model, the prompts and the extractor of the config: the result is a shake-out task for the
training loop, not a benchmark. The folder is a DatasetDict with the columns question and answer, which `dataset.name`
loads. No problem occurs twice, in one split or in both.
"""

from __future__ import annotations

import argparse
import operator
import random
import sys
from pathlib import Path

OPERATIONS = {
    "addition": ("+", operator.add),
    "subtraction": ("-", operator.sub),
    "multiplication": ("*", operator.mul),
}


def make_problems(count: int, operation: str, digits: int, seed: int) -> list[dict[str, str]]:
    """`count` different problems of two `digits`-digit numbers: {"question": "60494 - 65125 = ?", "answer": "-4631"}.

    Raises ValueError when there are not that many."""
    low, high = 10 ** (digits - 1), 10**digits
    if count > (high - low) ** 2:
        raise ValueError(f"--pool {count}: there are only {(high - low) ** 2} problems of {digits} digits")
    sign, compute = OPERATIONS[operation]
    rng, pairs = random.Random(seed), {}
    while len(pairs) < count:  # a dict keeps the order and drops repetitions
        pairs[rng.randrange(low, high), rng.randrange(low, high)] = None
    return [{"question": f"{a} {sign} {b} = ?", "answer": str(compute(a, b))} for a, b in pairs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/arithmetic.yaml", help="its model, prompts, extractor and budgets")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY.SUB=VALUE", help="override keys")
    parser.add_argument("--model", help="model to find failures of; the config's by default")
    parser.add_argument("--operation", choices=sorted(OPERATIONS), default="subtraction")
    parser.add_argument("--digits", type=int, default=5)
    parser.add_argument("--n-train", type=int, default=200)
    parser.add_argument("--n-eval", type=int, default=50)
    parser.add_argument("--pool", type=int, default=1000, help="how many problems to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="also push the dataset to the hub")
    args = parser.parse_args()
    for flag in ("digits", "n_train", "n_eval", "pool"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')}: must be at least 1")

    import datasets

    import train

    overrides = [*args.set, "dataset.input_field=question", "dataset.target_field=answer"]
    overrides += [f"model.name={args.model}"] if args.model else []
    try:
        config = train.read_config(args.config, overrides)
        problems = make_problems(args.pool, args.operation, args.digits, args.seed)
        Path(args.out).mkdir(parents=True, exist_ok=True)  # a place that cannot be written costs no decoding
        tokenizer = train.load_tokenizer(config)
        rows = [(problem["question"], problem["answer"]) for problem in problems]
        examples = train.encode_rows(rows, "pool", config, tokenizer)
        policy = train.load_policy(config, tokenizer)
        failures = find_failures(policy, examples, config, args.n_train + args.n_eval)
    except OSError as error:
        print(f"--out {args.out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    except (train.UserError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    wanted = args.n_train + args.n_eval
    if len(failures) < wanted:
        rate = max(len(failures), 1) / len(examples)
        print(
            f"--pool {args.pool}: {config.model.name} failed on {len(failures)} of {len(examples)} problems, and "
            f"{wanted} are asked for; try --pool {round(1.1 * wanted / rate)}, more --digits, or fewer rows",
            file=sys.stderr,
        )
        return 2
    rows = [{"question": example.question, "answer": example.target} for example in failures]
    splits = {"train": rows[: args.n_train], "test": rows[args.n_train : wanted]}
    dataset = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in splits.items()})
    dataset.save_to_disk(args.out)
    print(f"{args.out}: {args.n_train} train and {args.n_eval} test problems that {config.model.name} fails greedily")
    if args.push_to_hub:
        dataset.push_to_hub(args.push_to_hub)
    return 0


def find_failures(policy, examples: list, config, enough: int) -> list:
    """The examples whose greedy first attempt is wrong, in order, stopping once there are `enough`."""
    import train

    failures, tried, size = [], 0, config.eval.batch_size
    while tried < len(examples) and len(failures) < enough:
        batch = examples[tried : tried + size]
        prompts = [example.prompt for example in batch]
        attempt = train.make_attempt(policy, prompts, batch, config, 0.0, "greedy")
        failures += [example for example, right in zip(batch, attempt.correct, strict=True) if not right]
        tried += len(batch)
        print(f"{len(failures)} failures in {tried} problems", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
