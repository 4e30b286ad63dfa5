#!/usr/bin/env python3
"""Looks at a config before it is run, and at a run after it.

    python profile_run.py --config configs/gsm8k.yaml --n 64            # answers, lengths, budgets; then one step
    python profile_run.py --config outputs/score-gsm8k/config.yaml --adapter outputs/score-gsm8k/stage2 --votes 4
    python profile_run.py --samples outputs/score-gsm8k                 # a run's corrections by kind, side by side
    python profile_run.py --ask outputs/score-gsm8k "A pen costs 3 dollars. What do 7 cost?"    # both attempts at it

Nothing is trained: the step's learning rate is 0. The reports that train.py writes into a run's folder come first here.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import json
import math
import netrc
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlparse

import yaml

from reward_function import MATCH_FNS, answer_reader, correction_split, load_reward_module, outcome

# ---------------------------------------------------------------------------------------------------------- reports
RESULTS = {"Acc@t1": "acc_attempt1", "Acc@t2": "acc_attempt2", "delta": "delta", "95%": "delta_interval",
           "i->c": "delta_i_to_c", "c->i": "delta_c_to_i", "unanswered->c": "unanswered_to_correct",
           "wrong->c": "wrong_to_correct", "c->wrong": "correct_to_wrong", "mended": "wrong_mended",
           "repeated": "wrong_repeated", "edit distance": "edit_distance_ratio", "n": "n"}  # fmt: skip
DETAILS = {f"{title} {n}": f"{key}_attempt{n}" for title, key in {
           "reward": "reward", "flexible": "flexible_acc", "unanswered": "unanswered", "cut off": "truncated",
           "tokens": "completion_tokens"}.items() for n in (1, 2)}  # fmt: skip
MEANINGS = """\
Acc@t1, Acc@t2: share of rows whose first, second attempt is correct; delta: Acc@t2 - Acc@t1, with its 95% bootstrap
interval over rows. i->c, c->i: share of rows that went from incorrect to correct, and back; incorrect is unanswered (no
answer can be extracted) or wrong. mended, repeated: of the wrong first attempts, the share whose second is correct, or
gives the same answer again. edit distance: between the tokens of both attempts, over the longer one; 0 is a copy.
flexible: correct to a lenient reader, whatever the format. cut off: by the token budget. tokens: mean length.
"""
STEP_LINE = (
    "Stage {roman} step {step}/{steps}: reward {reward_attempt1:.3f} / {reward_attempt2:.3f}, acc {acc_attempt1:.2f} / "
    "{acc_attempt2:.2f}, kl {kl_attempt1:.3f} / {kl_attempt2:.3f}, {without_signal:.0%} without signal, cut off "
    "{truncated_attempt1:.0%} / {truncated_attempt2:.0%}, {tokens_per_second:.0f} tok/s, {minutes:.0f} min left"
)
EVAL_LINE = (
    "Evaluated {checkpoint}: Acc@t1 {acc_attempt1:.3f}, Acc@t2 {acc_attempt2:.3f}, delta {delta:+.3f}, i->c "
    "{delta_i_to_c:.3f} (wrong->c {wrong_to_correct:.3f}), c->i {delta_c_to_i:.3f}, n {n}"
)


def run_line(policy: Any, config: Any, device: str, train: int, test: int, steps: dict[int, int]) -> str:
    """What the terminal shows of a run before its first evaluation."""
    wrapped = sum(hasattr(module, "lora_A") for module in policy.model.modules())
    weights = sum(weight.numel() for weight in policy.trainable.values())
    numbers = str(policy.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return (
        f"{config.run_name}: {config.model.name} in {numbers} on {device}, LoRA on {wrapped} modules, {weights:,} "
        f"trainable parameters; {train} train and {test} test examples, {steps[1]} + {steps[2]} steps. Figures read "
        f"attempt 1 / attempt 2: of training they are sampled at temperature {config.train.generation_temperature:g}, "
        f"of evaluations {decoding(config)}. kl is K3 a token; without signal: problems whose rollouts all earn alike; "
        "cut off: by train.max_new_tokens_attempt1 and 2, for which profile_run.py recommends values."
    )


def step_line(event: dict[str, Any], steps: int) -> str:
    """What the terminal shows of a training step, the stage's remaining time included."""
    minutes = (steps - event["step"]) * (event["seconds_rollout"] + event["seconds_update"]) / 60
    return STEP_LINE.format(**event, steps=steps, minutes=minutes, roman="I" * event["stage"])


def attempt_means(conversations: list[Any], config: Any) -> dict[str, Any]:
    """Mean reward, accuracy (strict and flexible), truncation and length of each attempt over the conversations, the
    share unanswered, and what the corrections are (`correction_split`)."""
    means = {}
    for number, turns in enumerate(zip(*conversations, strict=True), 1):
        for name, values in {
            "reward": [turn.reward for turn in turns],
            "acc": [turn.correct for turn in turns],
            "flexible_acc": [turn.flexible for turn in turns],
            "unanswered": [outcome(turn.correct, turn.answer) == "unanswered" for turn in turns],
            "truncated": [turn.truncated for turn in turns],
            "completion_tokens": [len(turn.completion) for turn in turns],
        }.items():
            means[f"{name}_attempt{number}"] = sum(values) / len(values)
    match = answer_reader(config.reward.answer_extractor, config.reward.match).match
    return means | correction_split([tuple(c) for c in conversations], match)


def evaluation_figures(conversations: list[Any], config: Any) -> dict[str, Any]:
    """`attempt_means`, the mean edit distance between the attempts, and intervals."""
    distances = [edit_distance_ratio(first.completion, second.completion) for first, second in conversations]
    means = attempt_means(conversations, config) | {"edit_distance_ratio": sum(distances) / len(distances)}
    return means | intervals([[float(turn.correct) for turn in c] for c in conversations])


def intervals(correct: Any) -> dict[str, list[float]]:
    """95% bootstrap intervals over rows of Acc@t1, Acc@t2 and delta from correct [n, 2]; the pairs stay together."""
    import numpy as np

    rows = np.random.default_rng(0).integers(len(correct), size=(1000, len(correct)))
    means = np.asarray(correct)[rows].mean(1)  # [1000, 2]
    found = {"acc_attempt1": means[:, 0], "acc_attempt2": means[:, 1], "delta": means[:, 1] - means[:, 0]}
    return {f"{name}_interval": np.quantile(values, (0.025, 0.975)).round(4).tolist() for name, values in found.items()}


def edit_distance_ratio(a: list[int], b: list[int]) -> float:
    """Levenshtein distance of two token sequences over the longer length: 0 is a copy, 1 shares nothing."""
    import numpy as np

    if a == b:
        return 0.0
    b_tokens, offsets = np.array(b), np.arange(len(b) + 1)
    row = offsets.copy()
    for i, token in enumerate(a, 1):
        step = np.minimum(row[1:] + 1, row[:-1] + (b_tokens != token))  # deletion, substitution
        row = np.minimum.accumulate(np.concatenate(([i], step)) - offsets) + offsets  # insertions, all at once
    return float(row[-1] / max(len(a), len(b)))


def sample_row(example: Any, conversation: list[Any]) -> dict[str, Any]:
    """What samples.jsonl holds of a conversation: the question, the target and both attempts with their rewards."""
    row = {"question": example.question, "target": example.target}
    for number, turn in enumerate(conversation, 1):
        for name in ("text", "answer", "reward", "correct", "truncated"):
            row[f"{name}_attempt{number}"] = getattr(turn, name)
        row[f"tokens_attempt{number}"] = len(turn.completion)
    return row


def silence_warning(figures: dict[str, Any], steps: int) -> str:
    """Says that nothing was learned for some steps, and what to do about it."""
    return (
        f"Warning: all rollouts of each problem earned alike, {steps} steps in a row, so nothing was learned.\nRewards "
        f'are {figures["reward_attempt1"]:.2f} / {figures["reward_attempt2"]:.2f}. If low: "Format before '
        'correction" in README.md. If at their top: stop here.'
    )


def best_on_validation(folder: Path, evals: list[dict[str, Any]]) -> str | None:
    """The checkpoint with the highest Acc@t2 on the validation rows; a choice that is left to the reader."""
    validated = [e for e in evals if "held_out" in e and not e["checkpoint"].endswith("/step_0")]
    if not validated:
        return None
    best = max(reversed(validated), key=lambda e: e["acc_attempt2"])  # the latest of equals
    place = folder / best["checkpoint"]
    place = place if place.exists() else place.parent  # a stage's last step is its end
    return f"Best on the {best['n']} validation rows: {place}, Acc@t2 {best['acc_attempt2']:.3f}."


def made_with() -> dict[str, Any]:
    """The versions and the commit that a run's numbers were made with."""
    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "peft", "unsloth", "datasets"):
        versions[name] = importlib.metadata.version(name) if name in sys.modules else None
    return {"versions": versions, "git_commit": git_commit()}


def git_commit() -> str | None:
    with suppress(OSError):  # no git here
        command = ["git", "-C", Path(__file__).resolve().parent, "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return None


def decoding(config: Any) -> str:
    """How evaluations are sampled, in words."""
    temperature = config.eval.generation_temperature
    return f"sampled at temperature {temperature:g}" if temperature else "greedy"


def evaluation_name(event: dict[str, Any]) -> str:
    """What was evaluated: the checkpoint, and which adapter or rows where they are not the run's own test rows."""
    parts = Path(event.get("adapter") or "").parts  # from the run's name on
    place = "/".join(parts[-3 if parts and parts[-1].startswith("step_") else -2 :])
    return event["checkpoint"] + (f" ({place})" if place else " (validation)" if "held_out" in event else "")


def results_table(evals: list[dict[str, Any]], columns: dict[str, str] = RESULTS) -> str:
    """The evaluations as a markdown table."""

    def show(value: Any, sign: str) -> str:
        if isinstance(value, list):
            return "{:+.3f} to {:+.3f}".format(*value)
        return "" if value is None else f"{value:{sign}.3f}" if isinstance(value, float) else str(value)

    cells = [["checkpoint", *columns]]
    for event in evals:
        values = (show(event.get(key), "+" * (key == "delta")) for key in columns.values())
        cells.append([evaluation_name(event), *values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_results(run: Any, steps: list[dict[str, Any]], evals: list[dict[str, Any]], device: str) -> None:
    """results.json, results.md, curves.png, and the newest checkpoint's card, of train.py's Run."""
    results = {"run_name": run.config.run_name, "evals": evals, "device": device} | made_with()
    results |= {"seconds_total": time.time() - run.started, "command": shlex.join(["python", *sys.argv])}
    write_atomically(run.folder / "results.json", json.dumps(results, indent=1))
    write_atomically(run.folder / "results.md", results_page(run.config, evals))
    if run.checkpoint != run.folder:
        write_atomically(run.checkpoint / "README.md", model_card(run.config, evals, run.checkpoint))
    draw_curves(run.folder, steps, evals)


def write_atomically(file: Path, text: str) -> None:
    """The file holds the old text or the new, never half of one."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def to_json(row: dict[str, Any]) -> str:
    """One line of JSON; a number that is not finite, which JSON lacks, becomes null."""
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


def results_page(config: Any, evals: list[dict[str, Any]]) -> str:
    """results.md: what was evaluated and how, the tables, and what their columns mean."""
    return f"""# {config.run_name}

{config.model.name} on {config.dataset.name}, seed {config.train.seed}. Evaluations are {decoding(config)}.

{results_table(evals)}

{results_table(evals, DETAILS)}

{MEANINGS}"""


PANELS = {  # title: {label: key in metrics.jsonl}, column by column
    **{title: {f"attempt {n}": f"{key}_attempt{n}" for n in (1, 2)} for title, key in (
        ("mean reward", "reward"), ("accuracy", "acc"), ("log10 of the KL to the reference, a token (K3)", "kl"),
        ("completion tokens", "completion_tokens"))},
    "gap (attempt 2 - attempt 1)": {"reward": "reward_gap", "accuracy (delta)": "delta"},
    "corrected rows": {"wrong -> correct": "wrong_to_correct", "unanswered -> correct": "unanswered_to_correct"},
    "of the wrong first attempts": {"mended": "wrong_mended", "repeated": "wrong_repeated"},
    "cut off, unanswered, without signal": {
        "cut off 1": "truncated_attempt1", "cut off 2": "truncated_attempt2", "unanswered 1": "unanswered_attempt1",
        "unanswered 2": "unanswered_attempt2", "problems without signal": "without_signal"},
}  # fmt: skip
STYLES = [("tab:blue", "-"), ("tab:orange", "-"), ("tab:blue", ":"), ("tab:orange", ":"), ("tab:gray", "-")]


def draw_curves(folder: Path, steps: list[dict[str, Any]], evals: list[dict[str, Any]]) -> None:
    """curves.png: rewards, accuracies, gaps, corrections, KL and lengths by step, and the evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(17, 7), layout="constrained")
    for axis, (title, curves) in zip(axes.T.flat, PANELS.items(), strict=True):
        draw_panel(axis, curves, steps, evals)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.legend(fontsize=7)
    figure.suptitle("lines: rollouts of training; dots: test rows; diamonds: validation rows; bars: 95% intervals")
    figure.savefig(folder / ".curves.png.tmp", dpi=100, format="png")
    os.replace(folder / ".curves.png.tmp", folder / "curves.png")
    plt.close(figure)


def draw_panel(axis: Any, curves: dict[str, str], steps: list[dict[str, Any]], evals: list[dict[str, Any]]) -> None:
    """The lines of one panel, the dots of the evaluations that have its keys, and the mark between the stages."""
    import numpy as np

    x, is_kl = [event["global_step"] for event in steps], "kl_attempt1" in curves.values()
    black = {"mec": "black", "ecolor": "black", "capsize": 3}
    axis.margins(y=0.12)  # room for the stages' names
    for (label, key), (color, line), number in zip(curves.items(), STYLES, range(5), strict=False):
        y = np.array([event.get(key) for event in steps], dtype=float)
        axis.plot(x, np.log10(np.maximum(y, 1e-5)) if is_kl else y, line, color=color, linewidth=1, label=label)
        aside = (number - 0.5) * 0.008 * max(x, default=0)  # dots of equal height stay visible beside each other
        for event in [event for event in evals if event.get(key) is not None and line == "-"]:
            how = {"fmt": "D", "ms": 3} if "held_out" in event else {"fmt": "o", "ms": 5}
            bars, how = [[abs(event[key] - end)] for end in event.get(f"{key}_interval", [event[key]] * 2)], how | black
            axis.errorbar(event["global_step"] + aside, event[key], bars, color=color, **how)
    last = max((event["global_step"] for event in steps if event["stage"] == 1), default=0)
    if 0 < last < x[-1]:
        axis.axvline(last + 0.5, color="gray", linestyle="--", linewidth=1)
        for text, side in (("Stage I ", "right"), (" Stage II", "left")):
            axis.text(last + 0.5, 0.99, text, transform=axis.get_xaxis_transform(), ha=side, va="top", size=8)
    axis.axhline(-5 if is_kl else 0, color="black", linewidth=0.5)


# Where a multimodal checkpoint keeps its text part, whose own class names its weights without the prefix.
TEXT_KEYS = {
    "^model.language_model": "model",
    "^model.text_model": "model",
    "^language_model.model": "model",
    "^language_model.lm_head": "lm_head",
}
SHARED_SETTINGS = ("tie_word_embeddings", "quantization_config")  # and what stands beside the parts, for all of them


def model_card(config: Any, evals: list[dict[str, Any]], folder: Path) -> str:
    """The README.md of a saved adapter: the hub's metadata (it refuses local folders), results, how to use it."""
    from huggingface_hub import ModelCardData

    train, prompts, reward = config.train, config.prompts, config.reward
    names = {"base_model": config.model.name, "datasets": config.dataset.name}
    on_hub = {field: [name] for field, name in names.items() if not Path(name).exists()}
    base, data = (name if field in on_hub else Path(name).name for field, name in names.items())
    tags = ["lora", "score", "self-correction", "reinforcement-learning"]
    head = ModelCardData(library_name="peft", pipeline_tag="text-generation", tags=tags, **on_hub)
    label = folder.name if folder.name.startswith("stage") else f"{folder.parent.name}/{folder.name}"
    results = f"Evaluations on held-out rows, {decoding(config)}:\n\n{results_table(evals)}\n\n{MEANINGS}"
    rewards = ", ".join(f"`{name}`" for name in reward.fn) + f", weighted {reward.weights}" * bool(reward.weights)
    system = [{"role": "system", "content": prompts.system}] if prompts.system else []
    worked = [pair for e in prompts.examples for pair in (("user", e.input), ("assistant", e.output))]
    return f"""---
{head.to_yaml()}
---

# {config.run_name}, {label}

A LoRA adapter (r = {config.model.lora.r}) of `{base}`, trained by reinforcement learning to correct its own answers:
SCoRe, [Kumar et al., ICLR 2025](https://arxiv.org/abs/2409.12917). Data: `{data}`. Reward: {rewards}, answers read by
`{reward.answer_extractor}`. Learning rate {train.learning_rate:g}, alpha {train.alpha:g}, beta1 {train.beta1:g}, beta2
{train.beta2:g}, {train.num_generations} rollouts a problem, seed {train.seed}.

{results if evals else "Not evaluated yet."}
## Use

The first answer goes back in as the tokens it came in, followed by the instruction to correct it. Worked examples stand
before the problem verbatim, also where the chat template would cut the reasoning out of earlier turns.

```python
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

where = {str(folder)!r}
base, tokenizer = PeftConfig.from_pretrained(where).base_model_name_or_path, AutoTokenizer.from_pretrained(where)
whole = AutoConfig.from_pretrained(base)
text_part = whole.get_text_config()  # of a multimodal model, which alone was trained
for name in {SHARED_SETTINGS!r}:
    if hasattr(whole, name):
        setattr(text_part, name, getattr(whole, name))
names = {TEXT_KEYS!r}
model = AutoModelForCausalLM.from_pretrained(base, config=text_part, key_mapping=names)
model = PeftModel.from_pretrained(model, where)
system = {system!r}
worked = {[{"role": role, "content": text} for role, text in worked]!r}
correction = {{"role": "user", "content": {prompts.self_correction!r}}}

def encode(*turns):
    marks = [turn | {{"content": f"WORKED TURN {{number}}."}} for number, turn in enumerate(worked)]
    text = tokenizer.apply_chat_template([*system, *marks, *turns], tokenize=False, add_generation_prompt=True,
                                         **{config.model.chat_template_kwargs!r})
    for mark, turn in zip(marks, worked):
        text = text.replace(mark["content"], turn["content"])
    return tokenizer(text.split("FIRST ATTEMPT")[-1], add_special_tokens=False)["input_ids"]

def answer(ids, budget):
    out = model.generate(input_ids=torch.tensor([ids], device=model.device), max_new_tokens=budget, do_sample=False,
                         repetition_penalty=1.0)
    return [token for token in out[0, len(ids):].tolist() if token not in tokenizer.all_special_ids]

problem = {{"role": "user", "content": "A pen costs 3 dollars. What do 7 cost?"}}
prompt = encode(problem)
first = answer(prompt, {train.max_new_tokens_attempt1})
turn = encode(problem, {{"role": "assistant", "content": "FIRST ATTEMPT"}}, correction)
second = answer(prompt + first + turn, {train.max_new_tokens_attempt2})
print(tokenizer.decode(first), tokenizer.decode(second), sep="\\n\\n")
```
"""


class Wandb:
    """A run's page at Weights & Biases, if its config asks for one. It is online with a login and a server that answers
    within 3 seconds, else offline.

    It never prompts and never stops a run: whatever it raises is logged in a line, and it is off from there on."""

    def __init__(self, config: Any, folder: Path, run_id: str | None, log: Callable[[str], None]) -> None:
        self.config, self.folder, self.id, self.log, self.run = config, folder, run_id, log, None

    def start(self) -> None:
        mode = os.environ.get("WANDB_MODE")
        if not self.config.wandb_project or mode == "disabled":
            return
        if not mode:
            mode, url = "offline", urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
            with suppress(OSError, netrc.NetrcParseError):
                if os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(url.hostname):
                    socket.create_connection((url.hostname, url.port or 443), timeout=3).close()
                    mode = "online"
        with self.may_fail():
            import wandb

            self.run = wandb.init(
                project=self.config.wandb_project, name=self.config.run_name, config=self.config.model_dump(),
                dir=str(self.folder), mode=mode, id=self.id, resume="allow",
                settings=wandb.Settings(silent=True, console="off", init_timeout=20, x_disable_stats=True),
            )  # fmt: skip
            self.id = self.run.id
            self.run.define_metric("*", step_metric="global_step")
            if self.run.offline:
                self.log(f"W&B is offline; later: wandb sync {self.folder / 'wandb'}/offline-run-*")

    @contextmanager
    def may_fail(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.log(f"W&B is off from here on: {(str(error).splitlines() or [type(error).__name__])[0]}")
            self.run = None

    def write(self, event: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Numbers under stage1/, stage2/, eval/ or validation/ on one global step; of an evaluation also samples."""
        if not self.run:
            return
        with self.may_fail():
            import wandb

            prefix = event.get("held_out", "eval") if event["event"] == "eval" else f"stage{event['stage']}"
            numbers = {name: value for name, value in event.items() if isinstance(value, int | float)}
            values = {f"{prefix}/{name}": value for name, value in numbers.items()}
            if event["event"] == "eval":
                rows = [list(row.values()) for row in samples[:100]]
                values[f"{prefix}/samples"] = wandb.Table(columns=list(samples[0]), data=rows)
                self.run.summary.update({f"{event['checkpoint']}/{name}": value for name, value in numbers.items()})
            self.run.log(values | {"global_step": event["global_step"]})

    def finish(self) -> None:
        if self.run:
            with self.may_fail():
                self.run.finish()


# ------------------------------------------------------------------------------------------------------ diagnostics
def report_rollouts(train: Any, conversations: list[list[Any]], config: Any) -> None:
    """Of both attempts: how many are correct, wrong, unanswered or cut off, how long they are, what budget fits."""
    means = attempt_means(conversations, config)
    for number in (1, 2):
        turns = [conversation[number - 1] for conversation in conversations]
        names, budget = ("acc", "flexible_acc", "unanswered", "truncated", "reward"), f"max_new_tokens_attempt{number}"
        right, flexible, unanswered, cut, reward = (means[f"{name}_attempt{number}"] for name in names)
        lengths, now = sorted(len(turn.completion) for turn in turns), getattr(config.train, budget)
        fit = 2 * now if cut > 0.01 else min(now, 32 + int(1.1 * lengths[round(0.99 * (len(lengths) - 1))]) // 32 * 32)
        print(f"\nAttempt {number}, {len(turns)} rollouts, mean reward {reward:.3f}")
        print(f"  answers            {right:.1%} correct ({flexible:.1%} in any format), {unanswered:.1%} no answer")
        print(f"  prompt tokens      {percentiles([len(turn.prompt) for turn in turns])}")
        print(f"  completion tokens  {percentiles(lengths)}, cut off by the budget {cut:.1%}")
        print(f"  budget that fits   train.{budget}: {fit} (now {now})")
        for lost in [turn.text for turn in turns if not turn.answer and not turn.truncated][:1]:
            print(f"  a missing answer   {textwrap.shorten(lost, 200)!r}")
    mended, repeated = (means[name] or 0 for name in ("wrong_mended", "wrong_repeated"))
    _, silent = train.dynamic_sampling(conversations, 2, config.train)
    print(f"\nOf the wrong first attempts {mended:.1%} are mended and {repeated:.1%} give the same answer again.\n"
          f"{silent:.1%} of the problems have no signal in Stage II: all their rollouts earn alike.")  # fmt: skip


def percentiles(values: list[int]) -> str:
    at = [sorted(values)[round(share * (len(values) - 1))] for share in (0.5, 0.9, 0.99, 1)]
    return "p50 {} p90 {} p99 {} max {}".format(*at)


REPEATS, DECODE_TOKENS = 3, 256


def timed(train: Any, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of work(), with what the device has to do for it, and its result."""
    wait = train.torch.cuda.synchronize if train.DEVICE.type == "cuda" else lambda: None
    wait()
    start, result = time.perf_counter(), work()
    wait()
    return time.perf_counter() - start, result


def time_parts(train: Any, optimizer: Any, step: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of what step() calls, the device waited for around each, of the rest, and its result."""
    seconds: Counter[str] = Counter()

    def watch(owner: Any, name: str) -> Any:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            spent, result = timed(train, lambda: function(*args, **kwargs))
            seconds[name] += spent
            return result

        return mock.patch.object(owner, name, watched)

    parts = {"sample": train, "grade": train, "completion_log_probs": train, "backward": train.torch.Tensor}
    with ExitStack() as stack:
        for name, owner in {**parts, "step": optimizer}.items():
            stack.enter_context(watch(owner, name))
        whole, result = timed(train, step)
    return {**seconds, "the rest": whole - sum(seconds.values())}, result


def measure_step(train: Any, policy: Any, problems: list[Any], config: Any) -> None:
    """Where the time of a Stage II step goes, at a learning rate of 0: the median of REPEATS after a first."""
    optimizer, runs = train.torch.optim.AdamW(policy.trainable.values(), lr=0.0, weight_decay=0.0), []
    for number in range(REPEATS + 1):  # samples of its own each: the grader remembers answers
        step = (policy, optimizer, problems, 2, -number, 0.0, config)
        runs.append(time_parts(train, optimizer, lambda step=step: train.training_step(*step)))
    first, *others = [sum(parts.values()) for parts, _ in runs]
    seconds = statistics.median(others)
    parts, (figures, _) = runs[1 + others.index(seconds)]
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in policy.model.modules())
    shape = f"{len(problems)} problems x {config.train.num_generations} rollouts, 1 / {config.train.oversample} trained"
    print(f"\nOne Stage II step of {shape}, by {policy.sampler.name}\n  {seconds:.2f} s (the first {first:.2f} s), "
          f"{figures['tokens_per_second']:,.0f} sampled tokens/s, {figures['peak_memory_gb'] or 0:.2f} GiB at most\n  "
          f"micro-batches of {policy.micro_tokens} tokens, checkpointing {('off', 'on')[recomputes]}")  # fmt: skip
    for part, spent in parts.items():
        print(f"  {part:<20} {spent:>8.3f} s {spent / seconds:>5.0%}", flush=True)


def show_kernels(train: Any, policy: Any, problems: list[Any], config: Any) -> None:
    """A rollout and its update under torch's profiler: milliseconds of the card, or of a CPU's operations, by kind."""
    cuda, settings = train.DEVICE.type == "cuda", config.train
    rows = [problem for problem in problems for _ in range(settings.num_generations)]
    optimizer, made = train.torch.optim.AdamW(policy.trainable.values(), lr=0.0, weight_decay=0.0), []

    def roll_out(seed: str) -> None:
        made[:] = train.roll_out(policy, rows, config, settings.generation_temperature, seed)

    def update(_seed: str) -> None:
        train.train_step(policy, optimizer, train.dynamic_sampling(made, 2, settings)[0], 2, settings)

    for name, work in (("A rollout", roll_out), ("Its update", update)):
        work("warm up")
        with train.torch.profiler.profile(record_shapes=True) as seen:
            seconds, _ = timed(train, lambda work=work: work("watched"))
        spent: Counter[str] = Counter()
        alone: Counter[str] = Counter()  # kernels that no operation of torch launched, as in graphs
        for event in seen.events():
            if event.device_type.name == "CUDA":
                alone[event.name] += event.time_range.elapsed_us()
            parts = [(k.name, k.duration) for k in event.kernels] if cuda else [("", event.self_cpu_time_total)]
            for kernel, duration in parts:
                spent[kernel_kind(event.name, event.input_shapes, kernel, policy, config)] += duration / 1e3
                alone[kernel] -= duration
        for kernel, duration in alone.items() if cuda else ():
            spent[kernel_kind("", [], kernel, policy, config)] += max(0, duration) / 1e3
        busy = sum(spent.values())
        print(f"\n{name}, {1e3 * seconds:,.0f} ms watched, of which kernels take {busy:,.0f} ms")
        for kind, milliseconds in spent.most_common():
            print(f"  {kind:<28} {milliseconds:>10.1f} ms {milliseconds / busy:>5.0%}", flush=True)


def kernel_kind(operation: str, shapes: list[Any] | None, kernel: str, policy: Any, config: Any) -> str:
    """What an operation of torch, or a kernel that it launched, is for. Products are told apart by their sizes; those
    of a replayed graph have none."""
    name, sizes = f"{operation} {kernel}".lower(), {n for shape in shapes or [] for n in shape}
    vocabulary = policy.model.get_input_embeddings().weight.shape[0] in sizes
    if any(word in name for word in ("attn", "attention", "flash", "fmha", "_attend", "_combine")):
        return "attention"
    if any(word in name for word in ("gemm", "aten::mm", "aten::addmm", "nvjet", "cutlass", "xmma", "matmul")):
        r = config.model.lora.r
        lora = {r, max(16, 1 << (r - 1).bit_length())} & sizes  # the decoder pads it
        return "head: products" if vocabulary else "LoRA: products" if lora else "base weights: products"
    if vocabulary or "_sample" in name or "softmax" in name:
        return "head: softmax, sampling"
    if any(word in name for word in ("norm", "rope", "rotary", "silu", "swiglu", "rsqrt", "pow")):
        return "norms, rope, activations"
    if any(word in name for word in ("copy", "cast", "memcpy", "memset", "aten::to", "fill")):
        return "copies, casts"
    return "other elementwise"


def time_decoding(train: Any, policy: Any, pool: list[Any], sizes: list[int]) -> None:
    """Decodes exactly DECODE_TOKENS tokens a row at each batch size: medians of REPEATS after a first."""
    policy.eos_token_ids = []  # from here on no token ends a completion
    if hasattr(policy.sampler, "eos"):
        policy.sampler.eos.fill_(-1)
    for size in sizes:
        prompts, runs = [pool[i % len(pool)].prompt for i in range(size)], []
        for number in range(REPEATS + 1):
            how = (policy, prompts, DECODE_TOKENS, 1.0, f"decode/{number}")
            runs.append(timed(train, lambda how=how: train.sample(*how))[0])
        seconds = statistics.median(runs[1:])
        print(f"{policy.sampler.name:<20} {size:>5} rows {size * DECODE_TOKENS / seconds:>9,.0f} tokens/s "
              f"{1e3 * seconds / DECODE_TOKENS:>8.2f} ms a token of each row (first {runs[0]:.2f} s)")  # fmt: skip


def majority(turns: list[Any], match: Callable[[str, str], bool]) -> Any:
    """The first of the turns with the answer that most of them give. A turn without an answer does not vote."""
    votes: Counter[int] = Counter()
    for index, turn in [(index, turn) for index, turn in enumerate(turns) if turn.answer]:
        votes[next((i for i in votes if match(turn.answer, turns[i].answer)), index)] += 1
    return turns[max(votes, key=votes.__getitem__, default=0)]


def vote(train: Any, policy: Any, examples: list[Any], config: Any, most: int) -> None:
    """Majority votes at equal budgets, at the training temperature: for k = 1, 2, 4, ..., `most` the accuracy of 2k
    first attempts, and of k corrected pairs whose second attempts vote."""
    match = train.answer_reader(config.reward.answer_extractor, config.reward.match).match
    sizes = sorted({1 << i for i in range(most.bit_length())} | {most})
    right, temperature = Counter(), config.train.generation_temperature
    each = max(1, config.eval.batch_size // most)  # problems at once
    for start in range(0, len(examples), each):
        rows = [example for example in examples[start : start + each] for _ in range(most)]
        seed = f"{config.train.seed}/vote/{start}"
        pairs = train.roll_out(policy, rows, config, temperature, seed)
        more = train.take_turns(policy, rows, config, temperature, f"{seed}/more", [])
        for row in range(0, len(rows), most):
            for k in sizes:
                firsts = [first for first, _ in pairs[row : row + k]] + more[row : row + k]
                right["first", k] += majority(firsts, match).correct
                right["second", k] += majority([second for _, second in pairs[row : row + k]], match).correct
    print(f"Majority votes on {len(examples)} test rows, temperature {temperature:g}")
    for k in sizes:
        first, second = (f"{right[way, k] / len(examples):.3f}" for way in ("first", "second"))
        print(f"  {2 * k} first attempts {first}, {k} corrected pairs {second}")


def show_samples(folder: Path, wanted: str | None) -> None:
    """Prints the evaluated pairs of a run by kind: how many of each, then three side by side with a word diff."""
    evaluated: dict[str, list[dict[str, Any]]] = {}
    try:
        reward = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["reward"]
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        for row in [row for row in map(json.loads, lines) if row["event"] == "eval"]:
            evaluated.setdefault(evaluation_name(row), []).append(row)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"--samples {folder}: holds no run that can be read ({reason})") from None
    try:
        if reward["module"]:
            load_reward_module(reward["module"])
    except ValueError as error:
        raise ValueError(f"reward.module: {reward['module']} {error}") from None
    name, kinds = wanted or next(reversed(evaluated), None), {}
    if name not in evaluated:
        raise ValueError(f"--checkpoint {name}: not evaluated; evaluated are: {', '.join(evaluated) or 'none'}")
    for row in evaluated[name]:
        kinds.setdefault(kind_of(row, MATCH_FNS[reward["match"]]), []).append(row)
    print(f"{folder}, {name}: {len(evaluated[name])} rows")
    for kind, rows in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"{len(rows):>6}  {kind}")
    for kind, row in [(kind, row) for kind, rows in kinds.items() for row in rows[:3]]:
        print(f"\n=== {kind}: target {row['target'].splitlines()[-1][-60:]!r}\n{row['question'].strip()}")
        print(side_by_side(row["text_attempt1"], row["text_attempt2"]))


def kind_of(row: dict[str, Any], match: Callable[[str, str], bool]) -> str:
    """What became of a pair: its outcomes; where they are alike, whether its answers or texts are too."""
    before, after = (outcome(row[f"correct_attempt{n}"], row[f"answer_attempt{n}"]) for n in (1, 2))
    same = after == "wrong" and match(row["answer_attempt1"], row["answer_attempt2"])
    if before == after and row["text_attempt1"] == row["text_attempt2"]:
        return f"{after}, copied word for word"
    return f"{before} -> {after}" + " (the same answer)" * (before == "wrong" and same)


def side_by_side(first: str, second: str) -> str:
    """Two texts in two columns; words that only one of them has stand in [-...-] and {+...+}."""
    a, b = (text.replace("\n", " \n ").split(" ") for text in (first, second))
    marked: tuple[list[str], list[str]] = [], []
    for change, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for words, column, marks in ((a[a0:a1], marked[0], "[-{}-]"), (b[b0:b1], marked[1], "{{+{}+}}")):
            column += [w if change == "equal" or not w.strip() else marks.format(w) for w in words]
    width, texts = max(20, (shutil.get_terminal_size((120, 0)).columns - 3) // 2), [" ".join(words) for words in marked]
    columns = [[part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]] for text in texts]
    return "\n".join(f"{left:<{width}} | {right}" for left, right in zip_longest(*columns, fillvalue=""))


def ask(train: Any, args: argparse.Namespace) -> None:
    """Puts questions to a run's newest adapter or to --adapter: those given, else those typed in."""
    config = train.read_config(str(args.ask / "config.yaml"), args.set)
    saved = [args.adapter] if args.adapter else train.checkpoints(args.ask)
    if not saved or not (saved[-1] / "adapter_config.json").exists():
        raise train.UserError(f"--ask {args.ask}: no adapter has been saved yet; give one with --adapter DIR")
    train.check_adapter(saved[-1], config)
    policy = train.load_policy(config, train.load_tokenizer(config), saved[-1])
    print(f"{config.model.name} with {saved[-1]}", flush=True)
    with suppress(EOFError, KeyboardInterrupt):
        for question in args.question or iter(lambda: input("\nQuestion (an empty line ends): ").strip(), ""):
            try:
                answer(train, policy, config, question)
            except train.UserError as error:
                if args.question:
                    raise
                print(error, flush=True)  # the next may be shorter


def answer(train: Any, policy: Any, config: Any, question: str) -> None:
    """Prints both attempts at a question, as an evaluation would sample them. Raises UserError where it is too long."""
    examples = [train.Example(question, "", train.first_prompt(question, config, policy.tokenizer))]
    how = (policy, examples, config, config.eval.generation_temperature, "ask")
    seconds, (turns,) = timed(train, lambda: train.roll_out(*how))
    cut, texts = [", cut off by the budget" * turn.truncated for turn in turns], [turn.text.strip() for turn in turns]
    tokens = [len(turn.completion) for turn in turns]
    print(f"\n=== attempt 1 ({tokens[0]} tokens{cut[0]})\n{texts[0]}")
    print(f"=== correction prompt\n{config.prompts.self_correction.strip()}")
    print(f"=== attempt 2 ({tokens[1]} tokens{cut[1]})\n{texts[1]}\n=== what changed\n{side_by_side(*texts)}")
    print(f"=== {sum(tokens)} tokens in {seconds:.2f} s: {sum(tokens) / seconds:,.0f} tokens/s", flush=True)


def measure(train: Any, args: argparse.Namespace) -> None:
    """What --config asks for: votes, decoding, or lengths, answers and budgets first, then one step."""
    config = train.read_config(args.config, args.set)
    if args.adapter:
        train.check_adapter(args.adapter, config)
    settings = config.train
    if args.n and args.n < settings.oversample and not (args.votes or args.decode or args.lengths_only):
        raise train.UserError(f"--n {args.n}: train.oversample needs {settings.oversample} or more")
    tokenizer = train.load_tokenizer(config)
    pool, _, test = train.load_examples(config, tokenizer)
    policy = train.load_policy(config, tokenizer, args.adapter)
    print(f"{config.model.name}, {f'adapter {args.adapter}' if args.adapter else 'no adapter'}, on {train.DEVICE.type}")
    if args.votes:
        vote(train, policy, test, config, args.votes)
        return
    problems = pool[: args.n or settings.stage2_batch_size * settings.oversample]
    if not args.decode:
        rows = (policy, [problem for problem in problems for _ in range(settings.num_generations)], config)
        conversations = train.roll_out(*rows, settings.generation_temperature, "profile")
        report_rollouts(train, conversations, config)
        longest, limit = max(len(example.prompt) for example in pool + test), settings.max_prompt_length_attempt1
        print(f"The longest prompt of all rows has {longest} tokens (train.max_prompt_length_attempt1 is {limit}).")
    for sampler in [policy.sampler, *([train.Generate(policy)] if args.compare else [])]:
        policy.sampler = sampler
        if args.decode:
            time_decoding(train, policy, pool, args.decode)
        elif args.kernels:
            show_kernels(train, policy, problems, config)
        elif not args.lengths_only:
            measure_step(train, policy, problems, config)


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{message}\n")  # argparse's own prints the usage too
    parser.add_argument("--config", help="the config to measure")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY.SUB=VALUE", help="override keys")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a saved adapter, with --config or --ask")
    parser.add_argument("--n", type=int, help="problems; by default those of one Stage II step")
    parser.add_argument("--lengths-only", action="store_true", help="leave out the step's speed and memory")
    parser.add_argument("--compare", action="store_true", help="measure model.generate too")
    parser.add_argument("--kernels", action="store_true", help="where a step's milliseconds go, by kind of kernel")
    parser.add_argument("--decode", type=int, nargs="+", metavar="ROWS", help="time decoding alone at these batches")
    parser.add_argument("--votes", type=int, metavar="K", help="majority votes of up to 2K first attempts or K pairs")
    parser.add_argument("--samples", type=Path, metavar="RUN_DIR", help="print a run's corrections")
    parser.add_argument("--checkpoint", help="with --samples: pretrain, stage1, stage2, ...; the last one if not given")
    parser.add_argument("--ask", type=Path, metavar="RUN_DIR", help="put questions to a run's newest adapter")
    parser.add_argument("question", nargs="*", help="with --ask; without one they are typed in")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.config, args.samples, args.ask))) != 1 or (args.question and not args.ask):
        parser.error("give --config FILE, --samples RUN_DIR, or --ask RUN_DIR and questions")
    if any(n is not None and n < 1 for n in (args.votes, args.n and args.n - 1, *(args.decode or []))) or args.n == 0:
        parser.error("--n: at least 2; --votes, --decode: at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args, faults = parse_command_line(argv), (OSError, ValueError)
    try:
        if args.samples:
            show_samples(args.samples, args.checkpoint)
        elif args.ask and not (args.ask / "config.yaml").is_file():
            raise ValueError(f"--ask {args.ask}: holds no run; give the folder of one, as outputs/NAME")
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines, an error without a GPU
            import train

            faults = (train.UserError, train.RunError, train.RewardError)
            (ask if args.ask else measure)(train, args)
    except faults as error:
        print(str(error).replace("--resume-adapter", "--adapter"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
