"""The reports of a run, profile_run.py's modes, build_hard_arithmetic.py, and single-turn RL."""

import json
from unittest import mock

import huggingface_hub
import pytest
import torch
from conftest import ROOT, fork_run, no_curves, output, perturb
from single_attempt import train_first_attempts

import build_hard_arithmetic
import profile_run
import train

TINY = ["--config", "configs/tiny.yaml", "--n-train", "8", "--n-eval", "2", "--set", "eval.batch_size=16"]


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    out, steps = tmp_path_factory.mktemp("finished"), ["train.stage1_steps=2", "train.stage2_steps=2"]
    assert fork_run(tiny_run(out, "--set", *steps), out / "log", no_curves) == 0, output(out / "log")
    rows = [json.loads(line) for line in (out / "run/samples.jsonl").read_text(encoding="utf-8").split("\n")[-7:-1]]
    evals, file = json.loads((out / "run/results.json").read_text())["evals"], str(out / "run/config.yaml")
    return mock.Mock(folder=out / "run", file=file, config=train.read_config(file), rows=rows, evals=evals)


def run_card(card, question):
    names, shown = {}, '"A pen costs 3 dollars. What do 7 cost?"'
    exec(card.split("```python\n")[1].split("```")[0].replace(shown, repr(question)), names)
    return names


def test_card_code_gives_the_runs_prompts_and_attempts(finished):
    """Also with a system prompt, and with a worked example whose reasoning the template would cut."""
    for row in finished.rows[:3]:
        names = run_card((finished.folder / "stage2/README.md").read_text(encoding="utf-8"), row["question"])
        written = [names["tokenizer"].decode(names[name]) for name in ("first", "second")]
        assert written == [row["text_attempt1"], row["text_attempt2"]]
    config = finished.config.model_copy(deep=True)
    config.prompts.system, config.train.max_prompt_length_attempt1 = "Add.\n", 99
    config.train.max_prompt_length_attempt2 = config.model.max_seq_length = None
    config.prompts.examples = [train.WorkedExample(input="1+1=?", output="<think>b</think>2")]
    names = run_card(profile_run.model_card(config, [], finished.folder / "stage2"), "3+4=?")
    assert names["prompt"] == train.first_prompt("3+4=?", config, names["tokenizer"])
    assert "<think>b" in names["tokenizer"].decode(names["prompt"])
    assert names["turn"] == train.attempt2_bridge(names["tokenizer"], config)[0]


def test_reports_name_what_was_evaluated_and_cards_no_local_folder(finished):
    config, page = finished.config, (finished.folder / "results.md").read_text(encoding="utf-8")
    assert all(page.count(f"| {e['checkpoint']} ") == 2 for e in finished.evals) and config.model.name in page
    given = finished.evals[-1] | {"adapter": "a/other/stage1"}
    assert "| stage2 (other/stage1) |" in profile_run.results_table([given])
    local = profile_run.model_card(config, finished.evals, finished.folder / "stage2")
    assert (
        profile_run.results_table(finished.evals) in local and config.model.name not in local and "turn, 12)" in local
    )
    hub = config.model_copy(deep=True)
    hub.model.name, hub.dataset.name = "Q/q", "openai/gsm8k"
    card = profile_run.model_card(hub, [], finished.folder / "stage2")
    assert "Not evaluated yet" in card
    found = [huggingface_hub.ModelCard(text).data for text in (local, card)]
    assert [(data.base_model, data.datasets) for data in found] == [(None, None), (["Q/q"], ["openai/gsm8k"])]


def test_curves_show_figures_intervals_and_stages(finished, tmp_path):
    steps = [{"stage": 1 + (i > 2), "global_step": i, "acc_attempt1": i / 8 if i > 1 else None} for i in (1, 2, 3)]
    event, axis = finished.evals[-1] | {"acc_attempt1": 0.5, "acc_attempt1_interval": [0.25, 0.625]}, mock.MagicMock()
    profile_run.draw_panel(axis, {"attempt 1": "acc_attempt1"}, steps, [event])
    assert list(axis.plot.call_args.args[1][1:]) == [0.25, 0.375] and axis.axvline.call_args.args == (2.5,)
    assert axis.errorbar.call_args.args[1:] == (0.5, [[0.25], [0.125]])
    profile_run.draw_curves(tmp_path, [], [])
    empty = (tmp_path / "curves.png").stat().st_size
    profile_run.draw_curves(tmp_path, steps, [event])
    assert [file.stat().st_size > empty + 1000 for file in tmp_path.iterdir()] == [True]


def test_lengths_come_before_speed_and_decoding_ignores_eos(finished, capsys, monkeypatch):
    made, sample, config = [], train.sample, ["--config", finished.file, "--compare"]
    flags = [*config, "--adapter", str(finished.folder / "stage1"), "--n", "4", "--set", "train.num_generations=2"]
    assert profile_run.main([*flags, "train.max_new_tokens_attempt1=2"]) == 0
    text = capsys.readouterr().out
    order = ["Attempt 1, 8 rollouts", "attempt1: 4 (now 2)", "Attempt 2, 8", "no signal", "built-in", "model.generate"]
    assert sorted(order, key=text.rindex) == order and text.count("\n  backward ") == 2
    monkeypatch.setattr(train, "sample", lambda *args: made.append(sample(*args)[0]) or (made[-1], []))
    monkeypatch.setattr(profile_run, "DECODE_TOKENS", 20)
    assert profile_run.main([*config, "--decode", "2", "3"]) == 0
    assert [[len(row) for row in rows] for rows in made] == 2 * ([[20] * 2] * 4 + [[20] * 3] * 4)


def test_kernels_of_a_rollout_and_of_its_update_by_kind(finished, capsys):
    """The kinds of each add up to its whole; on a card the kernels' names decide."""
    assert profile_run.main(["--config", finished.file, "--kernels", "--n", "4"]) == 0
    text = capsys.readouterr().out
    tables = [part.splitlines() for part in text[text.index("A rollout, ") :].split("\n\n")]
    assert [lines[0].split(",")[0] for lines in tables] == ["A rollout", "Its update"]
    for _, *lines in tables:
        assert abs(sum(int(line.split()[-1][:-1]) for line in lines) - 100) < 6
        assert {"attention", "LoRA", "head"} <= {line.split()[0].strip(":") for line in lines}
    policy, r = mock.Mock(), finished.config.model.lora.r
    policy.model.get_input_embeddings.return_value.weight.shape = (111, 5)
    kinds = [
        ("", [], "_attend_kernel", "attention"), ("aten::mm", [[64, r]], "nvjet", "LoRA: products"),
        ("aten::mm", [[64, 111]], "sm90_xmma_gemm", "head: products"), ("aten::copy_", [[64]], "x", "copies, casts"),
        ("", [], "nvjet", "base weights: products"), ("aten::exp", [[9, 111]], "x", "head: softmax"),
        ("Fast_RMS_Layernorm", [], "_rms_layernorm_forward", "norms"), ("aten::add", [[64]], "x", "other"),
    ]  # fmt: skip
    for op, shapes, kernel, kind in kinds:
        assert profile_run.kernel_kind(op, shapes, kernel, policy, finished.config).startswith(kind)


def turns(answers):
    return [train.Turn([1], [2], text=a, answer=a, correct=a == "7") for a in answers.split(" ")]


def test_votes_by_hand_and_of_new_first_attempts(finished, capsys, monkeypatch):
    """Pairs 5 -> 7 and 7 -> 3, further first attempts 7 and 6: of two firsts the first of a tie wins, of four 7."""
    match, first = train.answer_reader("identity").match, {"7 5 5": 1, "7 5": 0, " 5": 1, "1/2 3 .5": 0, " ": 0}
    assert all(profile_run.majority(cast := turns(text), match) is cast[winner] for text, winner in first.items())
    how = {"roll_out": lambda *_: [turns("5 7"), turns("7 3")], "take_turns": lambda *_: turns("7 6")}
    scripted = mock.Mock(answer_reader=train.answer_reader, **how)
    profile_run.vote(scripted, None, [train.Example("?", "7", [1])], finished.config, 2)
    shares = [line.split()[3::4] for line in capsys.readouterr().out.splitlines()[1:]]
    assert shares == [["0.000,", "1.000"], ["1.000,", "1.000"]]
    asked, take_turns = [], train.take_turns
    monkeypatch.setattr(train, "take_turns", lambda *args: asked.append(take_turns(*args)) or asked[-1])
    assert profile_run.main(["--config", finished.file, "--votes", "4"]) == 0
    same = [(a.prompt == b.prompt, a.completion == b.completion) for a, b in zip(asked[0], asked[2], strict=True)]
    assert all(prompt for prompt, _ in same) and sum(completion for _, completion in same) < len(same) / 2


def test_samples_and_questions_show_the_runs_attempts(finished, capsys, monkeypatch):
    kinds = ["5 7 wrong -> correct", "5 5.0 wrong -> wrong (the same answer)", "5 6 wrong -> wrong",
             "5 5 wrong, copied word for word", "7 - correct -> unanswered"]  # fmt: skip
    for *answers, kind in (text.replace("-", "", text[2] == "-").split(" ", 2) for text in kinds):
        row = {f"{name}_attempt{n}": a for n, a in enumerate(answers, 1) for name in ("text", "answer")}
        row |= {f"correct_attempt{n}": a == "7" for n, a in enumerate(answers, 1)}
        assert profile_run.kind_of(row, train.answer_reader("identity").match) == kind
    assert profile_run.side_by_side("a b", "a d").split() == ["a", "[-b-]", "|", "a", "{+d+}"]
    assert profile_run.main(["--samples", str(finished.folder)]) == 0
    head, *lines = capsys.readouterr().out.split("\n===")[0].strip().splitlines()
    assert "stage2: 6 rows" in head and sum(int(line.split()[0]) for line in lines) == 6
    row, typed = finished.rows[0], iter(["too long" * 99, "1+1=?", ""])
    assert profile_run.main(["--ask", str(finished.folder), row["question"]]) == 0
    text, shown = capsys.readouterr().out, [row[f"text_attempt{n}"].strip() for n in (1, 2)]
    assert all(part in text for part in shown) and f"1 ({row['tokens_attempt1']} tokens" in text
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert profile_run.main(["--ask", str(finished.folder)]) == 0 and "=== attempt 2" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    "--samples nowhere", "--ask nowhere ?", "--config no.yaml", "--samples {0} --checkpoint x", "--ask {0} " + "?" * 99,
    "--ask {0} ? --set model.lora.r=3", "--config {0}/config.yaml --adapter {0}",
    "--config {0}/config.yaml --n 2 --set train.num_generations=2 train.oversample=3"])  # fmt: skip
def test_bad_input_is_a_line_and_exit_code_2(finished, capsys, flags):
    assert profile_run.main(flags.format(finished.folder).split()) == 2 and capsys.readouterr().err.count("\n") == 1


def test_hard_arithmetic_is_what_greedy_first_attempts_get_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = train.read_config("configs/tiny.yaml", ["eval.max_examples=40"])
    tokenizer = train.load_tokenizer(config)
    examples, policy = train.load_examples(config, tokenizer)[2], train.load_policy(config, tokenizer)
    problems = [(e.question, e.target) for e in examples]
    monkeypatch.setattr(build_hard_arithmetic, "make_problems", lambda *_: problems)
    (tmp_path / "mine.py").write_text("def paid(completions, level, **rest):\n    return [1.0] * len(completions)\n")
    trl = [f"reward.module={tmp_path}/mine.py", "reward.fn=[paid]", "--out", str(tmp_path / "hard")]
    assert build_hard_arithmetic.main([*TINY, *trl, "--n-train", "26"]) == 0
    first = [first for first, _ in train.roll_out(policy, examples, config, 0.0, "x")]
    wrong = [problem for problem, turn in zip(problems, first, strict=True) if not turn.correct]
    assert pytest.raises(SystemExit, build_hard_arithmetic.main, [*TINY, *trl]).value.code == 2  # what is there stays
    made = train.datasets.load_from_disk(str(tmp_path / "hard"))
    rows = [[(row["question"], row["answer"]) for row in made[split]] for split in ("train", "test")]
    assert rows == [wrong[:26], wrong[26:28]] and wrong[:28] != problems[:28]


@pytest.mark.parametrize("pool, named", [("20", "--pool 44,"), ("60", "try more"), ("82", "81"), ("9", "10")])
def test_too_few_failures_say_what_to_ask_for(tmp_path, capsys, monkeypatch, pool, named):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(build_hard_arithmetic, "find_failures", lambda *args: args[2][:5])
    assert build_hard_arithmetic.main([*TINY, "--out", str(tmp_path), "--digits", "1", "--pool", pool]) == 2
    assert named in capsys.readouterr().err
    problems = dict(build_hard_arithmetic.make_problems(81, "subtraction", 1, 0))
    assert len(problems) == 81 and all(eval(asked[:-4]) == int(answer) for asked, answer in problems.items())


def test_single_turn_rl_samples_and_trains_attempt_1_alone(make_policy, monkeypatch):
    policy, config = make_policy({"train.length_norm": "constant"})
    perturb(policy)
    examples, sgd = train.load_examples(config, policy.tokenizer)[0][:4], torch.optim.SGD(policy.trainable.values())
    seen, asked, log_probs, sample = [], [], train.completion_log_probs, train.sample
    monkeypatch.setattr(train, "sample", lambda *a, **how: asked.extend(a[1]) or sample(*a, **how))
    monkeypatch.setattr(train, "completion_log_probs", lambda *a: seen.append((a[1], log_probs(*a))) or seen[-1][1])
    monkeypatch.setattr(train, "grade", lambda given, *_: [setattr(t, "reward", i) for i, t in enumerate(given)])
    with train_first_attempts(train):
        figures, _ = train.training_step(policy, sgd, examples, 2, 1, 0.0, config)
    assert asked == [example.prompt for example in examples]
    (conversations, reference), (_, own) = seen
    loss = config.train.beta1 * train.k3(own, reference).sum()
    for (turn,), part in zip(conversations, own.split([len(t.completion) for (t,) in conversations]), strict=True):
        loss -= (turn.reward - (6 - turn.reward) / 3) * part.sum()
    assert figures["loss"] == pytest.approx(loss.item() / 4 / config.train.max_new_tokens_attempt1, rel=1e-4)
