"""Does a 4B model fit a card under configs/math.yaml? profile_run.py's step with every row as long as it may be.

    python tests/four_b.py --tokenizer Qwen2.5-1.5B-Instruct --folder 4b --memory-gb 24 --set model.load_in_4bit=true

Qwen3-4B's shape with random weights: memory and speed are real, what it says is noise, and hardly ever an end.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
QWEN3_4B = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=262144,
                rope_parameters={"rope_type": "default", "rope_theta": 5e6})  # fmt: skip


def write_model(folder: str, tokenizer: Any, shape: dict[str, Any]) -> None:
    """A Qwen3 of random weights in bf16, with somebody's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**shape, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def hold_to(gigabytes: float) -> None:
    """The card as one of so many GiB, also to whoever asks what is free. CUDA's own context comes on top."""
    import torch

    real, limit = torch.cuda.mem_get_info, int(gigabytes * 2**30)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / real()[1]))
    torch.cuda.mem_get_info = lambda *_, **__: (min(real()[0], max(0, limit - torch.cuda.memory_reserved())), limit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="a real tokenizer with a chat template")
    parser.add_argument("--folder", required=True, metavar="DIR", help="where the model is written, unless it is there")
    parser.add_argument("--memory-gb", type=float, help="hold the card to so many GiB")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY.SUB=VALUE", help="override keys")
    args = parser.parse_args()

    import profile_run
    import train

    if args.memory_gb:
        hold_to(args.memory_gb)
    if not (Path(args.folder) / "tokenizer_config.json").exists():  # what is written last
        write_model(args.folder, train.transformers.AutoTokenizer.from_pretrained(args.tokenizer), QWEN3_4B)

    def longest_rows(config: Any, tokenizer: Any) -> tuple[list, list, list]:
        rng, length = random.Random(0), config.train.max_prompt_length_attempt1
        ids = [i for i in range(min(len(tokenizer), 50000)) if i not in tokenizer.all_special_ids]
        rows = [train.Example("", "0", rng.choices(ids, k=length)) for _ in range(config.train.stage2_batch_size)]
        return rows, [], rows

    train.load_examples = longest_rows
    overrides = [f"model.name={args.folder}", "train.oversample=1", *args.set]
    return profile_run.main(["--config", str(ROOT / "configs/math.yaml"), "--set", *overrides])


if __name__ == "__main__":
    sys.exit(main())
