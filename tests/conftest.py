"""What the tests share: a random Qwen3 of a few thousand weights with its own tokenizer, and ways to build on it.

`pytest` runs on the CPU in float32, whatever the machine has; `pytest -m gpu` runs the tests that need a CUDA device.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny, and threads spin where cores are shared

PAD, IM_START, IM_END, END_OF_TEXT = "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SELF_CORRECTION = "Check it."

PLAIN_TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role + '\\n' + message.content }}<|im_end|>{{ '\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
# As Qwen3's own: an earlier assistant turn loses its reasoning.
STRIPPING_TEMPLATE = PLAIN_TEMPLATE.replace(
    "message.content", "(message.content.split('</think>')[-1] if message.role == 'assistant' else message.content)"
)
# As DeepSeek-R1's: the template itself opens the reasoning.
THINKING_TEMPLATE = PLAIN_TEMPLATE.replace("assistant\\n'", "assistant\\n<think>\\n'")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; run with `pytest -m gpu`")
    if config.getoption("markexpr", "").strip() != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the other tests compare float32 numbers


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device and `pytest -m gpu`")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what tests recorded as `said`, also where they ran in other processes."""
    for report in terminalreporter.getreports("passed"):
        for line in (value for name, value in report.user_properties if name == "said"):
            terminalreporter.write_line(line)


def build_tokenizer(eos: str | None = IM_END, pad: str | None = PAD, template: str = STRIPPING_TEMPLATE) -> Any:
    """One token a printable character or tag, so that any text survives a round trip."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = [PAD, "<unk>", IM_START, IM_END, END_OF_TEXT, *TAGS, "\n", *map(chr, range(32, 127))]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (IM_START, IM_END, END_OF_TEXT)])
    named = {key: token for key, token in (("eos_token", eos), ("pad_token", pad)) if token}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", chat_template=template, clean_up_tokenization_spaces=False, **named
    )


def build_model(
    folder: Path, vocab_size: int = 0, hidden: int = 32, tied: bool = False, seed: int = 0, **names: Any
) -> Path:
    """Writes a random Qwen3 with a tokenizer into `folder`. `names`: eos, pad and template of the tokenizer.

    Tags and ends are frequent in its samples; its generation_config asks for narrowed sampling and names several EOS
    ids, as a real model's does."""
    import torch
    import transformers

    tokenizer = build_tokenizer(**names)
    tags, (end, other_end, pad) = map(tokenizer.convert_tokens_to_ids, (TAGS, [IM_END, END_OF_TEXT, PAD]))
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "head_dim": hidden // 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad, "vocab_size": vocab_size or len(tokenizer)}
    config = transformers.Qwen3Config(**sizes, **ids, tie_word_embeddings=tied, initializer_range=0.3)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding[:, 0] = 1.5  # a constant feature, so that the head's first column is a bias
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.4
            layer.mlp.down_proj.weight *= 0.4
        if not tied:
            head[:, 0] = 0.0
            head[[*tags, end, other_end], 0] = 2.0
    narrowed = {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.5, "repetition_penalty": 1.3}
    ends = {"pad_token_id": pad, "eos_token_id": [end, other_end]}
    model.generation_config = transformers.GenerationConfig(**narrowed, **ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_data(folder: Path, train: int = 24, test: int = 6) -> Path:
    """Writes train.jsonl and test.jsonl of small sums."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"{10 + i}+{i % 7}=?", "answer": str(10 + i + i % 7)} for i in range(train + test)]
    for name, part in (("train", rows[:train]), ("test", rows[train:])):
        write_jsonl(folder / f"{name}.jsonl", part)
    return folder


def teach_format(folder: Path, data: Path, steps: int) -> Path:
    """Trains the model until about half of its samples are answers, right or wrong, so that rewards differ."""
    import random

    import torch
    import transformers

    rng, answer = random.Random(0), f"<answer>{{}}</answer>{IM_END}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    for _ in range(steps):
        texts = []
        for row in rng.sample(rows, 8):
            first, second = (answer.format(rng.choice([row["answer"], rng.randrange(10, 50)])) for _ in range(2))
            turn = "{}<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}"
            texts.append(turn.format("", row["question"], turn.format(first + "\n", SELF_CORRECTION, second)))
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def with_keys(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config mapping with dotted keys set, {"train.seed": 1}."""
    tree = copy.deepcopy(tree)
    for key, value in changes.items():
        node = tree
        *parents, name = key.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[name] = value
    return tree


def perturb(policy: Any, scale: float = 0.3, seed: int = 0) -> None:
    """Moves the policy away from its reference: LoRA's B starts at zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.trainable.items():
            if "lora_B" in name:
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder."""
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of train.jsonl (24 rows) and test.jsonl (6 rows)."""
    return build_data(tmp_path_factory.mktemp("data"))


def tiny_config(model: Path, data: Path, out: Path) -> dict[str, Any]:
    """A whole config as a mapping, valid, for the tiny model."""
    budgets = {"max_new_tokens_attempt1": 8, "max_new_tokens_attempt2": 12, "max_prompt_length_attempt1": 48}
    sizes = {"stage1_batch_size": 8, "stage2_batch_size": 8, "micro_batch_size": 4}
    return {
        "run_name": "test",
        "model": {"name": str(model), "gradient_checkpointing": False, "lora": {"r": 4, "alpha": 8}},
        "dataset": {"name": str(data), "input_field": "question", "target_field": "answer"},
        "prompts": {"self_correction": SELF_CORRECTION},
        "train": {"learning_rate": 0.01, "seed": 1} | sizes | budgets,
        "eval": {"batch_size": 4},
        "output": {"dir": str(out)},
    }


@pytest.fixture
def raw_config(tiny_dir: Path, data_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return tiny_config(tiny_dir, data_dir, tmp_path / "outputs")


@pytest.fixture
def make_config(raw_config: dict[str, Any]) -> Callable:
    """make_config({"train.seed": 3}) -> the checked Config of the tiny model with these keys changed."""
    import train

    return lambda changes=None: train.check_config(with_keys(raw_config, changes or {}))


@pytest.fixture
def make_policy(make_config: Callable) -> Callable:
    """make_policy(changes, **load_policy's arguments) -> (Policy, Config) of the tiny model."""
    import train

    def make(changes: dict[str, Any] | None = None, **how: Any) -> tuple[Any, Any]:
        config = make_config(changes)
        return train.load_policy(config, train.load_tokenizer(config), **how), config

    return make


@pytest.fixture
def policy(make_policy: Callable) -> Any:
    """The tiny policy, its adapter moved away from zero."""
    policy, _ = make_policy()
    perturb(policy)
    return policy


# ------------------------------------------------------------------------------------------------- runs in children

TIMINGS = {"seconds_rollout", "seconds_update", "tokens_per_second", "peak_memory_gb", "seconds"}
LONGEST = 120  # seconds until a child that hangs is ended


def fork_run(argv: list[str], log: Path, before: Callable[[], Any] | None = None, wait: bool = True) -> int:
    """`python train.py argv` in a forked child, `before` called in it first; `log`.out and .err get its output.

    Returns its exit code, negative for a signal, as subprocess does; with wait=False its process id."""
    import train

    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if wait else pid
    code = 99
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        for name in list(logging.root.manager.loggerDict):  # libraries' messages would go where pytest reads them
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.StreamHandler:
                    handler.setStream(sys.stderr)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(LONGEST)
        train.SIGNALS_SEEN.clear()
        sys.argv = ["train.py", *argv]
        if before:
            before()
        code = train.main(*train.parse_command_line(argv))
    except train.UserError as error:
        print(error, file=sys.stderr)
        code = 2
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def output(log: Path, name: str = "err") -> str:
    return Path(f"{log}.{name}").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """tiny_run(out, *flags) -> arguments of a run of two stages of six steps, a checkpoint every two.

    Its questions hold characters of several bytes and one that some readers take for the end of a line."""
    folder = tmp_path_factory.mktemp("tiny_run")
    data = build_data(folder / "data", train=24, test=6)
    model = teach_format(build_model(folder / "model"), data, steps=40)
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        write_jsonl(data / f"{name}.jsonl", [row | {"question": f"{row['question']}\u2028é\x85"} for row in rows])
    keys = {"stage1_batch_size": 4, "stage2_batch_size": 4, "checkpoint_every": 2}
    keys |= {"learning_rate": 0.005, "warmup_steps": 2, "lr_decay": 0.5}
    changes = {"run_name": "run", "model.lora.dropout": 0.1, "eval.batch_size": 64}
    changes |= {f"train.{name}": value for name, value in keys.items()}
    config = with_keys(tiny_config(model, data, folder / "outputs"), changes)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return lambda out, *flags: ["--config", str(file), "--set", f"output.dir={out}", *flags]


def no_curves() -> None:
    """Drawing takes longer than the rest of a run, and no test here looks."""
    import profile_run

    profile_run.draw_curves = lambda *args: None


def ending(folder: Path) -> dict[str, Any]:
    """All that a run leaves, timings aside."""

    def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    return {
        "metrics": timeless(lines),
        "samples": (folder / "samples.jsonl").read_text(encoding="utf-8"),
        "evals": timeless(json.loads((folder / "results.json").read_text())["evals"]),
        "table": (folder / "results.md").read_text(),
    } | {stage: (folder / stage / "adapter_model.safetensors").read_bytes() for stage in ("stage1", "stage2")}


def assert_same_ending(folder: Path, whole: SimpleNamespace, why: str) -> None:
    mine = ending(folder)
    assert [key for key, value in mine.items() if value != whole.ending[key]] == [], why
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle")], why
    assert not [file for file in files if ".tmp" in str(file.relative_to(folder))], why
