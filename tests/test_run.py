"""The run folder: one folder, one run, however runs start, stop, die, go on and get into one another's way.

Runs are forked from this process, which has imported everything once: a child lives for about a second.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import peft.peft_model
import pytest
import safetensors
import transformers
import yaml
from conftest import PLAIN_TEMPLATE, ROOT, assert_same_ending, ending, fork_run, no_curves, output

import profile_run
import train

STEPS = 3  # a stage, with a checkpoint after the second and one at the end
SHORT = [f"train.stage1_steps={STEPS}", f"train.stage2_steps={STEPS}", "eval.validation=2", "eval.max_examples=3"]
ONE_STEP = ["train.stage1_steps=1", "train.stage2_steps=0", "eval.validation=0"]
EVALUATIONS = [
    "pretrain", "stage1/step_0", "stage1/step_2", "stage1/step_3", "stage1", "stage2/step_2", "stage2/step_3", "stage2",
]  # fmt: skip


def quickly() -> None:
    """Leaves out, in a child, what takes time and is not looked at here."""
    no_curves()
    profile_run.git_commit = lambda: None
    peft.PeftModel.create_or_update_model_card = lambda *args: None  # train.py writes its own over it


@pytest.fixture(scope="module")
def short_run(tiny_run: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """short_run(out, *more) -> arguments of a run of two stages of three steps; `more`: keys to --set, then flags."""
    return lambda out, *more: tiny_run(out, *SHORT, *more)


@pytest.fixture(scope="module")
def whole(short_run: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The run that is never interrupted, the moments at which others die (the place of each), its seconds."""
    out = tmp_path_factory.mktemp("whole")
    start = time.monotonic()
    assert run(short_run(out), out, partial(die_at, None, out / "run", out / "moments")).code == 0, output(out / "log")
    moments, seconds = (out / "moments").read_text().splitlines(), time.monotonic() - start
    return SimpleNamespace(folder=out / "run", ending=ending(out / "run"), moments=moments, seconds=seconds)


@pytest.fixture
def finished(whole: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the whole run, to spoil: tmp_path/run."""
    return Path(shutil.copytree(whole.folder, tmp_path / "run"))


def run(argv: list[str], out: Path, before: Callable[[], Any] = quickly) -> SimpleNamespace:
    """A run in a forked child: exit code, and what it printed to stdout and stderr."""
    code = fork_run(argv, out / "log", before)
    return SimpleNamespace(code=code, out=output(out / "log", "out"), err=output(out / "log"))


def assert_refused(done: SimpleNamespace, *words: str) -> None:
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert [word for word in words if word not in done.err] == [], done.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def flags(**given: Any) -> Namespace:
    usual = {"resume": False, "eval_only": False, "smoke": None, "overwrite": False, "config": "run.yaml", "set": []}
    return Namespace(**usual | {"start_stage": 1, "resume_adapter": None} | given)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def lines_of(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n")[:-1]]


def steps_of(folder: Path) -> list[tuple[int, int]]:
    return [(line["stage"], line["step"]) for line in lines_of(folder) if line["event"] == "train"]


def evaluations_of(folder: Path) -> list[str]:
    return [line["checkpoint"] for line in lines_of(folder) if line["event"] == "eval"]


def newest(folder: Path) -> Path:
    return train.checkpoints(folder)[-1]


def wrap(module: Any, name: str, outer: Callable[..., Any]) -> None:
    """module.name(...) becomes outer(what it was, ...)."""
    inner = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: outer(inner, *args, **kwargs))


def at(moment: str | tuple[int, int], do: Callable[[], Any]) -> Callable[[], None]:
    """A child that does something at an evaluation, given by its label, or at the start of a (stage, step)."""

    def met(inner: Callable, *args: Any) -> Any:
        do() if moment in (args[-1], args[3:5]) else None
        return inner(*args)

    return lambda: (quickly(), wrap(train, "evaluate", met), wrap(train, "training_step", met))


def send(*numbers: int) -> Callable[[], None]:
    """The process sends itself these signals, one after the other."""
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def finish(argv: list[str], out: Path) -> str:
    """A run to its end: what it printed."""
    done = run(argv, out)
    assert (done.code, done.err) == (0, "")
    return done.out


def kill(argv: list[str], out: Path, moment: str | tuple[int, int]) -> None:
    assert run(argv, out, at(moment, send(signal.SIGKILL))).code == -signal.SIGKILL


def stop(argv: list[str], out: Path, moment: str | tuple[int, int], number: int = signal.SIGTERM) -> list[str]:
    """The arguments of the command with which a run that is sent a signal says to go on."""
    done = run(argv, out, at(moment, send(number)))
    assert done.code == 130, done.err
    (line,) = done.err.splitlines()
    python, script, *argv = shlex.split(line.partition("Go on with: ")[2])
    assert (python, script) == ("python", "train.py")
    return argv


def test_folder_of_a_whole_run(whole):
    """Every step keeps its adapter, the newest checkpoint alone its optimizer; nothing runs code when it is read."""
    names = set(contents(whole.folder))
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "results.json", "results.md"} <= names
    for place in ("stage1/step_2", "stage1", "stage2/step_2", "stage2"):
        files = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "state.json"}
        assert {f"{place}/{file}" for file in files} <= names
    assert not [name for name in names if "optimizer" in name], "a stage's end needs none"
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".jsonl", ".jinja", ".md", ".yaml"}
    assert steps_of(whole.folder) == [(stage, step + 1) for stage in (1, 2) for step in range(STEPS)]
    assert evaluations_of(whole.folder) == EVALUATIONS


def test_real_command_survives_a_closed_pipe_and_tells_no_secret(tiny_run, tmp_path):
    """`python train.py ... 2>&1 | head -1`, with keys in its environment."""
    secrets = {"WANDB_API_KEY": "5ec12e7" * 6, "HF_TOKEN": "hf_5ecretsecret"}
    command = shlex.join([sys.executable, "train.py", *tiny_run(tmp_path, *ONE_STEP)])
    shell = ["bash", "-c", f"{command} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(shell, cwd=ROOT, env=os.environ | secrets, text=True, capture_output=True, check=False)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1), done.stdout + done.stderr
    assert evaluations_of(tmp_path / "run") == ["pretrain", "stage1"]
    files = contents(tmp_path / "run")
    assert "curves.png" in files
    assert not [name for name, text in files.items() if any(value.encode() in text for value in secrets.values())]


# ------------------------------------------------------------------------------------------------------------ kills


class Moments:
    """Counts the moments of this process. Kills it at the moment-th; with None it writes each one's place to `told`."""

    def __init__(self, moment: int | None, folder: Path, told: Path) -> None:
        self.moment, self.folder, self.count, self.places, self.pid = moment, folder, 0, ["elsewhere"], os.getpid()
        self.diary = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def is_now(self, what: str) -> bool:
        self.count += 1
        if self.moment in (None, self.count):
            os.write(self.diary, f"{self.places[-1]}: {what}\n".encode())
        return self.count == self.moment

    def watch(self, event: str, args: tuple) -> None:
        """Writes, renames and removals in the run folder, as Python's audit events."""
        events = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
        if os.getpid() != self.pid or event not in events:
            return
        writes = event != "open" or bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        below = isinstance(args[0], str | Path) and str(args[0]).startswith(str(self.folder))
        by_descriptor = event in ("os.remove", "os.rmdir") and args[-1] != -1  # as rmtree does it
        if writes and (below or by_descriptor) and self.is_now(f"{event} {Path(args[0]).name}"):
            os.kill(self.pid, signal.SIGKILL)

    def within(self, module: Any, name: str, place: Callable[..., str]) -> None:
        """What happens in this function happens in this place."""

        def outer(inner: Callable, *args: Any, **kwargs: Any) -> Any:
            self.places.append(place(*args))
            try:
                return inner(*args, **kwargs)
            finally:
                self.places.pop()

        wrap(module, name, outer)

    def torn(self, module: Any, name: str, tear: Callable[..., None] | None = None) -> None:
        """A moment in the middle of what a writer writes, where `tear` leaves a half; else just before."""

        def outer(inner: Callable, *args: Any, **kwargs: Any) -> Any:
            if self.is_now(f"half of {name}" if tear else f"before {name}"):
                tear(inner, *args) if tear else None
                os.kill(self.pid, signal.SIGKILL)
            return inner(*args, **kwargs)

        wrap(module, name, outer)


def half_a_line(_: Any, run: train.Run, event: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    name, rows = ("samples.jsonl", samples) if len(str(event)) % 2 else ("metrics.jsonl", [event])
    text = "".join(map(train.reports.to_json, rows)).encode()
    cut = len(text) * 2 // 3
    cut = next((i + 1 for i in range(cut, len(text)) if text[i] >= 0xC0), cut)  # inside a character, where possible
    with (run.folder / name).open("ab") as stream:
        stream.write(text[:cut])


def half_the_weights(inner: Callable, tensors: dict, file: Any, *rest: Any) -> None:
    inner(tensors, file, *rest)
    os.truncate(file, os.path.getsize(file) // 2)


def die_at(moment: int | None, folder: Path, told: Path) -> None:
    """A child that kills itself at its moment-th moment; with None it only tells their places."""
    quickly()
    moments = Moments(moment, folder, told)
    moments.within(train.Run, "evaluate", lambda run, policy, examples, label, *rest: f"evaluation {label}")
    moments.within(train, "train_stage", lambda policy, examples, stage, *rest: f"stage{stage} step")
    moments.within(train.Run, "save_checkpoint", lambda run, policy, stage, step, _: f"stage{stage} checkpoint {step}")
    moments.within(train, "open_run", lambda *args: "open")
    moments.torn(train.Run, "write", half_a_line)
    moments.torn(train.reports, "write_atomically", lambda _, file, text: file.with_name(f".{file.name}.tmp").touch())
    moments.torn(train, "save_file", half_the_weights)
    moments.torn(peft.peft_model, "safe_save_file", half_the_weights)
    moments.torn(train, "train_step")
    sys.addaudithook(moments.watch)


def test_killed_at_random_moments(short_run, whole, tmp_path, record_property):
    """Resumed, or started again where nothing was there yet, each ends as the run that was never killed."""
    rng, kills, places, kinds = random.Random(20), 0, [], defaultdict(list)
    for number, place in enumerate(whole.moments, 1):  # one of each kind of place, not of the most frequent writes
        kinds[place.partition(":")[0]].append(number)
        kinds["half" + place.partition("half")[2]].append(number)
    chosen = sorted({rng.choice(numbers) for numbers in kinds.values()})
    for first in chosen:
        out, moment, deaths = tmp_path / str(first), first, 0
        out.mkdir()
        while True:
            resume = ["--resume"] if (out / "run" / "config.yaml").exists() else []
            done = run(short_run(out, *resume), out, partial(die_at, moment, out / "run", out / "told"))
            if done.code != -signal.SIGKILL:
                break
            deaths += 1
            moment = rng.randrange(1, len(whole.moments) // 3) if deaths < 3 and first % 6 == 0 else -1
        told = (out / "told").read_text().splitlines() if deaths else []
        assert done.code == 0, f"{told}: {done.err}"
        assert deaths >= 1, f"moment {first} never came"
        assert_same_ending(out / "run", whole, f"killed at {told}")
        shutil.rmtree(out)
        kills, places = kills + deaths, places + told
    record_property("said", f"{kills} kills of {len(chosen)} runs, every ending the same")
    assert kills > len(chosen), "some were killed more than once"
    for place in ("open", "half of", "step", "stage1 checkpoint 2", "stage1 checkpoint 3", "stage2 checkpoint 2",
                  *(f"evaluation {checkpoint}:" for checkpoint in EVALUATIONS)):  # fmt: skip
        assert any(place in told for told in places), f"no kill in {place}: {places}"


def test_killed_from_outside_in_slow_writes(short_run, whole, tmp_path):
    def slow(inner: Callable, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return inner(*args, **kwargs)

    def slowly() -> None:
        """Every flush, rename and weight file takes its time, so that a kill falls into one."""
        quickly()
        for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (peft.peft_model, "safe_save_file")):
            wrap(module, name, slow)

    rng, kills, code = random.Random(9), 0, None
    while code != 0:
        resume = ["--resume"] if (tmp_path / "run" / "config.yaml").exists() else []
        pid = fork_run(short_run(tmp_path, *resume), tmp_path / "log", slowly, wait=False)
        until = time.monotonic() + rng.uniform(0.4, 1.5) * whole.seconds if kills < 4 else math.inf
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                until, kills = math.inf, kills + 1
            time.sleep(0.01)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL), output(tmp_path / "log")
    assert kills >= 1
    assert_same_ending(tmp_path / "run", whole, f"killed {kills} times")


@pytest.mark.parametrize(
    ("number", "stage", "step"), [(signal.SIGTERM, 1, 1), (signal.SIGHUP, 2, 2), (signal.SIGINT, 1, STEPS)]
)
def test_a_signal_finishes_the_step_saves_and_prints_how_to_go_on(short_run, whole, tmp_path, number, stage, step):
    """Also where no checkpoint, one with a validation, or the stage's end was due."""
    command, folder = stop(short_run(tmp_path), tmp_path, (stage, step), number), tmp_path / "run"
    assert steps_of(folder)[-1] == (stage, step)
    assert newest(folder) == folder / f"stage{stage}" / (f"step_{step}" if step < STEPS else "")
    assert f"Going on from {folder}/stage{stage}" in finish(command, tmp_path)
    assert_same_ending(folder, whole, "stopped by a signal")


def test_a_signal_in_an_evaluation_and_a_second_one_at_once(short_run, whole, tmp_path):
    command = stop(short_run(tmp_path), tmp_path, "stage1")
    twice = run(command, tmp_path, at((2, 2), send(signal.SIGTERM, signal.SIGINT)))
    assert (twice.code, twice.err) == (130, "")
    assert steps_of(tmp_path / "run")[-1] == (2, 1), "the step in hand is abandoned"
    assert newest(tmp_path / "run") == tmp_path / "run" / "stage1"
    finish(command, tmp_path)
    assert_same_ending(tmp_path / "run", whole, "stopped three times")


def test_a_terminal_that_closes_costs_no_step(short_run, tmp_path):
    """A real SIGHUP: from then on every line that the run prints fails with EIO."""

    def and_then_nothing_is_flushed(main: Callable, *args: Any) -> int:
        code = main(*args)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        return code

    def on_a_terminal() -> None:
        os.setsid()
        master, terminal = os.openpty()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for number in (1, 2):
            os.dup2(terminal, number)
        os.close(terminal)
        at((1, 1), lambda: os.close(master))()
        wrap(train, "main", and_then_nothing_is_flushed)

    assert run(short_run(tmp_path), tmp_path, on_a_terminal).code == 130
    assert newest(tmp_path / "run") == tmp_path / "run" / "stage1" / "step_1"


def test_nohup_survives_a_logout(tiny_run, tmp_path):
    def before() -> None:
        at((1, 1), send(signal.SIGHUP))()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does

    assert run(tiny_run(tmp_path, *ONE_STEP), tmp_path, before).code == 0


# ------------------------------------------------------------------------------------------ C1, C6: one folder, one run


def test_two_starts_at_once(short_run, whole, tmp_path):
    pids = [fork_run(short_run(tmp_path), tmp_path / f"log{i}", quickly, wait=False) for i in (1, 2, 3)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert sorted(codes) == [0, 2, 2], [output(tmp_path / f"log{i}") for i in (1, 2, 3)]
    assert_same_ending(tmp_path / "run", whole, "as if alone")


def test_a_folder_in_use_is_refused_and_what_runs_beside_it_changes_nothing(short_run, whole, tmp_path):
    """The holder waits before its evaluation of Stage I until the others have tried."""
    waits, goes, folder = tmp_path / "waits", tmp_path / "goes", tmp_path / "run"

    def wait() -> None:
        waits.touch()
        while not goes.exists():
            time.sleep(0.01)

    pid = fork_run(short_run(tmp_path), tmp_path / "log_of_holder", at("stage1", wait), wait=False)
    try:
        while not waits.exists():
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), output(tmp_path / "log_of_holder")
            time.sleep(0.01)
        before = contents(folder)
        for flags in ([], ["--resume"], ["--overwrite"]):
            assert_refused(run(short_run(tmp_path, *flags), tmp_path), "output.dir", "in use", f"process {pid} on ")
        for flags in (["--eval-only", "--resume-adapter", str(folder / "stage1")], from_adapter(folder / "stage1")):
            finish(short_run(tmp_path, *flags), tmp_path)
        assert contents(folder) == before
    finally:
        goes.touch()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, output(tmp_path / "log_of_holder")
    assert_same_ending(folder, whole, "as if alone")
    assert evaluations_of(tmp_path / "run-eval") == ["adapter"]
    assert steps_of(tmp_path / "run-stage2") == [(2, 1), (2, 2), (2, 3)]
    assert not list(tmp_path.glob(".*.holder")), "who is named holds the folder"


def test_claim_folder_survives_a_holder_that_ends_or_was_killed(make_config):
    config, args = make_config(), flags()
    holder = Path(config.output.dir) / ".test.holder"
    with train.claim_folder(args, config):
        holder.unlink()
        with pytest.raises(train.UserError, match="in use"), train.claim_folder(args, config):
            pass
    holder.write_text("process 1 on nowhere, and more")  # as a kill leaves it
    says = rf"in use by process {os.getpid()} on \S+;"
    with train.claim_folder(args, config), pytest.raises(train.UserError, match=says), train.claim_folder(args, config):
        pass
    with train.claim_folder(args, config):
        pass


def test_second_start_changes_nothing_and_overwrite_leaves_nothing_old(short_run, whole, finished, tmp_path):
    """What a run does not write stays; what the old run wrote is gone before the new one can be killed."""
    for name in ("notes.txt", "data/train.jsonl", ".own.tmp"):
        (finished / name).parent.mkdir(exist_ok=True)
        (finished / name).write_text("mine")
    before = contents(finished)
    assert_refused(run(short_run(tmp_path), tmp_path), "output.dir", "--resume", "--overwrite")
    bad = run(short_run(tmp_path, "dataset.input_field=qestion", "--overwrite"), tmp_path)
    assert_refused(bad, "dataset.input_field")
    assert contents(finished) == before
    (finished / "stage1").rename(tmp_path / "elsewhere").joinpath("mine").touch()
    (finished / "stage1").symlink_to(tmp_path / "elsewhere")
    kill(short_run(tmp_path, "train.beta1=0.5", "--overwrite"), tmp_path, (1, 1))
    assert (tmp_path / "elsewhere" / "mine").exists()
    assert train.checkpoints(finished) == [finished], "a resume must not find the old run's"
    assert {"notes.txt", "data/train.jsonl", ".own.tmp"} <= contents(finished).keys()
    finish(short_run(tmp_path, "--overwrite"), tmp_path)
    (finished / ".own.tmp").unlink()
    assert_same_ending(finished, whole, "over another run")


READ = ["model.name", "dataset.name", "reward.module", "model.chat_template", "resume_adapter", "config", "link", "set"]


@pytest.mark.parametrize("key", READ)
def test_overwrite_never_deletes_what_the_config_reads(make_config, tmp_path, monkeypatch, key):
    config = make_config({"model.chat_template": "\n".join([PLAIN_TEMPLATE] * 99)})  # no path
    folder, args = Path(config.output.dir, config.run_name), flags(overwrite=True)
    place = folder / "merged" / "deep"
    place.mkdir(parents=True)
    assert train.find_start(args, config, folder, {}) is None
    if key == "link":
        (tmp_path / "link").symlink_to(folder / "merged")
        place, key = tmp_path / "link" / "deep", "dataset.name"
    elif key == "set":  # save_to_disk's, with a state.json of its own
        (folder / "dataset_info.json").touch()
        place, key = folder, "dataset.name"
    elif key == "model.chat_template":
        monkeypatch.setenv("HOME", str(folder))
        place = "~/merged/deep"
    section, _, name = key.rpartition(".")
    setattr(getattr(config, section) if section else args, name, str(place))
    with pytest.raises(train.UserError, match=re.escape(str(place))):
        train.find_start(args, config, folder, {})


def test_a_finished_run_that_is_resumed_changes_nothing(short_run, finished, tmp_path):
    """Also with keys that move time and memory alone: config.yaml tells what the rows were made with."""
    before = contents(finished)
    moved = ["train.micro_batch_size=2", "train.checkpoint_every=1", "model.gradient_checkpointing=true"]
    for keys in ([], moved):
        assert "Stage I" not in finish(short_run(tmp_path, *keys, "--resume"), tmp_path)
        assert contents(finished) == before


@pytest.mark.parametrize(
    "change",
    ["train.beta1=0.5", "train.seed=9", "eval.generation_temperature=1", "eval.batch_size=3", "reward.fn=exact_match",
     "model.lora.dropout=0.0", "train.stage2_steps=4", "eval.validation=3", "prompts.self_correction=Again."],
)  # fmt: skip
def test_resume_refuses_a_key_that_changes_a_number(short_run, finished, tmp_path, change):
    before = contents(finished)
    done = run(short_run(tmp_path, change, "--resume"), tmp_path)
    assert_refused(done, "--resume", change.partition("=")[0], "--start-stage 2 --resume-adapter")
    assert contents(finished) == before


def test_a_resumed_run_in_float16_keeps_its_loss_scale(short_run, tmp_path):
    """It overflows at first. LoRA dropout draws at each try, so a scale that was lost would change the numbers."""
    places = whole, killed = tmp_path / "whole", tmp_path / "killed"
    for place in places:
        place.mkdir()

    def overflows(then: Callable[[], Any] = quickly) -> Callable[[], None]:
        return lambda: (setattr(train, "LOSS_SCALE", 2.0**30), train.log_once.cache_clear(), then())

    def command(place: Path, *flags: str) -> list[str]:
        return short_run(place, "model.dtype=float16", *flags)

    done = run(command(whole), whole, overflows())
    assert (done.code, done.out.count("overflow"), "in float16" in done.out) == (0, 1, True), done.err
    scale = train.read_state(whole / "run" / "stage2")["loss_scale"]
    assert 1 < scale < 2**30
    assert run(command(killed), killed, overflows(at((1, 3), send(signal.SIGKILL)))).code == -signal.SIGKILL
    other_card = run(command(killed, "--resume"), killed, lambda: wrap(train, "number_format", lambda *_: "bfloat16"))
    assert_refused(other_card, "--resume", "model.dtype")
    assert run(command(killed, "--resume"), killed, overflows()).code == 0, output(killed / "log")
    assert train.read_state(killed / "run" / "stage2")["loss_scale"] == scale
    assert_same_ending(killed / "run", SimpleNamespace(ending=ending(whole / "run")), "float16")


OWN_REWARD = """
from reward_function import register_reward
@register_reward("own")
def own(predictions, targets, extract):
    return [{}.0 * len(text) for text in predictions]
"""


def test_resume_refuses_changed_rows_turns_and_rewards(tiny_run, tmp_path):
    """What the config does not show: one run, then each of its files changed alone."""
    data, module, template = tmp_path / "data", tmp_path / "own.py", tmp_path / "template.jinja"
    shutil.copytree(Path(tiny_run(tmp_path)[1]).parent / "data", data)
    dated = "{{ strftime_now('%d %B %Y') }}" + PLAIN_TEMPLATE
    module.write_text(OWN_REWARD.format(1))
    template.write_text(dated)
    keys = [f"dataset.name={data}", f"reward.module={module}", "reward.fn=own", f"model.chat_template={template}"]
    argv = tiny_run(tmp_path, *ONE_STEP, "eval.max_examples=2", "train.max_prompt_length_attempt1=80", *keys)
    finish(argv, tmp_path)
    before = contents(tmp_path / "run")

    def another_day() -> None:
        class Later(transformers.utils.chat_template_utils.datetime):
            @classmethod
            def now(cls, *args: Any) -> Any:
                return cls(2031, 2, 3)

        transformers.utils.chat_template_utils.datetime = Later

    turns = dated.replace("message.content", "(message.content if loop.index < 3 else message.content + '!')")
    rows, test_rows = ((data / f"{name}.jsonl").read_text() for name in ("train", "test"))
    for file, text, words in (
        (data / "train.jsonl", rows.replace("10+0=", "10+9="), ["rows"]),
        (data / "test.jsonl", re.sub(r'"answer": "\d+"', '"answer": "7"', test_rows, count=1), ["rows"]),
        (module, OWN_REWARD.format(-1), ["reward.module"]),
        (module, OWN_REWARD.format("[] + 1"), ["reward.fn"]),
        (template, turns, ["prompts.self_correction"]),
        (template, dated, ["template", "date"]),
    ):
        right = file.read_text()
        file.write_text(text)
        assert_refused(run([*argv, "--resume"], tmp_path, another_day if text == dated else quickly), *words)
        file.write_text(right)
    finish([*argv, "--resume"], tmp_path)
    assert contents(tmp_path / "run") == before


def test_fingerprints_hold_the_columns_that_rewards_read(make_config):
    def rows(column: str) -> str:
        example = train.Example("1+1=?", "2", [1, 2], {"solution": column})
        return train.fingerprints(([example], [], [example]), [3], make_config())["rows"]

    assert rows("two") == rows("two") != rows("three")


def test_resume_cleans_up_half_written_states(short_run, whole, finished, tmp_path):
    """Lines past the newest checkpoint, half of one more, checkpoints without state.json, temporary files."""
    shutil.copytree(finished / "stage1" / "step_2", finished / "stage2" / "step_9")
    for name in (".results.json.tmp", "stage2/.state.json.tmp", "stage2/step_9/.state.json.tmp"):
        (finished / name).write_text("half")
    for name in train.LOGS:
        with (finished / name).open("a") as stream:
            stream.write('{"event": "train", "st')
    for file in finished.glob("stage2/**/state.json"):
        file.unlink()
    assert newest(finished) == finished / "stage1"
    finish(short_run(tmp_path, "--resume"), tmp_path)
    assert not (finished / "stage2" / "step_9").exists()
    assert_same_ending(finished, whole, "half-written states")


@pytest.mark.parametrize(
    ("lost", "cut", "names"),
    [
        ([], "samples.jsonl", "samples.jsonl"),
        ([], "stage2/state.json", "state.json"),
        ([], "config.yaml", "config.yaml"),
        (["metrics.jsonl"], None, "metrics.jsonl"),
        (["stage2/state.json"], None, "optimizer"),
        (["stage2/adapter_config.json", "stage2/adapter_model.safetensors"], None, "adapter_model"),
        ([f"{place}/state.json" for place in (".", "stage1", "stage1/step_2", "stage2", "stage2/step_2")], None,
         "checkpoints"),
    ],
)  # fmt: skip
def test_resume_of_a_damaged_folder_is_one_line(short_run, finished, tmp_path, lost, cut, names):
    for name in lost:
        (finished / name).unlink()
    if cut:
        os.truncate(finished / cut, 8)
    before = contents(finished)
    assert_refused(run(short_run(tmp_path, "--resume"), tmp_path), names)
    assert contents(finished) == before


# ---------------------------------------------------------------------------------------------------- smoke, eval-only


def test_smoke_has_its_own_folder_and_replaces_smoke_runs_alone(short_run, finished, tmp_path):
    before, smoke = contents(finished), tmp_path / "run-smoke"
    shutil.copytree(finished, smoke)
    for flags in ([], ["--overwrite"]):
        assert_refused(run(short_run(tmp_path, "--smoke", "4", *flags), tmp_path), "--smoke", "run_name")
        assert contents(smoke) == before
    shutil.rmtree(smoke)
    command = stop(short_run(tmp_path, "--smoke", "4"), tmp_path, (1, 2))
    assert newest(smoke) == smoke / "stage1"
    for argv in (command, short_run(tmp_path, "--smoke", "4")):
        finish(argv, tmp_path)
        assert steps_of(smoke) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    mine, stage2 = contents(smoke), short_run(tmp_path, "--smoke", "4", *from_adapter(smoke / "stage1" / "step_1"))
    finish(stop(stage2, tmp_path, (2, 1)), tmp_path)
    assert steps_of(tmp_path / "run-stage2-smoke") == [(2, 1), (2, 2)]
    assert (contents(smoke), contents(finished)) == (mine, before)


def test_eval_only_gives_the_runs_numbers_and_replaces_those_before(short_run, finished, tmp_path):
    """Needs no train batch; a kill or a signal in the middle costs nothing."""
    before, folder = contents(finished), tmp_path / "run-eval"
    argv = short_run(tmp_path, "train.stage1_batch_size=500", "--eval-only")
    theirs = {event["checkpoint"]: event for event in lines_of(finished) if event["event"] == "eval"}
    kill(argv, tmp_path, "pretrain")
    finish(stop(argv, tmp_path, "pretrain"), tmp_path)
    for label, adapter in (("pretrain", None), ("stage1", finished / "stage1"), ("stage2", finished / "stage2")):
        finish([*argv, *(["--resume-adapter", str(adapter)] if adapter else [])], tmp_path)
        (event,) = lines_of(folder)
        assert json.loads((folder / "results.json").read_text())["evals"] == [event]
        assert event["adapter"] == (str(adapter) if adapter else None)
        differ = {key for key in event if event[key] != theirs[label].get(key)}
        assert differ <= {"seconds", "adapter", "global_step", "checkpoint"}
    assert (list(folder.glob("stage*")), contents(finished)) == ([], before)


def test_eval_only_never_touches_a_run_that_has_the_name(short_run, finished, tmp_path):
    folder = finished.rename(tmp_path / "run-eval")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"run_name": "run-eval"}))
    before = contents(folder)
    for flags in ([], ["--overwrite"]):
        assert_refused(run(short_run(tmp_path, "--eval-only", *flags), tmp_path), "--eval-only", "run_name")
        assert contents(folder) == before


# ------------------------------------------------------------------------------------- C2, C3: Stage II from an adapter


@pytest.fixture(scope="module")
def stage2(short_run: Any, whole: SimpleNamespace, tmp_path_factory: Any) -> SimpleNamespace:
    """A Stage II from another run's stage1/step_2, which lies in this run's folder; never interrupted."""
    out = tmp_path_factory.mktemp("stage2")
    shutil.copytree(whole.folder / "stage1" / "step_2", out / "run")
    finish(short_run(out, *from_adapter(out / "run")), out)
    return SimpleNamespace(folder=out / "run", weights=weights(out / "run" / "stage2"))


def from_adapter(folder: Path) -> list[str]:
    return ["--start-stage", "2", "--resume-adapter", str(folder)]


def test_stage_two_in_a_new_run(whole, stage2):
    assert steps_of(stage2.folder) == [(2, step + 1) for step in range(STEPS)]
    assert evaluations_of(stage2.folder) == ["pretrain", "stage1", "stage2/step_0", *EVALUATIONS[-3:]]
    assert weights(stage2.folder / "stage2" / "step_0") == weights(whole.folder / "stage1" / "step_2")
    assert stage2.weights != weights(whole.folder / "stage2")
    assert [event["adapter"] for event in lines_of(stage2.folder) if "adapter" in event] == [str(stage2.folder)]


@pytest.mark.parametrize("when", ["pretrain", "stage1", "stage2/step_0", (2, 1)])
def test_stage_two_after_a_run_of_the_same_config_is_a_run_of_its_own(short_run, stage2, finished, tmp_path, when):
    """The specification's own command: killed, then resumed without its adapter; stopped; typed once more."""
    before, mine = contents(finished), tmp_path / "run-stage2"
    argv = short_run(tmp_path, *from_adapter(finished / "stage1" / "step_2"))
    kill(argv, tmp_path, when)
    assert "run-stage2" in output(tmp_path / "log", "out")
    assert train.checkpoints(mine) == [mine / "stage2" / "step_0"]
    assert_refused(run(argv, tmp_path), "output.dir", "run_name=run-stage2 --resume", "--overwrite")
    assert contents(finished) == before
    finished.rename(tmp_path / "elsewhere")
    finish(stop(short_run(tmp_path, "run_name=run-stage2", "--resume"), tmp_path, (2, 3)), tmp_path)
    assert weights(mine / "stage2") == stage2.weights
    assert steps_of(mine) == steps_of(stage2.folder)
    assert evaluations_of(mine) == evaluations_of(stage2.folder)


def test_stage_two_goes_on_by_the_command_that_it_prints_and_overwrites_no_other_run(
    short_run, stage2, finished, tmp_path
):
    before, argv = contents(finished), short_run(tmp_path, *from_adapter(finished / "stage1" / "step_2"))
    for flags in ([], ["--overwrite"]):
        finish(stop([*argv, *flags], tmp_path, (2, 1)), tmp_path)
        assert weights(tmp_path / "run-stage2" / "stage2") == stage2.weights
        assert contents(finished) == before


# ------------------------------------------------------------------------------------------------------ ends in trouble


def full_in_open(name: str, due: Callable[[], bool]) -> None:
    """There is no room for files of this name."""

    def opens(inner: Callable, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, str | Path) and Path(file).name == name and set(mode) & set("wax+") and due():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return inner(file, mode, *args, **kwargs)

    wrap(builtins, "open", opens)
    io.open = builtins.open


def full_in_call(module: Any, name: str, due: Callable[[], bool], error: Exception) -> None:
    """A function fails as the system's own, or a library's in Rust, would."""

    def call(inner: Callable, *args: Any, **kwargs: Any) -> Any:
        if due():
            raise error
        return inner(*args, **kwargs)

    wrap(module, name, call)


RUST = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
FULL = {  # what fails once stage1/step_2 is there
    "metrics.jsonl": partial(full_in_open, "metrics.jsonl"),
    "results.json": partial(full_in_open, ".results.json.tmp"),
    "adapter": partial(full_in_call, peft.peft_model, "safe_save_file", error=RUST),
    "tokenizer": partial(full_in_open, "tokenizer_config.json"),
    "state.json": partial(full_in_open, ".state.json.tmp"),
    "flushing": partial(full_in_call, os, "fsync", error=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
}


@pytest.mark.parametrize("writer", FULL)
def test_a_full_disk_is_one_line_and_costs_nothing(short_run, whole, tmp_path, writer):
    """The system's error for a full disk names no file: the line names the run's folder."""
    folder, checkpoint = tmp_path / "run", tmp_path / "run" / "stage1" / "step_2"

    def before() -> None:
        quickly()
        FULL[writer](due=(checkpoint / "state.json").exists)

    done = run(short_run(tmp_path), tmp_path, before)
    assert (done.code, len(done.err.splitlines())) == (1, 1), done.err
    assert done.err.startswith(f"{folder}: "), done.err
    assert "No space left on device" in done.err
    command = shlex.split(done.err.partition("go on with: ")[2])[2:]
    assert weights(checkpoint) == weights(whole.folder / "stage1" / "step_2")
    if writer in ("metrics.jsonl", "results.json", "adapter"):  # the kills cover the rest
        finish(command, tmp_path)
        assert_same_ending(folder, whole, writer)


def test_a_place_that_cannot_be_written_or_is_not_there_is_named(short_run, tmp_path):
    assert_refused(run(short_run(tmp_path, "run_name=runn", "--resume"), tmp_path), "--resume", "run_name")
    assert not (tmp_path / "runn").exists()
    (tmp_path / "file").write_text("")
    assert_refused(run(short_run(tmp_path / "file"), tmp_path), "output.dir", str(tmp_path / "file"))
    (tmp_path / "run").write_text("")
    done = run(short_run(tmp_path), tmp_path)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert str(tmp_path / "run") in done.err and "--resume" not in done.err


def test_a_run_that_was_to_go_is_not_what_one_goes_on_with(short_run, finished, tmp_path):
    (tmp_path / ".run.holder").mkdir()
    done = run(short_run(tmp_path, "--overwrite"), tmp_path)
    assert done.code == 1 and ".run.holder" in done.err and "--resume" not in done.err


def test_the_logs_are_on_the_disk_before_their_sizes_are(tmp_path, monkeypatch):
    synced, log = [], tmp_path / "metrics.jsonl"
    log.write_text("{}\n")
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    train.Run(tmp_path, None, tmp_path, {}, SimpleNamespace(id=None), 0.0).write_state()
    assert synced[:2] == [log.stat().st_ino, (tmp_path / "state.json").stat().st_ino]


def test_skipped_steps_in_a_row_end_the_run_and_keep_the_checkpoint_before(short_run, tmp_path):
    def add_gradients(inner: Callable, policy: Any, *rest: Any) -> Any:
        stats = inner(policy, *rest)
        if (tmp_path / "run" / "stage1" / "step_2").exists():
            list(policy.trainable.values())[-1].grad.view(-1)[0] = math.inf
        return stats

    def before() -> None:
        quickly()
        train.MAX_SKIPPED_STEPS = 2
        wrap(train, "add_gradients", add_gradients)

    keys = ["train.stage1_steps=5", "train.stage2_steps=1", "train.checkpoint_every=1", "eval.validation=0"]
    done, folder = run(short_run(tmp_path, *keys), tmp_path, before), tmp_path / "run"
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "train.learning_rate" in done.err
    assert [line["skipped"] for line in lines_of(folder) if line["event"] == "train"] == [False, False, True, True]
    rows = [row["step"] for row in lines_of(folder, "samples.jsonl") if row["event"] == "train"]
    assert [rows.count(step) for step in (1, 2, 3, 4)] == [4, 4, 4, 4]
    first, second, third = (folder / "stage1" / f"step_{step}" for step in (1, 2, 3))
    assert weights(first) != weights(second) == weights(third), "a skipped step moves nothing"
    assert list(folder.rglob("optimizer.safetensors")) == [third / "optimizer.safetensors"], "the newest alone has one"
    finish(short_run(tmp_path, *keys, "--resume"), tmp_path)
    assert steps_of(folder) == [*((1, step) for step in range(1, 6)), (2, 1)]


def test_a_run_that_learns_nothing_says_so_once(tiny_run, tmp_path):
    def before() -> None:
        quickly()
        train.rewards.REWARD_FNS["format_and_match"] = lambda predictions, *rest: [0.25] * len(predictions)

    keys = [f"train.stage1_steps={train.SILENT_STEPS + 1}", "train.stage2_steps=0", "train.max_new_tokens_attempt1=1"]
    done = run(tiny_run(tmp_path, *keys), tmp_path, before)
    warned = [line for line in done.out.splitlines() if line.startswith("Warning: ")]
    assert ["nothing was learned" in line for line in warned] == [True], warned
    assert "100% without signal, cut off " in done.out
    assert {line["without_signal"] for line in lines_of(tmp_path / "run") if line["event"] == "train"} == {1.0}
