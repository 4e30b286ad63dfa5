#!/usr/bin/env python3
"""SCoRe: a language model learns to correct its own answers by reinforcement learning, on one GPU, in one file.

Kumar et al., "Training Language Models to Self-Correct via Reinforcement Learning", ICLR 2025 (arXiv 2409.12917).

The model answers a problem x1 (attempt 1, y1). It is told that there may be an error, not whether there is one
(x2 = x1 + y1 + instruction), and answers again (attempt 2, y2). r is an answer's reward, KLi is KL(pi(.|xi) ||
pi_ref(.|xi)), pi_ref the model before training. Each attempt is credited with its own reward only.

    Stage I     max  E[ r(y2)                                         ]  - beta2 KL1 - beta1 KL2
    Stage II    max  E[ r(y1)  +  r(y2) + alpha * (r(y2) - r(y1))     ]  - beta1 KL1 - beta1 KL2

Stage I holds attempt 1 where it was (a strict beta2) while attempt 2 learns to improve on it. Without it the policy
learns to answer once and to copy. Stage II trains both attempts and pays attempt 2 for progress.

How it stays small and exact:
- pi_ref is the same LoRA model with its adapter off: no second copy of the weights.
- Both attempts are read from one forward pass, and token log-probs computed in chunks: no [B, T, V] tensor exists.
- The loss is a sum over conversations: memory depends on the micro-batch, not on the batch.
- All randomness comes from (seed, stage, step, attempt, row), so a resumed run repeats an uninterrupted one exactly.

The file reads in the order in which a run meets it; the samplers, which know nothing of SCoRe, come last.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import random
import re
import reprlib
import shlex
import shutil
import signal
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal
from unittest.mock import patch

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, field_validator

import reward_function as rewards
from reward_function import ANSWER_EXTRACTORS, MATCH_FNS, RewardError, answer_reader, did_you_mean

# ---------------------------------------------------------------------------------------------------- configuration
# YAML 1.1 reads 1e-5 (no dot) as text; a number written so is still a number.
Real = Annotated[float, BeforeValidator(lambda v: float(v) if isinstance(v, str) else v), Field(allow_inf_nan=False)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Names = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(min_length=1)]


def key(default: Any, meaning: str, **bounds: Any) -> Any:
    """A config key: its default and meaning, both for --help, and its bounds."""
    shown = "required" if default is ... else json.dumps(default)
    return Field(default, description=f"{shown}: {meaning}", **bounds)


class Section(BaseModel, extra="forbid", strict=True):
    """A mapping in the YAML file, of these keys and no others."""


class LoraConfig(Section):
    r: int = key(16, "rank: how far the policy can move away from the reference", ge=1)
    alpha: Real = key(16, "scale of the update is alpha / r", gt=0)
    dropout: Real = key(0.0, "keep at 0: dropout trains another policy than the one that was sampled", ge=0, lt=1)
    target_modules: Names = key(["all-linear"], "names of the linear layers that get an adapter; all-linear: every one")


class ModelConfig(Section):
    name: PathText = key(..., "hub id or local folder; with the adapter off it is the reference policy")
    max_seq_length: int | None = key(None, "tokens of a whole conversation; null: computed from the budgets", ge=8)
    dtype: Literal["auto", "bfloat16", "float16"] = key("auto", "bfloat16, or float16 on cards without; CPU: float32")
    load_in_4bit: bool = key(False, "4-bit base weights: a bigger model on the same card")
    chat_template: str | None = key(None, "Jinja file or template; null or empty: the tokenizer's own")
    chat_template_kwargs: dict[str, Any] = key({}, "variables for the template, such as enable_thinking: true")
    fast_inference: bool = key(True, "rollouts by a built-in sampler; false: by model.generate")
    fast_inference_gpu_mem: Real = key(0.5, "share of the free GPU memory that a rollout may take", gt=0, lt=1)
    gradient_checkpointing: Literal["auto", True, False] = key("auto", "true: less memory, more time; auto: if needed")
    trust_remote_code: bool = key(False, "run code that comes with the model: only for a model that you trust")
    lora: LoraConfig = LoraConfig()


class DatasetConfig(Section):
    name: PathText = key(..., "hub id, local folder (jsonl, parquet, csv, save_to_disk) or file")
    config_name: str | None = key(None, "a sub-config of a hub dataset, or a subfolder of a local one")
    revision: str | None = key(None, "commit or tag of a hub dataset; null: the newest")
    split: str | None = key(None, "take train and test rows from this one split; null: from train and test")
    input_field: str = key(..., "column with the problem", min_length=1)
    target_field: str = key(..., "column with the reference answer", min_length=1)
    test_split_size: int | None = key(None, "test rows to hold out of `split`, or to keep of test; null: all", ge=1)


class WorkedExample(Section, str_strip_whitespace=True):
    input: str = key(..., "a problem", min_length=1)
    output: str = key(..., "its answer in the format", min_length=1)


class PromptsConfig(Section):
    system: str = key("", "system prompt; empty: none")
    examples: list[WorkedExample] = key([], "worked examples, shown as earlier turns: a list of {input, output}")
    self_correction: str = key(
        "There might be an error in the solution above because of lack of understanding of the question. Please "
        "correct the error, if any, and rewrite the solution.",
        "the instruction between attempt 1 and attempt 2",
        min_length=1,
    )


class RewardConfig(Section):
    module: PathText | None = key(None, "a Python file that registers your own rewards, extractors and matches")
    fn: Names = key(["format_and_match"], "registered, a function of `module`, or TRL's; a list is summed")
    weights: list[Real] | None = key(None, "a weight for each function of a list; null: 1.0 each", min_length=1)
    columns: dict[str, str] = key({}, "dataset columns by other names for rewards in TRL's form")
    answer_extractor: str = key("identity", "how an answer is read from an output and from a reference")
    match: str = key("equal", "when two answers are the same")

    @field_validator("module", "fn", "answer_extractor", "match")
    @classmethod
    def is_there(cls, value: Any, found: Any) -> Any:
        """Runs the module. Its functions can be named by the other keys, so if it fails they are not judged."""
        known = {"answer_extractor": ANSWER_EXTRACTORS, "match": MATCH_FNS}.get(found.field_name, ())
        if found.field_name == "module" and value:
            rewards.load_reward_module(value)
        elif found.field_name == "fn" and "module" in found.data:
            for name in value:
                if fault := rewards.reward_fault(name, found.data["module"]):
                    raise ValueError(f"{name!r} {fault}")
        elif known and "module" in found.data and value not in known:
            raise ValueError(f"is not registered; known are {', '.join(sorted(known))}{did_you_mean(value, known)}")
        return value


class TrainConfig(Section):
    stage1_batch_size: int = key(64, "problems an optimizer step in Stage I", ge=1)
    stage2_batch_size: int = key(64, "problems an optimizer step in Stage II", ge=1)
    micro_batch_size: int = key(8, "size of the update's passes, in full-length rows: memory, not results", ge=1)
    stage1_epochs: Real = key(1, "passes over the train rows in Stage I, or a part of one; 0: none", ge=0, le=10**4)
    stage2_epochs: Real = key(1, "the same for Stage II", ge=0, le=10**4)
    stage1_steps: int | None = key(None, "optimizer steps of Stage I; null: from stage1_epochs", ge=0, le=10**6)
    stage2_steps: int | None = key(None, "the same for Stage II", ge=0, le=10**6)
    learning_rate: Real = key(1e-5, "AdamW's, without weight decay", gt=0, le=1e6)
    warmup_steps: int = key(0, "steps of linear warm-up at the start of each stage", ge=0)
    lr_decay: Real = key(0.0, "share of a stage, its last, over which the rate falls linearly towards 0", ge=0, le=1)
    alpha: Real = key(10.0, "Stage II: attempt 2 earns r2 + alpha (r2 - r1): progress pays, a copy does not", ge=0)
    attempt2_weight: Real | None = key(None, "Stage II: both attempts' advantages on one scale, 2's times this", gt=0)
    beta1: Real = key(0.01, "weight of the KL to the reference: attempt 2 in Stage I, both in Stage II", ge=0)
    beta2: Real = key(0.1, "Stage I's strict KL weight on attempt 1, which holds it where it was", ge=0)
    baseline: Literal["leave_one_out", "none"] = key("leave_one_out", "mean of the other rollouts; none: raw returns")
    num_generations: int = key(1, "rollouts a problem; above 1 the baseline compares rollouts of one problem", ge=1)
    stage1_corrections: int = key(1, "Stage I: so many rollouts share a first attempt and are compared", ge=1)
    oversample: int = key(1, "of so many problems rolled out one is trained; those without signal go first", ge=1)
    length_norm: Literal["sequence", "constant"] = key("sequence", "divide by the length; constant: by the budget")
    generation_temperature: Real = key(1.0, "rollouts are drawn from softmax(logits / T), log-probs use the same", gt=0)
    max_new_tokens_attempt1: int = key(512, "token budget of attempt 1", ge=1)
    max_new_tokens_attempt2: int = key(512, "token budget of attempt 2", ge=1)
    max_prompt_length_attempt1: int = key(512, "longer problems are left out with a count, never cut", ge=1)
    max_prompt_length_attempt2: int | None = key(None, "holds prompt 1, attempt 1, instruction; null: computed", ge=1)
    seed: int = key(42, "decides LoRA's start, the order of the data and every sample", ge=0, lt=2**32)
    checkpoint_every: int | None = key(None, "steps between checkpoints (stage1/step_N); null: stage ends only", ge=1)

    def has_stage(self, stage: int) -> bool:
        epochs, steps = getattr(self, f"stage{stage}_epochs"), getattr(self, f"stage{stage}_steps")
        return bool(epochs if steps is None else steps)


class EvalConfig(Section):
    batch_size: int = key(64, "rows sampled at once", ge=1)
    max_examples: int | None = key(None, "evaluate the first N test rows; null: all", ge=1)
    generation_temperature: Real = key(0.0, "0 is greedy", ge=0)
    validation: int = key(0, "train rows held out of training and evaluated at each checkpoint, to choose by", ge=0)


class OutputConfig(Section):
    dir: PathText = key("outputs", "a run is written to {dir}/{run_name}/")
    merge: bool = key(False, "also save the base model with the adapter merged in, as merged/")


class Config(Section):
    run_name: str = key(..., "name of the run and its folder", max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    wandb_project: str | None = key(None, "Weights & Biases project; null: none")
    model: ModelConfig
    dataset: DatasetConfig
    prompts: PromptsConfig = PromptsConfig()
    reward: RewardConfig = RewardConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    output: OutputConfig = OutputConfig()


def known_keys(section: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema with its field, sections included."""
    keys = {}
    for name, info in getattr(section, "model_fields", {}).items():
        keys |= {prefix + name: info} | known_keys(info.annotation, f"{prefix}{name}.")
    return keys


# ----------------------------------------------------------------------------------------------------- command line
class UserError(Exception):
    """Bad user input. The message names the setting and the fix. Exit code 2."""


def refuse(*faults: tuple[Any, str]) -> None:
    """Raises UserError for the faults that are there, a line each. A line begins with the key or flag to change."""
    if lines := [line for there, line in faults if there]:
        raise UserError("\n".join(lines))


class RunError(Exception):
    """The run cannot go on. The message says why. Exit code 1."""


class Interrupted(Exception):
    """A signal asked the run to stop. Everything that is finished has been saved."""


def first_line(error: BaseException) -> str:
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__  # strerror: without the path
    return text.splitlines()[0][:300] + "; model.trust_remote_code: true would run it" * ("trust_remote_code" in text)


def parse_command_line(argv: list[str] | None = None) -> tuple[Namespace, Config]:
    """Reads flags and config. Raises UserError."""
    keys = "".join(f"\n  {name}\n      {info.description}" for name, info in known_keys().items() if info.description)
    parser = ArgumentParser(formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.description = "SCoRe: two-stage RL for self-correction on one GPU."
    parser.epilog = f"keys of the config file (default: meaning):{keys}"
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY.SUB=VALUE", help="override keys")
    parser.add_argument("--smoke", type=int, metavar="N", help="a quick check of every path on N examples")
    parser.add_argument("--start-stage", type=int, choices=(1, 2), default=1, help="2 skips Stage I; needs an adapter")
    parser.add_argument("--resume-adapter", metavar="DIR", type=os.path.expanduser, help="adapter to start from")
    parser.add_argument("--resume", action="store_true", help="continue this run from its newest checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the base model, or --resume-adapter")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in the way")
    parser.add_argument("--quiet", action="store_true", help="print the final table and errors only")
    parser.error = lambda message: refuse((True, " ".join(message.split())))  # argparse's own prints the usage too
    args = parser.parse_args(argv)
    config = read_config(args.config, args.set)
    adapter, stage2 = args.resume_adapter, args.start_stage == 2
    alone = stage2 and not args.resume and (args.eval_only or not adapter)
    clash = args.resume and (args.eval_only or args.overwrite or stage2 or adapter)
    refuse(
        (alone, "--start-stage 2: needs --resume-adapter DIR, and no --eval-only"),
        (adapter and not (stage2 or args.eval_only), "--resume-adapter: goes with --start-stage 2 or --eval-only"),
        (clash, "--resume: goes on as it was; leave out --eval-only, --overwrite, --start-stage, --resume-adapter"),
        (args.smoke is not None and args.smoke < 4, f"--smoke {args.smoke}: needs 4 or more, for two steps of two"),
    )
    if args.smoke:
        shrink_for_smoke(config, args.smoke)
    if adapter:
        check_adapter(Path(adapter), config)
    return args, config


class UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key written twice, where the plain loader silently keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [name.value for name, _ in node.value if name.value != "<<"]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.MarkedYAMLError(problem=f"the key {twice[0]} stands twice", problem_mark=node.start_mark)
        return node


def read_config(path: str, overrides: list[str] = ()) -> Config:
    """Reads a YAML file, applies `key.sub=value` overrides and validates the result. Raises UserError."""
    try:
        tree = {**yaml.load(Path(path).read_text(encoding="utf-8-sig"), UniqueKeys)}  # noqa: S506
    except Exception as error:  # yaml has more than its own: 2025-13-13 is a ValueError, !!bool maybe a KeyError
        raise UserError(f"--config {path}: no YAML of keys and values: {' '.join(str(error).split())[:300]}") from None
    for override in overrides:
        try:
            name, value = override.split("=", 1)
            *parents, last = name.split(".")
            section = tree
            for part in parents:
                section = section.setdefault(part, {})
            section[last] = yaml.load(value, UniqueKeys)  # noqa: S506
        except Exception:  # no =, whatever YAML raises, or a key that is no section
            raise UserError(f"--set {override!r}: must read key.sub=value, the value in YAML") from None
    return check_config(tree)


def check_config(tree: dict[str, Any]) -> Config:
    """Validates a whole config. Raises UserError, a line a fault: all those of single keys, else those between keys."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(dict.fromkeys(map(fault_line, error.errors())))) from None
    data, train, functions, weights = config.dataset, config.train, config.reward.fn, config.reward.weights
    rollouts, corrections, compared = train.num_generations, train.stage1_corrections, train.baseline != "none"
    alone = rollouts == 1 or not compared
    few = "the baseline compares first attempts, of which a step needs 2 or more; raise it"
    refuse(
        (data.split and not data.test_split_size, "dataset.test_split_size: dataset.split needs it"),
        (len(weights or functions) != len(functions), f"reward.weights: needs {len(functions)}, one a function"),
        (rollouts % corrections, f"train.stage1_corrections: must divide train.num_generations, {rollouts}"),
        (compared and train.stage1_batch_size * rollouts == corrections, f"train.stage1_batch_size: {few}"),
        (compared and train.stage2_batch_size * rollouts == 1, f"train.stage2_batch_size: {few}"),
        (train.oversample > 1 and alone, "train.oversample: needs a baseline, num_generations > 1"),
        (train.attempt2_weight and not compared, "train.attempt2_weight: needs a baseline; leave out one of the two"),
    )
    return config


def fault_line(fault: dict[str, Any]) -> str:
    """The key, the bad value, what would be right."""
    name = ".".join(part if str(part).isidentifier() else repr(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        homes = [known for known in known_keys() if known.split(".")[-1] == name.split(".")[-1]]
        close = did_you_mean(name, known_keys()) or "; --help lists them all"
        return f"{name}: unknown key{f'; it belongs to {homes[0]}' if homes else close}"
    message = "holds keys of its own" if fault["type"] == "model_type" else fault["msg"].removeprefix("Value error, ")
    value = f" (got {reprlib.repr(fault['input'])})" if not isinstance(fault["input"], dict) else ""
    return f"{name}: {message[0].lower() + message[1:300]}{value}"


def shrink_for_smoke(config: Config, examples: int) -> None:
    """Two optimizer steps a stage with a checkpoint after each: few rows, few generations, short completions."""
    train = config.train
    batch = max(2, examples // 2 // min(2, train.oversample))
    most = {"stage1_batch_size": batch, "stage2_batch_size": batch, "stage1_corrections": 2, "oversample": 2}
    for name, limit in (most | {"max_new_tokens_attempt1": 64, "max_new_tokens_attempt2": 64}).items():
        setattr(train, name, min(limit, getattr(train, name)))
    train.num_generations = 2 * train.stage1_corrections if train.num_generations > 1 else 1
    train.stage1_steps, train.stage2_steps = (2 * train.has_stage(stage) for stage in (1, 2))
    train.checkpoint_every = 1
    config.eval.max_examples = min(examples, config.eval.max_examples or examples)
    config.eval.validation = min(examples, config.eval.validation)


def check_adapter(folder: Path, config: Config) -> None:
    """Refuses, before any model is loaded, an adapter that does not fit the config. Raises UserError."""
    place, name, lora = f"--resume-adapter {folder}", config.model.name, config.model.lora
    try:
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base, r, alpha = str(saved["base_model_name_or_path"]), saved["r"], saved["lora_alpha"]
        modules, ours = sorted(saved.get("target_modules") or []), sorted(set(lora.target_modules))
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{place}: no sound adapter there; give one such as outputs/NAME/stage1") from None
    names_differ = modules != ours and not any(part == "all-linear" or "." in part for part in ours)  # or weights tell
    kinds = [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if saved.get(name)]
    if str(saved.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq")):
        kinds.append("init_lora_weights")  # these begin by changing the base weights
    refuse(
        (os.path.realpath(base) != os.path.realpath(name), f"{place}: trained on another model.name, {base}"),
        (r != lora.r, f"{place}: trained with model.lora.r {r}, and here it is {lora.r}"),
        (alpha != lora.alpha, f"{place}: trained with model.lora.alpha {alpha}, and here it is {lora.alpha}"),
        (names_differ, f"{place}: trained with model.lora.target_modules {modules}, and here they are {ours}"),
        (kinds, f"{place}: trained with {', '.join(kinds)}, which no config here has"),
    )


if __name__ == "__main__":  # here, so that a mistyped key costs a second, not the minute that the imports may take
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`, Ctrl-C ends the process without a traceback
    try:
        ARGS, CONFIG = parse_command_line()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------- slow imports, the device
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import warns of a coming change there
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)  # of 4-bit kernels

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW, Optimizer

UNSLOTH_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def written_for_unsloth() -> bool:
    """Whether Unsloth has code of its own for the model that the command line names, this script's or that of one that
    imports it, by its config.json. For others its import changes the code of transformers: .github/RESULTS.md."""
    flags = ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--config")
    flags.add_argument("--model")  # build_hard_arithmetic.py's
    flags.add_argument("--ask", dest="config", type=lambda run: f"{run}/config.yaml")  # profile_run.py's
    flags.add_argument("--set", nargs="+", action="extend", default=[])
    with suppress(Exception, SystemExit):  # what is wrong there will be said where it is read for good
        named, _ = flags.parse_known_args()
        name = named.model or read_config(named.config, named.set).model.name
        file = Path(name, "config.json") if Path(name).is_dir() else hf_hub_download(name, "config.json")
        told = json.loads(Path(file).read_bytes())
        windows = told.get("sliding_window") and told.get("use_sliding_window", True)  # see `unsloth_serves`
        return told["model_type"] in UNSLOTH_FAMILIES and not windows
    return True


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu")
torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans for each new length: .13 s of an update on an H200
if DEVICE.type != "cpu" and written_for_unsloth():  # it must be imported before transformers and peft
    with redirect_stdout(io.StringIO()):  # its banner
        import unsloth  # noqa: F401

import datasets
import filelock
import transformers
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import profile_run as reports

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only installation
    triton = None

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs an error before raising it
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of each README without metadata
QUIET = False  # --quiet


def log(message: str, always: bool = False) -> None:
    """Prints one line without tearing a progress bar. With --quiet prints only what is logged `always`."""
    if always or not QUIET:
        try:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # `| head` or the terminal has gone: the run goes on
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


log_once = cache(log)  # each message


# ---------------------------------------------------------------------------------------------------------- the run
def train_and_evaluate(args: Namespace, config: Config) -> None:
    """The whole run: evaluate, Stage I, evaluate, Stage II, evaluate. Raises UserError, RunError, Interrupted."""
    with claim_folder(args, config) as folder:
        tokenizer = load_tokenizer(config)
        bridge, _ = attempt2_bridge(tokenizer, config)
        data = train, _, test = load_examples(config, tokenizer, args.smoke)
        grade([Turn(train[0].prompt, [], train[0].target)], train[:1], config, [])  # a reward that fails does so now
        steps = {stage: 0 if args.eval_only else len(stage_batches(stage, len(train), config)) for stage in (1, 2)}
        marks = fingerprints(data, bridge, config)
        checkpoint = find_start(args, config, folder, marks)
        saved = None if checkpoint == folder else checkpoint  # a run's start has no weights
        adapter = Path(args.resume_adapter) if args.resume_adapter else saved
        for file in adapter.glob("*.safetensors") if adapter else ():
            read_weights(file)  # before the minute that the model may take
        policy = load_policy(config, tokenizer, adapter)
        run = open_run(args, config, folder, checkpoint, marks, policy)
        log(reports.run_line(policy, config, DEVICE.type, len(train), len(test), steps))
        if args.eval_only:  # a new adapter adds nothing: without one to resume this is the base model
            run.evaluate(policy, test, "adapter" if adapter else "pretrain", 0, adapter=args.resume_adapter)
        else:
            run_stages(run, policy, data, steps)
        evals = run.events("eval")
        log("\n" + reports.results_table(evals), always=True)
        if best := reports.best_on_validation(folder, evals):
            log(best)
        run.wandb.finish()
        if config.output.merge and run.state["finished"]:
            save_merged(run.checkpoint, folder / "merged", config, policy)
        log(f"Done, {time.time() - run.started:.0f} s in all: {folder}/results.md, {folder}/curves.png")


def run_stages(run: Run, policy: Policy, data: Splits, steps: dict[int, int]) -> None:
    """Both stages from where the run stands, and the evaluations between them."""
    train, validation, test = data

    def validate(stage: int, step: int) -> None:
        if validation and (step or stage == stages[0]):  # else Stage I ended with this
            at = steps[1] * (stage - 1) + step
            run.evaluate(policy, validation, f"stage{stage}/step_{step}", at, held_out="validation")

    start_stage, done = run.state["stage"], run.state["step"]
    stages = [stage for stage in range(start_stage, 3) if steps[stage]]
    if done >= steps[start_stage] and not steps.get(start_stage + 1):
        log("All steps have been taken; nothing is left to train.")
    with reference(policy):  # an adapter to start from is not the pretrained model
        run.evaluate(policy, test, "pretrain", 0)
    if start_stage == 2 and done == 0:
        run.evaluate(policy, test, "stage1", steps[1], adapter=run.state["adapter"])
    for stage in stages:
        train_stage(policy, train, stage, run, done if stage == start_stage else 0, steps, validate)
        validate(stage, steps[stage])
        run.evaluate(policy, test, f"stage{stage}", steps[1] * (stage - 1) + steps[stage])


# ------------------------------------------------------------------------------------------------------------- data
@dataclass
class Example:
    """One problem: its text, its reference answer, and the token ids of the attempt-1 prompt."""

    question: str
    target: str
    prompt: list[int]
    columns: dict[str, Any] = field(default_factory=dict)  # what rewards in TRL's form get by name


Splits = tuple[list[Example], list[Example], list[Example]]  # train, validation, test
Conversations = list[list["Turn"]]  # a conversation is the list of its turns


def load_tokenizer(config: Config) -> Any:
    """The tokenizer with its chat template. Raises UserError."""
    name, given = config.model.name, config.model.chat_template
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # a wrong name, no network, or a damaged file: each library has its own class for it
        place = "there" if os.path.isdir(name) else "on the hub, and no folder here"
        raise UserError(f"model.name: {name}: no tokenizer {place}: {first_line(error)}") from None
    if template := given:
        with suppress(OSError, ValueError):  # no file: it is the template itself
            template = Path(os.path.expanduser(given)).read_bytes().decode("utf-8-sig", errors="replace")
        if not ("{{" in template or "{%" in template) or "\ufffd" in template:
            raise UserError(f"model.chat_template: no Jinja template, nor a UTF-8 file of one: {given!r}")
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        with suppress(Exception):  # multimodal families may keep it beside the tokenizer, for their processor
            tokenizer.chat_template = transformers.ProcessorMixin.get_processor_dict(name)[0]["chat_template"]
    if not tokenizer.chat_template or len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up, without files
        raise UserError(f"model.name: {name} has no tokenizer with a chat template; set model.chat_template to one")
    return tokenizer


def opening_turns(config: Config, *said: str) -> list[dict[str, str]]:
    """The system prompt, the worked examples and what was `said` after them as turns of the chat."""
    system, examples = config.prompts.system, config.prompts.examples
    texts = [text for example in examples for text in (example.input, example.output)] + list(said)
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    return [{"role": "system", "content": system}] + turns if system else turns


def chat_text(tokenizer: Any, config: Config, *said: str) -> str:
    """The chat template's text of system prompt + worked examples + `said`, open for the assistant to write. For the
    examples it renders markers, which then give way to the texts: so these stand verbatim, also where the template cuts
    the reasoning out of earlier turns. Raises UserError for a part that it does not render."""
    system, texts, turns = config.prompts.system, {}, opening_turns(config, *said)
    for number, turn in enumerate(turns[bool(system) : -len(said)]):
        marker = f"WORKEDEXAMPLETURN{number}STANDSHERE"
        texts[marker], turn["content"] = turn["content"], marker
    how = {"tokenize": False, "add_generation_prompt": True}
    try:
        text = tokenizer.apply_chat_template(turns, **how, **config.model.chat_template_kwargs)
    except Exception as error:  # templates raise what they like
        at_fault = "prompts.system" if system and "system" in str(error).lower() else "model.chat_template"
        raise UserError(f"{at_fault}: the chat template refuses it: {first_line(error)}") from None
    if system.strip() not in text:
        raise UserError("prompts.system: the chat template does not render it; put it into the problems")
    if any(text.count(marker) != 1 for marker in texts):
        raise UserError("prompts.examples: the chat template does not render each once; use prompts.system")
    return re.sub("|".join(texts), lambda marker: texts[marker[0]], text) if texts else text


def attempt2_bridge(tokenizer: Any, config: Config) -> tuple[list[int], str]:
    """The token ids that stand between attempt 1's last token and attempt 2's first, and the think tag if left open.

    Attempt 2's prompt is attempt 1's + attempt 1 verbatim + bridge. Rendered as a whole, attempt 1 would lose its
    reasoning (Qwen3's template cuts it out of history) and be tokenised anew. Fills in the budgets that the config
    leaves open. Raises UserError."""
    problem, attempt1 = "PROBLEMSTANDSHERE", "FIRSTATTEMPTSTANDSHERE"
    correction, train = config.prompts.self_correction, config.train
    head, _, tail = chat_text(tokenizer, config, problem, attempt1, correction).partition(attempt1)
    if problem not in head.upper() or not tail or attempt1 in tail or correction.strip() not in tail:
        what = "the problem, then attempt 1 once, and prompts.self_correction after it"
        raise UserError(f"model.chat_template: must render {what}")
    bridge = tokenizer(tail, add_special_tokens=False)["input_ids"]
    need = train.max_prompt_length_attempt1 + train.max_new_tokens_attempt1 + len(bridge)
    train.max_prompt_length_attempt2 = given = train.max_prompt_length_attempt2 or need
    longest = given + train.max_new_tokens_attempt2
    config.model.max_seq_length = whole = config.model.max_seq_length or longest
    refuse(
        (given < need, f"train.max_prompt_length_attempt2: needs {need} or more to hold attempt 1; leave it out"),
        (whole < longest, f"model.max_seq_length: a conversation can take {longest} tokens; leave it out"),
    )
    return bridge, "<think>" if tail.rstrip().endswith("<think>") else ""


def load_examples(config: Config, tokenizer: Any, smoke: int | None = None) -> Splits:
    """Train, validation and test examples, no question in two of them, whatever the seed or order. Raises UserError."""
    wanted, splits = config.dataset, load_splits(config.dataset)
    names, setting = ([wanted.split], "split") if wanted.split else (["train", "test"], "name")
    if missing := [name for name in names if name not in splits]:
        there = f"it has {', '.join(splits)}; set dataset.split to one and dataset.test_split_size"
        raise UserError(f"dataset.{setting}: {wanted.name} has no split {missing[0]}; {there}")
    rows = [read_rows(splits[name], name, config, tokenizer) for name in names]
    train, test = hold_out(*rows, wanted.test_split_size, "dataset.test_split_size") if wanted.split else rows
    asked = {plain(example) for example in test}
    kept = [example for example in train if plain(example) not in asked]
    if len(kept) < len(train):
        log(f"Warning: {len(train) - len(kept)} train rows are also test rows; they are not trained on.")
    refuse((not kept, f"dataset.name: every train row of {wanted.name} is also a test row; nothing is left to learn"))
    train, validation = hold_out(kept, config.eval.validation, "eval.validation")
    return train[:smoke], validation, test[: wanted.test_split_size][: config.eval.max_examples]


def plain(example: Example) -> str:
    """A question without what does not tell it from another: white space."""
    return " ".join(example.question.split())


def hold_out(rows: list[Example], count: int | None, name: str) -> tuple[list[Example], list[Example]]:
    """The rows to keep and `count` others, chosen by the hash of the question, so that a question is on one side."""
    by_hash = sorted(rows, key=lambda row: hashlib.sha256(plain(row).encode(errors="replace")).digest())
    asked = set(map(plain, by_hash[:count]))
    kept, held_out = ([row for row in rows if (plain(row) in asked) is out] for out in (False, True))
    refuse((not kept, f"{name}: must leave some of the {len(rows)} rows to train on, and is {count}; lower it"))
    return kept, held_out


def load_splits(wanted: DatasetConfig) -> dict[str, Any]:
    """The dataset's splits by name: from a file, a folder (laid out as on the hub, or by save_to_disk) or the hub. Each
    split of a folder is read by itself: its columns may have other types than another's. Raises UserError."""
    place, path, name = wanted.name, Path(wanted.name), wanted.config_name
    try:
        if name and (path / name).is_dir():
            path, name = path / name, None
        if any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            reader = path.suffix[1:] if path.suffix in (".csv", ".parquet") else "json"
            loaded = datasets.load_dataset(reader, data_files=str(path))
        elif path.is_dir():
            found, loaded = datasets.load_dataset_builder(str(path), name), {}
            for split, files in found.config.data_files.items():
                place = f"{wanted.name} ({split})"
                names = {re.sub(r"(-\d+-of-\d+.*|/\d+)?\.\w+$", "", os.path.relpath(file, path)) for file in files}
                if len(names) > 1:
                    raise ValueError(f"{', '.join(sorted(names))} are all named as this split's; keep one")
                loaded[str(split)] = datasets.load_dataset(found.name, data_files=files, split="train")
        else:
            loaded = datasets.load_dataset(wanted.name, wanted.config_name, revision=wanted.revision)
        loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
        for split in loaded:
            place = f"{wanted.name} ({split})"
            loaded[split].data.validate(full=True)  # the reader of JSON lets text pass that is not UTF-8
    except Exception as error:  # one class a library, a network and a file format
        cause = error.__cause__ or error
        reason = "it is empty" if isinstance(cause, StopIteration) else first_line(cause)
        raise UserError(f"dataset.name: cannot load {place}: {reason}") from None
    return loaded


def read_rows(rows: Any, split: str, config: Config, tokenizer: Any) -> list[Example]:
    """The examples of a split. Rows that cannot be used are left out with a count. Raises UserError."""
    wanted, reward = config.dataset, config.reward
    for setting, column in (("input_field", wanted.input_field), ("target_field", wanted.target_field)):
        if column not in rows.column_names:
            there = f"it has {', '.join(rows.column_names)}{did_you_mean(column, rows.column_names)}"
            raise UserError(f"dataset.{setting}: no column {column!r} in {wanted.name} ({split}); {there}")
    if any(isinstance(target, float) and abs(target) >= 2**53 for target in rows[wanted.target_field]):
        raise UserError(f"dataset.target_field: numbers of {split} are too large to be read exactly; make them text")
    extract, kept, faults = answer_reader(reward.answer_extractor, reward.match), {}, []
    for number, pair in enumerate(zip(rows[wanted.input_field], rows[wanted.target_field], strict=True)):
        try:
            kept[number] = read_row(*pair, extract, config, tokenizer)
        except UserError as error:
            faults.append(f"{error} (row {number} of {split} in {wanted.name})")
    if faults:
        left_out = f"{len(faults)} of {len(rows)} {split} rows cannot be used"
        refuse((2 * len(faults) > len(rows), f"{faults[0]}: {left_out}"))
        log(f"Warning: {left_out} and are left out; the first: {faults[0]}.")
    refuse((not kept, f"dataset.name: {wanted.name} has no {split} rows"))
    targets = [example.target for example in kept.values()]
    columns = rewards.trl_columns(rows.select(kept), targets, reward.fn, reward.module, reward.columns, extract)
    return [replace(example, columns=named) for example, named in zip(kept.values(), columns, strict=True)]


def read_row(question: Any, target: Any, extract: Any, config: Config, tokenizer: Any) -> Example:
    """A row as an example. A target that the file's reader took for a number or a date becomes text again. Raises
    UserError for what is wrong with the row."""
    if isinstance(target, date):
        target = target.isoformat().removesuffix("T00:00:00")
    if type(target) in (int, float) and not math.isnan(target):
        target = str(target)
    for setting, text in (("input_field", question), ("target_field", target)):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"dataset.{setting}: {reprlib.repr(text)} is no text; mend or remove the row")
    if not rewards.is_correct(target, target, extract):
        others = [name for name in rewards.extractors_that_read(target) if name != extract.name]
        instead = f"; {', '.join(others)} would" * bool(others)
        raise UserError(f"dataset.target_field: {extract.name} finds no answer in {target[-60:]!r}{instead}")
    return Example(question, target, first_prompt(question, config, tokenizer))


def first_prompt(question: str, config: Config, tokenizer: Any) -> list[int]:
    """The token ids of attempt 1's prompt. One over budget is refused, never cut. Raises UserError."""
    prompt = tokenizer(chat_text(tokenizer, config, question), add_special_tokens=False)["input_ids"]
    if len(prompt) > (most := config.train.max_prompt_length_attempt1):
        raise UserError(f"train.max_prompt_length_attempt1: {most}, and a prompt has {len(prompt)} tokens; raise it")
    return prompt


def fingerprints(data: Splits, bridge: list[int], config: Config) -> dict[str, str]:
    """What a resumed run must find as it was beside the config: rows as prompts, the turns between, the rewards."""
    code = [Path(file).read_text("latin-1") for file in (rewards.__file__, config.reward.module) if file]
    marked = {
        "rows": [[[row.prompt, row.target, row.columns] for row in part] for part in data],
        RENDERED: bridge,
        "code of reward.module or reward_function": code,
        "number format of model.dtype": number_format(config),
        "train.py": Path(__file__).read_text("latin-1"),
    }
    # An object that is no JSON, such as an image, stands as its text, without its address: each process has another.
    dump = partial(json.dumps, default=lambda thing: re.sub(" at 0x\\w+", "", str(thing)))
    texts = {name: dump(thing).encode() for name, thing in marked.items()}
    return {name: hashlib.sha256(text).hexdigest()[:16] for name, text in texts.items()}


def stage_batches(stage: int, examples: int, config: Config) -> list[list[int]]:
    """The batches of a whole stage as row indices: a seeded shuffle each epoch, leftovers (under a batch) left out. A
    function of its arguments alone, so a resumed run finds its place by the step's number. Raises UserError."""
    train = config.train
    problems, epochs, steps = (getattr(train, f"stage{stage}_{key}") for key in ("batch_size", "epochs", "steps"))
    if not train.has_stage(stage):
        return []
    size = problems * train.oversample
    steps = round(epochs * (examples // size)) if steps is None else steps
    if examples < size:
        raise UserError(f"train.stage{stage}_batch_size: x oversample = {size}, only {examples} train rows; lower it")
    if not steps:
        raise UserError(f"train.stage{stage}_epochs: {epochs} is less than one step; raise it, or 0 skips the stage")
    batches = []
    for epoch in range(math.ceil(steps / (examples // size))):
        order = list(range(examples))
        random.Random(f"{train.seed}/stage{stage}/{epoch}").shuffle(order)
        batches += [order[i : i + size] for i in range(0, examples - size + 1, size)]
    return batches[:steps]


# ------------------------------------------------------------------------------------------------------------ model
ENOUGH_TOKENS = 32768  # of a micro-batch: with a fourth as many an H200 waited for the host (.github/RESULTS.md)
ATTENTION_TOKENS = 4  # where rows share prompts, a micro-batch counts so many that only the attention sees as one
ROPE_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that change with the length of the row
LOSS_SCALE = 2.0**16  # of float16, at first and at most: a gradient of 1e-9, times this, is not rounded to 0


@dataclass
class Policy:
    """The model being trained and what goes with it. Its reference is itself inside `reference(policy)`."""

    model: Any  # a PEFT model, always in training mode outside `generating(policy)`
    tokenizer: Any
    eos_token_ids: list[int]
    pad_token_id: int
    bridge: list[int]  # what the chat template puts between attempt 1 and attempt 2: turn ends, instruction
    think_prefix: str  # "<think>" where the chat template itself opens the tag, so that rewards see the pair
    for_generation: Callable[[], Any]
    for_training: Callable[[], Any]
    micro_tokens: int  # tokens of a micro-batch of the update, see `micro_batches`; an out-of-memory halves it
    logit_scale: float = 1.0  # the constant by which the family multiplies the head's output
    loss_scale: float = 1.0  # float16: a power of two above 1 by which the loss is multiplied, see `train_step`
    memory_share: float = 0.5  # of the free GPU memory: what a rollout may take
    recompute: Callable[[], Any] | None = None  # `for_training` with gradient checkpointing, while `auto` is without
    sampler: Any = None
    share: str = ""  # the forward's argument for rows that share prompts, see `lay_out`; "": it has none

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def reference(policy: Policy) -> Any:
    """Context in which the policy is the reference pi_ref: the same weights, the adapter switched off."""
    return policy.model.disable_adapter()


def load_policy(config: Config, tokenizer: Any, adapter: Path | None = None) -> Policy:
    """The policy with its sampler; `adapter` holds LoRA weights to start from. Raises UserError if these do not fit."""
    bridge, think_prefix = attempt2_bridge(tokenizer, config)
    model, for_generation, for_training, share = load_model(config)
    name, train, embedding = config.model.name, config.train, model.get_input_embeddings().weight
    if max(bridge, default=0) >= len(embedding):
        raise UserError(f"model.name: the tokenizer of {name} has tokens that its model lacks: it is another model's")
    wanted, able = config.model.gradient_checkpointing, model.get_base_model().supports_gradient_checkpointing
    refuse((wanted is True and not able, f"model.gradient_checkpointing: {name} has none; set it to false"))
    if adapter:
        load_adapter(model, adapter)
    if DEVICE.type == "cpu" and model.num_parameters() < 2**24:
        torch.set_num_threads(1)  # matrices this small keep threads waiting for one another
    # A model's own generation_config (top_k, top_p, repetition penalty) would sample from another policy than the one
    # whose log-probs are trained. Only its token ids are kept.
    eos = eos_ids(model, tokenizer, name)
    pad = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    longest = train.max_prompt_length_attempt2 + train.max_new_tokens_attempt2
    switches = for_generation, partial(for_training, wanted is True)
    policy = Policy(model, tokenizer, eos, pad, bridge, think_prefix, *switches, train.micro_batch_size * longest)
    policy.memory_share = config.model.fast_inference_gpu_mem
    if wanted == "auto":  # it costs time, so it waits for an out-of-memory
        policy.recompute = partial(for_training, True) if able else None
        policy.micro_tokens = min(policy.micro_tokens, max(longest, ENOUGH_TOKENS))
    policy.loss_scale = LOSS_SCALE if embedding.dtype == torch.float16 else 1.0
    policy.for_training()
    find_logit_scale(policy)
    if share:
        share_where_exact(policy, share)
    policy.sampler = make_sampler(policy, config.model.fast_inference, name)
    return policy


def load_model(config: Config) -> tuple[Any, ...]:
    """The PEFT model, the switch to generation, the one to training, which is told about gradient checkpointing, and
    what lets rows share a prompt: Unsloth's where it serves, else those of transformers + PEFT. Both give base weights
    in `number_format`, the same LoRA settings and float32 LoRA weights. Raises UserError."""
    name = config.model.name
    if config.model.load_in_4bit and DEVICE.type == "cpu":
        raise UserError("model.load_in_4bit: needs a GPU; set it to false on a CPU")
    torch.manual_seed(config.train.seed)  # LoRA's A matrices
    try:
        text = text_config(config)
        check_length(text, config)
        model, *switches = load_with_unsloth(config) if unsloth_serves(text) else load_with_transformers(config, text)
    except torch.OutOfMemoryError:
        raise UserError(f"model.name: {name} does not fit in GPU memory; set model.load_in_4bit: true") from None
    except UserError:
        raise
    except Exception as error:  # a model's files and code raise what they like
        raise UserError(f"model.name: {name} cannot be loaded: {first_line(error)}") from None
    model.peft_config["default"].base_model_name_or_path = name
    return model, *switches


def text_config(config: Config) -> Any:
    """The model's own config or, of a multimodal one, that of its text part."""
    wanted = config.model
    whole = transformers.AutoConfig.from_pretrained(wanted.name, trust_remote_code=wanted.trust_remote_code)
    text = whole.get_text_config()
    if text is not whole:
        shared = {name: getattr(whole, name) for name in reports.SHARED_SETTINGS if hasattr(whole, name)}
        text.update(shared | {"multimodal_parent": whole.model_type})
    return text


def check_length(text: Any, config: Config) -> None:
    """A conversation must fit in the model's positions, and in those that some rotary embeddings start from: past them
    a token's place, and so its log-prob, depends on how long its row is. Raises UserError."""
    rope, limits = getattr(text, "rope_parameters", None) or {}, [getattr(text, "max_position_embeddings", None)]
    for part in (rope, *rope.values()):  # one, or one a kind of layer
        if isinstance(part, dict) and part.get("rope_type") in ROPE_BY_LENGTH:
            limits.append(part.get("original_max_position_embeddings"))
    longest = config.train.max_prompt_length_attempt2 + config.train.max_new_tokens_attempt2
    limit = min(filter(None, limits), default=longest)
    if longest > limit:
        what = f"a conversation can take {longest} tokens, and {config.model.name} is exact up to {limit}"
        raise UserError(f"train.max_new_tokens_attempt1: {what}; lower the budgets")


def unsloth_serves(text: Any) -> bool:
    """Whether Unsloth runs here and has code of its own for the model."""
    written = text.model_type in UNSLOTH_FAMILIES and not hasattr(text, "multimodal_parent")
    by_length = (getattr(text, "rope_parameters", None) or {}).get("rope_type") in ROPE_BY_LENGTH
    return DEVICE.type != "cpu" and written and not by_length and not getattr(text, "sliding_window", None)


def number_format(config: Config) -> torch.dtype:
    """model.dtype. `auto` is float16 on cards that would only emulate bfloat16, those before capability 8.0."""
    auto = "bfloat16" if DEVICE.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    auto = "float32" if DEVICE.type == "cpu" else auto
    return getattr(torch, auto if config.model.dtype == "auto" else config.model.dtype)


def load_with_unsloth(config: Config) -> tuple[Any, ...]:
    import unsloth.utils.attention_dispatch
    from unsloth import FastLanguageModel

    wanted, checkpointing = config.model, config.model.gradient_checkpointing is not False
    how = {"load_in_4bit": wanted.load_in_4bit, "trust_remote_code": wanted.trust_remote_code}
    how |= {"max_seq_length": wanted.max_seq_length, "use_exact_model_name": True, "text_only": True}
    with redirect_stdout(io.StringIO()):  # banners
        base, _ = FastLanguageModel.from_pretrained(wanted.name, dtype=number_format(config), **how)
    make_deterministic(base)
    how = lora_settings(base, config) | {"use_gradient_checkpointing": checkpointing, "bias": "none"}
    with redirect_stdout(io.StringIO()):
        model = FastLanguageModel.get_peft_model(base, random_state=config.train.seed, **how)

    # Unsloth's own for shared prompts waits for a compiler. Its backward took 333 ms, all of ours, gathers too, 143.
    unsloth.utils.attention_dispatch._flex_shared_prefix_attention = attend_in_rows
    switches = partial(FastLanguageModel.for_inference, model), partial(FastLanguageModel.for_training, model)
    # Cards before capability 8.0 have no fused attention for grouped heads.
    fused = DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    return model, *switches, "prefix_seg_info" if fused else ""


def load_with_transformers(config: Config, text: Any) -> tuple[Any, ...]:
    """The same without Unsloth. Raises UserError or ValueError for what it would load wrongly."""
    numbers, place = number_format(config), {"": DEVICE} if DEVICE.type != "cpu" else None
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": numbers}
    bits = transformers.BitsAndBytesConfig(**nf4) if config.model.load_in_4bit else None
    base = load_base(config, text, dtype=numbers, device_map=place, quantization_config=bits)
    make_deterministic(base)
    base.gradient_checkpointing_disable()  # config.json may switch it on
    model = get_peft_model(base, PeftLoraConfig(**lora_settings(base, config), task_type="CAUSAL_LM"))

    def for_training(checkpointing: bool) -> None:
        model.train()
        if checkpointing:  # never to be off again: see `use_less_memory`
            base.gradient_checkpointing_enable({"use_reentrant": False})

    return model, model.eval, for_training, ""


def load_base(config: Config, text: Any, **how: Any) -> Any:
    """The model without an adapter; of a multimodal one its text part. Raises ValueError for random weights."""
    how |= {"trust_remote_code": config.model.trust_remote_code, "config": text, "key_mapping": reports.TEXT_KEYS}
    how |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    base, found = transformers.AutoModelForCausalLM.from_pretrained(config.model.name, **how)
    if odd := sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]):
        raise ValueError(f"its weights do not fit its config.json: {odd[0]} is missing or has another shape")
    return base


def make_deterministic(base: Any) -> None:
    """Switches off what makes a token's log-prob depend on more than the tokens before it: dropout and noise, and the
    look at the row's length of rotary embeddings, which `check_length` keeps where they do not change. Raises
    ValueError for a router whose noise stays."""
    for module in base.modules():
        if hasattr(module, "router_jitter_noise"):  # PhiMoE's, which is also a constant of its evaluation
            raise ValueError("it draws its experts at random in training")
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "jitter_noise" in name):
                setattr(module, name, 0.0)
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):  # one for each kind of layer
            module.rope_type = {layers: "default" if k in ROPE_BY_LENGTH else k for layers, k in kind.items()}
        elif kind in ROPE_BY_LENGTH:
            module.rope_type = "default"


def lora_settings(base: Any, config: Config) -> dict[str, Any]:
    """PEFT's settings for this model. Raises UserError that lists the targets it lacks, and all that it has."""
    lora, head, layers, barred = config.model.lora, base.get_output_embeddings(), {}, []
    for path, part in base.named_modules():
        if isinstance(part, torch.nn.Linear | transformers.pytorch_utils.Conv1D) and part is not head:
            layers[path] = re.search(r"[^.]+(\.\d+)?$", path)[0]  # one of a list is called as its list, then its number
        # Three kinds cannot have an adapter: a router; a shared expert, of which PEFT makes adapters of all experts,
        # which cannot be loaded again; what is read past its adapter: Mamba's out_proj by a fused kernel, Gemma 3n's
        # correction_coefs in training.
        if path.endswith(".router") or (hasattr(part, "experts") and not hasattr(part, "self_attn")):
            barred.append(f"{path}.")
        if hasattr(part, "A_log") and hasattr(part, "in_proj"):
            barred.append(f"{path}.out_proj")
        if hasattr(part, "correction_coefs"):
            barred.append(f"{path}.correction_coefs")
    cannot = {name for path, name in layers.items() if path.startswith(tuple(barred))}
    every = sorted(set(layers.values()) - cannot)
    targets = every if "all-linear" in lora.target_modules else list(dict.fromkeys(lora.target_modules))
    there = [f".{path}" for path, name in layers.items() if name in every]
    missing = [target for target in targets if not any(path.endswith(f".{target}") for path in there)]
    if missing or not targets:
        has = f"{config.model.name} has no {', '.join(missing)} that LoRA can train; it has {', '.join(every)}"
        raise UserError(f"model.lora.target_modules: {has}; all-linear stands for all of these")
    if cannot:
        log(f"LoRA leaves out {', '.join(sorted(cannot))}: a router, shared experts, or what is read past an adapter.")
    if left := [name for name in every if not any(f".{target}".endswith(f".{name}") for target in targets)]:
        log(f"Without LoRA: {', '.join(left)}. With model.lora.target_modules: all-linear they would have it.")
    return {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": targets}


def eos_ids(model: Any, tokenizer: Any, name: str) -> list[int]:
    """Every token that ends an answer: those of the generation config, of the model config and of the tokenizer."""
    named = [getattr(part, "eos_token_id", None) for part in (model.generation_config, model.config, tokenizer)]
    with suppress(Exception):  # no generation_config.json; a loader may have put another in its place
        named.insert(0, transformers.GenerationConfig.from_pretrained(name).eos_token_id)
    ids = [i for given in named for i in (given if isinstance(given, list) else [given]) if i is not None]
    if not ids:
        raise UserError("model.name: neither the model nor its tokenizer names an EOS token")
    return list(dict.fromkeys(ids))


def load_adapter(model: Any, folder: Path) -> None:
    """Copies saved LoRA weights into `model`. Raises UserError when they do not fit, or the file is damaged."""
    saved = read_weights(folder / "adapter_model.safetensors")
    ours = get_peft_model_state_dict(model, save_embedding_layers=False)
    theirs, wanted = ({f"{name} {tuple(w.shape)}" for name, w in weights.items()} for weights in (saved, ours))
    if odd := sorted(theirs ^ wanted):
        raise UserError(f"--resume-adapter {folder}: is of another base model: {odd[0]} does not match")
    set_peft_model_state_dict(model, saved)


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """A safetensors file. Raises UserError where it is damaged, or holds NaN or infinity."""
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read: {first_line(error)}; give another adapter or checkpoint") from None
    if not all(weight.float().isfinite().all() for weight in weights.values()):
        raise UserError(f"{file}: holds NaN or infinity; give another adapter or checkpoint")
    return weights


def find_logit_scale(policy: Policy) -> None:
    """Sets the constant by which the family scales its logits after the head: of those in its config (some families
    multiply by one, others divide) the one that gives the model's own log-probs on a short row. Raises UserError."""
    config, row, off = policy.model.config, [i % len(policy.tokenizer) for i in range(5, 17)], {}
    named = [getattr(config, name, None) for name in ("logits_scaling", "logit_scale", "lm_head_multiplier")]
    try:
        with torch.no_grad(), reference(policy):  # the adapter's dropout would differ between the two
            with autocast(policy):
                logits = policy.model(input_ids=torch.tensor([row], device=DEVICE)).logits[0, :-1]
            own = logits.float().log_softmax(-1).gather(-1, torch.tensor(row[1:], device=DEVICE)[:, None])[:, 0]
            for scale in [1.0, *(power for x in named if isinstance(x, int | float) and x for power in (x, 1 / x))]:
                policy.logit_scale = scale
                ours = completion_log_probs(policy, [[Turn(row[:1], row[1:])]], 1.0)
                off[scale] = (ours - own).abs().max().item()
    except Exception as error:  # a model's code raises what it likes
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"model.name: {config.model_type} cannot be trained: {why}") from None
    if not own.isfinite().all():
        raise UserError(f"model.dtype: the logits of {config.model_type} are not finite in {logits.dtype}; set another")
    policy.logit_scale = min(off, key=off.get)
    exact = policy.model.get_input_embeddings().weight.dtype == torch.float32
    if not off[policy.logit_scale] < (1e-3 if exact else 0.1):
        why = "changes its logits after the head in an unknown way, or is random in training"
        raise UserError(f"model.name: {config.model_type} {why}: unsupported")


def share_where_exact(policy: Policy, share: str) -> None:
    """Lets rows share prompts by the forward's argument `share`, if that leaves the log-probs of three rows alone."""
    prompt, longest = [5, 6, 7, 8], min(100, policy.micro_tokens // 4)
    rows = [[Turn(prompt, [n % len(policy.tokenizer) for n in range(at, at + longest)])] for at in (9, 19, 29)]
    with torch.no_grad(), reference(policy):  # an adapter may have dropout
        whole, policy.share = completion_log_probs(policy, rows, 1.0), share
        try:
            off = (completion_log_probs(policy, rows, 1.0) - whole).abs().mean().item()
            if not off < 0.1:
                raise ValueError(f"log-probs would be {off:.2g} nats off")
        except Exception as error:  # also whatever a version of Unsloth without the argument raises
            policy.share = ""
            log(f"Rows do not share their prompts in the update: {first_line(error)}.")


@contextmanager
def generating(policy: Policy) -> Iterator[None]:
    """Context for model.generate: inference mode on, and back to training mode however it ends."""
    policy.for_generation()
    try:
        with torch.no_grad(), autocast(policy):
            yield
    finally:
        policy.for_training()


def autocast(policy: Policy) -> Any:
    """Arithmetic in the base weights' 16 bits (LoRA weights are kept in float32), or plain float32."""
    dtype = policy.model.get_input_embeddings().weight.dtype
    return torch.autocast(DEVICE.type, dtype=dtype) if dtype.itemsize == 2 else nullcontext()


# ---------------------------------------------------------------------------------------------------------- a stage
MAX_GRAD_NORM = 1.0
MAX_SKIPPED_STEPS = 10  # in a row, until a run whose loss is not finite ends
SILENT_STEPS = 3  # in a row, until a line says that nothing is learned


def train_stage(
    policy: Policy, examples: list[Example], stage: int, run: Run, done: int, steps: dict[int, int], validate: Callable
) -> None:
    """One stage from its step `done` on: rolls out, updates, writes down, and calls `validate(stage, step)` before it
    goes on from a checkpoint. The stages differ in `stage_returns` alone. Raises Interrupted after saving one, RunError
    when MAX_SKIPPED_STEPS steps in a row had a loss or gradient that is not finite."""
    config, train = run.config, run.config.train
    batches = stage_batches(stage, len(examples), config)
    optimizer = AdamW(policy.trainable.values(), lr=train.learning_rate, weight_decay=0.0)
    if 0 < done < len(batches):
        load_optimizer(policy, optimizer, run.checkpoint / OPTIMIZER)
    skipped, silent, every = 0, 0, train.checkpoint_every or math.inf
    for step in range(done + 1, len(batches) + 1):
        if (step - 1) % every == 0:
            validate(stage, step - 1)
        problems, rate = [examples[i] for i in batches[step - 1]], learning_rate(step, len(batches), train)
        figures, conversations = training_step(policy, optimizer, problems, stage, step, rate, config)
        event = {"event": "train", "stage": stage, "step": step, "global_step": steps[1] * (stage - 1) + step}
        run.log_step(event | figures, problems, conversations, len(batches))
        skipped, silent = (skipped + 1) * figures["skipped"], (silent + 1) * (figures["without_signal"] == 1)
        if skipped == MAX_SKIPPED_STEPS:
            where = f"stage {stage}, step {step}; samples are in {run.folder}/samples.jsonl"
            fix = "set model.dtype: bfloat16 in a new run, or " * (policy.loss_scale > 1)
            raise RunError(f"no finite gradient in {skipped} steps in a row ({where}); {fix}lower train.learning_rate")
        if silent == SILENT_STEPS:
            log(reports.silence_warning(figures, silent))
        stop, last = bool(SIGNALS_SEEN), step == len(batches)
        if last or stop or step % every == 0:
            run.save_checkpoint(policy, stage, step, None if last else optimizer)
            if stop:
                raise Interrupted


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """The rate of a stage's step, 1 to `steps`: a trapezoid. Linear warm-up over `warmup_steps`, then constant, and
    over the last share `lr_decay` of the stage linearly towards 0."""
    rise, fall = step / max(1, train.warmup_steps), (steps + 1 - step) / max(1.0, train.lr_decay * steps)
    return train.learning_rate * min(1.0, rise, fall)


def training_step(
    policy: Policy, optimizer: Optimizer, problems: list[Example], stage: int, step: int, rate: float, config: Config
) -> tuple[dict[str, Any], Conversations]:
    """One step: rolls out a batch of problems and updates on those with something to learn from. Returns what
    metrics.jsonl says of it and all conversations."""
    train, seed = config.train, f"{config.train.seed}/stage{stage}/{step}"
    corrections = train.stage1_corrections if stage == 1 else 1
    rows = [problem for problem in problems for _ in range(train.num_generations // corrections)]
    for group in optimizer.param_groups:
        group["lr"] = rate
    if step % 100 == 0 and policy.loss_scale > 1:  # or one early overflow would lose small gradients for ever
        policy.loss_scale = min(2 * policy.loss_scale, LOSS_SCALE)
    torch.manual_seed(random.Random(seed).getrandbits(31))  # LoRA dropout, and whatever else draws
    start = time.perf_counter()
    conversations = roll_out(policy, rows, config, train.generation_temperature, seed, corrections)
    sampled = time.perf_counter()
    chosen, without_signal = dynamic_sampling(conversations, stage, train)
    figures = reports.attempt_means(conversations, config) | train_step(policy, optimizer, chosen, stage, train)
    figures |= {"seconds_rollout": sampled - start, "seconds_update": time.perf_counter() - sampled}
    tokens = sum({id(turn): len(turn.completion) for c in conversations for turn in c}.values())  # a shared one once
    figures |= {"tokens_per_second": tokens / figures["seconds_rollout"], "without_signal": without_signal}
    figures |= {"reward_gap": figures["reward_attempt2"] - figures["reward_attempt1"], "learning_rate": rate}
    figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None
    return figures, conversations


# ---------------------------------------------------------------------------------------------------------- rollout
@dataclass
class Turn:
    """One attempt at one problem. In a conversation, a later prompt holds the earlier turns."""

    prompt: list[int]
    completion: list[int]  # up to and with EOS
    text: str = ""  # what rewards see: the completion decoded, EOS removed, tags kept
    answer: str = ""  # extracted from it, "" where there is none
    reward: float = 0.0
    correct: bool = False
    flexible: bool = False  # correct if a lenient reader looks for the answer: for diagnosis, never a reward
    truncated: bool = False  # the budget ended it, not EOS
    log_probs: list[float] = field(default_factory=list)  # the sampler's, of each token under softmax(logits / T)

    @property
    def written(self) -> list[int]:
        """The completion without its EOS."""
        return self.completion if self.truncated else self.completion[:-1]


def roll_out(
    policy: Policy, examples: list[Example], config: Config, temperature: float, seed: str, corrections: int = 1
) -> Conversations:
    """Samples and grades both attempts at every example. With `corrections` m each first attempt stands in m
    conversations in a row and is corrected in each anew. Raises RewardError."""
    policy.sampler.keeps = True  # attempt 2 goes on from attempt 1's K/V
    firsts = take_turns(policy, examples, config, temperature, f"{seed}/1", [])
    policy.sampler.keeps = False
    opened = [[first] for first in firsts for _ in range(corrections)]
    examples = [example for example in examples for _ in range(corrections)]
    seconds = take_turns(policy, examples, config, temperature, f"{seed}/2", opened)
    return [[*before, second] for before, second in zip(opened, seconds, strict=True)]


def take_turns(
    policy: Policy, examples: list[Example], config: Config, temperature: float, seed: str, earlier: Conversations
) -> list[Turn]:
    """Samples and grades one attempt at every example. After the turns of `earlier` its prompt holds these verbatim,
    reasoning included. Raises RewardError."""
    prompts, budget = [example.prompt for example in examples], config.train.max_new_tokens_attempt1
    if earlier:
        prompts = [[*last.prompt, *last.written, *policy.bridge] for *_, last in earlier]
        budget = config.train.max_new_tokens_attempt2
    made = sample(policy, prompts, budget, temperature, seed)
    turns = []
    for prompt, completion, log_probs in zip(prompts, *made, strict=True):
        turn = Turn(prompt, completion, truncated=completion[-1] not in policy.eos_token_ids, log_probs=log_probs)
        turn.text = policy.think_prefix + policy.tokenizer.decode(turn.written, clean_up_tokenization_spaces=False)
        turns.append(turn)
    grade(turns, examples, config, earlier)
    return turns


def grade(turns: list[Turn], examples: list[Example], config: Config, earlier: Conversations) -> None:
    """Sets reward (the weighted sum of reward.fn), answer, correctness (by the answers alone). Raises RewardError."""
    wanted, texts, targets = config.reward, [turn.text for turn in turns], [example.target for example in examples]
    extract = answer_reader(wanted.answer_extractor, wanted.match)
    named = rewards.trl_arguments(turns, examples, earlier, opening_turns(config), config.prompts.self_correction)
    earned = rewards.compute_rewards(wanted.fn, wanted.weights, wanted.module, texts, targets, extract, named)
    for turn, target, reward in zip(turns, targets, earned, strict=True):
        turn.reward, turn.answer = reward, rewards.given_answer(turn.text, turn.truncated, extract)
        turn.correct = rewards.is_correct(turn.text, target, extract)
        turn.flexible = rewards.is_flexibly_correct(turn.text, target, extract)


# -------------------------------------------------------------------------------------------------------- objective
def dynamic_sampling(conversations: Conversations, stage: int, train: TrainConfig) -> tuple[Conversations, float]:
    """The conversations to train on, and the share of problems without signal (DAPO, arXiv 2503.14476).

    Where all rollouts of a problem earn alike, every advantage is 0 and only the KL terms would pull. One problem in
    `oversample` is trained, in the order of the batch; those without signal are the first to be left out."""
    (returns, _), n = stage_returns(stage, conversations, train), train.num_generations
    credit, size = (x.abs().unflatten(0, (-1, n)).amax((1, 2)) for x in (advantages(returns, stage, train), returns))
    silent = credit <= 1e-9 * size  # relative: rounding leaves traces of large rewards
    kept = silent.int().argsort(stable=True)[: len(silent) // train.oversample].sort().values.tolist()
    return [c for problem in kept for c in conversations[problem * n : (problem + 1) * n]], silent.float().mean().item()


def stage_returns(stage: int, conversations: Conversations, train: TrainConfig) -> tuple[Tensor, list[float]]:
    """What differs between the stages: the returns of attempts 1 and 2, [B, 2], and their KL weights kappa.

    Stage I: attempt 1 earns nothing and is held by beta2 (Eq. 3). Stage II: attempt 2 earns r2 + alpha (r2 - r1), so
    progress pays (Eq. 4). A bonus of your own, say on correctness alone, goes here: turns hold all that is known."""
    r1, r2 = (torch.tensor([c[i].reward for c in conversations], dtype=torch.float64) for i in (0, 1))
    if stage == 1:
        return torch.stack([torch.zeros_like(r1), r2], 1), [train.beta2, train.beta1]
    return torch.stack([r1, r2 + train.alpha * (r2 - r1)], 1), [train.beta1, train.beta1]


def advantages(returns: Tensor, stage: int, train: TrainConfig) -> Tensor:
    """Returns [B, 2] minus a baseline that does not depend on the row's own sample: the mean of the others that answer
    the same prompt, or of the whole batch where there is only one rollout a problem.

    The gradient keeps its direction and loses variance. In Stage I the m corrections of one first attempt, which stand
    in a row, are compared with each other; the first attempt is compared with other first attempts by its mean."""
    m = train.stage1_corrections if stage == 1 else 1
    if train.baseline == "none":
        return returns
    first = minus_others(returns[:, 0].view(-1, m).mean(1), train.num_generations // m).repeat_interleave(m)
    second = minus_others(returns[:, 1], m if m > 1 else train.num_generations)
    return torch.stack([first, second], 1)


def minus_others(returns: Tensor, group_size: int) -> Tensor:
    """Returns [B] minus the mean of the others in the group. Rows come in groups of `group_size` samples of one prompt;
    where that is 1, the whole batch is the group."""
    groups = returns.view(-1, group_size) if group_size > 1 else returns.view(1, -1)
    others = (groups.sum(1, keepdim=True) - groups) / (groups.shape[1] - 1)
    return (groups - others).view(-1)


def balanced(credit: Tensor, stage: int, train: TrainConfig) -> Tensor:
    """Advantages [B, 2] of Stage II brought to one scale, attempt 2's times `attempt2_weight`, where that is given.

    With alpha 10 attempt 2's returns vary about six times as much as attempt 1's. Clipping and Adam leave only a step's
    direction, so attempt 1 would hardly be trained."""
    if stage == 1 or train.attempt2_weight is None:
        return credit
    scale = credit.std(0).clamp(min=1e-6)
    return credit / scale * torch.tensor([1.0, train.attempt2_weight], dtype=credit.dtype)


def train_step(
    policy: Policy, optimizer: Optimizer, conversations: Conversations, stage: int, train: TrainConfig
) -> dict[str, Any]:
    """One REINFORCE step, on-policy, so without an importance ratio. Returns loss, KL and gradient statistics;
    "skipped": the weights are untouched, for loss, gradient or a sampled log-prob is not finite.

    An out-of-memory starts the update over in less memory, an overflow of float16 with half the loss scale: nothing
    of the step is lost. Where no scale helps, the batch is at fault, and the scale stays."""
    returns, kappas = stage_returns(stage, conversations, train)
    credit, scale = balanced(advantages(returns, stage, train), stage, train).float(), policy.loss_scale
    while True:
        optimizer.zero_grad(set_to_none=True)
        try:
            figures = add_gradients(policy, conversations, credit, kappas, train)
        except torch.OutOfMemoryError:
            figures = None
        if not figures:  # out here the error is gone, which held the activations
            use_less_memory(policy, max(len(c[-1].prompt) + len(c[-1].completion) for c in conversations))
            continue
        norm = torch.nn.utils.clip_grad_norm_(policy.trainable.values(), MAX_GRAD_NORM).item()
        if math.isfinite(norm) or not math.isfinite(figures["loss"]) or policy.loss_scale <= 2:
            break
        policy.loss_scale /= 2
        log_once("A gradient overflowed float16: the loss is scaled by half as much and the update done again.")
    skipped = not math.isfinite(norm + figures["loss"] + figures["logprob_drift"])
    if skipped:
        policy.loss_scale = scale
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return figures | {"grad_norm": norm, "skipped": skipped}


def use_less_memory(policy: Policy, longest: int) -> None:
    """After an out-of-memory: gradient checkpointing where it is `auto`, then half the micro-batch. Raises RunError
    where a micro-batch is one row of `longest` tokens already."""
    if policy.recompute:
        policy.for_training, policy.recompute = policy.recompute, None
        policy.for_training()
        how = "gradient checkpointing, as model.gradient_checkpointing: true has from the start"
    elif policy.micro_tokens * (ATTENTION_TOKENS if policy.share else 1) >= longest:
        policy.micro_tokens //= 2
        how = f"micro-batches of {policy.micro_tokens} tokens"
    else:
        raise RunError(f"one row of {longest} tokens does not fit in this card's memory; lower the token budgets")
    torch.cuda.empty_cache()
    log(f"Out of GPU memory: the update starts over with {how}.")


def add_gradients(
    policy: Policy, conversations: Conversations, credit: Tensor, kappas: list[float], train: TrainConfig
) -> dict[str, float]:
    """Adds the gradient of

        mean over conversations of  sum over turns of  [ -A * sum_t log pi_t  +  kappa * sum_t k3_t ] / N

    to the parameters. credit [B, turns] holds the advantages A, kappas a weight for each turn. N is the completion's
    own length (`sequence`) or the token budget (`constant`, Dr. GRPO, arXiv 2503.20783). Each micro-batch of
    conversations has one forward pass of the policy, one of the reference and one backward pass for all its turns.

    Returns the loss, the mean KL of each attempt's tokens, the largest of a token, and the larger of both attempts'
    mean drift (of the sampler's log-probs from these)."""
    (rows, turns), kl_max = credit.shape, torch.zeros((), device=DEVICE)
    lengths = torch.tensor([[len(turn.completion) for turn in c] for c in conversations])  # [B, turns]
    budgets = torch.tensor([train.max_new_tokens_attempt1, train.max_new_tokens_attempt2])[:turns]
    norms = lengths if train.length_norm == "sequence" else budgets
    weights = torch.stack([credit, torch.tensor(kappas).expand(rows, -1)]) / norms / rows  # [2, B, turns]
    sums = torch.zeros(turns, 4, device=DEVICE)
    for batch in micro_batches(conversations, policy.micro_tokens, bool(policy.share)):
        chosen, of_turn = [conversations[b] for b in batch], lengths[batch].flatten()
        with torch.no_grad(), reference(policy):
            reference_log_probs = completion_log_probs(policy, chosen, train.generation_temperature)
        log_probs = completion_log_probs(policy, chosen, train.generation_temperature)  # [N]
        advantage, kappa = weights[:, batch].flatten(1).repeat_interleave(of_turn, 1).to(DEVICE)  # [N] each
        kl = k3(log_probs, reference_log_probs)
        loss = kappa * kl - advantage * log_probs
        (policy.loss_scale * loss.sum()).backward()
        drift = log_probs - torch.tensor([p for c in chosen for turn in c for p in turn.log_probs], device=DEVICE)
        whose = torch.arange(turns).repeat(len(batch)).repeat_interleave(of_turn).to(DEVICE)
        sums.index_add_(0, whose, torch.stack([loss, kl, drift.abs(), torch.ones_like(kl)], 1).detach())
        kl_max = torch.maximum(kl_max, kl.detach().max())
    for weight in filter(lambda weight: weight.grad is not None, policy.trainable.values()):
        weight.grad /= policy.loss_scale
    loss, kl, drift, tokens = sums.cpu().double().T  # [turns] each
    figures = {"loss": loss.sum().item(), "kl_max": kl_max.item(), "logprob_drift": (drift / tokens).max().item()}
    return figures | {f"kl_attempt{number}": value for number, value in enumerate((kl / tokens).tolist(), 1)}


def micro_batches(conversations: Conversations, max_tokens: int, shared: bool) -> list[list[int]]:
    """Conversations by index in groups of at most `max_tokens` tokens (and at least one conversation): the longest
    first, pads counted. Where prompts are `shared`, problem by problem, a prompt counted once; but of the rows that the
    attention sees, with pads, ATTENTION_TOKENS count as one."""
    lengths, batches, tokens, longest = [len(c[-1].prompt) + len(c[-1].completion) for c in conversations], [], 0, 0
    for row in range(len(lengths)) if shared else sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        prompt, before = (conversations[n][0].prompt for n in (row, row - 1))
        tokens, longest = tokens + lengths[row] - len(prompt) * (prompt == before), max(longest, lengths[row])
        whole = (len(batches[-1]) + 1) * longest if batches else 0
        if not batches or (max(tokens, whole // ATTENTION_TOKENS) if shared else whole) > max_tokens:
            batches.append([])
            tokens = longest = lengths[row]
        batches[-1].append(row)
    return batches


def lay_out(policy: Policy, conversations: Conversations) -> tuple[Tensor, dict[str, Any], list[Tensor]]:
    """Token ids [B, L] for one forward pass, what else it takes, and where each conversation's tokens stand in [B * L].

    Each conversation is a right-padded row: causal attention never looks ahead, so no pad is seen and no mask is
    needed. (Unsloth drops masks in training mode: a left-padded row would be silently wrong.) Where the attention can
    share a prompt, there is one row without pads: a problem's prompt once, then what follows it in each of its
    conversations, whose positions go on from the prompt's."""
    rows = [torch.tensor(c[-1].prompt + c[-1].completion) for c in conversations]
    ids = pad_sequence(rows, batch_first=True, padding_value=policy.pad_token_id)
    apart, together, end = [b * ids.shape[1] + torch.arange(len(row)) for b, row in enumerate(rows)], [], 0
    if not policy.share:
        return ids, {}, apart
    for prompt, group in groupby(range(len(rows)), key=lambda b: conversations[b][0].prompt):
        shared, end = torch.arange(end, end + len(prompt)), end + len(prompt)
        for b in group:
            own = torch.arange(end, end := end + len(rows[b]) - len(prompt))
            together.append(torch.cat([shared, own]))
    packed, positions, back = torch.zeros(3, 1, end, dtype=torch.long)
    for row, place, there in zip(rows, together, apart, strict=True):
        packed[0, place], positions[0, place], back[0, place] = row, torch.arange(len(row)), there  # of several, any
    attention = {policy.share: [t.to(DEVICE) for t in (pad_sequence(together, True), back[0])]}
    return packed, attention | {"position_ids": positions.to(DEVICE)}, together


def attend_in_rows(q: Tensor, k: Tensor, v: Tensor, rows: list, scale: float | None = None) -> Tensor:
    """Causal attention where rows share prompts: q, k and v [1, T, heads, head_dim] -> the same. All else sees a prompt
    once; attention, a small part of the work, sees whole rows. `rows`, from `lay_out`: where each row's tokens stand in
    T [B, L], and where each token stands in the rows [T]. A pad reads token 0; no token of the row looks at it."""
    spread, back = rows
    whole = (F.embedding(spread, x[0].flatten(1)).unflatten(2, x.shape[2:]).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*whole, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, back)[None]


def completion_log_probs(policy: Policy, conversations: Conversations, temperature: float) -> Tensor:
    """log pi(token | all before it) of every completion token, EOS included, under softmax(logits / temperature):
    float32 [N], conversation by conversation, turn by turn.

    The last turn's row begins with the earlier turns, so one forward pass serves all. Targets are the sampled tokens:
    what ended attempt 1 need not be what stands there in attempt 2's prompt."""
    ids, how, places = lay_out(policy, conversations)
    model = policy.model.get_base_model()
    backbone = getattr(model, model.base_model_prefix, None) or model.model
    with autocast(policy):
        hidden = backbone(input_ids=ids.to(DEVICE), use_cache=False, **how)[0]  # [B, L, H]
    turns = [(places[b][len(t.prompt) - 1 :], t.completion) for b, c in enumerate(conversations) for t in c]
    where = torch.cat([place[: len(completion)] for place, completion in turns])  # a token's is the one before it
    targets = torch.tensor([token for _, completion in turns for token in completion], device=DEVICE)
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    hidden = hidden.flatten(0, 1)[where.to(DEVICE)].to(head.weight.dtype)  # [N, H]
    return LinearLogProb.apply(hidden, head.weight, head.bias, targets, policy.logit_scale, cap, temperature)


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits in float32 from hidden [N, H] and the output embedding [V, H]: bf16 would round a logit of 20 by 0.06."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return (hidden @ weight.T).float()


class LinearLogProb(torch.autograd.Function):
    """log softmax(z / T)[target] for N tokens, z = s (h W^T + b), in chunks, never holding [N, V].

    s is the family's scale, 1 in most; with a cap c, z becomes c tanh(z / c). W is frozen, so the gradient with respect
    to h, (W[target] - softmax W) s / T, is known in the forward pass: it is kept ([N, H]) and backward is one
    multiplication: two matrix products a token, where a checkpointed head has three. The softmax is in float32."""

    CHUNK_BYTES = 2**28

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale, cap, temperature):
        log_probs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        direction = torch.empty_like(hidden) if hidden.requires_grad else None
        rows = max(1, LinearLogProb.CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            logits = head_logits(hidden[chunk], weight)  # [rows, V]
            logits = logits if bias is None else logits.add_(bias)
            if cap:
                logits = logits.mul_(scale / cap).tanh_()
                slope = 1 - logits * logits
            factor = (cap if cap else scale) / temperature
            log_p = (logits * factor if factor != 1 else logits).log_softmax(1)
            log_probs[chunk] = log_p.gather(1, targets[chunk, None])[:, 0]
            if direction is not None:
                # softmax - onehot in float32 first: where the target is nearly sure, bf16 would lose the difference.
                # 2**10: float16 would round a small one to 0.
                away = log_p.exp_().scatter_add_(1, targets[chunk, None], -torch.ones_like(log_p[:, :1]))
                away = away.mul_(slope) if cap else away
                direction[chunk] = torch.mul(away, 2**10, out=torch.empty_like(away, dtype=weight.dtype)) @ weight
        ctx.save_for_backward(direction)
        ctx.factor = -scale / temperature / 2**10
        return log_probs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        (direction,) = ctx.saved_tensors
        return (gradient[:, None] * ctx.factor * direction).to(direction.dtype), *[None] * 6  # in float32 until here


def k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Schulman's K3 estimate of KL(pi || pi_ref) a token, from samples of pi: exp(d) - d - 1, d = log pi_ref - log pi.

    >= 0, and 0 where the policies agree. Past d = 10 (a token 22,000 times likelier under the reference) the
    exponential goes on as its tangent: one such token would otherwise drown, or overflow, the whole step."""
    d = reference_log_probs - log_probs
    capped = d.clamp(max=10.0)
    # expm1: near 0, exp(d) - 1 would keep less of float32 than the estimate has; what rounding leaves below 0 is 0
    return (capped.expm1() * (1 + (d - capped)) - capped).clamp(min=0)


# ------------------------------------------------------------------------------------------------------- evaluation
def evaluate(policy: Policy, examples: list[Example], config: Config, checkpoint: str) -> tuple[dict, list[dict]]:
    """The paper's metrics on `examples`, greedily unless eval.generation_temperature says otherwise: the event for
    metrics.jsonl, and a row for samples.jsonl for each example. "acc" is the share of correct answers, not a mean
    reward. Raises Interrupted."""
    size, temperature = config.eval.batch_size, config.eval.generation_temperature
    start, conversations, where = time.perf_counter(), [], {"event": "eval", "checkpoint": checkpoint}
    for i in tqdm(range(0, len(examples), size), f"evaluate {checkpoint}", leave=False, disable=QUIET or None):
        if SIGNALS_SEEN:
            raise Interrupted
        conversations += roll_out(policy, examples[i : i + size], config, temperature, f"{config.train.seed}/eval/{i}")
    if not all(math.isfinite(p) for conversation in conversations for turn in conversation for p in turn.log_probs):
        log(f"Warning: the model overflows its numbers in rollouts of {checkpoint}; set model.dtype: bfloat16.")
    event = where | {"n": len(examples)} | reports.evaluation_figures(conversations, config)
    event["seconds"] = time.perf_counter() - start
    return event, [where | reports.sample_row(*pair) for pair in zip(examples, conversations, strict=True)]


# ------------------------------------------------------------------------------------------------------- run folder
# What a run writes; nothing else in its folder is ever deleted.
RUN_FILES = ("config.yaml", "state.json", "metrics.jsonl", "samples.jsonl", "results.json", "results.md", "curves.png",
             "stage1", "stage2", "merged", "wandb", ".smoke")  # fmt: skip
LOGS = ("metrics.jsonl", "samples.jsonl")
# A resumed run may change these: they move time, memory and files, not a number.
HARMLESS_KEYS = ("wandb_project", "output.", "model.fast_inference_gpu_mem", "model.gradient_checkpointing",
                 "train.micro_batch_size", "train.checkpoint_every")  # fmt: skip
OPTIMIZER, RENDERED = "optimizer.safetensors", "rendered prompts.self_correction"


@contextmanager
def claim_folder(args: Namespace, config: Config) -> Iterator[Path]:
    """Chooses the run's folder and holds it while the run goes on: one folder, one run. Raises UserError."""
    name, smoke = config.run_name, "-smoke" * bool(args.smoke)
    if args.start_stage == 2 and os.path.exists(f"{config.output.dir}/{name}{smoke}/config.yaml"):
        log(f"{name}{smoke} holds a run, so this Stage II is a run of its own, {name}-stage2{smoke}.")
        name += "-stage2"
        args.set.append(f"run_name={name}")  # as `resume_command` prints it
    config.run_name = name + smoke + "-eval" * args.eval_only
    folder = Path(config.output.dir, config.run_name)
    lock, holder = (folder.with_name(f".{folder.name}.{kind}") for kind in ("lock", "holder"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        claim = filelock.FileLock(lock).acquire(timeout=0)
    except filelock.Timeout:
        who = "another process"
        with suppress(OSError):  # it may be ending just now
            who = holder.read_text()
        raise UserError(f"output.dir: {folder} is in use by {who}; wait for it, or set another run_name") from None
    except (OSError, ValueError) as error:
        raise UserError(f"output.dir: cannot write to {folder.parent}: {first_line(error)}") from None
    with claim, ExitStack() as ending:
        ending.callback(holder.unlink, missing_ok=True)
        holder.write_text(f"process {os.getpid()} on {os.uname().nodename}")
        yield folder


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, the earliest first. The folder itself is its start, without weights."""
    found = [file.parent for where in ("", "stage*/", "stage*/step_*/") for file in folder.glob(f"{where}state.json")]
    return sorted(found, key=lambda place: [read_state(place)[name] for name in ("stage", "step")])


def read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return {name: state[name] for name in ("stage", "step", "finished", "logs", "marks", "seconds")} | state
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{folder}/state.json: is damaged; put it back, or start a new run") from None


def find_start(args: Namespace, config: Config, folder: Path, marks: dict[str, str]) -> Path | None:
    """The checkpoint to go on from, None for a new run. Changes nothing. Refuses what would mix or lose runs."""
    if args.resume:
        return newest_checkpoint(folder, config, marks)
    if (folder / "dataset_info.json").exists():  # save_to_disk's, which has a state.json of its own
        raise UserError(f"output.dir: {folder} holds a data set; set another run_name")
    there = [name for name in RUN_FILES if name != "state.json" and (folder / name).exists()]
    if there and args.smoke and ".smoke" not in there:
        raise UserError(f"--smoke: {folder} holds a run that is no smoke run; set another run_name")
    if args.eval_only and {"stage1", "stage2"} & set(there):
        raise UserError(f"--eval-only: {folder} holds a run that trained; set another run_name")
    if there and not (args.overwrite or args.smoke or args.eval_only):
        resume = f", or go on with {resume_command(args)}" * ("config.yaml" in there)  # else a start was killed
        what = f"{folder} holds {', '.join(there)}; set another run_name"
        raise UserError(f"output.dir: {what}, or give --overwrite{resume}")
    read = [config.model.name, config.dataset.name, config.reward.module, config.model.chat_template]
    for path in filter(None, [*read, args.config, args.resume_adapter]):
        place = Path(os.path.expanduser(path)).resolve()
        if any(place.is_relative_to((folder / name).resolve()) for name in there):
            raise UserError(f"output.dir: {folder} would lose {path}, which this run reads; set another run_name")
    return None


def newest_checkpoint(folder: Path, config: Config, marks: dict[str, str]) -> Path:
    """The checkpoint from which --resume ends as an undisturbed run would. Raises UserError where none does."""
    try:
        before = transformers.utils.flatten_dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except Exception as error:  # none, or whatever stands there
        raise UserError(f"--resume: {folder} holds no run; check run_name (config.yaml: {first_line(error)})") from None
    if not (found := checkpoints(folder)):
        raise UserError(f"--resume: {folder} has lost its checkpoints; start anew with --overwrite")
    newest, state, now = found[-1], read_state(found[-1]), transformers.utils.flatten_dict(config.model_dump())
    keys = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    changed = [f"{key} {before.get(key)!r} -> {now.get(key)!r}" for key in keys if not key.startswith(HARMLESS_KEYS)]
    other = [name for name in marks if state["marks"].get(name) != marks[name]]
    if "train.py" in other:
        log(f"Warning: train.py has changed since {folder} was made; what follows may not be the same mathematics.")
    changed += [f"the {name}" for name in other if name != "train.py"]
    if changed:
        dated = " (does the chat template print today's date?)" * bool({"rows", RENDERED} & set(other))
        how = "from its weights, --start-stage 2 --resume-adapter DIR" if newest != folder else "with --overwrite"
        why = f"{folder} was made with something else: {'; '.join(changed)}{dated}"
        raise UserError(f"--resume: {why}; put it back, or start anew {how}")
    if state["step"] and not state["finished"] and not (newest / OPTIMIZER).exists():
        why = f"{newest} has no optimizer state, which only a run's newest checkpoint keeps"
        raise UserError(f"--resume: {why}; Stage II can start from it: --start-stage 2 --resume-adapter {newest}")
    for file in map(folder.joinpath, state["logs"]):
        if not file.exists() or file.stat().st_size < state["logs"][file.name]:
            raise UserError(f"--resume: {file} is shorter than at its checkpoint; put it back")
    return newest


@dataclass
class Run:
    """The run folder and W&B: what is written down while the stages go by."""

    folder: Path
    config: Config
    checkpoint: Path  # the newest
    state: dict[str, Any]  # what its state.json says
    wandb: reports.Wandb
    started: float  # as if the run had never been interrupted

    def events(self, kind: str) -> list[dict[str, Any]]:
        file = self.folder / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []  # not at U+2028
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def evaluate(self, policy: Policy, examples: list[Example], label: str, at: int, **extra: Any) -> None:
        """Evaluates and writes it down, unless that was done before an interruption."""
        if label in [event["checkpoint"] for event in self.events("eval")]:
            return
        event, samples = evaluate(policy, examples, self.config, label)
        event |= {"global_step": at} | extra
        self.write(event, [row | extra for row in samples])
        log(reports.EVAL_LINE.format(**event))
        self.write_results()

    def log_step(self, event: dict, problems: list[Example], conversations: Conversations, steps: int) -> None:
        """Writes and prints a training step; of its rollouts four, or all where the step was skipped."""
        each, where = len(conversations) // len(problems), {key: event[key] for key in ("event", "stage", "step")}
        shown = list(enumerate(conversations))[: None if event["skipped"] else 4]
        self.write(event, [where | reports.sample_row(problems[row // each], c) for row, c in shown])
        log(reports.step_line(event, steps))

    def write(self, event: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        for name, rows in (("samples.jsonl", samples), ("metrics.jsonl", [event])):
            with (self.folder / name).open("a", encoding="utf-8") as stream:
                stream.writelines(map(reports.to_json, rows))
        self.wandb.write(event, samples)

    def save_checkpoint(self, policy: Policy, stage: int, step: int, optimizer: Optimizer | None) -> None:
        """Saves stage{1,2}/step_N or, without optimizer, the stage's end. The newest alone keeps optimizer state."""
        finished = step > 0 and optimizer is None
        self.checkpoint = self.folder / f"stage{stage}" / ("" if finished else f"step_{step}")
        self.state |= {"stage": stage, "step": step, "finished": finished, "loss_scale": policy.loss_scale}
        save_checkpoint(policy, self.checkpoint, optimizer)
        self.write_results()
        for old in {*self.folder.glob(f"stage*/step_*/{OPTIMIZER}")} - {self.checkpoint / OPTIMIZER}:
            old.unlink()
        log(f"Saved {self.checkpoint}")

    def write_results(self) -> None:
        """results.json, results.md, curves.png, the newest checkpoint's card and, last, state.json: now it is done."""
        device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else DEVICE.type
        reports.write_results(self, self.events("train"), self.events("eval"), device)
        self.write_state()

    def write_state(self) -> None:
        """state.json, without which the checkpoint is none. What the logs hold past the sizes in it did not happen."""
        wait_for_disk(map(self.folder.joinpath, LOGS))
        sizes = {name: (self.folder / name).stat().st_size for name in LOGS if (self.folder / name).exists()}
        self.state |= {"logs": sizes, "wandb_id": self.wandb.id, "seconds": time.time() - self.started}
        reports.write_atomically(self.checkpoint / "state.json", json.dumps(self.state, indent=1))


def open_run(args: Namespace, config: Config, folder: Path, start: Path | None, marks: dict, policy: Policy) -> Run:
    """Prepares the run folder. Called after data, model and adapter have loaded, so a failed start deletes nothing."""
    state = {"stage": args.start_stage, "step": 0, "finished": False, "logs": {}, "marks": marks, "seconds": 0.0}
    state = read_state(start) if start else state | {"adapter": args.resume_adapter}
    policy.loss_scale = state.get("loss_scale", policy.loss_scale)
    folder.mkdir(exist_ok=True)
    halves = [place for place in folder.glob("stage*/step_*/") if not (place / "state.json").exists()]  # after a kill
    for path in halves if start else map(folder.joinpath, RUN_FILES):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    args.overwrite = False  # it is done: what stands in the folder from now on is this run's
    for file in filter(Path.exists, map(folder.joinpath, LOGS)):
        os.truncate(file, state["logs"].get(file.name, 0))
    if args.smoke:
        (folder / ".smoke").touch()
    wandb = reports.Wandb(config, folder, state.get("wandb_id"), log)
    run = Run(folder, config, start or folder, state, wandb, time.time() - state["seconds"])
    if start:
        log(f"Going on from {start}.")
    else:
        if args.start_stage == 2:  # the adapter may be gone when the run goes on
            run.save_checkpoint(policy, 2, 0, None)
        else:
            run.write_state()
        text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
        reports.write_atomically(folder / "config.yaml", text)  # last: a folder without it holds no run
    wandb.start()
    return run


def save_checkpoint(policy: Policy, folder: Path, optimizer: Optimizer | None) -> None:
    """Writes adapter, tokenizer and optimizer state, safetensors and JSON only, and waits until the disk has them."""
    policy.model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    policy.tokenizer.save_pretrained(str(folder))
    if optimizer:
        pairs = [(name, optimizer.state[parameter]) for name, parameter in policy.trainable.items()]
        moments = {f"{name}/{part}": value.contiguous() for name, parts in pairs for part, value in parts.items()}
        save_file(moments, folder / OPTIMIZER)
    wait_for_disk(folder.rglob("*"))


def wait_for_disk(files: Iterator[Path]) -> None:
    """Returns when the disk has all that was written to these files: a power cut takes nothing of it."""
    for file in filter(Path.is_file, files):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def load_optimizer(policy: Policy, optimizer: Optimizer, file: Path) -> None:
    trainable = policy.trainable
    for place, value in read_weights(file).items():  # none where all steps were skipped
        name, part = place.rsplit("/", 1)
        optimizer.state[trainable[name]][part] = value if part == "step" else value.to(DEVICE)


def save_merged(adapter: Path, folder: Path, config: Config, policy: Policy) -> None:
    """The base model with the adapter added to its weights in float32, saved in bf16."""
    base = load_base(config, text_config(config), dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload().to(torch.bfloat16)
    merged.generation_config = policy.model.generation_config  # every token that ends an answer
    whole = not vars(merged.config).pop("multimodal_parent", None)  # a text part is saved by its own class's names
    merged.save_pretrained(folder, save_original_format=whole)
    policy.tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------- signals
SIGNALS_SEEN: list[int] = []  # any asks the run to stop


def on_signal(number: int, _frame: Any) -> None:
    """First Ctrl-C, SIGTERM or SIGHUP: stop after the step in hand. Second: at once."""
    SIGNALS_SEEN.append(number)
    if len(SIGNALS_SEEN) > 1:
        os._exit(130)
    with suppress(OSError):
        os.write(1, b"Stopping at the next safe point; once more to stop at once.\n")  # print may be in use


# --------------------------------------------------------------------------------------------------------- samplers

# An appendix that knows a model and nothing of SCoRe. Three samplers share one call, generate(prompts, max_new_tokens,
# temperature, seed, first_row), and one promise: what a row gets depends on its prompt, the seed and its row number
# alone. Noise is drawn for each (seed, row number), so that other rows and the free memory change nothing.

Rows = list[list[int]]  # a row each
Made = tuple[Rows, list[list[float]]]  # completions, EOS included where it was reached, and their log-probs


def make_sampler(policy: Policy, fast: bool, model_name: str) -> Any:
    """The fastest sampler that serves the policy's model; with `fast` off, model.generate. Logs which, and why. Raises
    UserError where none does."""
    reasons = [] if fast else ["model.fast_inference is false"]
    for kind in (Decoder, GraphSampler, Generate) if fast else (Generate,):
        try:
            sampler = check_exact(kind(policy), policy)
            log(f"Rollouts of {model_name} use {sampler.name}" + (f" ({'; '.join(reasons)})." if reasons else "."))
            return sampler
        except Exception as error:  # also whatever a model's own code raises where a graph is captured
            fault = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            reasons.append(fault.split("\n")[0])
    raise UserError(f"model.name: {model_name} cannot be sampled: {reasons[-1]}")


def check_exact(sampler: Any, policy: Policy) -> Any:
    """The sampler, if its greedy tokens and log-probs of two short rows are the plain forward's. Raises ValueError."""
    weight = policy.model.get_input_embeddings().weight
    prompts = [[number % len(weight) for number in range(5, end)] for end in (9, 16)]
    for prompt, row, logps in zip(prompts, *sampler.generate(prompts, 4, 0.0, 0), strict=True):
        with generating(policy):
            logits = policy.model(input_ids=torch.tensor([prompt + row], device=DEVICE)).logits
        plain = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1).cpu()
        chosen = plain.gather(1, torch.tensor(row)[:, None])[:, 0]
        off = ((chosen - torch.tensor(logps)).abs() + plain.amax(-1) - chosen).mean().item()
        if not off < (1e-3 if weight.dtype == torch.float32 else 0.2):
            raise ValueError(f"{sampler.name} is {off:.2g} nats off the plain forward")
    return sampler


def sample(policy: Policy, prompts: Rows, max_new_tokens: int, temperature: float, seed: str) -> Made:
    """B completions and their log-probs, sampled from softmax(logits / temperature); 0 is greedy, log-probs as for 1.

    Row i is row number i of this seed. Where the free memory holds fewer rows, they go in parts."""
    if rows_that_fit(policy, prompts, max_new_tokens) < len(prompts):
        policy.sampler.keeps, policy.sampler.kept = False, None  # parts are prefilled whole: K/V would only take memory
    size = rows_that_fit(policy, prompts, max_new_tokens)
    how, starts = (max_new_tokens, temperature, random.Random(seed).getrandbits(62)), range(0, len(prompts), size)
    parts = [policy.sampler.generate(prompts[at : at + size], *how, at) for at in starts]
    return [row for rows, _ in parts for row in rows], [row for _, rows in parts for row in rows]


def rows_that_fit(policy: Policy, prompts: Rows, max_new_tokens: int) -> int:
    """How many of the rows decode together: their K/V cache and logits take the policy's share of the free memory."""
    if DEVICE.type != "cuda" or not prompts:
        return max(1, len(prompts))
    config, slots = policy.model.config, max(map(len, prompts)) + max_new_tokens
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    row = 4 * config.num_hidden_layers * kv_heads * head_dim * slots + 8 * config.vocab_size  # bf16 K, V; f32 logits
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(1, int(policy.memory_share * free / row))


def row_uniforms(seed: int, first_row: int, rows: int, count: int) -> torch.Tensor:
    """The noise of rows first_row, first_row + 1, ...: uniform in [0, 1), float64 [rows, count], one for each token."""
    streams = [random.Random(f"{seed}/{first_row + row}") for row in range(rows)]
    return torch.tensor([[s.random() for _ in range(count)] for s in streams], dtype=torch.float64)


def pick(logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token and its log-prob, each [B], from logits [B, V] and the rows' noise, uniform [B].

    It is the first token whose cumulative probability exceeds uniform * total, so never one of probability 0. The sum
    is in float64, where the rarest token of a large vocabulary still counts."""
    log_p = F.log_softmax(logits.float() / (temperature or 1), -1)
    if temperature == 0:
        token = log_p.argmax(-1, keepdim=True)
    else:
        total = log_p.exp().cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)
        token.clamp_(max=logits.shape[1] - 1)  # matters for NaN logits only
    return token[:, 0], log_p.gather(-1, token)[:, 0]


def pad_left(prompts: Rows, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [B, length of the longest prompt]."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], True, pad, "left")
    mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], True, 0, "left")
    return ids.to(DEVICE), mask.to(DEVICE)


@dataclass
class Generate:
    """Samples with model.generate, which serves every model and launches some thousand kernels a token."""

    policy: Policy
    name = "model.generate"

    def generate(self, prompts: Rows, max_new_tokens: int, temperature: float, seed: int, first_row: int = 0) -> Made:
        """As `sample`, for rows that fit in memory."""
        policy, (ids, mask), log_probs = self.policy, pad_left(prompts, self.policy.pad_token_id), []
        uniforms = row_uniforms(seed, first_row, len(prompts), max_new_tokens).to(DEVICE)

        def leave_one(_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            """A logits processor that picks the token itself, so that generate's greedy search finds no other."""
            token, log_p = pick(logits, temperature, uniforms[:, len(log_probs)])
            log_probs.append(log_p)
            return torch.full_like(logits, -math.inf).scatter_(1, token[:, None], 0.0)

        how = dict(do_sample=False, eos_token_id=policy.eos_token_ids or -1, pad_token_id=policy.pad_token_id)
        how |= dict(max_new_tokens=max_new_tokens, logits_processor=transformers.LogitsProcessorList([leave_one]))
        with generating(policy):
            rows = policy.model.generate(input_ids=ids, attention_mask=mask, **how)[:, ids.shape[1] :].tolist()
        ends = [next((i + 1 for i, t in enumerate(row) if t in policy.eos_token_ids), len(row)) for row in rows]
        made = rows, torch.stack(log_probs, 1).tolist()
        return tuple([row[:end] for row, end in zip(part, ends, strict=True)] for part in made)


# The Decoder. A token step is about ten kernels a layer, captured once as a CUDA graph and replayed. Prompts are padded
# on the right, so a token's position is its cache slot: causal attention sees no pad, and a new token attends to slots
# 0..position of its row and nothing else. Kernels find the K/V cache through an offset in device memory, so graphs
# outlive the cache, which each rollout allocates at its own size and frees before the update. Attempt 2 goes on from
# attempt 1's K/V: only the bridge is new. A step also reads guesses of a row's next tokens, copied from where its last
# ones stood before, in its own text or its neighbours'. A guess is right if it is the token that is chosen anyway, by
# the noise of its place: samples stay what they are, but for rounding, and rows end in fewer steps. (fmt: skip keeps
# long signatures at one kind of argument a line.)
if triton is not None:

    @triton.jit
    def _add_norm_kernel(
        h, y, b, weight, x, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One row: h += y[:SIZE] + y[SIZE:] @ b (not when WIDTH, the length of y's rows, is 0); x = RMSNorm(h)."""
        row = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, BLOCK)
        ok = c < SIZE
        dtype = h.dtype.element_ty
        v = tl.load(h + row * SIZE + c, mask=ok, other=0.0).to(tl.float32)
        if WIDTH > 0:
            d = tl.load(y + row * WIDTH + c, mask=ok, other=0.0).to(tl.float32)
            for r0 in range(0, R, 8):
                for r1 in tl.static_range(8):
                    xa = tl.load(y + row * WIDTH + SIZE + r0 + r1).to(tl.float32)
                    d += xa * tl.load(b + (r0 + r1) * SIZE + c, mask=ok, other=0.0).to(tl.float32)
            v = (v + d.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
            tl.store(h + row * SIZE + c, v.to(dtype), mask=ok)
        v *= tl.rsqrt(tl.sum(v * v, 0) / SIZE + eps)
        w = tl.load(weight + c, mask=ok, other=0.0).to(tl.float32)
        tl.store(x + row * SIZE + c, (v.to(weight.dtype.element_ty).to(tl.float32) * w).to(dtype), mask=ok)

    @triton.jit
    def _lora_tile(
        y, b, n, ok_n, c, ok_c, part,
        OUT: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, PEFT: tl.constexpr = False,
    ):  # fmt: skip
        """Rows n, columns c of y[:, :OUT] + y[:, OUT:] @ b in float32; b is block-diagonal, c lies in block `part`.
        PEFT's LoRA rounds its part before it adds it, Unsloth's only the sum. PEFT trains what the graph samples,
        Unsloth what the decoder samples, but for text parts of multimodal models."""
        v = tl.load(y + n[:, None] * WIDTH + c[None, :], mask=ok_n[:, None] & ok_c[None, :], other=0.0).to(tl.float32)
        if R > 0:
            r = part * R + tl.arange(0, R)
            xa = tl.load(y + n[:, None] * WIDTH + OUT + r[None, :], mask=ok_n[:, None], other=0.0)
            block = tl.load(b + r[:, None] * OUT + c[None, :], mask=ok_c[None, :], other=0.0)
            lora = tl.dot(xa, block, input_precision="ieee")
            v += lora.to(y.dtype.element_ty).to(tl.float32) if PEFT else lora
        return v.to(y.dtype.element_ty).to(tl.float32)

    @triton.jit(do_not_specialize=["tokens"])
    def _add_lora_kernel(y, b, x, tokens, OUT: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
        """A tile of M tokens of one projection: x = y[:, :OUT] + y[:, OUT:] @ b, rounded as by PEFT."""
        n = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        ok_n, ok_c = n < tokens, c < OUT
        v = _lora_tile(y, b, n, ok_n, c, ok_c, 0, OUT, OUT + R, R, True).to(x.dtype.element_ty)
        tl.store(x + n[:, None] * OUT + c[None, :], v, mask=ok_n[:, None] & ok_c[None, :])

    @triton.jit(do_not_specialize=["tokens", "layer"])
    def _rope_cache_kernel(
        y, b, q_norm, k_norm, cos, sin, rows, pos, q, anchor, control, tokens, layer, eps,
        H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
        NORM: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """M tokens of one head of q|k|v: add LoRA; normalize and rotate q and k; q goes out, k and v to the cache."""
        n = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
        ok_n = n < tokens
        head = tl.program_id(1)
        part = (head >= H).to(tl.int32) + (head >= H + KV).to(tl.int32)  # 0: q, 1: k, 2: v
        HALF: tl.constexpr = D // 2
        OUT: tl.constexpr = (H + 2 * KV) * D
        i = tl.arange(0, BLOCK)
        ok_i = i < HALF
        ok = ok_n[:, None] & ok_i[None, :]
        dtype = y.dtype.element_ty
        lo = _lora_tile(y, b, n, ok_n, head * D + i, ok_i, part, OUT, OUT + 3 * R, R)
        hi = _lora_tile(y, b, n, ok_n, head * D + HALF + i, ok_i, part, OUT, OUT + 3 * R, R)
        slot = tl.load(pos + n, mask=ok_n, other=0)
        if part < 2:
            if NORM:
                scale = tl.rsqrt((tl.sum(lo * lo, 1) + tl.sum(hi * hi, 1)) / D + eps)[:, None]
                w_lo = tl.where(part == 0, tl.load(q_norm + i, mask=ok_i), tl.load(k_norm + i, mask=ok_i))
                w_hi = tl.where(part == 0, tl.load(q_norm + HALF + i, mask=ok_i), tl.load(k_norm + HALF + i, mask=ok_i))
                lo = ((lo * scale).to(dtype).to(tl.float32) * w_lo.to(tl.float32)[None, :]).to(dtype).to(tl.float32)
                hi = ((hi * scale).to(dtype).to(tl.float32) * w_hi.to(tl.float32)[None, :]).to(dtype).to(tl.float32)
            angle = slot[:, None] * HALF + i[None, :]
            co = tl.load(cos + angle, mask=ok, other=0.0).to(tl.float32)
            si = tl.load(sin + angle, mask=ok, other=0.0).to(tl.float32)
            lo, hi = lo * co - hi * si, hi * co + lo * si
        if part == 0:
            to = q + (n[:, None] * (H * D) + head * D + i[None, :])
        else:
            at = (layer * 2 + part - 1) * tl.load(control + 1) + tl.load(rows + n, mask=ok_n, other=0)
            at = ((at * KV + (head - H - (part - 1) * KV)) * tl.load(control + 2) + slot) * D
            to = anchor + (tl.multiple_of(tl.load(control), 16) + at[:, None] + i[None, :])
        tl.store(to, lo.to(dtype), mask=ok)
        tl.store(to + HALF, hi.to(dtype), mask=ok)

    @triton.jit(do_not_specialize=["layer"])
    def _attend_kernel(
        q, anchor, control, rows, pos, o, part, layer, scale, KV: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr,
        K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        """K tokens in a row, of one cache row: their GROUP query heads of one K/V head over slots 0..pos of each token,
        or one of SPLITS parts."""
        row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        g, d = tl.arange(0, G), tl.arange(0, BLOCK_D)
        ok_g, ok_d = g < GROUP * K, d < D
        ok_q = ok_g[:, None] & ok_d[None, :]
        whose = ((row * K + g // GROUP) * KV + head) * GROUP + g % GROUP  # the token's head
        at = whose[:, None] * D + d[None, :]
        query = tl.load(q + at, mask=ok_q, other=0.0)
        held, slots, cell = tl.load(control + 1), tl.load(control + 2), tl.load(rows + row * K)
        k = anchor + tl.multiple_of(tl.load(control), 16) + ((layer * 2 * held + cell) * KV + head) * slots * D
        v = k + held * KV * slots * D
        length = tl.load(pos + row * K).to(tl.int32) + K
        span = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
        start = split * span
        stop = tl.minimum(start + span, length)
        top = tl.full([G], -1e30, tl.float32)
        total = tl.zeros([G], tl.float32)
        acc = tl.zeros([G, BLOCK_D], tl.float32)
        for s0 in range(start, stop, BLOCK):
            s = s0 + tl.arange(0, BLOCK)
            ok = s < stop
            keys = tl.load(k + s[None, :] * D + d[:, None], mask=ok[None, :] & ok_d[:, None], other=0.0)
            w = tl.dot(query, keys, input_precision="ieee") * (scale * 1.44269504)  # log2(e): exp2 is the fast one
            w = tl.where(s[None, :] < (length - K + 1 + g // GROUP)[:, None], w, float("-inf"))
            higher = tl.maximum(top, tl.max(w, 1))
            p = tl.exp2(w - higher[:, None])
            decay = tl.exp2(top - higher)
            values = tl.load(v + s[:, None] * D + d[None, :], mask=ok[:, None] & ok_d[None, :], other=0.0)
            acc = acc * decay[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
            total = total * decay + tl.sum(p, 1)
            top = higher
        if SPLITS == 1:
            tl.store(o + at, (acc / total[:, None]).to(o.dtype.element_ty), mask=ok_q)
        else:  # part: [rows, heads, SPLITS, D + 2], float32
            to = (whose * SPLITS + split) * (D + 2)
            tl.store(part + to[:, None] + d[None, :], acc, mask=ok_q)
            tl.store(part + to + D, top, mask=ok_g)
            tl.store(part + to + D + 1, total, mask=ok_g)

    @triton.jit
    def _combine_kernel(part, o, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
        """Join the SPLITS parts of one row's head; part 0 is never empty."""
        head = tl.program_id(0)
        d, s = tl.arange(0, BLOCK_D), tl.arange(0, SPLITS)
        ok = d < D
        at = part + (head * SPLITS + s) * (D + 2)
        top = tl.load(at + D)
        w = tl.exp2(top - tl.max(top, 0))
        acc = tl.load(at[:, None] + d[None, :], mask=ok[None, :], other=0.0)
        out = tl.sum(acc * w[:, None], 0) / tl.sum(tl.load(at + D + 1) * w, 0)
        tl.store(o + head * D + d, out.to(o.dtype.element_ty), mask=ok)

    @triton.jit(do_not_specialize=["tokens"])
    def _silu_mul_kernel(y, b, x, tokens, SIZE: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
        """A tile of M tokens: SiLU(gate) * up, each with its LoRA added."""
        n = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        ok_n, ok_c = n < tokens, c < SIZE
        gate = _lora_tile(y, b, n, ok_n, c, ok_c, 0, 2 * SIZE, 2 * SIZE + 2 * R, R)
        up = _lora_tile(y, b, n, ok_n, SIZE + c, ok_c, 1, 2 * SIZE, 2 * SIZE + 2 * R, R)
        dtype = y.dtype.element_ty
        act = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        tl.store(x + n[:, None] * SIZE + c[None, :], (act * up).to(dtype), mask=ok_n[:, None] & ok_c[None, :])

    @triton.jit
    def _sample_kernel(
        logits, control, inv_t, state, chosen, logp,
        CAP: tl.constexpr, VOCAB: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The token after one of the K that a row's step has read: the largest z + Gumbel noise, z = logits / T.

        The noise is -log(E), E exponential, keyed by (seed, row number, token count, column): no other row matters.
        E is -log(1 - u), u on a grid of 2^-31 near 0, where E decides who wins: probabilities are exact to about 5e-10
        a token, and no token can gain more than 22 nats."""
        n = tl.program_id(0).to(tl.int64)
        row, seed = n // K, tl.load(control + 4)
        number = (tl.load(control + 5) + tl.load(state + 4 * CAP + row)).to(tl.int32)
        made = (tl.load(state + 2 * CAP + row) + n % K).to(tl.int32)
        best, where = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
        peak, total = tl.full([BLOCK], -1e30, tl.float32), tl.zeros([BLOCK], tl.float32)  # of exp(z - peak)
        for start in range(0, VOCAB, BLOCK):
            c = start + tl.arange(0, BLOCK)
            z = tl.load(logits + n * VOCAB + c, mask=c < VOCAB, other=float("-inf")).to(tl.float32) * tl.load(inv_t)
            quad = start // 4 + tl.arange(0, BLOCK // 4)  # Philox gives four numbers at a time
            r0, r1, r2, r3 = tl.philox(seed, quad, quad * 0 + number, quad * 0 + made, quad * 0)
            bits = tl.reshape(tl.join(tl.join(r0, r1), tl.join(r2, r3)), (BLOCK,))
            u = tl.minimum(((bits >> 1).to(tl.float32) + 0.5) * 4.656612873e-10, 0.99999994)
            e = tl.where(u < 0.01, u * (1.0 + u * (0.5 + u * 0.33333334)), -tl.log(1.0 - u))
            value = z - tl.load(inv_t + 1) * tl.log(e)
            where = tl.where(value > best, c, where)
            best = tl.maximum(best, value)
            higher = tl.maximum(peak, z)
            total = total * tl.exp(peak - higher) + tl.exp(z - higher)
            peak = higher
        top = tl.max(peak, 0)
        token = tl.min(tl.where(best == tl.max(best, 0), where, VOCAB - 1), 0)  # the first of equals
        z = tl.load(logits + n * VOCAB + token).to(tl.float32) * tl.load(inv_t)
        tl.store(chosen + n, token)
        tl.store(logp + n, z - top - tl.log(tl.sum(total * tl.exp(peak - top), 0)))

    @triton.jit
    def _advance_kernel(
        chosen, logp, control, eos, state, tokens, logps, lengths, context, ends, pad, CAP: tl.constexpr,
        WIDTH: tl.constexpr, SLOTS: tl.constexpr, K: tl.constexpr, MOST: tl.constexpr, EOS: tl.constexpr,
    ):  # fmt: skip
        """One row: record the token chosen after its last one, and after each guess that was right; move the row's
        state on."""
        row = tl.program_id(0).to(tl.int64)
        pos, count = tl.load(state + CAP + row), tl.load(state + 2 * CAP + row)
        done, prompt = tl.load(state + 3 * CAP + row), tl.load(state + 4 * CAP + row)
        going, taken, last = done == 0, count * 0, count * 0 + pad
        for j in tl.static_range(K):
            token = tl.load(chosen + row * K + j).to(tl.int64)
            tl.store(tokens + prompt * WIDTH + count + j, token, mask=going)
            tl.store(logps + prompt * WIDTH + count + j, tl.load(logp + row * K + j), mask=going)
            if MOST > 1:
                tl.store(context + prompt * SLOTS + pos + j + 1, token, mask=going)
            ended = count + j + 1 >= tl.load(control + 3)
            for e in tl.static_range(EOS):
                ended |= token == tl.load(eos + e)
            last = tl.where(going, token, last)
            taken += going.to(tl.int64)
            done |= (going & ended).to(tl.int64)
            if j + 1 < K:
                going &= (ended == 0) & (token == tl.load(state + (5 + j) * CAP + row))
        tl.debug_barrier()  # every warp has read the state
        tl.store(lengths + prompt, count + taken)
        tl.store(state + row, last)
        tl.store(state + CAP + row, pos + taken)
        tl.store(state + 2 * CAP + row, count + taken)
        tl.store(state + 3 * CAP + row, done)
        tl.store(ends + prompt, pos + taken, mask=taken > 0)

    @triton.jit
    def _guess_kernel(
        state, context, ends, CAP: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr, NEAR: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One row: guess what comes next, from what followed where its last three tokens, or two, stood before: in its
        own text (there one will do) or those of its NEAR neighbours, which in training may answer the same problem."""
        row = tl.program_id(0).to(tl.int64)
        prompt = tl.load(state + 4 * CAP + row)
        end, near = tl.load(ends + prompt), prompt // NEAR * NEAR
        own, found = context + prompt * SLOTS + end, tl.zeros([BLOCK], tl.int32)
        last = tl.load(own)
        before, first = tl.load(own - 1, mask=end > 0, other=-1), tl.load(own - 2, mask=end > 1, other=-1)
        for other in tl.static_range(NEAR):
            text, until = context + (near + other) * SLOTS, tl.load(ends + near + other).to(tl.int32)
            mine = (near + other == prompt).to(tl.int32)
            for start in range(0, until, BLOCK):
                i = start + tl.arange(0, BLOCK)
                one = tl.load(text + i, mask=i < until, other=-2) == last
                two = one & (tl.load(text + i - 1, mask=(i > 0) & (i < until), other=-2) == before)
                three = two & (tl.load(text + i - 2, mask=(i > 1) & (i < until), other=-2) == first)
                same = one.to(tl.int32) + two + three
                place = ((2 * same + mine) * NEAR + other) * SLOTS + i
                found = tl.maximum(found, tl.where(same + mine > 1, place, 0))
        best = tl.max(found, 0)  # 0: nowhere
        whose, at = near + best // SLOTS % NEAR, best % SLOTS
        until = tl.load(ends + whose)
        for j in tl.static_range(1, MOST):
            known = (best > 0) & (at + j <= until)
            guess = tl.load(context + whose * SLOTS + at + j, mask=known, other=0)
            tl.store(state + (4 + j) * CAP + row, tl.where(known, guess, last))

    @triton.jit
    def _delta_rule_kernel(
        q, k, v, g, beta, state, out, q_row, k_row, v_row, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
        BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ):  # fmt: skip
        """One token of the gated delta rule (arXiv 2412.06464), for BLOCK_V columns of one head's state S [K, V], with
        q and k brought to length 1:  S <- exp(g) S;  S <- S + k beta (v - k S);  out = q S / sqrt(K)."""
        n = tl.program_id(0).to(tl.int64)
        row, head, i = n // H, n % H, tl.arange(0, BLOCK_K)
        c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        query = tl.load(q + row * q_row + head * K + i, mask=i < K, other=0.0).to(tl.float32)
        key = tl.load(k + row * k_row + head * K + i, mask=i < K, other=0.0).to(tl.float32)
        value = tl.load(v + row * v_row + head * V + c, mask=c < V, other=0.0).to(tl.float32)
        query *= tl.rsqrt((tl.sum(query * query, 0) + 1e-6) * K)
        key *= tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
        at, ok = state + (n * K + i[:, None]) * V + c[None, :], (i < K)[:, None] & (c < V)[None, :]
        s = tl.load(at, mask=ok, other=0.0) * tl.exp(tl.load(g + n).to(tl.float32))
        new = tl.load(beta + n).to(tl.float32) * (value - tl.sum(s * key[:, None], 0))
        s += key[:, None] * new[None, :]
        tl.store(at, s, mask=ok)
        tl.store(out + n * V + c, tl.sum(s * query[:, None], 0), mask=c < V)


class FusedLinear:
    """Projections of one input (q/k/v, gate/up, o, down) as one product [W; A] x: outputs, then every LoRA's A x.

    What follows adds (A x) B, B block-diagonal and scaled. Dense base weights move into the buffer of A and become
    views of it: training reads the same memory. Quantized base layers run by themselves, and only A is a buffer."""

    def __init__(self, modules: list[torch.nn.Module], dtype: torch.dtype):
        self.modules, self.bases = modules, [getattr(m, "base_layer", m) for m in modules]
        self.dense = all(type(base) is torch.nn.Linear for base in self.bases)
        ranks = [a.weight.shape[0] for m in modules for a in getattr(m, "lora_A", {}).values()]
        self.rank = max(16, 1 << (max(ranks) - 1).bit_length()) if ranks else 0  # padded with zeros: tl.dot wants >= 16
        self.out, extra = sum(module.out_features for module in modules), self.rank * len(modules)
        zeros = partial(torch.zeros, dtype=dtype, device=self.bases[0].weight.device)
        self.weight, self.b = zeros(self.out * self.dense + extra, modules[0].in_features), zeros(extra, self.out)
        self.a = self.weight[self.out * self.dense :]
        self.bias = zeros(self.out + extra) if self.dense and any(b.bias is not None for b in self.bases) else None
        self.reload()

    @torch.no_grad()
    def reload(self) -> None:
        """Copy the LoRA weights as they are now (zeros where adapters are off), cast to the compute dtype."""
        self.b.zero_()
        stop = 0
        for i, (module, base) in enumerate(zip(self.modules, self.bases, strict=True)):
            start, stop = stop, stop + module.out_features
            if self.dense and base.weight.data_ptr() != self.weight[start:stop].data_ptr():
                self.weight[start:stop] = base.weight  # at the first call, and when something replaced the weight
                base.weight.data = self.weight[start:stop]
            if self.dense and base.bias is not None:
                self.bias[start:stop] = base.bias
            if not getattr(module, "disable_adapters", True):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                at = slice(i * self.rank, i * self.rank + len(a))
                self.a[at] = a
                torch.mul(b.t(), module.scaling["default"], out=self.b[at, start:stop])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, in] -> [N, out + LoRA columns]."""
        if self.dense:
            return F.linear(x, self.weight, self.bias)
        return torch.cat([base(x) for base in self.bases] + [F.linear(x, self.a)] * (self.rank > 0), -1)

    def add_lora(self, y: torch.Tensor) -> torch.Tensor:
        """y [N, out + LoRA columns] -> [N, out], in plain torch or, of one projection on CUDA, by one kernel."""
        if self.rank == 0 or triton is None or not y.is_cuda or len(self.modules) > 1:
            return (y[:, self.out :] @ self.b).add_(y[:, : self.out]) if self.rank else y
        x, tiles = y.new_empty(len(y), self.out), (triton.cdiv(len(y), 16), triton.cdiv(self.out, 64))
        _add_lora_kernel[tiles](y, self.b, x, len(y), self.out, self.rank, 16, 64)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out], LoRA added."""
        return self.add_lora(self(x.flatten(0, -2))).unflatten(0, x.shape[:-1])


def rows_for_graph(rows: int) -> int:
    """The batch size whose graph decodes `rows` rows: 8, 16, 32, 64, 96, 128, 192, 256, 384, ..."""
    size = max(8, 1 << (rows - 1).bit_length())
    return size * 3 // 4 if size >= 128 and rows <= size * 3 // 4 else size


class Decoder:
    """Samples with a model's own parameters, LoRA active and unmerged: kernels on CUDA (see above), torch on a CPU."""

    name = "the built-in decoder"
    compact = True  # drop ended rows from the batch
    keeps = False  # leave the K/V to the next generate(), whose prompts may extend the ones before; see `roll_out`
    most = 8  # tokens of a row that one step reads: the last chosen, then guesses of the next; see `_guess_kernel`
    near = 8  # rows that guess from one another's text
    step_tokens = 256  # of all rows: more than these would cost more than right guesses win
    block = 4096  # logits that a program of the choosing kernel reads at once
    burst = 4  # graph replays between two looks at which rows have ended
    prompt_tokens = 8192  # prompt tokens in one forward pass, pads included

    def __init__(self, policy: Policy):
        """Raises ValueError for a model that it does not serve, as far as check_exact's short rows could not tell.
        Re-points the base weights (see FusedLinear)."""
        base = policy.model.get_base_model()
        config, family = base.config, type(base).__name__
        if family.removesuffix("ForCausalLM") not in ("Llama", "Mistral", "Qwen2", "Qwen3"):
            raise ValueError(f"{family} is not of the architecture of Llama, Mistral, Qwen2 or Qwen3")
        if getattr(config, "sliding_window", None):
            raise ValueError("it uses sliding-window attention")
        if len({weight.device for weight in base.parameters()}) > 1:
            raise ValueError("it is on several devices")
        if config.hidden_act != "silu":
            raise ValueError(f"its activation is {config.hidden_act}, not silu")
        self.backbone, self.head = base.model, base.lm_head
        self.embedding, self.eps = self.backbone.embed_tokens.weight, config.rms_norm_eps
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self._set_up(policy)
        # An attention program holds the query heads of all these tokens: more than so many would spill its registers.
        # Cards before capability 8.0, of one stage, and CPUs do not guess.
        room = (64 if self.dtype.itemsize == 2 else 32) * (self.stages > 1)
        self.most = max(1, min(self.most, room // (self.heads // self.kv)))
        self.layers = [self._fuse(layer) for layer in self.backbone.layers]
        self.linears = [part for layer in self.layers for part in (layer.qkv, layer.o, layer.gate_up, layer.down)]

    def _set_up(self, policy: Policy) -> None:
        """What does not depend on the architecture."""
        weight = policy.model.get_input_embeddings().weight
        self.device, self.dtype, self.pad = weight.device, weight.dtype, policy.pad_token_id
        self.kernels = self.graphed = triton is not None and self.device.type == "cuda"
        gpu = torch.cuda.get_device_properties(self.device) if self.graphed else None
        self.processors, self.stages = (gpu.multi_processor_count, 2 if gpu.major >= 8 else 1) if gpu else (1, 1)
        self.eos = torch.tensor(policy.eos_token_ids or [-1], device=self.device)
        self.release()

    def _fuse(self, layer: torch.nn.Module) -> SimpleNamespace:
        """What a token step reads of one decoder layer."""
        attn, mlp = layer.self_attn, layer.mlp
        inputs = {"qkv": [attn.q_proj, attn.k_proj, attn.v_proj], "o": [attn.o_proj]}
        inputs |= {"gate_up": [mlp.gate_proj, mlp.up_proj], "down": [mlp.down_proj]}
        part = SimpleNamespace(**{name: FusedLinear(modules, self.dtype) for name, modules in inputs.items()})
        part.before, part.after = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        part.norms = [attn.q_norm.weight, attn.k_norm.weight] if hasattr(attn, "q_norm") else []
        return part

    def release(self) -> None:
        """Drop graphs, buffers and kept K/V; the next generate() makes them again."""
        self.graphs, self.held = {}, [1, 1, 1]
        self.pool = self.cache = self.kept = self.cos = self.static = None

    @torch.no_grad()
    def generate(self, prompts: Rows, max_new_tokens: int, temperature: float, seed: int, first_row: int = 0) -> Made:
        """As `sample`, for rows that fit in memory."""
        rows = rows_for_graph(len(prompts)) if self.graphed else len(prompts)
        for linear in self.linears:
            linear.reload()
        self._start(prompts, rows, max_new_tokens, temperature, seed, first_row)
        self._continue(rows, max_new_tokens)
        ends = [*enumerate(self.lengths[: len(prompts)].tolist())]
        tokens, logps = ([part[i, :n].tolist() for i, n in ends] for part in (self.tokens.cpu(), self.logps.cpu()))
        if self.keeps and self.cache is not None:
            # by prompt: the cache row and the tokens whose K/V it holds, which the last's is not among
            held = [prompt + row[:-1] for prompt, row in zip(prompts, tokens, strict=True)]
            self.kept = self.cache, self.state[4, :rows].argsort(), held
        self.cache = None
        return tokens, logps

    def _start(self, prompts: Rows, rows: int, max_new_tokens: int, *how) -> None:
        """Prefill and the first token of each row. `how`: temperature, seed, first_row."""
        kept, self.kept = self._kept_for(prompts), None
        seen: dict[tuple, int] = {}  # equal prompts are prefilled once, in the first rows, longest first
        first = [seen.setdefault(tuple(prompt), i) for i, prompt in enumerate(prompts)]
        order = sorted(range(len(prompts)), key=lambda i: (first[i] != i, -len(prompts[i])))
        unique = [tuple(prompts[i]) for i in order[: len(seen)]]
        where = [order.index(first[i]) for i in order] + [0] * (rows - len(prompts))
        slots = len(unique[0]) + max_new_tokens + self.most  # guesses may go past the budget
        self._reserve(rows, max_new_tokens, slots)
        texts = [torch.frombuffer(array("q", prompt), dtype=torch.long) for prompt in prompts]  # torch.tensor is slow
        self.context[: len(prompts), : len(unique[0])] = pad_sequence(texts, True)
        self.ends.zero_()
        if self.cos is None:
            self.cos, self.sin = self._tables(self.held[2])
        self.cache = self.anchor.new_zeros(len(self.layers), 2, rows, self.kv, slots, self.head_dim)
        offset = (self.cache.data_ptr() - self.anchor.data_ptr()) // self.anchor.element_size()
        self._begin(order, [len(unique[w]) for w in where], (offset, rows, slots, max_new_tokens), *how)
        hidden = self._go_on(unique, order[: len(unique)], *kept) if kept else self._prefill(unique)
        where = torch.tensor(where, device=self.device)
        for layer in self.cache:
            layer[:, len(unique) : len(prompts)] = layer[:, where[len(unique) : len(prompts)]]
        self._choose(head_logits(hidden[where], self.head.weight), rows)

    def _reserve(self, rows: int, new: int, slots: int) -> None:
        """Buffers that graphs point at, with room to grow: larger ones drop the graphs."""
        least = (256, 1024, 4096)
        held = [1 << (max(n) - 1).bit_length() for n in zip((rows, new, slots), least, self.held, strict=True)]
        if held != self.held:
            self.release()
            self.held, (rows, new, slots), whole = held, held, {"dtype": torch.long, "device": self.device}
            # token, position, tokens made, ended, index of the prompt, guesses of the next tokens
            self.state = torch.zeros(4 + self.most, rows, **whole)
            self.context = torch.zeros(rows, slots, **whole)  # by prompt: its tokens
            self.ends = torch.zeros(rows, **whole)  # by prompt: where its last token stands
            self.control = torch.zeros(6, **whole)  # cache offset, its rows and slots, max_new_tokens, seed, first_row
            self.inv_t = torch.zeros(2, device=self.device)  # 1 / temperature, 1 to sample or 0 for greedy
            self.tokens = torch.zeros(rows, new + 1, **whole)  # by prompt; ended rows may write behind their end
            self.logps = torch.zeros(rows, new + 1, device=self.device)
            self.lengths, self.row_numbers = torch.zeros(rows, **whole), torch.arange(rows, **whole)
            self.anchor = torch.zeros(16, dtype=self.dtype, device=self.device)

    def _tables(self, slots: int) -> tuple[torch.Tensor, ...]:
        """Cosines and sines of the positions, both [slots, head_dim / 2]."""
        rotary = self.backbone.rotary_emb
        if hasattr(rotary, "get_cached"):  # Unsloth's
            rotary.extend_rope_embedding(self.anchor, slots)
            table = rotary.get_cached(slots, self.device.index)
        else:
            table = [t[0] for t in rotary(self.anchor, torch.arange(slots, device=self.device)[None])]
        return tuple(t[:slots, : self.head_dim // 2].contiguous() for t in table)

    def _begin(self, order: list[int], lengths: list[int], control: tuple, temperature: float, seed: int, first: int):
        """The state of all rows: row i is prompt order[i], of lengths[i] tokens; the rows behind them are spare."""
        self.limit, self.temperature, rows, given = control[-1], temperature, len(lengths), len(order)
        self.control.copy_(torch.tensor([*control, seed & (2**63 - 1), first]))
        self.inv_t.copy_(torch.tensor([1 / (temperature or 1), float(temperature > 0)]))
        if temperature and not self.kernels:
            self.uniforms = row_uniforms(seed, first, rows, self.limit + 1).to(self.device)
        columns = ([self.pad, n - 1, 0, i >= given, order[i] if i < given else i] for i, n in enumerate(lengths))
        self.state[:5, :rows] = torch.tensor([*columns], device=self.device).T

    def _continue(self, rows: int, max_new_tokens: int) -> None:
        """Token steps until every row has ended, in smaller batches when most have."""
        made, looks = 1, []
        while made < max_new_tokens:
            graph = self._graph(rows) if self.graphed else None
            for _ in range(min(self.burst, max_new_tokens - made) if graph else 1):
                graph.replay() if graph else self._step(rows)
                made += 1
            looks.append((self.state[3, :rows].to("cpu", non_blocking=True), torch.cuda.Event() if graph else None))
            if graph:  # look one burst behind, so that the card never waits for us
                looks[-1][1].record()
                if len(looks) < 2:
                    continue
                looks[0][1].synchronize()
            ended = looks.pop(0)[0].tolist()
            if all(ended):
                return
            fewer = rows_for_graph(ended.count(0)) if graph else ended.count(0)
            if self.compact and fewer <= rows * (0.5 if graph else 0.75):
                n = rows if self.keeps else fewer  # rows whose K/V is kept change places, others are overwritten
                order = torch.tensor(sorted(range(rows), key=ended.__getitem__)[:n], device=self.device)
                self.state[:, :n] = self.state[:, order]
                for layer in self.cache:
                    layer[:, :n] = layer[:, order]
                rows, looks = fewer, []

    def _graph(self, rows: int) -> torch.cuda.CUDAGraph:
        """The captured token step of this batch size. Warming up moves the state, so it is put back."""
        if rows not in self.graphs:
            state, graph = self.state.clone(), torch.cuda.CUDAGraph()
            self._step(rows)
            self._step(rows)
            self.state.copy_(state)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self._step(rows)
            self.graphs[rows] = graph
        return self.graphs[rows]

    def _step(self, rows: int) -> None:
        k = max(1, min(self.most, self.step_tokens // rows))
        ids = torch.cat([self.state[:1, :rows], self.state[5 : 4 + k, :rows]]).T.flatten()
        pos = (self.state[1, :rows, None] + self.row_numbers[:k]).flatten()
        hidden = self._forward(ids, self.row_numbers[:rows].repeat_interleave(k), pos, width=k)
        self._choose(head_logits(hidden, self.head.weight), rows)

    def _prefill(self, prompts: list[tuple[int, ...]]) -> torch.Tensor:
        """Write the prompts' K/V to the first cache rows, longest prompt first -> hidden states [prompts, hidden]."""
        hidden, first = [], 0
        while first < len(prompts):
            length = len(prompts[first])
            part = prompts[first : first + max(1, self.prompt_tokens // length)]
            ids = torch.tensor([p + (self.pad,) * (length - len(p)) for p in part], device=self.device)
            last = torch.tensor([i * length + len(p) - 1 for i, p in enumerate(part)], device=self.device)
            rows = torch.arange(first, first + len(part), device=self.device).repeat_interleave(length)
            pos = torch.arange(length, device=self.device).repeat(len(part))
            hidden.append(self._forward(ids.flatten(), rows, pos, (first, len(part), length))[last])
            first += len(part)
        return torch.cat(hidden)

    def _kept_for(self, prompts: Rows) -> tuple | None:
        """If all prompts, m in a row each, extend what is kept: its cache, and each one's row and known tokens."""
        cache, rows_of, held = self.kept or (None, None, [])
        each = len(prompts) // max(1, len(held))
        held = [tokens for tokens in held for _ in range(each)]
        extend = len(held) == len(prompts) and all(p[: len(k)] == k != p for p, k in zip(prompts, held, strict=True))
        return (cache, rows_of.repeat_interleave(each), [*map(len, held)]) if extend else None

    def _go_on(self, prompts, numbers, cache, rows_of, known) -> torch.Tensor:
        """_prefill() of prompts whose first known[number] tokens have their K/V in row rows_of[number] of `cache`."""
        known, source = [known[number] for number in numbers], rows_of[numbers]
        for new, old in zip(self.cache, cache, strict=True):
            new[:, : len(prompts), :, : max(known)] = old[:, source, :, : max(known)]
        rest = [(prompt[at], row, at) for row, prompt in enumerate(prompts) for at in range(known[row], len(prompt))]
        rest = torch.tensor(rest, device=self.device)
        # Copies start at aligned addresses: for others Triton would compile the kernels once more.
        hidden = torch.cat([self._forward(*map(torch.clone, p.T)) for p in rest.split(self.prompt_tokens)])
        return hidden[rest[:, 1].bincount().cumsum(0) - 1]

    def _forward(self, ids, rows, pos, prompt=None, width=1) -> torch.Tensor:
        """Tokens ids [N] at (rows, pos) [N] of the cache -> normalized hidden states; prompt, width: see _attend."""
        h, y, below, plan = F.embedding(ids, self.embedding), None, None, None
        if not self.kernels:  # what all layers of the torch path share; a token step reads the cache as it lies
            mask = torch.arange(0 if prompt else int(pos.max()) + 1, device=self.device) <= pos[:, None]
            read = slice(len(rows)) if torch.equal(rows, self.row_numbers[: len(rows)]) else rows
            plan = self.cos[pos][:, None], self.sin[pos][:, None], mask[:, None, None], read
        for index, layer in enumerate(self.layers):
            x = self._add_norm(h, y, below, layer.before, self.eps)
            q = self._rope_cache(index, layer, layer.qkv(x), rows, pos, plan)
            x = self._attend(index, q, rows, pos, plan, prompt, width)
            x = self._add_norm(h, layer.o(x), layer.o, layer.after, self.eps)
            y, below = layer.down(self._silu_mul(layer.gate_up, layer.gate_up(x))), layer.down
        return self._add_norm(h, y, below, self.backbone.norm.weight, self.eps)

    def _add_norm(self, h, y, linear, weight, eps) -> torch.Tensor:
        """h += y with linear's LoRA (y None: nothing to add), in place; returns RMSNorm(h)."""
        if not self.kernels:
            if y is not None:
                h += linear.add_lora(y)
            return (F.rms_norm(h.float(), h.shape[-1:], None, eps).to(weight.dtype).float() * weight).to(h.dtype)
        size, block = h.shape[-1], triton.next_power_of_2(h.shape[-1])
        x, warps = torch.empty_like(h), min(16, max(4, block // 256))
        y, b, width, rank = (h, h, 0, 0) if y is None else (y, linear.b, y.shape[1], linear.rank)
        _add_norm_kernel[(h.numel() // size,)](h, y, b, weight, x, eps, size, width, rank, block, num_warps=warps)
        return x

    def _rope_cache(self, index, layer, y, rows, pos, plan) -> torch.Tensor:
        """y of q|k|v -> q [N, heads * head_dim], normalized (Qwen3) and rotated; k and v go to the cache."""
        heads, kv, dim = self.heads, self.kv, self.head_dim
        if self.kernels:
            q, norms = y.new_empty(len(y), heads * dim), layer.norms or (y, y)
            _rope_cache_kernel[(triton.cdiv(len(y), 16), heads + 2 * kv)](
                y, layer.qkv.b, *norms, self.cos, self.sin, rows, pos, q, self.anchor, self.control, len(y), index,
                self.eps, heads, kv, dim, layer.qkv.rank, bool(layer.norms), 16,
                max(16, triton.next_power_of_2(dim // 2)),
            )  # fmt: skip
            return q
        q, k, v = layer.qkv.add_lora(y).view(len(y), -1, dim).split([heads, kv, kv], 1)
        if layer.norms:
            q, k = (F.rms_norm(t, (dim,), w, self.eps) for t, w in zip((q, k), layer.norms, strict=True))
        lo, hi = torch.cat((q, k), 1).chunk(2, -1)
        cos, sin, *_ = plan
        q, k = torch.cat((lo * cos - hi * sin, hi * cos + lo * sin), -1).split([heads, kv], 1)
        self.cache[index][:, rows, :, pos] = torch.stack((k, v), 1)
        return q.reshape(len(q), -1)

    def _attend(self, index, q, rows, pos, plan, prompt, width) -> torch.Tensor:
        """Query tokens q [N, heads * head_dim], `width` of a cache row in a row, each over slots 0..pos of it."""
        n, group, dim = len(q), self.heads // self.kv, self.head_dim
        if prompt:  # count whole prompts of length tokens, padded on the right, in the cache rows from first on
            first, count, length = prompt
            k, v = self.cache[index, :, first : first + count, :, :length]
            q = q.view(count, length, self.heads, dim).transpose(1, 2)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(n, -1)
        if not self.kernels:
            _, _, mask, read = plan
            k, v = self.cache[index, :, :, :, : mask.shape[-1]][:, read]
            return F.scaled_dot_product_attention(q.view(n, self.kv, group, dim), k, v, attn_mask=mask).view(n, -1)
        splits, out = 1, torch.empty_like(q)
        while splits < 16 and n // width * self.kv * splits <= self.processors:  # until the card is full
            splits *= 2
        part = q.new_empty(n * self.heads * splits * (dim + 2) * (splits > 1), dtype=torch.float32)
        wide = max(16, triton.next_power_of_2(dim))
        _attend_kernel[(n // width, self.kv, splits)](
            q, self.anchor, self.control, rows, pos, out, part, index, dim**-0.5, self.kv, group,
            max(16, triton.next_power_of_2(group * width)), width, dim, wide,
            max(16, 16384 // (wide * q.element_size())), splits, num_stages=self.stages,
        )  # fmt: skip
        if splits > 1:
            _combine_kernel[(n * self.heads,)](part, out, dim, wide, splits, num_warps=2)
        return out

    def _silu_mul(self, linear, y) -> torch.Tensor:
        """y of gate|up -> SiLU(gate) * up, both with their LoRA."""
        if not self.kernels:
            gate, up = linear.add_lora(y).chunk(2, -1)
            return F.silu(gate) * up
        n, size = len(y), linear.out // 2
        x = y.new_empty(n, size)
        _silu_mul_kernel[(triton.cdiv(n, 16), triton.cdiv(size, 64))](y, linear.b, x, n, size, linear.rank, 16, 64)
        return x

    def _choose(self, logits: torch.Tensor, rows: int) -> None:
        """Choose each row's next tokens from logits [rows * K, V], record them, and move the rows' state on."""
        if self.kernels:
            n, vocab = logits.shape
            made = logits.new_empty(n, dtype=torch.int32), logits.new_empty(n, dtype=torch.float32)
            cap, slots, k = self.state.shape[1], self.context.shape[1], n // rows
            how = cap, vocab, k, self.block
            _sample_kernel[(n,)](logits, self.control, self.inv_t, self.state, *made, *how, num_warps=16)
            _advance_kernel[(rows,)](
                *made, self.control, self.eos, self.state, self.tokens, self.logps, self.lengths, self.context,
                self.ends, self.pad, cap, self.tokens.shape[1], slots, k, self.most, len(self.eos),
            )  # fmt: skip
            if self.most > 1:
                _guess_kernel[(rows,)](self.state, self.context, self.ends, cap, slots, self.most, self.near, 1024)
            return
        ids, pos, count, done, prompt = self.state[:5, :rows]
        token, logp = pick(logits, self.temperature, self.uniforms[prompt, count] if self.temperature else None)
        self.tokens[prompt, count], self.logps[prompt, count] = token, logp
        alive = done == 0
        ids.copy_(torch.where(alive, token, self.pad))
        pos += alive
        count += alive
        self.lengths[prompt] = count
        done |= (count >= self.limit) | (token[:, None] == self.eos).any(-1)


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **more) -> tuple[Tensor, None]:
    """transformers' sdpa, except that the query heads of one new token go in as the rows of the K/V head they share:
    sdpa would write that out once for each of them."""
    (rows, heads, new, size), shared = query.shape, key.shape[1]
    if new > 1 or attention_mask is None or attention_mask.shape[1] > 1 or more.get("position_bias") is not None:
        plain = transformers.AttentionInterface()["sdpa"]
        return plain(module, query, key, value, attention_mask, scaling=scaling, **more)
    query = query.view(rows, shared, heads // shared, size)
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, -1), None


transformers.AttentionInterface.register("grouped", grouped_attention)
transformers.AttentionMaskInterface.register("grouped", transformers.masking_utils.sdpa_mask)


def one_token_delta_rule(query, key, value, g, beta, initial_state, **_) -> tuple[Tensor, Tensor]:
    """transformers' rule for one token of linear attention, in one kernel; the state [B, heads, K, V] changes in place.
    In all other arguments the token is dimension 1."""
    q, k, v = (x.flatten(1) for x in (query, key, value))
    (rows, heads, size, wide), out = initial_state.shape, value.new_empty(value.shape)
    _delta_rule_kernel[(rows * heads, triton.cdiv(wide, 32))](
        q, k, v, g.contiguous(), beta.contiguous(), initial_state, out, q.stride(0), k.stride(0), v.stride(0),
        heads, size, wide, triton.next_power_of_2(size), 32,
    )  # fmt: skip
    return out, initial_state


class GraphSampler(Decoder):
    """Samples with the model's own forward over a static cache: for architectures that Decoder does not know.

    Prompts are padded on the left: all rows write to one slot. A graph needs its cache, so large ones go after use."""

    name = "a graph of the model's own forward"
    compact, most = False, 1

    def __init__(self, policy: Policy):
        self.policy, self.base = policy, policy.model.get_base_model()
        self._set_up(policy)
        modules = [*self.base.modules()]
        norms = [m for m in modules if type(m).__name__.endswith("RMSNorm") and getattr(m, "weight", None) is not None]
        self.linears = [FusedLinear([module], self.dtype) for module in modules if hasattr(module, "lora_A")]
        # (owner, attribute, what stands there during a rollout)
        self.replaced = [(norm, "forward", self._one_kernel_norm(norm)) for norm in norms]
        self.replaced += [(linear.modules[0], "forward", linear.forward) for linear in self.linears]
        places, rule = {sys.modules[type(module).__module__] for module in modules}, "torch_recurrent_gated_delta_rule"
        places = [place for place in places if self.kernels and hasattr(place, rule)]
        self.replaced += [(place, rule, one_token_delta_rule) for place in places]

    def _one_kernel_norm(self, norm: torch.nn.Module) -> Callable:
        """An RMSNorm's forward by the decoder's kernel, if its output is x / rms(x) times w, rounded before that (as w
        is) or after, or times 1 + w."""
        eps, weight = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0)), norm.weight

        def run(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self._add_norm(x.contiguous(), None, None, w, eps)

        x = torch.linspace(-1, 3, 2 * len(weight)).view(2, -1).to(weight)
        own, weights = norm(x).float(), (weight, weight.float(), 1 + weight.float())
        off = [((run(w, x).float() - own).abs().max() / own.abs().max()).item() for w in weights]
        found = min(off) < (1e-5 if x.dtype == torch.float32 else 1e-2)
        return partial(run, weights[off.index(min(off))]) if found else norm.forward

    def generate(self, *request: Any, **more: Any) -> Made:
        """As Decoder.generate. Meanwhile a projection with LoRA is two kernels, a norm or a token of linear attention
        one; query heads share their K/V head without copies of it."""
        attention, before = self.base.config._attn_implementation, torch.cuda.memory_allocated()
        with ExitStack() as swapped, generating(self.policy):
            for owner, name, other in self.replaced:
                swapped.enter_context(patch.object(owner, name, other))
            if attention == "sdpa":
                swapped.callback(self.base.set_attn_implementation, attention)
                self.base.set_attn_implementation("grouped")
            made = super().generate(*request, **more)
        if not self.graphed or torch.cuda.memory_allocated() - before > 0.05 * torch.cuda.mem_get_info()[1]:
            self.release()
        return made

    def _start(self, prompts: Rows, rows: int, max_new_tokens: int, *how) -> None:
        ids, mask = pad_left(prompts + [prompts[0]] * (rows - len(prompts)), self.pad)
        slots = ids.shape[1] + max_new_tokens
        if self.static is not None and (len(self.real) != rows or self.real.shape[1] < slots):
            self.release()
        self._reserve(rows, max_new_tokens, 1)
        if self.static is None:
            slots = triton.cdiv(slots + 2, 128) * 128 if self.graphed else slots  # warming up takes two slots
            self.real = torch.ones(rows, slots, dtype=torch.long, device=self.device)  # 0: a pad
            self.static = transformers.StaticCache(config=self.base.config, max_cache_len=slots)
            # A graph cannot roll a window: sliding layers hold all slots too, and the mask hides what is outside.
            whole, rolling = transformers.cache_utils.StaticLayer, transformers.cache_utils.StaticSlidingWindowLayer
            self.static.layers = [whole(slots) if type(layer) is rolling else layer for layer in self.static.layers]
            known = "StaticLayer", "LinearAttentionLayer", "LinearAttentionAndStaticFullAttentionLayer"
            if odd := {type(layer).__name__ for layer in self.static.layers}.difference(known):
                raise ValueError(f"its cache has {', '.join(sorted(odd))}")
        self.real[:, : ids.shape[1]], self.real[:, ids.shape[1] :] = mask, 1
        self.static.reset()
        self._begin([*range(len(prompts))], mask.sum(-1).tolist(), (0, 0, 0, max_new_tokens), *how)
        self._choose(self._logits(ids, (mask.cumsum(-1) - 1).clamp(min=0), mask), rows)
        if self.graphed and max_new_tokens > 1 and rows not in self.graphs:
            self._graph(rows)
            self._start(prompts, rows, max_new_tokens, *how)  # capturing has moved the cache on: prefill again

    def _step(self, rows: int) -> None:
        self._choose(self._logits(self.state[0, :rows, None], self.state[1, :rows, None], self.real), rows)

    def _logits(self, ids: torch.Tensor, positions: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Logits [rows, V] of the token after ids [rows, n] at these positions, which go to the next n slots."""
        make = getattr(self.base, "create_masks_for_generate", transformers.masking_utils.create_masks_for_generate)
        shape = torch.empty(*ids.shape, 0, dtype=self.dtype, device=self.device)
        where = dict(past_key_values=self.static, position_ids=positions)
        masks = make(config=self.base.config, inputs_embeds=shape, attention_mask=real, **where)
        return self.base(input_ids=ids, attention_mask=masks, use_cache=True, logits_to_keep=1, **where).logits[:, -1]


# ------------------------------------------------------------------------------------------------------------- main
def main(args: Namespace, config: Config) -> int:
    """Runs, and turns every way of ending into an exit code: 0 done, 2 bad input, 130 interrupted, 1 the rest."""
    global QUIET
    QUIET = args.quiet
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, on_signal)
    try:
        train_and_evaluate(args, config)
        return 0
    except (UserError, RewardError, RunError) as error:
        code, line = 1 if isinstance(error, RunError) else 2, error
    except Interrupted:
        code, line = 130, f"Interrupted. Go on with: {resume_command(args)}"
    except torch.OutOfMemoryError:
        code, line = 1, "Out of GPU memory in a rollout; lower model.fast_inference_gpu_mem or the batch sizes"
    except Exception as error:  # safetensors and tokenizers have classes of their own for the system's errors
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        folder = Path(config.output.dir, config.run_name)
        own_run = (folder / "config.yaml").is_file() and not args.overwrite  # else an older one, which was to go
        go_on = f" and go on with: {resume_command(args)}" * own_run
        code, line = 1, f"{getattr(error, 'filename', None) or folder}: {first_line(error)}; mend that{go_on}"
    with suppress(OSError):  # the terminal may have gone
        print(line, file=sys.stderr, flush=True)
    return code


def resume_command(args: Namespace) -> str:
    """What to type to go on after an interruption."""
    if args.eval_only:
        return shlex.join(["python", *sys.argv])
    given = (["--set", *args.set] if args.set else []) + (["--smoke", str(args.smoke)] if args.smoke else [])
    return shlex.join(["python", sys.argv[0], "--config", args.config, *given, "--resume"])


if __name__ == "__main__":
    sys.exit(main(ARGS, CONFIG))
