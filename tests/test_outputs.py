"""What a finished run leaves for others: results, curves, cards, a merged model, W&B, and a quiet terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import matplotlib.image
import pytest
import transformers
from conftest import fork_run, output
from peft import AutoPeftModelForCausalLM

import profile_run
import train


@pytest.fixture(scope="module")
def finished(tiny_run: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A whole run that merges, logs to W&B offline and validates."""
    place = tmp_path_factory.mktemp("finished")
    keys = ["output.merge=true", "wandb_project=score", "eval.validation=4"]
    code = fork_run(tiny_run(place, *keys), place / "log")
    return SimpleNamespace(
        code=code, folder=place / "run", out=output(place / "log", "out"), err=output(place / "log"), keys=keys
    )


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_metrics_hold_every_step_and_evaluation(finished: SimpleNamespace) -> None:
    steps = events(finished.folder, "train")
    assert [(e["stage"], e["step"]) for e in steps] == [
        (stage, step) for stage in (1, 2) for step in range(1, len(steps) // 2 + 1)
    ]
    assert [e["global_step"] for e in steps] == list(range(1, len(steps) + 1))
    for event in steps:
        assert math.isclose(event["reward_gap"], event["reward_attempt2"] - event["reward_attempt1"])
        assert {"kl_attempt1", "kl_attempt2", "loss", "grad_norm", "acc_attempt1", "tokens_per_second"} <= event.keys()
    tested = [e["checkpoint"] for e in events(finished.folder, "eval") if "held_out" not in e]
    assert tested == ["pretrain", "stage1", "stage2"]


def test_validation_is_at_every_checkpoint(finished: SimpleNamespace) -> None:
    validated = [e["checkpoint"] for e in events(finished.folder, "eval") if "held_out" in e]
    last = events(finished.folder, "train")[-1]["step"]
    steps = sorted({*range(2, last + 1, 2), last})  # every two, and the stage's end
    assert validated == ["stage1/step_0", *(f"stage{stage}/step_{step}" for stage in (1, 2) for step in steps)]
    assert "validation rows" in finished.out


def test_accuracy_is_of_answers_and_unanswered_is_never_correct(finished: SimpleNamespace) -> None:
    text = (finished.folder / "samples.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    final = [row for row in rows if row["event"] == "eval" and row["checkpoint"] == "stage2"]
    event = [e for e in events(finished.folder, "eval") if e["checkpoint"] == "stage2"][-1]
    assert event["acc_attempt2"] == sum(row["correct_attempt2"] for row in final) / len(final)
    assert not any(row["correct_attempt1"] for row in rows if not row["answer_attempt1"])


def test_results_name_what_they_were_made_with(finished: SimpleNamespace) -> None:
    results = json.loads((finished.folder / "results.json").read_text())
    assert results["run_name"] == "run"
    assert results["evals"] == events(finished.folder, "eval")
    assert {"python", "torch", "transformers", "peft"} <= results["versions"].keys()
    assert results["seconds_total"] > 0
    page = (finished.folder / "results.md").read_text()
    for word in ("seed 1", "greedy", "Acc@t1", "stage2", "mended"):
        assert word in page
    assert matplotlib.image.imread(finished.folder / "curves.png").std() > 0.01


def test_config_is_the_resolved_one(finished: SimpleNamespace) -> None:
    config = train.read_config(str(finished.folder / "config.yaml"))
    assert config.model.max_seq_length == config.train.max_prompt_length_attempt2 + config.train.max_new_tokens_attempt2


def test_adapters_load_with_peft_alone(finished: SimpleNamespace) -> None:
    for stage in ("stage1", "stage2"):
        folder = finished.folder / stage
        assert AutoPeftModelForCausalLM.from_pretrained(folder).active_adapter == "default"
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template
        assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]


def test_card_has_metadata_results_and_prompts(finished: SimpleNamespace) -> None:
    card = huggingface_hub.ModelCard.load(finished.folder / "stage2" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None, "a local folder, which the hub refuses"
    assert "Acc@t1" in card.text
    assert "Check it." in card.text


def test_merged_model_is_there(finished: SimpleNamespace) -> None:
    assert (finished.code, finished.err) == (0, "")
    assert transformers.AutoModelForCausalLM.from_pretrained(finished.folder / "merged").num_parameters() > 0


def test_wandb_without_a_login_goes_offline(finished: SimpleNamespace) -> None:
    assert "wandb sync" in finished.out
    assert list((finished.folder / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_wandb_that_fails_does_not_stop_a_run(make_config: Callable[..., Any], tmp_path: Path) -> None:
    said: list[str] = []
    logger = profile_run.Wandb(make_config(), tmp_path, None, said.append)
    logger.start()
    assert logger.run is None, "the config asks for none"
    logger.run = Mock(**{"log.side_effect": ConnectionError("the server has gone")})
    for _ in range(2):
        logger.write({"event": "train", "stage": 1, "global_step": 1, "loss": 0.5}, [])
    logger.finish()
    assert (logger.run, len(said)) == (None, 1)
    assert "the server has gone" in said[0]


def test_terminal_says_what_figures_mean(finished: SimpleNamespace) -> None:
    for words in ("attempt 1 / attempt 2", "sampled", "greedy", "trainable parameters", "min left", "Saved"):
        assert words in finished.out, words
    assert "\r" not in finished.out, "no progress bar outside a terminal"


def test_quiet_prints_the_final_table_only(tiny_run: Callable[..., list[str]], tmp_path: Path) -> None:
    flags = tiny_run(tmp_path, "train.stage1_steps=1", "train.stage2_steps=0", "eval.max_examples=2")
    assert fork_run([*flags, "--quiet"], tmp_path / "log") == 0
    lines = output(tmp_path / "log", "out").strip().splitlines()
    assert lines[0].startswith("| checkpoint")
    assert all(line.startswith("|") for line in lines)
    assert output(tmp_path / "log") == ""


def test_the_new_task_of_the_readme_runs(tmp_path: Path) -> None:
    flags = ["--config", "tests/new_task/config.yaml", "--smoke", "8", "--set", f"output.dir={tmp_path}"]
    assert fork_run(flags, tmp_path / "log") == 0, output(tmp_path / "log")


def test_stage_two_from_an_adapter_evaluates_the_model_before_it(finished: Any, tiny_run: Any, tmp_path: Path) -> None:
    """`pretrain` is the base model, `stage1` the adapter that was given, as in the run that made it."""
    flags = tiny_run(tmp_path, "train.stage2_steps=1", "eval.validation=4")
    flags += ["--start-stage", "2", "--resume-adapter", str(finished.folder / "stage1")]
    assert fork_run(flags, tmp_path / "log") == 0, output(tmp_path / "log")

    def texts(folder: Path, label: str) -> list[str]:
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        rows = [row for row in map(json.loads, lines) if row.get("checkpoint") == label]
        return [row[f"text_attempt{number}"] for row in rows for number in (1, 2)]

    assert texts(finished.folder, "pretrain") != texts(finished.folder, "stage1"), "the adapter has learned"
    for label in ("pretrain", "stage1"):
        assert texts(tmp_path / "run", label) == texts(finished.folder, label)


def test_resuming_a_finished_run_warns_of_another_trainer(finished: Any, tiny_run: Any, tmp_path: Path) -> None:
    def edited() -> None:
        train.__file__ = str(tmp_path / "train.py")

    (tmp_path / "train.py").write_text("# another")
    before = (finished.folder / "metrics.jsonl").read_bytes()
    flags = tiny_run(finished.folder.parent, "eval.validation=4", "--resume")
    assert fork_run(flags, tmp_path / "log", before=edited) == 0, output(tmp_path / "log")
    said = output(tmp_path / "log", "out")
    assert "train.py has changed" in said
    assert "nothing is left" in said
    assert (finished.folder / "metrics.jsonl").read_bytes() == before
