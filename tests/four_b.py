"""Memory and seconds of a 4B model at a config's full budgets: a Qwen3-4B of random weights has the real ones.

    python tests/four_b.py --tokenizer DIR --set dataset.name=DIR [--config configs/math.yaml] [--rows 32] [--only ...]

Cases: bf16 or 4-bit base weights, on the whole card or held to 24 GB. In each, for both stages, an update at the worst
case (every row as long as the budgets allow) and at a usual one (prompt 150, attempts 400), and a rollout at full
budgets (no EOS). `extras`: the graph decoder beside model.generate and the trainer's log-probs; train.importance_clip.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
CASES = ("bf16", "4bit", "bf16-24gb", "4bit-24gb", "extras")


def build(folder: Path, tokenizer: Path, small: bool) -> None:
    """Writes the model: Qwen3-4B's shape, normal weights of standard deviation 0.02, bf16."""
    import torch
    import transformers

    shape = (
        dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=16,
            num_key_value_heads=2,
        )
        if small
        else dict(
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            head_dim=128,
            num_key_value_heads=8,
        )
    )
    config = transformers.Qwen3Config(
        vocab_size=151936,
        max_position_embeddings=262144,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        **shape,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "vocab", "merges", "special")):
            shutil.copy(file, folder / file.name)


def conversations(train, policy, lengths: tuple[int, int, int], rows: int) -> list:
    """[attempt 1, attempt 2] of random tokens: prompt 1, attempt 1 and attempt 2 as long as `lengths` say."""
    rng, most = random.Random(0), len(policy.tokenizer) - 1
    draw = lambda length: [[rng.randrange(most) for _ in range(length)] for _ in range(rows)]  # noqa: E731
    prompts, attempts = draw(lengths[0]), []
    for length in lengths[1:]:
        answers = draw(length)
        attempts.append(
            train.Attempt(
                prompts=prompts,
                completions=answers,
                texts=[""] * rows,
                answers=[""] * rows,
                correct=[False] * rows,
                rewards=[rng.random() for _ in range(rows)],
                flexible=[False] * rows,
                truncated=[True] * rows,
                sampled_log_probs=None,
                seconds=1.0,
            )
        )
        prompts = [p + a + policy.bridge for p, a in zip(prompts, answers, strict=True)]
    return attempts


def measured(label: str, policy, work) -> dict:
    """Prints and returns seconds and peak memory of work(), or the reason why it did not end."""
    import torch

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start, reason = time.perf_counter(), ""
    try:
        work()
    except Exception as error:  # what does not fit is a result
        reason = str(error).splitlines()[0][:150]
    if gpu:
        torch.cuda.synchronize()
    row = {
        "what": label,
        "seconds": round(time.perf_counter() - start, 2),
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else 0.0,
        "micro-batch": policy.micro_tokens if policy else "",
        "checkpointing": "" if policy is None else "off" if policy.recompute else "on",
        "failed": reason,
    }
    print("ROW " + json.dumps(row), flush=True)
    return row


def measure(args: argparse.Namespace, case: str) -> None:
    """One case, in a process of its own."""
    import torch

    import train

    if case.endswith("24gb"):
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(24e9 / whole)
    changes = [f"model.name={args.folder}", f"model.load_in_4bit={str(case.startswith('4bit')).lower()}", *args.set]
    if case == "extras":
        changes += ["train.importance_clip=2", "train.max_new_tokens_attempt1=64", "train.max_new_tokens_attempt2=64"]
    config = train.read_config(args.config, changes)
    tokenizer = train.load_tokenizer(config)
    examples, _ = train.load_examples(config, tokenizer)
    held = []
    measured("load", None, lambda: held.append(train.load_policy(config, tokenizer)))
    policy, keys = held[0], config.train
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=1e-6, weight_decay=0.0)
    rows = args.rows or keys.stage2_batch_size * keys.num_generations
    if case == "extras":
        return extras(train, policy, optimizer, config, examples[: min(rows, 16)])
    worst = (keys.max_prompt_length_attempt1, keys.max_new_tokens_attempt1, keys.max_new_tokens_attempt2)
    for name, lengths in (("usual", tuple(map(min, worst, (150, 400, 400)))), ("worst", worst)):
        attempts = conversations(train, policy, lengths, rows)
        for stage in (1, 2):
            measured(
                f"update, Stage {'I' * stage}, {name}, {rows} rows",
                policy,
                lambda a=attempts, s=stage: train.improve(policy, optimizer, a, s, config),
            )
    if policy.decoder:
        policy.decoder.eos.fill_(-1)
    policy.eos_token_ids = []
    measured(
        f"rollout, full budgets, {rows} rows",
        policy,
        lambda: train.roll_out(policy, examples[:rows], config, 1.0, "four_b"),
    )
    return None


def extras(train, policy, optimizer, config, examples: list) -> None:
    """The decoder against generate and the trainer (Qwen3's q and k norms), and five steps with importance_clip."""
    import torch

    prompts = [example.prompt for example in examples[:8]]
    mine, log_probs = train.sample(policy, prompts, 64, 0.0, "greedy")
    with torch.no_grad():
        trained = train.completion_log_probs(policy, prompts, mine, 1.0).cpu()
    drift = (
        (trained - torch.tensor([p for row in log_probs or [] for p in row])).abs().mean().item() if log_probs else 0
    )
    decoder, policy.decoder = policy.decoder, None
    theirs, _ = train.sample(policy, prompts, 64, 0.0, "greedy")
    policy.decoder = decoder
    same = sum(sum(a == b for a, b in zip(x, y, strict=False)) for x, y in zip(mine, theirs, strict=True))
    equal = sum(x == y for x, y in zip(mine, theirs, strict=True))
    what = f"decoder and generate, greedy: {equal} of 8 rows, {same} of {sum(map(len, theirs))} tokens equal; "
    print("ROW " + json.dumps({"what": f"{what}mean log-prob difference to the trainer {drift:.4f}"}), flush=True)
    rng = random.Random(0)  # a random model earns nothing: rewards are drawn
    for step in range(5):
        attempts, found = train.roll_out(policy, examples, config, 1.0, f"clip/{step}"), []
        for attempt in attempts:
            attempt.rewards = [rng.random() for _ in attempt.rewards]
        row = measured(
            f"importance_clip 2, step {step + 1}",
            policy,
            lambda a=attempts, f=found: f.append(train.improve(policy, optimizer, a, 2, config)),
        )
        if found:
            print(f"{row['what']}: loss {found[0]['loss']:.4f}, drift {found[0]['logprob_drift']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/math.yaml")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder of a Qwen tokenizer with a chat template"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "random-4b", help="the model goes here"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY.SUB=VALUE")
    parser.add_argument("--rows", type=int, help="rows of a step; the config's if not given")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--limit", type=int, default=300, help="seconds for each case")
    parser.add_argument("--out", type=Path, help="the table as a file too")
    parser.add_argument("--small", action="store_true", help="a tiny model: does the script work?")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return measure(args, args.child)
    if not (args.folder / "config.json").exists():
        build(args.folder, args.tokenizer, args.small)
    columns = ("seconds", "peak GiB", "micro-batch", "checkpointing", "failed")
    lines = [f"| case | what | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for case in args.only:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", case]
        try:
            done = subprocess.run(
                command, text=True, timeout=args.limit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
            ).stdout
        except subprocess.TimeoutExpired as error:
            done = (error.stdout or b"").decode() + f'\nROW {{"what": "not done in {args.limit} s"}}'
        rows = [json.loads(line[4:]) for line in done.splitlines() if line.startswith("ROW ")]
        print(done if not rows else "\n".join(line for line in done.splitlines() if "importance" in line), flush=True)
        lines += [
            f"| {case} | {row['what']} | {' | '.join(str(row.get(column, '')) for column in columns)} |"
            for row in rows
        ]
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return None


if __name__ == "__main__":
    main()
