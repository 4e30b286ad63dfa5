"""Several processes train as one: shares of a batch, summed gradients, one writer, one end.

Groups are forked from this process and talk through gloo on loopback; one test starts a real launcher."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from conftest import ROOT, assert_same_ending, ending, fork_run, no_curves, output, perturb, random_attempts
from safetensors.torch import load_file, save_file

import train


def join_group(rank: int, count: int, port: int, then: Callable[[int], Any] | None = None) -> None:
    """Makes this process the rank-th of `count`, as a launcher's environment would have at its start."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    PartialState._reset_state()
    train.PROCESSES, train.MAIN = PartialState(cpu=True), rank == 0
    assert train.PROCESSES.num_processes == count
    no_curves()
    if then:
        then(rank)


def fork_group(count: int, argv: list[str], logs: Path, then: Callable[[int], Any] | None = None) -> list[int]:
    """Runs `argv` in `count` processes; returns their exit codes. Process k's output is in logs/k.out and .err."""
    logs.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pids = [
        fork_run(argv, logs / str(rank), partial(join_group, rank, count, port, then), wait=False)
        for rank in range(count)
    ]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def everything_said(logs: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(logs.iterdir()))


# ------------------------------------------------------------------------------------------------------------ gradient


class SavingSGD(torch.optim.SGD):
    """Writes the gradients of a step to `file` instead of following them."""

    def __init__(self, policy: Any, file: Path) -> None:
        super().__init__(policy.trainable.values(), lr=1.0)
        self.named, self.file = policy.trainable, file

    def step(self) -> None:
        save_file({name: weight.grad.clone() for name, weight in self.named.items()}, self.file)


@pytest.mark.parametrize(("processes", "rows"), [(2, 7), (4, 8), (4, 3)])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_summed_gradient_is_that_of_one_process(
    make_policy: Callable[..., Any], tmp_path: Path, processes: int, rows: int, stage: int
) -> None:
    policy, config = make_policy({"train.max_grad_norm": 1e9, "train.micro_batch_size": 1})
    perturb(policy, 0.2)  # far from the reference K3 would magnify the rounding of log-probs
    attempts = random_attempts(random.Random(rows), rows, (8, 12), policy.eos_token_ids)
    alone = train.improve(policy, SavingSGD(policy, tmp_path / "alone"), attempts, stage, config)
    assert alone.pop("logprob_drift") is None, "nothing here was sampled"

    def step(rank: int) -> None:
        together = train.improve(policy, SavingSGD(policy, tmp_path / str(rank)), attempts, stage, config)
        assert {key: together[key] for key in alone} == pytest.approx(alone, rel=1e-5, abs=1e-7)
        sys.exit(0)

    codes = fork_group(processes, [], tmp_path / "logs", step)
    assert codes == [0] * processes, everything_said(tmp_path / "logs")
    expected = load_file(tmp_path / "alone")
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-3
    for rank in range(processes):
        for name, gradient in load_file(tmp_path / str(rank)).items():
            assert (gradient - expected[name]).abs().max().item() <= 1e-6 * max(1.0, largest), name


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("processes", [2, 4])
def test_a_greedy_evaluation_is_that_of_one_process(
    tiny_run: Callable[..., list[str]], tmp_path: Path, processes: int
) -> None:
    found = []
    for count in (1, processes):
        out = tmp_path / str(count)
        codes = fork_group(count, tiny_run(out, "--eval-only"), tmp_path / f"logs{count}")
        assert codes == [0] * count, everything_said(tmp_path / f"logs{count}")
        (line,) = train.read_lines(out / "run" / "metrics.jsonl")
        found.append(({k: v for k, v in line.items() if k != "seconds"}, (out / "run" / "samples.jsonl").read_text()))
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def pair(tiny_run: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A whole run of two processes."""
    out = tmp_path_factory.mktemp("pair")
    codes = fork_group(2, tiny_run(out), out / "logs")
    assert codes == [0, 0], everything_said(out / "logs")
    return SimpleNamespace(folder=out / "run", logs=out / "logs", ending=ending(out / "run"))


def steps_of(folder: Path) -> list[tuple[int, int]]:
    return [(e["stage"], e["step"]) for e in train.read_lines(folder / "metrics.jsonl") if e["event"] == "train"]


ALL_STEPS = [(stage, step) for stage in (1, 2) for step in range(1, 7)]


def test_one_process_writes_and_prints(pair: SimpleNamespace) -> None:
    assert steps_of(pair.folder) == ALL_STEPS
    assert [e["checkpoint"] for e in pair.ending["evals"]] == ["pretrain", "stage1", "stage2"]
    assert "| stage2" in output(pair.logs / "0", "out")
    assert output(pair.logs / "1", "out") == ""


def test_the_processes_sample_differently(pair: SimpleNamespace, tiny_run: Callable[..., list[str]]) -> None:
    """Each step has four problems; were both to draw the same numbers, equal prompts would give equal answers."""

    def record(rank: int) -> None:
        def sample(policy: Any, prompts: Any, budget: int, temperature: float, seed: str) -> Any:
            (pair.folder.parent / f"seed{rank}").write_text(seed)
            sys.exit(0)

        train.sample = sample

    fork_group(2, tiny_run(pair.folder.parent / "seeds"), pair.folder.parent / "seeds", record)
    seeds = [(pair.folder.parent / f"seed{rank}").read_text() for rank in (0, 1)]
    assert len(set(seeds)) == 2


def signal_in_step(stage: int, step: int, sender: int, number: int = signal.SIGTERM) -> Callable[[int], None]:
    """Process `sender` gets the signal in the middle of a step."""

    def then(rank: int) -> None:
        inner, seen = train.improve, {1: 0, 2: 0}

        def improve(policy: Any, optimizer: Any, attempts: Any, now: int, config: Any) -> Any:
            seen[now] += 1
            if rank == sender and (now, seen[now]) == (stage, step):
                os.kill(os.getpid(), number)
            return inner(policy, optimizer, attempts, now, config)

        train.improve = improve

    return then


def test_a_signal_to_one_stops_both_and_resuming_ends_the_same(
    tiny_run: Callable[..., list[str]], pair: SimpleNamespace, tmp_path: Path
) -> None:
    codes = fork_group(2, tiny_run(tmp_path), tmp_path / "logs", signal_in_step(1, 3, sender=1))
    assert codes == [130, 130], everything_said(tmp_path / "logs")
    assert train.newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "stage1" / "step_3"
    codes = fork_group(2, tiny_run(tmp_path, "--resume"), tmp_path / "more")
    assert codes == [0, 0], everything_said(tmp_path / "more")
    assert_same_ending(tmp_path / "run", pair, "two processes, interrupted and resumed")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_processes(
    tiny_run: Callable[..., list[str]], tmp_path: Path, before: int, after: int
) -> None:
    codes = fork_group(before, tiny_run(tmp_path), tmp_path / "logs", signal_in_step(2, 2, sender=0))
    assert codes == [130] * before, everything_said(tmp_path / "logs")
    codes = fork_group(after, tiny_run(tmp_path, "--resume"), tmp_path / "more")
    assert codes == [0] * after, everything_said(tmp_path / "more")
    assert steps_of(tmp_path / "run") == ALL_STEPS


def test_a_killed_process_ends_the_others(tiny_run: Callable[..., list[str]], tmp_path: Path) -> None:
    start = time.monotonic()
    codes = fork_group(2, tiny_run(tmp_path), tmp_path / "logs", signal_in_step(1, 3, 1, signal.SIGKILL))
    assert codes == [1, -signal.SIGKILL], everything_said(tmp_path / "logs")
    assert time.monotonic() - start < 30
    (line,) = output(tmp_path / "logs" / "0").splitlines()
    assert line.startswith("Process 0 stops, as another has: ")
    assert train.newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "stage1" / "step_2"


def test_nobody_waits_for_the_dead(tiny_run: Callable[..., list[str]], tmp_path: Path) -> None:
    """With gloo the next exchange fails at once; with NCCL it goes on waiting, as process 0 does here."""

    def then(rank: int) -> None:
        signal_in_step(1, 3, 1, signal.SIGKILL)(rank)
        if rank == 0:
            exchange, seen = train.sum_over_processes, []

            def wait_long(*args: Any) -> Any:
                seen.append(1)
                return exchange(*args) if len(seen) < 3 else time.sleep(120)

            train.sum_over_processes = wait_long

    start = time.monotonic()
    codes = fork_group(2, tiny_run(tmp_path), tmp_path / "logs", then)
    assert codes == [1, -signal.SIGKILL], everything_said(tmp_path / "logs")
    assert time.monotonic() - start < 60
    assert output(tmp_path / "logs" / "0") == "Process 0 stops, as another has\n"


def test_the_last_one_may_take_its_time(tiny_run: Callable[..., list[str]], tmp_path: Path) -> None:
    """When all is trained the others go; one stays to merge and to upload."""

    def slow(rank: int) -> None:
        train.save_merged = train.on_main(lambda *args: (time.sleep(8), (tmp_path / "merged").touch()))

    codes = fork_group(2, tiny_run(tmp_path, "--set", "output.merge=true"), tmp_path / "logs", slow)
    assert codes == [0, 0], everything_said(tmp_path / "logs")
    assert (tmp_path / "merged").exists()


def test_a_process_that_cannot_start_costs_no_earlier_run(
    tiny_run: Callable[..., list[str]], pair: SimpleNamespace, tmp_path: Path
) -> None:
    """Process 0 is ready to overwrite; process 1 fails to load a little later."""
    shutil.copytree(pair.folder, tmp_path / "run")

    def fail(rank: int) -> None:
        def load_policy(*args: Any) -> Any:
            time.sleep(1)
            raise train.UserError("no memory here")

        if rank == 1:
            train.load_policy = load_policy

    codes = fork_group(2, tiny_run(tmp_path, "--overwrite"), tmp_path / "logs", fail)
    assert codes == [1, 2], everything_said(tmp_path / "logs")
    assert output(tmp_path / "logs" / "1") == "Process 1: no memory here\n"
    assert ending(tmp_path / "run") == pair.ending


def test_a_slow_save_is_waited_for(tiny_run: Callable[..., list[str]], tmp_path: Path) -> None:
    """A launcher ends the other processes as soon as one has gone, so none may go before the checkpoint is whole."""

    def slow(rank: int) -> None:
        signal_in_step(1, 3, sender=1)(rank)
        if rank == 0:
            save = train.save_checkpoint
            train.save_checkpoint = lambda *args: (time.sleep(1), save(*args))
        else:
            leave = train.Interrupted.__init__
            seen = tmp_path / "run" / "stage1" / "step_3" / "state.json"

            def left(self: Any, *args: Any) -> None:
                (tmp_path / "whole").write_text(str(seen.exists()))
                leave(self, *args)

            train.Interrupted.__init__ = left

    codes = fork_group(2, tiny_run(tmp_path), tmp_path / "logs", slow)
    assert codes == [130, 130], everything_said(tmp_path / "logs")
    assert (tmp_path / "whole").read_text() == "True"


def test_more_processes_than_rows_ask_no_reward_for_nothing() -> None:
    assert train.grade([], [], train.RewardConfig()) == ([], [])


def test_an_error_of_one_process_is_shown(tiny_run: Callable[..., list[str]], tmp_path: Path) -> None:
    def fail(rank: int) -> None:
        def improve(*args: Any) -> Any:
            raise train.RunError("the card is on fire")

        if rank == 1:
            train.improve = improve

    codes = fork_group(2, tiny_run(tmp_path), tmp_path / "logs", fail)
    assert codes == [1, 1], everything_said(tmp_path / "logs")
    assert output(tmp_path / "logs" / "1").splitlines() == ["the card is on fire"]


def test_torchrun_launches_it(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "train.py", "--config", "configs/tiny.yaml", "--smoke", "8", "--set", f"output.dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "score-tiny-smoke"
    assert steps_of(folder) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert done.stdout.count("2 processes") == done.stdout.count("Done in") == 1
