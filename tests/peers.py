"""One optimizer step beside what else trains the same model on the same card: seconds, tokens/s, memory, start-up.

    python tests/peers.py --config configs/gsm8k.yaml [--only ours ours-two trl trl-vllm] [--steps 5] [--set key=value]

ours       attempt 1 alone, sampled and trained: the work of TRL's GRPOTrainer
ours-two   the two-attempt Stage II step
trl        TRL's GRPOTrainer over an Unsloth model, rollouts by its generate (without a GPU: over transformers + PEFT)
trl-vllm   the same with Unsloth's vLLM engine

Each in a process of its own, one after the other: same prompts, model, LoRA, rollouts a step, token budget, KL weight
and learning rate, all from the config. A peer that fails or takes longer than --limit seconds leaves its reason there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

STARTED = time.time()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PEERS = ("ours", "ours-two", "trl", "trl-vllm")


class Watch:
    """Times steps and counts their completion tokens; the highest use of the card's memory."""

    def __init__(self) -> None:
        self.startup, self.seconds, self.tokens, self.used, self.begun = None, [], [], 0.0, 0.0

    def begin(self) -> None:
        self.begun = time.time()
        self.startup = self.startup or self.begun - STARTED
        self.tokens.append(0)

    def end(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            self.used = max(self.used, (total - free) / 2**30)
        self.seconds.append(time.time() - self.begun)

    def figures(self) -> dict:
        import torch

        rates = [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        return {
            "s/step": statistics.median(self.seconds[1:]),
            "tokens/s": statistics.median(rates[1:]),
            "first step": self.seconds[0],
            "start-up": self.startup,
            "peak GiB": peak,
            "card GiB": self.used,
            "tokens a step": statistics.median(self.tokens[1:]),
        }


def read(args: argparse.Namespace) -> tuple:
    """train.py as a module, the config, its tokenizer, and the train rows of each step."""
    import train

    config = train.read_config(args.config, args.set)
    tokenizer = train.load_tokenizer(config)
    examples, _ = train.load_examples(config, tokenizer)
    size = config.train.stage2_batch_size
    return train, config, tokenizer, [examples[i * size : (i + 1) * size] for i in range(args.steps)]


def run_ours(args: argparse.Namespace, attempts: int) -> dict:
    """Our step, with one attempt or two."""
    train, config, tokenizer, steps = read(args)
    import torch

    policy, watch = train.load_policy(config, tokenizer), Watch()
    if attempts == 1:
        train.stage_terms = lambda stage, r1, r2, keys: [(r1, keys.beta1)]
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=config.train.learning_rate, weight_decay=0.0)
    for number, examples in enumerate(steps):
        rows = [example for example in examples for _ in range(config.train.num_generations)]
        watch.begin()
        made = train.roll_out(policy, rows, config, config.train.generation_temperature, f"peers/{number}", attempts)
        train.improve(policy, optimizer, [made[0], made[-1]], 2, config)
        watch.end()
        watch.tokens[-1] = sum(len(completion) for attempt in made for completion in attempt.completions)
    return watch.figures()


def run_trl(args: argparse.Namespace, vllm: bool) -> dict:
    """TRL's GRPOTrainer on attempt 1's prompts, rewarded as `reward.fn` says."""
    train, config, tokenizer, steps = read(args)
    import datasets
    import torch
    import transformers

    keys, gpu, watch = config.train, torch.cuda.is_available(), Watch()
    examples = [example for step in steps for example in step]
    target_of = {example.question: example.target for example in examples}
    if gpu:
        from unsloth import FastLanguageModel

        more = (
            dict(
                fast_inference=True,
                gpu_memory_utilization=config.model.fast_inference_gpu_mem,
                max_lora_rank=config.model.lora.r,
            )
            if vllm
            else {}
        )
        model, _ = FastLanguageModel.from_pretrained(
            config.model.name,
            max_seq_length=config.model.max_seq_length,
            dtype=torch.bfloat16,
            load_in_4bit=config.model.load_in_4bit,
            use_exact_model_name=True,
            **more,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            **train.lora_settings(config),
            random_state=keys.seed,
            use_gradient_checkpointing=config.model.gradient_checkpointing not in (False, "auto"),
        )
    else:
        model = train.load_policy(config, tokenizer).model
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list, question: list[str], completion_ids: list, **_: object) -> list[float]:
        watch.tokens[-1] += sum(map(len, completion_ids))
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return train.grade(texts, [target_of[q] for q in question], config.reward)[0]

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            watch.begin()

        def on_step_end(self, *_: object, **__: object) -> None:
            watch.end()

    rollouts = keys.stage2_batch_size * keys.num_generations
    settings = GRPOConfig(
        output_dir="peers",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=args.steps,
        per_device_train_batch_size=rollouts,
        gradient_accumulation_steps=1,
        num_generations=keys.num_generations,
        max_completion_length=keys.max_new_tokens_attempt1,
        num_iterations=1,
        temperature=keys.generation_temperature,
        top_p=1.0,
        beta=keys.beta1,
        learning_rate=keys.learning_rate,
        max_grad_norm=keys.max_grad_norm,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        bf16=gpu,
        use_vllm=vllm,
        use_cpu=not gpu,
        gradient_checkpointing=False,
        seed=keys.seed,
        **(dict(vllm_mode="colocate") if vllm else {}),
    )
    rows = [{"prompt": tokenizer.decode(e.prompt), "question": e.question} for e in examples]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[Steps()],
    )
    trainer.train()
    return watch.figures()


def run_child(args: argparse.Namespace) -> None:
    name = args.child
    figures = (
        run_ours(args, 2 if name == "ours-two" else 1) if name.startswith("ours") else run_trl(args, "vllm" in name)
    )
    print("FIGURES " + json.dumps(figures), flush=True)


def ask_child(name: str, limit: int) -> dict:
    """The figures of one peer, or the reason why there are none."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--child", name],
            text=True,
            timeout=limit,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"not done in {limit} s"}
    lines = done.stdout.strip().splitlines() or ["no output"]
    found = [line for line in lines if line.startswith("FIGURES ")]
    if not found:
        print("\n".join(lines[-30:]), file=sys.stderr)
    return json.loads(found[-1][8:]) if found else {"reason": lines[-1][:200]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY.SUB=VALUE")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--steps", type=int, default=5, help="the first is not in the medians")
    parser.add_argument("--limit", type=int, default=600, help="seconds for each peer")
    parser.add_argument("--out", type=Path, help="the table as a file too")
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_child(args)
    packages = ("torch", "transformers", "trl", "unsloth", "vllm")
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    versions = ", ".join(f"{package} {found[package]}" for package in packages if package in found)
    columns = ("s/step", "tokens/s", "tokens a step", "peak GiB", "card GiB", "start-up", "first step")
    lines = [versions, "", f"| peer | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in args.only:
        figures = ask_child(name, args.limit)
        shown = ["-" if figures.get(c) is None else f"{figures[c]:,.2f}" for c in columns]
        lines.append(
            f"| {name} | {figures['reason'] + ' |' * len(columns) if 'reason' in figures else ' | '.join(shown) + ' |'}"
        )
        print(lines[-1], flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    return None


if __name__ == "__main__":
    main()
