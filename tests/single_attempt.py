"""Single-turn RL, the baseline at equal GPU seconds and the paper's ablation: attempt 1 alone is sampled and trained.

    python tests/single_attempt.py --config configs/gsm8k.yaml --set run_name=single train.stage2_steps=476

Takes train.py's flags, leaves Stage I out, evaluates both attempts as ever; the training log shows the first as both.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def train_first_attempts(train: Any) -> Any:
    """Patch of train.training_step: no second attempt is sampled, and the loss has attempt 1's terms alone."""
    whole_step, train_step = train.training_step, train.train_step

    def roll_out(policy: Any, examples: list, config: Any, temperature: float, seed: str, _: int = 1) -> list[list]:
        turns = train.take_turns(policy, examples, config, temperature, f"{seed}/1", [])
        return [[turn, turn] for turn in turns]  # the second is for the log

    def update(policy: Any, optimizer: Any, conversations: list[list], stage: int, settings: Any) -> dict[str, Any]:
        figures = train_step(policy, optimizer, [c[:1] for c in conversations], stage, settings)
        return figures | {"kl_attempt2": figures["kl_attempt1"]}

    def stage_returns(_: int, conversations: list[list], settings: Any) -> tuple[Any, list[float]]:
        returns = [[c[0].reward] for c in conversations]
        return train.torch.tensor(returns, dtype=train.torch.float64), [settings.beta1]

    def advantages(returns: Any, _: int, settings: Any) -> Any:
        alone = settings.baseline == "none"
        return returns if alone else train.minus_others(returns[:, 0], settings.num_generations)[:, None]

    def training_step(*args: Any) -> tuple[dict[str, Any], list[list]]:
        ours = {"roll_out": roll_out, "train_step": update, "stage_returns": stage_returns, "advantages": advantages}
        with mock.patch.multiple(train, **ours, balanced=lambda credit, *_: credit):
            figures, conversations = whole_step(*args)
        return figures | {"tokens_per_second": figures["tokens_per_second"] / 2}, conversations

    return mock.patch.object(train, "training_step", training_step)


def main() -> int:
    import train

    sys.argv += ["--set", "train.stage1_steps=0"]
    with train_first_attempts(train):
        return train.main(*train.parse_command_line())


if __name__ == "__main__":
    sys.exit(main())
