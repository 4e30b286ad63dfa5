"""An ablation of the paper, "no multi-turn training": only attempt 1 is trained, attempt 2 is sampled and watched.

    python tests/single_attempt.py --config configs/gsm8k.yaml --set run_name=single train.stage1_epochs=0 \\
        train.stage2_epochs=0.162
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    """Runs train.py with terms for attempt 1 alone."""
    import train

    train.stage_terms = lambda stage, r1, r2, config: [(r1, config.beta1)]
    return train.main(*train.parse_command_line())


if __name__ == "__main__":
    sys.exit(main())
