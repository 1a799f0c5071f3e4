"""How job.py judges the end of a start, and what it decides."""

import os
import re
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cluster import job
from cluster.config import parse_time
from cluster.job import TIME_LIMIT, End, decide, judge, starts_in_vain
from cluster.nodes import Chosen
from cluster.records import lead_for, note, read_events, saved_step
from cluster.slurm import JobState

START = [{"event": "start", "step": 0}]
SAVED = [{"event": "checkpoint", "step": 5, "write_s": 2.0}]
RUNNING = JobState("RUNNING", "None", 1000)


@pytest.mark.parametrize(
    ("code", "asked", "before", "new", "output", "expected"),
    [
        (0, "", START, [*SAVED, {"event": "finished", "step": 5}], "", End("finished", "", 5, True)),
        # `python launcher/pretrain.py` on a finished run writes nothing
        (0, "", [*START, *SAVED, {"event": "finished"}], [], "", End("finished", "", 5, False)),
        (75, TIME_LIMIT, [], [*START, *SAVED, {"event": "stopped"}], "", End("stopped", TIME_LIMIT, 5, True)),
        (75, "", [], [*START, *SAVED, {"event": "stopped", "cause": "train.stop_at"}], "",
         End("finished", "train.stop_at", 5, True)),
        (75, "", [], START, "", End("stopped", "a signal to the ranks", 0, False, True)),
        # `deepspeed` hides its ranks' code
        (0, TIME_LIMIT, [], [*START, {"event": "stopped"}], "", End("stopped", TIME_LIMIT, 0, False)),
        (0, "", [*START, *SAVED], START, "x\nRuntimeError: gone\nend",
         End("failed", "exit code 0: RuntimeError: gone", 5, False)),
        (2, "", [], [], "a\npretrain: train.steps: wrong\n", End("refused", "pretrain: train.steps: wrong", 0, False)),
        # srun --wait has ended the others with SIGKILL
        (137, "", [], [], "pretrain: no\nsrun: error: n1", End("refused", "pretrain: no", 0, False)),
        (1, "", [], [*START, {"event": "failed", "error": "E: x"}], "srun: error: n1",
         End("failed", "exit code 1: E: x", 0, False)),
        (-10, "by hand", [], [], "", End("stopped", "by hand; it could not save any more", 0, False, True)),
        (1, "by hand", [], [*START, {"event": "failed", "error": "E"}], "", End("failed", "exit code 1: E", 0, False)),
        (9, "", [], [], "", End("failed", "exit code 9: no output", 0, False)),
    ],
)  # fmt: skip
def test_how_a_start_ended(code, asked, before, new, output, expected):
    assert judge(code, asked, before, [*before, *new], output) == expected


@pytest.mark.parametrize(
    ("end", "in_vain", "now", "requeue", "code", "text"),
    [
        (End("finished", "", 9, True), 0, RUNNING, False, 0, "the run is finished"),
        (End("finished", "train.stop_at", 9, True), 0, RUNNING, False, 0, "where it was to stop: train.stop_at"),
        (End("refused", "bad key", 0, False), 1, RUNNING, False, 2, "not requeued, as it would be refused again: bad key"),
        (End("stopped", "w", 9, True), 0, RUNNING, True, 75, r"stopped \(w\), saved step 9; requeued"),
        (End("stopped", "w", 9, True), 0, JobState("COMPLETING", "None"), False, 75, "SLURM is ending the job itself"),
        # the warning came too late; a job that ran into its limit may still be requeued
        (End("stopped", "w", 9, True), 0, JobState("COMPLETING", "TimeLimit"), True, 75, "requeued"),
        (End("stopped", "w", 9, True), 0, JobState(), True, 75, "requeued"),
        (End("failed", "E", 5, False), 2, RUNNING, True, 75, r"failed \(E\), saved step 5; requeued"),
        (End("failed", "E", 5, False), 3, RUNNING, False, 1,
         r"failed \(E\), saved step 5; not requeued: 3 starts in a row saved nothing beyond step 5. Mend"),
    ],
)  # fmt: skip
def test_what_is_decided(end, in_vain, now, requeue, code, text):
    verdict = decide(end, in_vain, 3, now)
    assert (verdict.requeue, verdict.code) == (requeue, code)
    assert re.search(text, verdict.text)


def test_starts_in_vain_are_those_of_this_job_since_it_last_got_further(tmp_path):
    def end(job="7", progress=False, blameless=False):
        note(tmp_path, "end", job=job, progress=progress, blameless=blameless)

    assert starts_in_vain(tmp_path, "7") == 0
    end()
    end(progress=True)
    end()
    end(job="6")
    end(blameless=True)
    end()
    assert starts_in_vain(tmp_path, "7") == 2
    assert starts_in_vain(tmp_path, "8") == 0


def test_the_lead_grows_with_the_time_that_saves_take():
    assert lead_for([], 300) == 300
    assert lead_for(SAVED, 300) == 300
    assert lead_for([{"event": "checkpoint", "step": 1, "write_s": 200.0}, *SAVED], 300) == 660
    assert lead_for([{"event": "checkpoint", "step": 1, "write_s": 200.0}, *SAVED * 10], 300) == 300  # long ago


def test_a_torn_ledger_is_read(tmp_path):
    (tmp_path / "l").write_bytes(
        b'{"event": "checkpoint", "step": 3}\n[1]\n{"event": "checkp\n\xff\n{"event": "start"}'
    )
    assert [event["event"] for event in read_events(tmp_path / "l")] == ["checkpoint", "start"]
    assert saved_step(read_events(tmp_path / "l")) == 3
    assert read_events(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("1:00:00", 3600), ("2-0", 172_800), ("1-2:03", 93_780), ("1-02:03:04", 93_784),
     ("UNLIMITED", None), ("infinite", None), ("", None), ("1-", None), ("x", None)],
)  # fmt: skip
def test_times_as_slurm_writes_them(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.fault(33)
def test_the_meeting_place_avoids_ports_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(job, "PORTS", range(port, port + 1))
        monkeypatch.setattr("random.sample", lambda ports, n: list(ports))
        with pytest.raises(OSError, match=r"ports tried between \d+ and \d+ on \S+ none is free"):
            job.meeting_place(None)
    assert job.meeting_place("lo") == ("127.0.0.1", port)


@pytest.mark.fault(34)
def test_an_interface_that_is_not_there_is_named():
    with pytest.raises(OSError, match=r"has no network interface ib7 with an IPv4 address; it has .*lo \(127.0.0.1\)"):
        job.meeting_place("ib7")


OPTIONS = ["--run-dir=x", "--lead-s=3", "--max-failures=3", "--node-counts=1,2", "--tasks-per-node=1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (OPTIONS, "expected -- and the command that starts the ranks"),
        ([*OPTIONS, "--preflight={}", "--", "srun", "true"], "expected -- and two commands"),
        ([*OPTIONS, "--", "srun", "true"], "no SLURM_JOB_ID; this runs inside a job"),
    ],
)
def test_refusals(arguments, message):
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run([sys.executable, "cluster/job.py", *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert message in done.stderr


def test_srun_is_not_waited_for_when_the_ranks_have_gone(tmp_path):
    """Not before they came, however long that takes; soon where they told their end; else late after the last heartbeat."""
    folder, ledger = tmp_path / "lease", tmp_path / "ledger.jsonl"
    folder.mkdir()
    ledger.write_text('{"event": "start"}\n{"event": "failed"}\n')  # of the start before
    (folder / "00000001.json").write_text('{"beat": 9}')
    silence = job.Silence(tmp_path, now=0.0)
    assert not silence.too_long(5_000)
    (folder / "00000002.json").write_text('{"beat": 0}')
    ledger.write_text(ledger.read_text() + '{"event": "start"}\n{"event": "checkpoint"}\n')
    assert not silence.too_long(5_010)
    assert not silence.too_long(5_010 + job.SILENT_S)
    assert silence.too_long(5_011 + job.SILENT_S)
    (folder / "00000002.json").write_text('{"beat": 1}')
    assert not silence.too_long(6_000)
    ledger.write_text(ledger.read_text() + '{"event": "failed"}\n')
    assert not silence.too_long(6_000 + job.ENDED_S)
    assert silence.too_long(6_001 + job.ENDED_S)


def test_one_slow_save_leaves_half_of_a_start_to_training():
    """Or each start would be asked to stop at once, until ten saves have passed. What was asked for is not lowered."""
    slow = [{"event": "checkpoint", "step": 1, "write_s": 200.0}]
    assert lead_for(slow, 300, 1000) == 500
    assert lead_for(slow, 300, 10_000) == 660
    assert lead_for(slow, 300, 400) == 300


@pytest.mark.parametrize(
    ("number", "left_s", "cause", "blameless"),
    [
        (signal.SIGUSR1, 350, "the time limit is near, and the pre-flight had not ended", False),
        (signal.SIGUSR1, 5000, "SIGUSR1 to the job before its ranks were started", True),
        (signal.SIGTERM, 350, "SIGTERM to the job before its ranks were started", True),
    ],
)
def test_a_preflight_that_takes_the_whole_start_counts(number, left_s, cause, blameless):
    """Else such a job would be requeued for ever."""
    asked, chosen = SimpleNamespace(signal_number=number), Chosen([], ("n1", 1))
    end = job.not_started(chosen, asked, 5, JobState("RUNNING", "None", left_s), 300)
    assert (end.kind, end.cause, end.blameless) == ("stopped", cause, blameless)
