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
from typing import Any

OPERATIONS = {
    "addition": ("+", operator.add),
    "subtraction": ("-", operator.sub),
    "multiplication": ("*", operator.mul),
}


def pairs_of(digits: int) -> int:
    """How many problems of two numbers with so many digits there are."""
    return (9 * 10 ** (digits - 1)) ** 2


def make_problems(count: int, operation: str, digits: int, seed: int) -> list[tuple[str, str]]:
    """`count` different problems of two `digits`-digit numbers, each as ("60494 - 65125 = ?", "-4631")."""
    sign, compute = OPERATIONS[operation]
    rng, pairs = random.Random(seed), {}
    while len(pairs) < count:  # a dict keeps the order and drops repetitions
        a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        pairs[a, b] = f"{a} {sign} {b} = ?", str(compute(a, b))
    return list(pairs.values())


def find_failures(train: Any, policy: Any, examples: list, config: Any, enough: int) -> list:
    """The examples whose greedy first attempt is wrong, in order, until there are `enough`."""
    failures, size = [], config.eval.batch_size
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        turns = train.take_turns(policy, batch, config, 0.0, "greedy", [])
        failures += [example for example, turn in zip(batch, turns, strict=True) if not turn.correct]
        print(f"{len(failures)} failures in {start + len(batch)} problems", flush=True)
        if len(failures) >= enough:
            break
    return failures[:enough]


def build(train: Any, args: argparse.Namespace) -> tuple[list, str]:
    """The failures, n_train + n_eval of them, and the model's name. Raises UserError where there are not as many."""
    # The reward plays no part, and one in TRL's form would ask for columns that these problems lack.
    overrides = [*args.set, "reward.fn=exact_match", "reward.weights=null"]
    config = train.read_config(args.config, overrides + [f"model.name={args.model}"] * bool(args.model))
    wanted, most = args.n_train + args.n_eval, pairs_of(args.digits)
    if not wanted <= args.pool <= most:
        raise train.UserError(
            f"--pool {args.pool}: must be {wanted} (the rows) to {most} (all of {args.digits} digits)"
        )
    problems = make_problems(args.pool, args.operation, args.digits, args.seed)
    reader = train.answer_reader(config.reward.answer_extractor, config.reward.match)
    tokenizer = train.load_tokenizer(config)
    examples = [train.read_row(*problem, reader, config, tokenizer) for problem in problems]
    failures = find_failures(train, train.load_policy(config, tokenizer), examples, config, wanted)
    if len(failures) < wanted:
        pool = round(1.1 * wanted * len(examples) / max(1, len(failures)))
        advice = f"try --pool {pool}, more --digits" if pool <= most else "try more --digits"
        failed = f"{config.model.name} fails on {len(failures)} of {len(examples)} problems"
        raise train.UserError(f"--pool {args.pool}: {failed}, and {wanted} are asked for; {advice}, or fewer rows")
    return failures, config.model.name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{message}\n")  # argparse's own prints the usage too
    parser.add_argument("--config", default="configs/arithmetic.yaml", help="its model, prompts, extractor and budgets")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY.SUB=VALUE", help="override keys")
    parser.add_argument("--model", help="model to find failures of; the config's by default")
    parser.add_argument("--operation", choices=sorted(OPERATIONS), default="subtraction")
    parser.add_argument("--digits", type=int, default=5)
    parser.add_argument("--n-train", type=int, default=200)
    parser.add_argument("--n-eval", type=int, default=50)
    parser.add_argument("--pool", type=int, default=1000, help="how many problems to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="also push the dataset to the hub")
    args = parser.parse_args(argv)
    if (args.out / "dataset_dict.json").exists():
        parser.error(f"--out {args.out}: holds a data set; give another folder, or delete that one")
    for flag in ("digits", "n_train", "n_eval", "pool"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')}: must be at least 1")
    if args.digits > 2000:
        parser.error("--digits: at most 2000, as Python writes no product of over 4,300 digits")

    import train

    try:
        args.out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written costs no decoding
        failures, model = build(train, args)
        rows = [{"question": example.question, "answer": example.target} for example in failures]
        splits = {"train": rows[: args.n_train], "test": rows[args.n_train :]}
        made = {name: train.datasets.Dataset.from_list(part) for name, part in splits.items()}
        dataset = train.datasets.DatasetDict(made)
        dataset.save_to_disk(args.out)
    except OSError as error:
        print(f"--out {args.out}: cannot be written: {train.first_line(error)}", file=sys.stderr)
        return 2
    except (train.UserError, train.RewardError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.out}: {args.n_train} train and {args.n_eval} test problems that {model} fails greedily")
    if args.push_to_hub:
        dataset.push_to_hub(args.push_to_hub)
    return 0


if __name__ == "__main__":
    sys.exit(main())
