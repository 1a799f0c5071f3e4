"""What status.py tells of a run, from records whose times are known. Of real ones: test_requeue.py."""

import json
import os
import re
import time
from xml.etree import ElementTree

import pytest

import launcher.goodput
from cluster import goodput
from cluster.goodput import UNTOLD, read_status
from cluster.report import html_page, ticks
from cluster.slurm import JobState
from cluster.status import describe, main
from launcher.goodput import PARTS, Goodput

# Begun at 10 s, killed after step 18; begun again from step 10 at 50 s, finished at 80 s.
JOBS = [
    {"time": 0, "event": "submitted", "job": "7"},
    {"time": 10, "event": "begin", "job": "7", "restart": 0, "nodes": "n[1-2]", "saved_step": 0},
    {"time": 40, "event": "end", "job": "7", "restart": 0, "verdict": "failed (killed), saved step 10; requeued"},
    {"time": 50, "event": "begin", "job": "7", "restart": 1, "nodes": "n[3-4]", "saved_step": 10},
    {"time": 81, "event": "end", "job": "7", "restart": 1, "verdict": "the run is finished"},
]
LEDGER = [
    {"time": 15, "event": "start", "step": 0},
    {"time": 26, "event": "checkpoint", "step": 10},
    {"time": 56, "event": "start", "step": 10},
    {"time": 79, "event": "checkpoint", "step": 20},
    {"time": 80, "event": "finished", "step": 20},
]
RUNNING = JobState("RUNNING", "None", 1000)


def step(number, **more):
    return {"step": number, "speed/step_time_s": 1.0, "speed/data_wait_s": 0.1, **more}


def speed(number):
    return step(
        number, **{"loss/train": 2.5, "progress/tokens": 100 * number, "speed/tokens_per_s": 100.0, "speed/mfu": 0.4}
    )


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput, "job_state", lambda job: JobState())
    write(tmp_path, JOBS, LEDGER, 20)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "speed/checkpoint_stall_s": 0.5}\n{"step": 20, "speed/eval_time_s": 2.0}\n{"step": 2')
    (tmp_path / "metrics.superseded.jsonl").write_text("".join(json.dumps(step(n)) + "\n" for n in range(11, 19)))
    (tmp_path / "config.yaml").write_text("train: {steps: 20}")
    return tmp_path


def write(folder, jobs, ledger, steps):
    for name, lines in (("jobs", jobs), ("ledger", ledger), ("metrics", [speed(n + 1) for n in range(steps)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_steps_that_were_lost_are_counted_from_where_they_were_done_again(run_dir):
    """Not from a later start's save between two logged steps: of 6 to 20, then of 6 to 10, and of 19 and 20."""
    lines = [step(20, resumed_step=5), step(10, resumed_step=5), step(20, resumed_step=18)]
    (run_dir / "metrics.superseded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_status(run_dir, now=1e6).parts_s["lost"] == 15 + 5 + 2


def test_where_the_time_of_a_finished_run_went(run_dir):
    found = read_status(run_dir, now=1e6)
    assert found.wall_s == 81
    assert found.parts_s == pytest.approx(
        {
            "steps": 18,
            "data": 2,
            "checkpoint": 0.5,
            "evaluation": 2,
            "lost": 8,
            "start-up": 11,
            "queue": 20,
            "rest": 19.5,
        }
    )
    assert found.goodput == pytest.approx(18 / 81)
    assert (found.state, found.job, found.step, found.steps, found.tokens, found.saved_step, found.left_s) == (
        "finished", "7", 20, 20, 2000, 20, 0
    )  # fmt: skip
    assert (found.loss, found.tokens_per_s, found.mfu) == (2.5, 100, 0.4)
    assert [(s.restart, s.from_step, s.end) for s in found.starts] == [
        (0, 0, "failed (killed), saved step 10; requeued"), (1, 10, "the run is finished")
    ]  # fmt: skip
    text = "\n".join(describe(found))
    assert (
        ": finished, SLURM job 7\n  step 20 of 20  saved 20  tokens 2,000  loss 2.5  tokens/s 100  MFU 40.0%\n" in text
    )
    assert "  goodput 22.2% of 81.0 s:\n     22.2%     18.0 s  steps that count\n" in text
    assert "  job 7, restart 1, on n[3-4], from step 10: the run is finished" in text


def test_time_in_which_nothing_was_submitted_is_no_queue(run_dir):
    write(run_dir, [*JOBS[:3], *({**event, "job": "8"} for event in JOBS[3:])], LEDGER, 20)
    assert read_status(run_dir, now=100.0).parts_s["queue"] == 10


@pytest.mark.parametrize(
    ("jobs", "ledger", "slurm", "state", "parts"),
    [
        (1, 0, JobState("PENDING", "Resources"), "pending (Resources)", {"queue": 100}),
        (2, 0, RUNNING, "running", {"queue": 10, "start-up": 90, "rest": 0}),
        (2, 1, RUNNING, "running", {"queue": 10, "start-up": 5, "steps": 0, "rest": 85}),
        (3, 2, JobState("PENDING", "BeginTime"), "pending (BeginTime)", {"queue": 70, "start-up": 5, "rest": 25}),
        (2, 2, JobState("NODE_FAIL", "None"), f"{UNTOLD}; its job is NODE_FAIL", {"queue": 10, "start-up": 5, "rest": 11}),
    ],
)  # fmt: skip
def test_a_run_under_way(run_dir, monkeypatch, jobs, ledger, slurm, state, parts):
    write(run_dir, JOBS[:jobs], LEDGER[:ledger], 0)
    (run_dir / "metrics.superseded.jsonl").unlink()
    monkeypatch.setattr(goodput, "job_state", lambda job: slurm)
    found = read_status(run_dir, now=100.0)
    assert found.state == state
    assert {key: seconds for key, seconds in found.parts_s.items() if seconds or key in parts} == parts
    ends = {1: [], 2: [UNTOLD if slurm.state == "NODE_FAIL" else ""], 3: [JOBS[2]["verdict"]]}[jobs]
    assert [start.end for start in found.starts] == ends


def steps_and_data(lines, saved):
    parts = dict.fromkeys(PARTS, 0.0)
    launcher.goodput._add_lines(parts, lines, saved)
    return parts["steps"], parts["data"]


def test_steps_between_logged_ones_are_counted_from_where_they_were_begun():
    lines = [step(5), step(10), step(15)]
    assert steps_and_data(lines, []) == pytest.approx((13.5, 1.5))
    assert steps_and_data([step(15), step(20), step(15), step(25)], [12, 23]) == pytest.approx((0.9 * 13, 1.3))


def test_outside_slurm_the_ledger_and_the_lease_tell(run_dir):
    (run_dir / "jobs.jsonl").unlink()
    write(run_dir, [], [*LEDGER[:2], {"time": 30, "event": "stopped", "step": 12, "signal": "SIGTERM"}, LEDGER[2]], 12)
    found = read_status(run_dir, now=60.0)
    assert [(start.from_step, start.end) for start in found.starts] == [(0, "stopped (SIGTERM)"), (10, UNTOLD)]
    assert found.state == UNTOLD
    lease = run_dir / "lease/00000003.json"
    lease.parent.mkdir()
    lease.write_text('{"host": "n9", "released": false}   \n')
    found = read_status(run_dir, now=time.time())
    assert (found.state, found.starts[-1].end) == ("running on n9", "")
    os.utime(lease, (1, 1))
    assert read_status(run_dir, now=time.time()).state == UNTOLD
    lease.write_text('{"host": "n9", "released": true}')
    assert read_status(run_dir, now=time.time()).state == UNTOLD


def test_a_run_that_has_nothing_yet(run_dir):
    for path in run_dir.iterdir():
        path.write_text("")
    found = read_status(run_dir, now=60.0)
    assert (found.state, found.step, found.loss, found.steps, found.goodput, found.starts) == ("not started", 0, None, None,
                                                                                               None, [])  # fmt: skip
    assert describe(found) == [f"{run_dir}: not started", "  step 0  saved 0  tokens 0"]


def test_what_is_left_goes_by_the_usual_step(run_dir):
    """The mean of the first ones has a slow one in it."""
    write_lines(run_dir / "metrics.jsonl", [{**speed(10), "speed/step_time_s": 9.0, "speed/median_step_time_s": 2.0}])
    write_lines(run_dir / "ledger.jsonl", LEDGER[:1])
    assert read_status(run_dir, now=60.0).left_s == 20.0


def test_values_that_are_not_finite_are_left_out(run_dir):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps({**speed(21), "loss/train": "nan"}) + "\n")
    assert read_status(run_dir, now=60.0).loss is None


def test_the_command(run_dir, capsys):
    assert main([str(run_dir), "--json", "--watch", "0.01"]) == 0  # ends, as the run is finished
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["parts_s"]["queue"], told["starts"][1]["from_step"]) == ("finished", 20, 10)
    assert main([str(run_dir / "lease")]) == 2
    assert "holds no ledger.jsonl; expected a run's folder, such as runs/NAME" in capsys.readouterr().err
    assert main([str(run_dir), "--html", "/nowhere/page.html"]) == 2
    assert "/nowhere/page.html cannot be written: No such file or directory; choose another" in capsys.readouterr().err


def test_the_page_is_whole_and_says_the_same(run_dir, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main([str(run_dir), "--html", str(page)]) == 0
    text = page.read_text()
    ElementTree.fromstring(re.sub(r"<meta[^>]*>|<!doctype html>", "", text).replace("class=n", 'class="n"').replace(
        "class=key", 'class="key"'))  # fmt: skip
    assert "<p>step 20 of 20 · saved 20 · tokens 2,000 · loss 2.5" in text
    assert "Goodput 22.2% of 81.0 s." in text
    assert "<td class=n>24.7%</td><td class=n>20.0 s</td>" in text  # of the queue
    assert "<td>7.1</td><td>n[3-4]</td><td class=n>10</td><td>the run is finished</td>" in text
    assert text.count("<polyline") == 2  # loss and tokens/s; nothing was held out
    assert float(re.findall(r'<rect x="([\d.]+)" width="([\d.]+)"', text)[-1][0]) == pytest.approx(
        860 * 61.5 / 81, abs=0.1
    )


def test_what_a_page_shows_is_escaped(run_dir):
    write(run_dir, [{**event, "nodes": "<b>", "verdict": "<script>"} for event in JOBS], LEDGER, 1)
    text = html_page(read_status(run_dir, now=100.0), [speed(1)], 100.0)
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    assert "<b>" not in text
    assert "<polyline" not in text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 40, [0, 10, 20, 30, 40]), (5.66, 6.24, [5.6, 5.7, 5.8, 5.9, 6.0, 6.1, 6.2, 6.3]), (2, 2, [2, 2.5]),
     (0, 0, [0, 0.2]), (99, 1201, [0, 200, 400, 600, 800, 1000, 1200, 1400])],
)  # fmt: skip
def test_numbers_of_an_axis_are_round(low, high, expected):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert found == pytest.approx(expected)


def test_outside_slurm_a_start_tells_how_long_it_had_been_up(run_dir):
    """A rewind begins a start in the same process; what was killed before left no end."""
    (run_dir / "jobs.jsonl").unlink()
    ledger = [
        {"time": 15, "event": "start", "step": 0, "up_s": 5.0},
        {"time": 20, "event": "rewind", "step": 6},
        {"time": 22, "event": "start", "step": 5, "up_s": 12.0},
        {"time": 60, "event": "start", "step": 10, "up_s": 6.5},
        {"time": 80, "event": "finished", "step": 20},
    ]
    write(run_dir, [], ledger, 20)
    found = read_status(run_dir, now=1e6)
    assert (found.wall_s, found.parts_s["start-up"], found.parts_s["queue"]) == (70, 5 + 2 + 6.5, 0)
    write(run_dir, [], [*ledger[:3], {"time": 30, "event": "start", "step": 10, "up_s": None}], 20)
    assert read_status(run_dir, now=1e6).parts_s["start-up"] == 7


def test_the_run_itself_adds_up_the_same_while_it_goes(run_dir):
    """From the records of the starts before; the last start's lines come one by one."""
    metrics = (run_dir / "metrics.jsonl").read_text().splitlines()[:-1]
    (run_dir / "metrics.jsonl").write_text("\n".join(metrics[:10]))
    write_lines(run_dir / "jobs.jsonl", JOBS[:4])
    write_lines(run_dir / "ledger.jsonl", LEDGER[:3])
    goodput = Goodput(run_dir, now=120.0)
    shares = [goodput.add(line) for line in [*map(json.loads, metrics[10:]), {"step": 20, "speed/sample_time_s": 3.0}]]
    assert shares[-3:] == [{}, {}, {}]  # a save, an evaluation, samples
    last = goodput.add(speed(30))
    assert sum(last.values()) == pytest.approx(1)
    wall_s = 8 / last["goodput/badput_lost"]
    assert wall_s >= 120
    assert {name: share * wall_s for name, share in last.items() if "rest" not in name} == pytest.approx(
        {
            "goodput/goodput": 27,
            "goodput/badput_data": 3,
            "goodput/badput_checkpoint": 0.5,
            "goodput/badput_evaluation": 5,
            "goodput/badput_lost": 8,
            "goodput/badput_start-up": 11,
            "goodput/badput_queue": 20,
        }
    )


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_rank_that_is_slow_is_told_until_it_is_no_longer(run_dir):
    slow = {"time": 70, "event": "straggler", "step": 15, "ranks": [3], "host": "n4", "own_s": 1.5, "median_s": 1.0}
    node = {**slow, "ranks": [0, 1], "host": "n3"}
    write(run_dir, JOBS, [*LEDGER[:3], slow, node, LEDGER[3]], 20)
    text = "\n".join(describe(read_status(run_dir, now=75.0)))
    assert "  slow since step 15: rank 3 on n4, 1.5 s of a step until it waits for others, the median 1 s\n" in text
    assert "  slow since step 15: ranks 0 to 1 on n3, 1.5 s of a step" in text
    write(run_dir, JOBS, [*LEDGER[:3], slow, node, {**slow, "event": "straggler_ended"}], 20)
    assert [line[:33] for line in read_status(run_dir, now=75.0).slow] == ["since step 15: ranks 0 to 1 on n3"]
    write(run_dir, JOBS, [LEDGER[0], slow, LEDGER[2]], 20)  # another start's
    assert read_status(run_dir, now=75.0).slow == []
