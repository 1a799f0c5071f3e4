"""Which nodes are good, by what they told; and what a node tells when its neighbours are silent."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from cluster import nodes as nodes_module
from cluster import preflight
from cluster.config import Preflight
from cluster.nodes import Needs, choose, on_nodes, write_hostfile
from cluster.preflight import PreflightError, judge, measure, telling_the_time
from cluster.records import note
from launcher import preflight as on_node
from launcher.preflight import ROUNDS_END, Report, all_reduces, ask_clock, disk, rounds
from runs import ROOT, environment, free_port

LIMITS = Preflight()
SLOW = {"gb_s": [1.0, 9.0]}


def report(node, others=(), **changes):
    """Of a node of two devices that is well."""
    device = {"free_gib": 79.0, "whole_gib": 80.0, "tflops": 600.0}
    return {
        "node": node, "doing": "", "interfaces": ["lo", "ib0"], "program": {"launcher/a.py": "1", "torch": "2.8"},
        "clock": {"ahead_s": 0.001, "delay_s": 0.002}, "folders": {"/run": {"free_gb": 100.0, "write_mb_s": 500.0}},
        "devices": [{"name": f"cuda:{i}", **device} for i in range(2)],
        "pairs": {other: {"gb_s": [10.0, 10.0]} for other in others}, **changes,
    }  # fmt: skip


def cluster_of(count):
    """All well: each node has measured with its neighbours."""
    names = [f"n{i + 1}" for i in range(count)]
    pairs = [pair for together in rounds(count) for pair in together]
    return {name: report(name, [names[sum(pair) - i] for pair in pairs if i in pair]) for i, name in enumerate(names)}


def slow_device(values):
    return [values, {**values, "name": "cuda:1", "tflops": 250.0}]


DEVICE = {"name": "cuda:0", "free_gib": 79.0, "whole_gib": 80.0, "tflops": 600.0}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"folders": {"/run": {"error": "OSError: read-only"}}}, "/run cannot be written: OSError: read-only"),
        ({"folders": {"/run": {"free_gb": 0.5}}}, "/run has 0.50 GB free; expected 1"),
        ({"devices": [DEVICE]}, "it has 1 devices; expected 2"),
        ({"devices": [DEVICE, {**DEVICE, "name": "cuda:1", "free_gib": 60.0}]},
         "cuda:1 has 60.0 of 80.0 GiB free; expected 0.9 of it: another process may be left there"),
        ({"devices": slow_device(DEVICE)},
         "a matrix product makes 250 TFLOP/s; expected 0.5 of the nodes' median, 300"),
        ({"program": {"launcher/a.py": "2", "torch": "2.8"}}, "another program: launcher/a.py: 2, 1 on most"),
        ({"program": {"launcher/a.py": "1"}}, "another program: torch: None, 2.8 on most"),
        ({"clock": {"ahead_s": -7.0, "delay_s": 0.1}}, "its clock is 7.0 s behind; expected 5 s at most"),
        ({"interfaces": ["lo"]}, "it has no network interface ib0; it has lo"),
        ({"clock": {"error": "OSError: timed out"}}, "it does not reach n1: OSError: timed out"),
        ({"error": "RuntimeError: no kernel", "doing": "a matrix product on cuda:1"},
         "the pre-flight failed at a matrix product on cuda:1: RuntimeError: no kernel"),
        ({"doing": "a matrix product on cuda:1"}, "it did not come to an end: a matrix product on cuda:1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_node_is_told(changes, what):
    reports = cluster_of(4)
    assert judge(reports, "n1", LIMITS, 2, "ib0") == {}
    reports["n3"] |= changes
    assert judge(reports, "n1", LIMITS, 2, "ib0") == {"n3": what}


def test_a_node_that_tells_nothing_is_the_only_one_blamed():
    reports = cluster_of(4)
    reports["n3"] = {}
    for other in ("n2", "n4"):
        reports[other]["pairs"]["n3"] = {"error": "TimeoutError: it was not ready"}
    assert judge(reports, "n1", LIMITS, 2) == {"n3": "it did not answer: it hangs, or does not see the run's folder"}


@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_slow_link_is_the_node_s_and_not_its_neighbours(count):
    for slow in cluster_of(count):
        reports = cluster_of(count)
        for node, told in reports.items():
            for other in told["pairs"]:
                if slow in (node, other):
                    told["pairs"][other] = SLOW
        assert judge(reports, "n1", LIMITS, 2) == {
            slow: "an all-reduce makes 1 GB/s; expected 0.5 of the nodes' median, 5"
        }


def test_of_two_nodes_none_is_slow_but_by_a_fixed_need():
    reports = cluster_of(2)
    reports["n2"] |= {"devices": [{**DEVICE, "tflops": 1.0}] * 2}
    assert judge(reports, "n1", LIMITS, 2) == {}
    assert judge(reports, "n1", Preflight(matmul_tflops=500.0, all_reduce_gb_s=20.0), 2) == {
        "n1": "an all-reduce makes 10 GB/s; expected 20",
        "n2": "a matrix product makes 1 TFLOP/s; expected 500; an all-reduce makes 10 GB/s; expected 20",
    }


def test_who_is_to_blame_where_nodes_do_not_reach_each_other():
    silent = {"error": "RuntimeError: timed out"}
    reports = cluster_of(2)
    for node, other in (("n1", "n2"), ("n2", "n1")):
        reports[node]["pairs"][other] = silent
    assert judge(reports, "n1", LIMITS, 2) == {"n2": "no all-reduce with n1 (RuntimeError: timed out)"}
    reports = cluster_of(4)
    for node in ("n2", "n3", "n4"):
        reports[node]["clock"] = {"error": "OSError: no route"}
    assert judge(reports, "n1", LIMITS, 2) == {"n1": "3 of 3 other nodes do not reach it: OSError: no route"}
    reports = cluster_of(4)
    for told in reports.values():
        told["pairs"] = dict.fromkeys(told["pairs"], silent)
    with pytest.raises(PreflightError, match="none of 4 nodes could sum with its neighbours, which is no fault of one"):
        judge(reports, "n1", LIMITS, 2)


def test_the_program_of_most_nodes_is_right_and_of_two_the_batch_host_s():
    reports = cluster_of(2)
    reports["n1"]["program"] = {"torch": "3"}
    assert judge(reports, "n1", LIMITS, 2).keys() == {"n2"}
    reports = cluster_of(3)
    reports["n1"]["program"] = {"torch": "3"}
    assert judge(reports, "n1", LIMITS, 2).keys() == {"n1"}


@pytest.mark.parametrize("count", range(1, 9))
def test_each_node_meets_its_neighbours_and_one_at_a_time(count):
    found = rounds(count)
    for together in found:
        busy = [node for pair in together for node in pair]
        assert len(busy) == len(set(busy))
    times = [sum(node in pair for together in found for pair in together) for node in range(count)]
    assert times == [min(2, count - 1)] * count


def test_clocks_are_compared(monkeypatch):
    port = free_port()
    with telling_the_time(port):
        told = ask_clock("127.0.0.1", port, 5)
        assert abs(told["ahead_s"]) <= told["delay_s"]
        assert told["address"] == "127.0.0.1"
        ours = time.time
        monkeypatch.setattr(
            on_node.time, "time", lambda: ours() - 3600 * (sys._getframe(1).f_code.co_name == "ask_clock")
        )
        assert ask_clock("127.0.0.1", port, 5)["ahead_s"] == pytest.approx(-3600, abs=1)
        with pytest.raises(PreflightError, match=f"port {port} is no longer free here"), telling_the_time(port):
            pass
    with pytest.raises(ConnectionRefusedError):
        ask_clock("127.0.0.1", port, 5)
    with socket.create_server(("127.0.0.1", port)) as other:
        threading.Thread(target=lambda: other.accept()[0].close()).start()
        with pytest.raises(ConnectionError):
            ask_clock("127.0.0.1", port, 5)
    with telling_the_time(port):  # which is free again at once
        pass


def test_a_neighbour_that_never_comes_is_not_waited_for_longer_than_its_round(tmp_path):
    with pytest.raises(TimeoutError, match="it was not ready in time"):
        all_reduces(Report(tmp_path, "n1"), None, "n2", True, "0", time.monotonic() + 0.3)
    assert max(len(rounds(count)) for count in range(1, 70)) == len(ROUNDS_END)


def test_who_waits_without_end_goes_on_without_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(on_node, "MARGIN_S", 0.1)
    release = threading.Event()
    told = on_node._answered(lambda: {"gb_s": [release.wait()]}, time.monotonic() + 0.2)
    assert told == {"error": "TimeoutError: it stopped answering", "stuck": True}
    release.set()
    assert on_node._answered(lambda: {"gb_s": [1.0]}, time.monotonic() + 60) == {"gb_s": [1.0]}
    reports = cluster_of(4)
    reports["n3"]["doing"] = "an all-reduce with n4"
    reports["n4"]["pairs"] = {"n3": told, "n1": {"skipped": "it still waits for n3"}}
    reports["n1"]["pairs"]["n4"] = {"error": "TimeoutError: it was not ready in time"}
    assert judge(reports, "n1", LIMITS, 2).keys() == {"n3"}


def test_a_disk_is_written(tmp_path):
    told = disk(tmp_path)
    assert told["free_gb"] > 0
    assert told["write_mb_s"] > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        disk(tmp_path / "none")


def test_refused_on_a_node_that_is_not_meant(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    options = [f"--out={tmp_path}", "--nodes=n1,n2", "--clock=n1:1", "--within-s=60", "--ports=20000-30000"]
    assert on_node.main(options) == 2
    assert "preflight: this is n3; expected one of --nodes n1,n2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault(9)
def test_four_nodes_measure_each_other_and_one_is_stopped_in_it(tmp_path):
    """Four processes on this machine. Its neighbours come to an end, and it alone is blamed."""
    names, port = ["n1", "n2", "n3", "n4"], free_port()
    (tmp_path / "out").mkdir()
    options = [f"--out={tmp_path / 'out'}", f"--nodes={','.join(names)}", f"--clock=127.0.0.1:{port}", "--within-s=90",
               "--ports=20000-30000", f"--folder={tmp_path}"]  # fmt: skip
    with telling_the_time(port):
        processes = {
            name: subprocess.Popen(
                [sys.executable, "launcher/preflight.py", *options], cwd=ROOT,
                env=environment(SLURMD_NODENAME=name, GLOO_SOCKET_IFNAME="lo"),
            )
            for name in names
        }  # fmt: skip
        try:
            third = tmp_path / "out/n3.json"
            while not (third.exists() and '"doing": "an all-reduce' in third.read_text()):
                assert processes["n3"].poll() is None
            processes["n3"].send_signal(signal.SIGSTOP)
            assert [processes[name].wait(300) for name in names if name != "n3"] == [0, 0, 0]
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
    reports = {name: json.loads((tmp_path / f"out/{name}.json").read_text()) for name in names}
    wrong = judge(reports, "n1", Preflight(speed=0.0, free_disk_gb=0.0), 0, "lo")
    assert wrong == {"n3": f"it did not come to an end: {reports['n3']['doing']}"}
    assert reports["n1"]["devices"][0]["tflops"] > 0
    assert reports["n1"]["pairs"]["n2"]["gb_s"][0] > 0


# What srun stands for here: one task for each node, of which n2 hangs.
STEP = """
import json, os, sys, time
options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
for node in options["nodes"].split(","):
    told = {**REPORTS[node], "clock": {"ahead_s": 0.0, "delay_s": 0.0, "address": "10.0.0." + node[1:]}, "port": 20007}
    if node != HANGS:
        open(os.path.join(options["out"], node + ".json"), "w").write(json.dumps(told))
time.sleep(WAIT)
"""


def srun(folder, program):
    """Of this name, as its first three options say where to run."""
    (folder / "srun").write_text(
        '#!/bin/bash\n[ "$1 $2 $3" = "--nodes=3 --ntasks=3 --nodelist=n1,n2,n3" ] && exec "${@:4}"\n'
    )
    (folder / "srun").chmod(0o755)
    return [str(folder / "srun"), sys.executable, "-c", program]


def step(folder, hangs, wait=0.0):
    return srun(folder, f"REPORTS = {cluster_of(3)!r}\nHANGS = {hangs!r}\nWAIT = {wait}\n{STEP}")


def chosen(tmp_path, command, counts, limits=LIMITS, stop=lambda: False):
    return choose(
        ["n1", "n2", "n3"], counts, command, limits, Needs(2, "ib0"), run_dir=tmp_path, job="7", restart=1,
        place=("10.0.0.1", free_port()), ports=range(20000, 30000), stop=stop,
    )  # fmt: skip


def test_the_ranks_start_on_as_many_good_nodes_as_divide_the_batch(tmp_path, capfd):
    assert chosen(tmp_path, None, [3]).used == ["n1", "n2", "n3"]
    found = chosen(tmp_path, step(tmp_path, "n2"), [1, 2, 3])
    assert (found.used, found.place[0], found.left_out.keys()) == (["n1", "n3"], "10.0.0.1", {"n2"})
    found = chosen(tmp_path, step(tmp_path, "n2"), [1, 3])
    assert found.used == ["n1"]
    out = capfd.readouterr().out
    assert "job.py: pre-flight: n2 LEFT OUT: it did not answer" in out
    assert "job.py: pre-flight: n3 good: cuda:0 600 TFLOP/s, with n2 10 GB/s" in out
    assert "job.py: n3 stay idle: the run can be on 1, 3 nodes" in out
    found = chosen(tmp_path, step(tmp_path, "n2"), [3])
    assert (found.used, found.cause) == (
        [], "of 3 nodes 2 are good and 3 are needed: n2: it did not answer: it hangs, or does not see the run's folder"
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "jobs.jsonl").read_text().splitlines()]
    assert [line["used"] for line in lines] == [["n1", "n3"], ["n1"], []]


def test_a_batch_host_that_is_left_out_is_not_where_the_ranks_meet(tmp_path):
    found = chosen(tmp_path, step(tmp_path, "n1"), [2])
    assert (found.used, found.place) == (["n2", "n3"], ("10.0.0.2", 20007))


def test_a_pre_flight_that_does_not_end_is_ended_and_one_that_tells_nothing_blames_no_node(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "GRACE_S", 0.0)
    found = chosen(tmp_path, step(tmp_path, "n2", wait=600), [1, 2], Preflight(within_s=5))
    assert found.used == ["n1", "n3"]
    found = chosen(tmp_path, srun(tmp_path, "exit(3)"), [1])
    assert (found.used, found.left_out) == ([], {})
    assert "the pre-flight: no node told anything (exit code 3)" in found.cause
    assert chosen(tmp_path, step(tmp_path, "n2", wait=600), [1], stop=lambda: True).used == []
    (tmp_path / "file").touch()
    with pytest.raises(PreflightError, match="preflight/x cannot be written: Not a directory"):
        measure([], nodes=["n1"], run_dir=tmp_path / "file", name="x", place=("h", 1), ports=range(2), limits=LIMITS,
                stop=lambda: False)  # fmt: skip


def test_the_step_is_told_its_nodes_and_so_is_deepspeed(tmp_path):
    assert on_nodes(["srun", "--wait=60", "x"], ["n1", "n3"], 8) == [
        "srun", "--nodes=2", "--ntasks=16", "--nodelist=n1,n3", "--wait=60", "x"
    ]  # fmt: skip
    write_hostfile(tmp_path / "hostfile", ["n1", "n3"], 8)
    assert (tmp_path / "hostfile").read_text() == "n1 slots=8\nn3 slots=8\n"


def test_who_is_excluded_at_the_requeue(tmp_path, monkeypatch):
    """What the user excluded stays; what the start before did is measured again; and enough must remain."""
    answers = {
        ("scontrol", "show", "job"): "JobId=7 ExcNodeList=n[8-9] NumNodes=2",
        ("scontrol", "show", "hostnames"): "n8\nn9\n",
        ("sinfo", "--Node", "--noheader"): "n1 mixed\nn2 allocated\nn3 idle\nn4 drained\nn5 idle*\nn9 idle\n",
    }
    monkeypatch.setattr(
        nodes_module, "ask", lambda *words: subprocess.CompletedProcess(words, 0, answers[words[:3]], "")
    )
    ask = nodes_module.to_exclude
    assert ask(tmp_path, "7", [], [2]) == ([], None)
    assert ask(tmp_path, "7", ["n2"], [2, 4]) == (["n2"], ["n2", "n8", "n9"])
    assert ask(tmp_path, "7", ["n2"], [3]) == ([], None)
    note(tmp_path, "end", job="7", excluded=["n9"])
    assert ask(tmp_path, "7", [], [2]) == ([], ["n8"])
    assert ask(tmp_path, "7", ["n2"], [3]) == (["n2"], ["n2", "n8"])
    for bound in (
        "Reservation=big",
        "Features=ib",
        "ReqNodeList=n[1-3]",
    ):  # which of the others it may have is not known
        answers["scontrol", "show", "job"] = f"JobId=7 ExcNodeList=(null) {bound}"
        assert ask(tmp_path, "7", ["n2"], [2])[0] == []
    answers["scontrol", "show", "job"] = (
        "JobId=7 ExcNodeList=(null) Reservation=(null) Features=(null) ReqNodeList=(null)"
    )
    assert ask(tmp_path, "7", ["n2"], [2])[0] == ["n2"]
