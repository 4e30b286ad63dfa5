"""Single-turn RL, an ablation of the paper and a baseline at equal GPU seconds: only attempt 1 is sampled and trained.

The training log shows it as both attempts; the evaluations ask for a second one as ever.

    python tests/single_attempt.py --config configs/gsm8k.yaml --set run_name=single train.stage1_epochs=0 \\
        train.stage2_epochs=0.543
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    """Runs train.py with terms for attempt 1 alone, and no attempt 2 in Stage II's rollouts."""
    import train

    roll_out = train.roll_out

    def roll_out_once(*args: Any, **how: Any) -> list[Any]:
        evaluates = len(args) == 6  # evaluate gives the number of attempts, train_stage leaves it out
        return roll_out(*args, **how) if evaluates else roll_out(*args, 1, **how) * 2

    train.stage_terms = lambda stage, r1, r2, config: [(r1, config.beta1)]
    train.roll_out = roll_out_once
    return train.main(*train.parse_command_line())


if __name__ == "__main__":
    sys.exit(main())
