"""A rank that is slower than the others is named once, and once more when it no longer is; noise is not."""

import re

import pytest

from launcher import config
from launcher.run_dir import Ledger
from launcher.stragglers import STEPS, Stragglers
from runs import injected, metrics, run, write_recipe


class Mesh:
    rank = 0

    def __init__(self, own_s):
        self.own_s, self.world_size = own_s, len(own_s)

    def sum(self, row):
        """What the others add to it."""
        return [
            mine + other
            for mine, other in zip(row, [0, 0, *(x for s in self.own_s[1:] for x in (0.0, s))], strict=True)
        ]


class Engine:
    def __init__(self, own_s):
        self.mesh, self.own_time = Mesh(own_s), self

    def take_s(self):
        return self.mesh.own_s[0]


def watch(tmp_path, own_s, share=0.2, hosts=None):
    """Stragglers among ranks of these times a step, and how to change them."""
    engine = Engine(list(own_s))
    return Stragglers(share, engine, hosts or ["n1"] * len(own_s), Ledger(tmp_path)), engine.mesh.own_s


def windows(stragglers, n, first=1, every=10):
    """n windows of `every` steps; the metrics of the last."""
    for i in range(first, first + n):
        for _ in range(every):
            stragglers.add(data_s=0.0)
        found = stragglers.look(i * every)
    return found


def events(folder):
    return [(e["event"], e["step"], e["ranks"], e["host"]) for e in Ledger(folder).events()]


def test_a_slow_rank_is_named_once_and_once_when_it_no_longer_is(tmp_path, caplog):
    stragglers, own_s = watch(tmp_path, [1.0, 1.1, 1.5, 1.0])
    assert windows(stragglers, 9) == {
        "speed/slowest_rank": 2, "speed/slowest_rank_excess": pytest.approx(0.5), "speed/stragglers": 0
    }  # fmt: skip
    assert not caplog.records
    assert windows(stragglers, 31, first=10)["speed/stragglers"] == 1
    (line,) = caplog.messages
    assert line == (
        "step 100  rank 2 on n1 is slower than the others, which wait: 1.5 s of a step until it waits itself (data 0 s, "
        "forward 1.5 s), where the median rank takes 1 s; above log.straggler_share=0.2 for 100 steps"
    )
    own_s[2] = 1.0
    assert windows(stragglers, 10, first=41)["speed/stragglers"] == 0
    windows(stragglers, 20, first=51)
    assert caplog.messages[1:] == [
        "step 500  rank 2 on n1 is no longer slower than the others: 1 s, where the median rank takes 1 s"
    ]
    assert events(tmp_path) == [("straggler", 100, [2], "n1"), ("straggler_ended", 500, [2], "n1")]


def test_a_rank_that_is_slow_now_and_then_is_not_named(tmp_path):
    stragglers, own_s = watch(tmp_path, [1.0, 3.0])
    for i in range(20):
        own_s[1] = 1.1 if i % 9 == 8 else 3.0
        windows(stragglers, 1, first=i + 1)
    assert events(tmp_path) == []


def test_waiting_for_data_counts_and_is_told(tmp_path, caplog):
    stragglers, _ = watch(tmp_path, [1.0, 1.0])
    for step in range(1, 501):
        stragglers.add(data_s=0.5)
        if step % 100 == 0:
            stragglers.look(step)
    assert (
        "rank 0 on n1 is slower than the others, which wait: 1.5 s of a step until it waits itself (data 0.5 s, "
        in (caplog.text)
    )
    assert events(tmp_path) == [("straggler", 500, [0], "n1")]  # five windows at least


def test_a_host_all_of_whose_ranks_are_slow_is_named_as_one(tmp_path, caplog):
    hosts = ["n1"] * 3 + ["n2"] * 2 + ["n3"]
    stragglers, own_s = watch(tmp_path, [1, 1, 2, 2, 2, 1], hosts=hosts)
    windows(stragglers, STEPS // 10)
    assert events(tmp_path) == [("straggler", 100, [2], "n1"), ("straggler", 100, [3, 4], "n2")]
    assert "all 2 ranks on n2 are slower than the others" in caplog.text
    own_s[3:5] = 1, 1
    windows(stragglers, STEPS // 10, first=11)
    assert "all 2 ranks on n2 are no longer slower" in caplog.text


@pytest.mark.parametrize(("own_s", "share"), [([1.0], 0.2), ([1.0, 9.0], 0.0)])
def test_alone_or_switched_off_nothing_is_compared(tmp_path, own_s, share):
    stragglers, _ = watch(tmp_path, own_s, share)
    assert windows(stragglers, 20) == {}
    assert events(tmp_path) == []


@pytest.mark.parametrize("share", ["-0.1", ".inf"])
def test_a_share_that_is_none_is_refused(tmp_path, share):
    recipe = write_recipe(tmp_path, tmp_path)
    with pytest.raises(config.ConfigError, match=r"log.straggler_share"):
        config.load_config(str(recipe), [f"log.straggler_share={share}"])


@pytest.mark.slow
@pytest.mark.fault(10)
def test_a_rank_that_really_is_slow_is_named_by_the_run(corpus, tmp_path):
    """Rank 1 of two is slow from step 21 to 60; before, and well after, nobody is."""
    recipe, run_dir = write_recipe(tmp_path, corpus), tmp_path / "runs/test"
    options = [
        "train.steps=120",
        "train.global_batch_size=4",
        "log.every=10",
        "log.straggler_share=1.0",
        "eval.every=0",
    ]
    text = run(injected("slow-rank", 1, 21, recipe, *options, "checkpoint.every=1000"), tmp_path / "log")
    found = [event for event in Ledger(run_dir).events() if event["event"].startswith("straggler")]
    assert [(event["event"], event["ranks"]) for event in found] == [("straggler", [1]), ("straggler_ended", [1])]
    assert found[0]["step"] == 60
    assert 100 <= found[1]["step"] <= 120
    assert found[0]["own_s"] > 0.1 > found[0]["median_s"]
    assert (
        len(re.findall(r"step 60  rank 1 on \S+ is slower than the others, which wait: 0\.\d+ s of a step", text)) == 1
    )
    assert len(re.findall(r"rank 1 on \S+ is no longer slower than the others", text)) == 1
    (line,) = (line for line in metrics(run_dir) if line["step"] == 60 and "loss/train" in line)
    assert (line["speed/slowest_rank"], line["speed/stragglers"]) == (1, 1)
    assert line["speed/slowest_rank_excess"] > 1
