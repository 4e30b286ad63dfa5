"""Does a run's adapter answer the same without train.py and Unsloth? Greedy, plain transformers + PEFT.

    python tests/plain_peft.py outputs/score-gsm8k --n 100 [--as-text] [--dtype float32]

Compares both attempts at evaluated rows with those in samples.jsonl: word for word, by answer, and how many are right.
Attempt 1 goes back to the model as its token ids; with --as-text as text, as a chat server would send it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def complete(
    model: Any, prompts: list[list[int]], pad: int, ends: list[int], budget: int, size: int
) -> list[list[int]]:
    """Greedy completions of token prompts, left-padded, EOS removed."""
    import torch

    completions = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=budget, do_sample=False,
                                 repetition_penalty=1.0, eos_token_id=ends, pad_token_id=pad)  # fmt: skip
        for row in out[:, width:].tolist():
            completions.append(row[: next((i for i, token in enumerate(row) if token in ends), len(row))])
    return completions


def compare(folder: Path, checkpoint: str, n: int, as_text: bool, dtype: str, size: int = 50) -> list[dict[str, int]]:
    """Counts for attempts 1 and 2 of the first n rows of that evaluation."""
    import torch
    import yaml
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer, GenerationConfig

    from reward_function import ANSWER_EXTRACTORS, is_correct

    config = yaml.safe_load((folder / "config.yaml").read_text())
    lines = map(json.loads, (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1])
    rows = [line for line in lines if line["event"] == "eval" and line["checkpoint"] == checkpoint][:n]
    base = json.loads((folder / checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoPeftModelForCausalLM.from_pretrained(folder / checkpoint, dtype=getattr(torch, dtype)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder / checkpoint)
    ends = GenerationConfig.from_pretrained(base).eos_token_id
    ends = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]

    system = [{"role": "system", "content": config["prompts"]["system"]}] if config["prompts"]["system"] else []
    worked = [{"role": role, "content": example[key]} for example in config["prompts"].get("examples", [])
              for role, key in (("user", "input"), ("assistant", "output"))]  # fmt: skip

    def encode(turns: list[dict[str, str]], after: str = "") -> list[int]:
        marked = [turn | {"content": f"WORKED TURN {number}."} for number, turn in enumerate(worked)]
        text = tokenizer.apply_chat_template([*system, *marked, *turns], add_generation_prompt=True, tokenize=False,
                                             **config["model"]["chat_template_kwargs"])  # fmt: skip
        for mark, turn in zip(marked, worked, strict=True):  # a template may cut the reasoning out of an earlier turn
            text = text.replace(mark["content"], turn["content"])
        return tokenizer(text.split(after)[-1] if after else text, add_special_tokens=False)["input_ids"]

    asked = [[{"role": "user", "content": row["question"]}] for row in rows]
    correct = {"role": "user", "content": config["prompts"]["self_correction"]}
    prompts = [encode(turns) for turns in asked]
    first = complete(model, prompts, pad, ends, config["train"]["max_new_tokens_attempt1"], size)
    texts = [tokenizer.decode(tokens) for tokens in first]
    if as_text:
        prompts = [
            encode([*turns, {"role": "assistant", "content": text}, correct])
            for turns, text in zip(asked, texts, strict=True)
        ]
    else:
        tail = encode([*asked[0], {"role": "assistant", "content": "FIRST ATTEMPT"}, correct], after="FIRST ATTEMPT")
        prompts = [prompt + tokens + tail for prompt, tokens in zip(prompts, first, strict=True)]
    second = complete(model, prompts, pad, ends, config["train"]["max_new_tokens_attempt2"], size)
    extract, counts = ANSWER_EXTRACTORS[config["reward"]["answer_extractor"]], []
    for number, mine in ((1, texts), (2, [tokenizer.decode(tokens) for tokens in second])):
        theirs = [row[f"text_attempt{number}"] for row in rows]
        counts.append(
            {
                "rows": len(rows),
                "identical": sum(a == b for a, b in zip(mine, theirs, strict=True)),
                "same answer": sum(extract(a) == extract(b) for a, b in zip(mine, theirs, strict=True)),
                "right here": sum(is_correct(a, row["target"], extract) for a, row in zip(mine, rows, strict=True)),
                "right in the run": sum(row[f"correct_attempt{number}"] for row in rows),
            }
        )
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a run folder")
    parser.add_argument("--checkpoint", default="stage2")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--as-text", action="store_true", help="give attempt 1 back as text, not as its token ids")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    for number, counts in enumerate(compare(args.folder, args.checkpoint, args.n, args.as_text, args.dtype), 1):
        print(f"attempt {number}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
