"""A run that is killed at any moment, then resumed, ends as if nothing had happened.

Runs are forked from this process, which has imported everything once: a child lives for about a second. A moment is
a write, rename or removal in the run folder, a half-written file, a rollout or an update; the child counts them and
kills itself (SIGKILL) at the one it was given. Other children are killed from outside while a slow writer writes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft.peft_model
import pytest
from conftest import ROOT, assert_same_ending, ending, fork_run, no_curves, output

import train

STEPS = 6  # a stage: 24 rows, 4 a step


@pytest.fixture(scope="module")
def whole(tiny_run: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The run that is never interrupted, the moments at which others die (the place of each), its seconds."""
    out = tmp_path_factory.mktemp("whole")
    start = time.monotonic()
    code = fork_run(tiny_run(out), out / "log", partial(die_at, None, out / "run", out / "moments"))
    assert code == 0, output(out / "log")
    moments = (out / "moments").read_text().splitlines()
    return SimpleNamespace(
        folder=out / "run", ending=ending(out / "run"), moments=moments, out=out, seconds=time.monotonic() - start
    )


# --------------------------------------------------------------------------------------------------------- moments


def die_at(moment: int | None, folder: Path, told: Path) -> None:
    """Makes this process kill itself at its moment-th moment; with None it only writes each one's place to `told`."""
    no_curves()
    count, places = 0, ["elsewhere"]
    diary = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    pid = os.getpid()

    def is_now(what: str) -> bool:
        nonlocal count
        count += 1
        if moment is None or count == moment:
            os.write(diary, f"{places[-1]}: {what}\n".encode())
        return count == moment

    def kill_if_now(what: str) -> None:
        if is_now(what):
            os.kill(pid, signal.SIGKILL)

    def watch(event: str, args: tuple) -> None:
        if os.getpid() != pid or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        path, writes = args[0], event != "open" or bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        below = isinstance(path, str | Path) and str(path).startswith(str(folder))
        by_descriptor = event in ("os.remove", "os.rmdir") and args[-1] != -1  # as rmtree does it
        if writes and (below or by_descriptor):
            kill_if_now(f"{event} {Path(path).name}")

    def within(module: Any, name: str, place: Callable[..., str]) -> None:
        inner = getattr(module, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            places.append(place(*args))
            try:
                return inner(*args, **kwargs)
            finally:
                places.pop()

        setattr(module, name, outer)

    def torn(module: Any, name: str, tear: Callable[..., None]) -> None:
        """Dies in the middle of what a writer writes."""
        inner = getattr(module, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            if is_now(f"half of {name}"):
                tear(inner, *args)
                os.kill(pid, signal.SIGKILL)
            return inner(*args, **kwargs)

        setattr(module, name, outer)

    def half_a_line(_: Any, file: Path, rows: list[dict[str, Any]]) -> None:
        text = "".join(map(train.to_json, rows)).encode()
        cut = len(text) * 2 // 3
        cut = next((i + 1 for i in range(cut, len(text)) if text[i] >= 0xC0), cut)  # inside a character, where possible
        with file.open("ab") as stream:
            stream.write(text[:cut])

    def half_a_text(_: Any, file: Path, text: str) -> None:
        file.with_name(f".{file.name}.tmp").write_text(text[: len(text) // 2])

    def half_the_weights(inner: Callable, tensors: dict, file: Any, *rest: Any) -> None:
        inner(tensors, file, *rest)
        os.truncate(file, os.path.getsize(file) // 2)

    def around(module: Any, name: str) -> None:
        inner = getattr(module, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            kill_if_now(f"before {name}")
            result = inner(*args, **kwargs)
            kill_if_now(f"after {name}")
            return result

        setattr(module, name, outer)

    within(train, "evaluate", lambda policy, examples, config, checkpoint: f"evaluation {checkpoint}")
    within(train, "train_stage", lambda policy, examples, stage, *rest: f"stage{stage} step")
    within(train, "save_checkpoint", lambda policy, folder, *rest: f"{folder.parent.name}/{folder.name} checkpoint")
    within(train, "prune_checkpoints", lambda folder, keep: f"{folder.name} prune")
    within(train, "enter_run", lambda *args: "enter")
    torn(train, "append_lines", half_a_line)
    torn(train, "write_atomically", half_a_text)
    torn(train, "save_file", half_the_weights)
    torn(peft.peft_model, "safe_save_file", half_the_weights)
    around(train, "sample")
    around(train, "improve")
    sys.addaudithook(watch)


def moments_to_die_at(whole: SimpleNamespace, rng: random.Random) -> list[int]:
    """Two seeded moments of each kind of place: kills are spread over a run, not over its most frequent writes."""
    kinds = defaultdict(list)
    for number, place in enumerate(whole.moments, 1):
        kinds[place.partition(":")[0]].append(number)
    chosen = [number for numbers in kinds.values() for number in rng.sample(numbers, min(len(numbers), 2))]
    halves = [number for number, place in enumerate(whole.moments, 1) if ": half of" in place]
    return sorted(set(chosen + rng.sample(halves, 4)))


def test_killed_at_random_moments(
    tiny_run: Callable[..., list[str]], whole: SimpleNamespace, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    rng, kills, places, twice = random.Random(20), 0, [], 0
    chosen = moments_to_die_at(whole, rng)
    for first in chosen:
        out, moment, deaths = tmp_path / str(first), first, 0
        out.mkdir()
        while True:
            resume = ["--resume"] if deaths else []
            # checkpoints may be more or fewer after a resume: they move nothing
            often = ["--set", f"train.checkpoint_every={rng.choice([1, 2])}"] if deaths % 2 else []
            before = partial(die_at, moment, out / "run", out / "told")
            code = fork_run(tiny_run(out, *resume, *often), out / "log", before)
            if code != -signal.SIGKILL:
                break
            deaths += 1
            moment = rng.randrange(1, len(whole.moments) // 3) if deaths < 3 and first % 3 == 0 else -1
        told = (out / "told").read_text().splitlines() if deaths else []
        assert code == 0, f"{told}: {output(out / 'log')}"
        assert deaths >= 1, f"moment {first} never came"
        assert_same_ending(out / "run", whole, f"killed at {told}")
        shutil.rmtree(out)
        kills, places, twice = kills + deaths, places + told, twice + (deaths > 1)
    more = f"({twice} of them killed more than once)"
    record_property("said", f"{kills} kills of {len(chosen)} runs {more}, every ending the same")
    assert kills >= 20
    assert twice >= 3
    for place in (
        "evaluation pretrain",
        "stage1 step",
        "stage1/step_",
        "/stage1 checkpoint",
        "stage1 prune",
        "half of",
        "evaluation stage1",
        "stage2 step",
        "stage2/step_",
        "/stage2 checkpoint",
        "evaluation stage2",
    ):
        assert any(place in told for told in places), f"no kill in {place}: {places}"


def slow_writes() -> None:
    """Every flush, rename and weight file takes its time, so that a kill from outside falls into one."""
    no_curves()
    for module, name in (
        (os, "fsync"),
        (os, "replace"),
        (os, "rename"),
        (train, "save_file"),
        (peft.peft_model, "safe_save_file"),
    ):
        inner = getattr(module, name)

        def slow(*args: Any, inner: Callable = inner, **kwargs: Any) -> Any:
            time.sleep(0.01)
            result = inner(*args, **kwargs)
            time.sleep(0.01)
            return result

        setattr(module, name, slow)


def test_killed_from_outside_in_slow_writes(
    tiny_run: Callable[..., list[str]], whole: SimpleNamespace, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    rng, kills = random.Random(9), 0
    for trial in range(6):
        out, deaths = tmp_path / str(trial), 0
        out.mkdir()
        while True:
            pid = fork_run(tiny_run(out, *["--resume"] * bool(deaths)), out / "log", slow_writes, wait=False)
            until = time.monotonic() + rng.uniform(0.3, 1.5 * whole.seconds) if deaths < 2 else float("inf")
            while not has_ended(pid):
                if time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
                    until = float("inf")
                time.sleep(0.01)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code != -signal.SIGKILL:
                break
            deaths += 1
        assert code == 0, output(out / "log")
        assert_same_ending(out / "run", whole, f"trial {trial}, killed {deaths} times")
        kills += deaths
    record_property("said", f"{kills} kills from outside, every ending the same")
    assert kills >= 4


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


# ------------------------------------------------------------------------------------------------------------ signals


def signalled(stage: int, step: int, *numbers: int) -> Callable[[], None]:
    """Sends this process signals in the middle of a step."""

    def before() -> None:
        no_curves()
        inner, steps = train.improve, {1: 0, 2: 0}

        def improve(policy: Any, optimizer: Any, attempts: Any, now: int, config: Any) -> dict[str, Any]:
            steps[now] += 1
            if (now, steps[now]) == (stage, step):
                for number in numbers:
                    os.kill(os.getpid(), number)
            return inner(policy, optimizer, attempts, now, config)

        train.improve = improve

    return before


def steps_of(folder: Path) -> list[tuple[int, int]]:
    lines = train.read_lines(folder / "metrics.jsonl")
    return [(line["stage"], line["step"]) for line in lines if line["event"] == "train"]


@pytest.mark.parametrize(("stage", "step"), [(1, 1), (1, STEPS), (2, 3), (2, STEPS)])
def test_sigterm_finishes_the_step_and_saves(
    tiny_run: Callable[..., list[str]], whole: SimpleNamespace, tmp_path: Path, stage: int, step: int
) -> None:
    log, folder = tmp_path / "log", tmp_path / "run"
    assert fork_run(tiny_run(tmp_path), log, signalled(stage, step, signal.SIGTERM)) == 130
    (line,) = output(log).splitlines()
    assert line.startswith("Interrupted.")
    assert line.endswith("--resume")
    assert steps_of(folder)[-1] == (stage, step)
    newest = folder / f"stage{stage}" / (f"step_{step}" if step < STEPS else "")
    assert train.newest_checkpoint(folder) == newest
    assert fork_run(tiny_run(tmp_path, "--resume"), log, no_curves) == 0, output(log)
    assert_same_ending(folder, whole, "stopped by SIGTERM")


def test_sigterm_in_an_evaluation(tiny_run: Callable[..., list[str]], whole: SimpleNamespace, tmp_path: Path) -> None:
    def before() -> None:
        no_curves()
        inner = train.evaluate

        def evaluate(policy: Any, examples: Any, config: Any, checkpoint: str, **how: Any) -> Any:
            if checkpoint == "stage1":
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(policy, examples, config, checkpoint, **how)

        train.evaluate = evaluate

    assert fork_run(tiny_run(tmp_path), tmp_path / "log", before) == 130
    assert fork_run(tiny_run(tmp_path, "--resume"), tmp_path / "log", no_curves) == 0, output(tmp_path / "log")
    assert_same_ending(tmp_path / "run", whole, "stopped by SIGTERM")


def test_a_second_signal_exits_at_once(tiny_run: Callable[..., list[str]], tmp_path: Path) -> None:
    before = signalled(1, 3, signal.SIGTERM, signal.SIGINT)
    assert fork_run(tiny_run(tmp_path), tmp_path / "log", before) == 130
    assert steps_of(tmp_path / "run") == [(1, 1), (1, 2)], "the step in hand is abandoned"
    assert train.newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "stage1" / "step_2"


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def finished(whole: SimpleNamespace, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished run."""
    yield Path(shutil.copytree(whole.folder, tmp_path / "run"))


def test_half_written_checkpoints_are_ignored_and_cleaned_up(
    tiny_run: Callable[..., list[str]], whole: SimpleNamespace, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "stage1" / "step_4", finished / "stage2" / "step_9")
    (finished / "stage2" / "step_9" / "state.json").unlink()
    for place in ("stage2/.step_5.tmp", "stage1/.end.tmp"):
        shutil.copytree(finished / "stage1" / "step_4", finished / place)
    for name in (".metrics.jsonl.tmp", ".curves.png.tmp"):
        (finished / name).write_text("half")
    for file in [finished / "stage2" / "state.json", *finished.glob("stage2/step_*/state.json")]:
        file.unlink()
    assert train.newest_checkpoint(finished) == finished / "stage1"
    assert fork_run(tiny_run(tmp_path, "--resume"), tmp_path / "log", no_curves) == 0, output(tmp_path / "log")
    assert_same_ending(finished, whole, "half-written checkpoints")
    assert sorted(path.name for path in finished.glob("stage2/*step_*")) == ["step_4"]


def test_what_a_checkpoint_holds(whole: SimpleNamespace) -> None:
    """All that continuing needs, in formats that run no code when read."""
    checkpoint = whole.folder / "stage1" / "step_4"
    names = {file.name for file in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json"} <= names
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".jinja", ".md", ".txt"}
    moments = train.load_file(checkpoint / "optimizer.safetensors")
    weights = train.load_file(checkpoint / "adapter_model.safetensors")
    assert len(moments) == 3 * len(weights), "AdamW's step, mean and mean square of each weight"


def test_pruning_keeps_the_newest_and_the_ends(tmp_path: Path) -> None:
    def checkpoint(place: str, complete: bool = True, **state: Any) -> None:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "adapter_model.safetensors").write_text("weights")
        if complete:
            (tmp_path / place / "state.json").write_text(json.dumps(state))

    for step in (2, 10, 9, 1):
        checkpoint(f"stage1/step_{step}", stage=1, step=step)
    checkpoint("stage1/step_11", complete=False)
    (tmp_path / "stage1" / "state.json").write_text(json.dumps({"stage": 1, "step": 12, "finished": True}))
    checkpoint("stage2/step_1", stage=2, step=1)
    train.prune_checkpoints(tmp_path / "stage1", None)
    assert len(list(tmp_path.glob("stage1/step_*/state.json"))) == 4
    train.prune_checkpoints(tmp_path / "stage1", 3)
    assert {path.parent.name for path in tmp_path.glob("stage1/step_*/state.json")} == {"step_2", "step_9", "step_10"}
    train.prune_checkpoints(tmp_path / "stage1", 1)
    assert {path.parent.name for path in tmp_path.glob("stage1/step_*/state.json")} == {"step_10"}, "not by name"
    assert (tmp_path / "stage1" / "state.json").exists()
    assert (tmp_path / "stage2" / "step_1" / "state.json").exists()
    assert train.newest_checkpoint(tmp_path) == tmp_path / "stage2" / "step_1"


def test_no_pickle_is_read_or_written_by_the_trainer() -> None:
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    for word in ("import pickle", "torch.load(", "torch.save(", "eval(", "exec(", "yaml.load("):
        assert word not in source.replace(".eval(", "").replace("model.eval", ""), word
