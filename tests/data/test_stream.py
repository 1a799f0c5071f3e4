"""Raw streaming: the same windows at any world size, workers and stops; every way to end says so; nothing hangs."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data.lane_workers import Crew, Job
from data.lanes import Lane, LaneState, Stream, StreamConfig, StreamEnd, StreamError
from data.stream import StreamLoader
from data.tokenizer import TokenizerConfig, load_tokenizer, train

ROOT = Path(__file__).parents[2]
T = 16


@pytest.fixture(scope="session", autouse=True)
def _library_cache(tmp_path_factory):
    """datasets keeps lock files of what it opens; not in the home folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)  # the workers'
        yield


@pytest.fixture(scope="session")
def pieces(tmp_path_factory, texts):
    """Folder of a small tokenizer."""
    folder = tmp_path_factory.mktemp("stream") / "tokenizer"
    cfg = TokenizerConfig(vocab_size=400, train_bytes=2**17)
    train([(texts, cfg.train_bytes)], folder, cfg)
    return folder


def documents(seed, n):
    """n texts of 0 to 60 words, each word of its own, so that no two stretches of tokens are alike."""
    generator = random.Random(seed)
    return [
        " ".join(f"w{seed}d{number}n{word}" for word in range(generator.choice([0, 1, 2, 5, 20])))
        for number in range(n)
    ]


def write(folder, kind, files):
    """The texts of each file in a file; returns their paths."""
    paths = []
    for number, texts in enumerate(files):
        path = folder / f"{number:02d}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=7)
        elif kind == "arrow":
            table = pa.table({"text": texts})
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=5)
        else:
            with (gzip.open if kind.endswith("gz") else open)(path, "wt", encoding="utf-8") as stream:
                stream.writelines(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts))
        paths.append(str(path))
    return paths


def config(pieces, paths, kind="jsonl", **more):
    dataset = {"jsonl": "json", "jsonl.gz": "json"}.get(kind, kind)
    return StreamConfig(**{"dataset": dataset, "data_files": paths, "tokenizer": str(pieces), "workers": 0} | more)


def loader_of(cfg, G=12, B=1, rank=0, ranks=1, **more):
    return StreamLoader(
        Stream.open(cfg),
        **{"seq_len": T, "seed": 5} | more,
        global_batch_size=G,
        micro_batch_size=B,
        dp_rank=rank,
        dp_size=ranks,
    )


def run(cfg, n_steps, **more):
    """sample -> window over n_steps, and the cursor after them, as JSON gives it back."""
    seen, parts = {}, []
    for rank in range(more.get("ranks", 1)):
        with loader_of(cfg, rank=rank, **more) as loader:
            for _ in range(n_steps):
                batch = next(loader)
                rows = np.concatenate([batch.tokens.numpy(), batch.targets.numpy()[..., -1:]], axis=-1)
                for sample, row in zip(batch.samples.ravel().tolist(), rows.reshape(-1, rows.shape[-1]), strict=True):
                    assert sample not in seen
                    seen[sample] = row.tolist()
            parts.append(loader.cursor())
    return seen, json.loads(json.dumps(StreamLoader.merge_cursors(parts)))


def take(loader, n):
    return [next(loader) for _ in range(n)]


def one_epoch(cfg, lane):
    """The tokens that a lane should give in an epoch without shuffling, computed from the files."""
    stream, tokenizer = Stream.open(cfg), load_tokenizer(cfg.tokenizer)
    out = []
    for shard in stream.lane_shards(lane):
        for _, text in stream.texts(lane, shard, 0):
            out += [*tokenizer.encode(text).tolist(), tokenizer.eos_id] if text else []
    return out


LAYOUTS = {"jsonl": [40, 33, 25, 31, 40], "jsonl.gz": [90], "parquet": [49, 42], "arrow": [9] * 13}


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    """kind -> files: more than 12 lanes, fewer, one, and parquet's row groups."""
    made = {}
    for kind, sizes in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("files")
        made[kind] = write(folder, kind, [documents(seed, size) for seed, size in enumerate(sizes)])
    return made


@pytest.mark.parametrize(
    ("kind", "shuffle_buffer"), [("jsonl", 0), ("jsonl.gz", 4), ("parquet", 0), ("parquet", 4), ("arrow", 4)]
)
def test_same_windows_whatever_the_world_and_the_stops(pieces, layouts, kind, shuffle_buffer):
    """Stopped and gone on with other ranks and batches at random, over more than one epoch of the shorter lanes."""
    cfg = config(pieces, layouts[kind], kind, lanes=12, shuffle_buffer=shuffle_buffer)
    expected, _ = run(cfg, 22, G=24)
    generator = random.Random(f"{kind} {shuffle_buffer}")
    seen, cursor = {}, None
    while len(seen) < 300:
        ranks = generator.choice([1, 2, 3, 4])
        B = generator.choice([1, 2])
        G = ranks * B * generator.choice([1, 2, 5])
        step, cursor = run(cfg, generator.choice([0, 1, 6]), G=G, B=B, ranks=ranks, cursor=cursor, prefetch=1)
        assert sorted(step) == list(range(len(seen), len(seen) + len(step)))
        seen |= step
    assert seen == {sample: expected[sample] for sample in seen}
    assert max(lane["epoch"] for lane in cursor["lanes"]) > 0


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_token_is_a_target_once_an_epoch(pieces, layouts, kind):
    """Lane by lane: an epoch's tokens follow each other, and the next epoch's follow them."""
    cfg = config(pieces, layouts[kind], kind, lanes=4, epochs=2)
    stream, tokenizer, every = Stream.open(cfg), load_tokenizer(cfg.tokenizer), []
    for number in range(4):
        expected = one_epoch(cfg, number)
        every += expected
        lane = Lane(stream, tokenizer, T, 5, LaneState(lane=number))
        windows = []
        with pytest.raises(StreamEnd, match=rf"lane {number} has given all \d+ windows of its 2 epochs\. Set data"):
            windows.extend(iter(lambda lane=lane: lane.window().tokens.tolist(), None))
        targets = [token for window in windows for token in window[1:]]
        assert all(before[-1] == after[0] for before, after in zip(windows, windows[1:], strict=False))
        assert targets == (expected * 2)[1 : len(targets) + 1]
        assert len(expected) * 2 - 1 - len(targets) < T  # no more than the end of the last epoch is left over
    texts = [text for seed, size in enumerate(LAYOUTS[kind]) for text in documents(seed, size) if text]
    assert sorted(every) == sorted(t for text in texts for t in [*tokenizer.encode(text).tolist(), tokenizer.eos_id])


def test_shuffling_gives_the_same_documents_in_another_order_every_epoch(pieces, layouts):
    cfg = config(pieces, layouts["jsonl"], lanes=1, shuffle_buffer=8, epochs=2)
    stream, tokenizer = Stream.open(cfg), load_tokenizer(cfg.tokenizer)

    def order(seed):
        return [(d.state.epoch, d.shard, d.row) for d in Lane(stream, tokenizer, T, seed, LaneState(lane=0))._read()]

    first = [place[1:] for place in order(5) if place[0] == 0]
    second = [place[1:] for place in order(5) if place[0] == 1]
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != sorted(first)
    assert order(5) == order(5) != order(6)
    assert all(place[0] == 0 and place[1] // 8 == 0 for place in first[: len([p for p in first if p < (0, 8)])])


def test_resume_tokenizes_one_document_again(pieces, layouts):
    """Of those that the windows before had used, only the one in which the next window begins."""
    cfg = config(pieces, layouts["jsonl.gz"], "jsonl.gz", lanes=1)
    stream, tokenizer = Stream.open(cfg), load_tokenizer(cfg.tokenizer)
    lane = Lane(stream, tokenizer, T, 5, LaneState(lane=0))
    for _ in range(40):
        lane.window()
    again = next(Lane(stream, tokenizer, T, 5, lane.state)._read())
    assert again.state == lane.state.model_copy(update={"windows": 0, "token": 0})
    assert again.state.document > 5


def test_the_cursor_counts_what_was_handed_out(pieces, layouts):
    cfg = config(pieces, layouts["jsonl"], lanes=4)
    with loader_of(cfg, G=4, prefetch=3) as loader:
        while loader._ready.qsize() < 3:
            time.sleep(0.01)
        assert not loader.at_end()  # looking ahead is not handing out
        assert loader.cursor()["samples"] == 0
        assert [lane["windows"] for lane in loader.cursor()["lanes"]] == [0] * 4
        batch = next(loader)
        assert loader.cursor()["samples"] == 4
        assert [lane["windows"] for lane in loader.cursor()["lanes"]] == [1] * 4
    assert batch.samples.tolist() == [[0], [1], [2], [3]]
    assert batch.tokens.shape == batch.targets.shape == (4, 1, T)
    assert (batch.span, batch.n_targets, batch.documents) == ((0, 4), 4 * T, None)


def test_describe_names_rows_of_files(pieces, layouts):
    cfg = config(pieces, layouts["jsonl"], lanes=4)
    with loader_of(cfg, G=4) as loader:
        batch = next(loader)
        lines = loader.describe(batch.samples.ravel()).splitlines()
        assert lines[1].startswith("sample 1: lane 1, window 0, epoch 0, ")
        for line, lane in zip(lines, range(4), strict=True):
            assert f"{lane:02d}.jsonl row" in line
        assert loader.describe([99]) == (
            "sample 99: lane 3, window 24, of which rows is known in the steps after it alone, on the rank that read it"
        )


def test_the_last_epoch_ends_with_a_named_end(pieces, tmp_path):
    paths = write(tmp_path, "jsonl", [["a b c d e f " * 10] * 8, ["a b c d e f " * 10] * 2])
    cfg = config(pieces, paths, lanes=2, epochs=3)
    with loader_of(cfg, G=2) as loader:
        steps = 0
        while not loader.at_end():
            next(loader)
            steps += 1
        n_tokens = min(len(one_epoch(cfg, lane)) for lane in range(2)) * 3
        assert steps == (n_tokens - 1) // T
        with pytest.raises(StreamEnd, match=rf"lane 1 has given all {steps} windows of its 3 epochs"):
            next(loader)
        with pytest.raises(RuntimeError, match="the loader is closed"):
            next(loader)


@pytest.fixture
def good(tmp_path):
    (tmp_path / "good").mkdir()
    return write(tmp_path / "good", "jsonl", [documents(seed, 40) for seed in range(2)])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"G": 10, "B": 4}, r"global_batch_size=10 is not a multiple .*nearest that are: 8, 12"),
        ({"B": 0}, "micro_batch_size=0; expected at least 1"),
        ({"rank": 2, "ranks": 2}, "dp_rank=2 of dp_size=2"),
        ({"prefetch": 0}, "prefetch=0; expected at least 1"),
        ({"seq_len": 0}, "seq_len=0; expected at least 1"),
        ({"ranks": 3}, r"lanes=4 cannot be shared by dp_size=3 ranks; it can by 1, 2, 4\. .* fit are: 3, 6"),
        ({"ranks": 2, "workers": 3}, r"workers=3, but a rank of 2 has 2 of the 4 lanes; use at most 2"),
        ({"dataset": "/nowhere/set", "data_files": None}, r"dataset /nowhere/set, split train cannot be opened: "),
        (
            {"data_files": ["/nowhere/*.jsonl"]},
            r"no file is named by data\.stream\.data_files=\['/nowhere/\*\.jsonl'\]",
        ),
        ({"data_files": ["/nowhere/a.jsonl"]}, r"\(/nowhere/a\.jsonl\), split train cannot be opened: FileNotFound"),
        ({"field": "words"}, r"has no field 'words'; its fields: text, n\. Set data\.stream\.field"),
        ({"field": "n"}, r"field 'n' is int64, expected text\. Set data\.stream\.field"),
        ({"sample_by": "line"}, r"dataset='json' with sample_by='line'; 'text' needs"),
        ({"dataset": "text"}, r"dataset='text' with sample_by=None; 'text' needs sample_by: line, paragraph"),
        ({"tokenizer": "/nowhere"}, "/nowhere"),
        ({"lanes": 80}, r"lane \d+ of 80 has \d+ tokens, a window takes 17; it reads .*jsonl\. Use fewer data.*lanes"),
    ],
)
def test_refusals(pieces, good, change, match):
    options = {key: change[key] for key in change.keys() & {"G", "B", "rank", "ranks", "prefetch", "seq_len"}}
    cfg = config(pieces, good, **{"lanes": 4} | {key: change[key] for key in change.keys() - options.keys()})
    with pytest.raises(ValueError, match=match), loader_of(cfg, **options) as loader:
        next(loader)


def test_the_config_refuses_what_it_cannot_use():
    for wrong in [{"lanes": 0}, {"workers": -1}, {"epochs": 0}, {"data_files": []}, {"trust_remote_code": True}]:
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            StreamConfig(dataset="json", tokenizer="t", **wrong)


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (['{"text": "a"}'] * 5 + ['{"text": "cut'], r"lane 0: .*bad\.jsonl cannot be read after row \d+: .*Repair the"),
        (
            ['{"text": "a"}'] * 300 + ['{"text": null}'],
            r"lane 0: .*bad\.jsonl, row 300 \(counted from 0\): field 'text' is",
        ),
        (
            ['{"text": "a"}'] * 3 + ['{"n": 1}'],
            r"bad\.jsonl, row 3 \(counted from 0\): field 'text' is null or missing",
        ),
        (['{"text": "a"}', '{"text": {"b": 1}}'], r"bad\.jsonl cannot be read after row 0"),
        (['{"text": "a"}', '{"text": 7}'], r"bad\.jsonl cannot be read after row 0"),
    ],
)
@pytest.mark.fault(44, 45)
def test_malformed_documents_stop_the_step_and_are_named(pieces, good, tmp_path, lines, match):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines))
    cfg = config(pieces, [good[0], str(bad)], lanes=1)
    with pytest.raises(StreamError, match=match), loader_of(cfg, G=1, seq_len=64) as loader:
        take(loader, 1000)


def test_a_json_list_whose_fields_show_when_it_is_read(pieces, tmp_path):
    """The library does not look into one beforehand."""
    path = tmp_path / "list.json"
    path.write_text('[{"words": "a"}, {"words": "b"}]')
    with pytest.raises(StreamError, match=r"list\.json has no field 'text' at row 0; its fields: words\. Set data"):
        next(loader_of(config(pieces, [str(path)], "json", lanes=1), G=1))
    path.write_text('[{"text": 1}, {"text": 2}]')
    with pytest.raises(StreamError, match=r"list\.json, row 0: field 'text' is int64, expected text; repair the file"):
        next(loader_of(config(pieces, [str(path)], "json", lanes=1), G=1))


@pytest.mark.fault(50)
def test_empty_files_are_refused_at_the_first_step(pieces, tmp_path):
    paths = write(tmp_path, "parquet", [[""] * 30])
    with pytest.raises(StreamError, match=r"lane 0 of 1 has 0 tokens, a window takes 17; it reads .*00\.parquet"):
        next(loader_of(config(pieces, paths, "parquet", lanes=1), G=1))


@pytest.mark.fault(46, 47)
def test_a_cut_gzip_and_a_file_without_footer_are_named(pieces, tmp_path, good):
    whole = gzip.compress(Path(good[0]).read_bytes() * 20)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StreamError, match=r"cut\.jsonl\.gz"):
        next(loader_of(config(pieces, [str(tmp_path / "cut.jsonl.gz")], lanes=1), G=1))
    (tmp_path / "no.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(StreamError, match=r"no\.parquet.* cannot be opened"):
        loader_of(config(pieces, [str(tmp_path / "no.parquet")], "parquet", lanes=1), G=1)


def test_text_files_by_document(pieces, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n" * 9)
    cfg = config(pieces, [str(tmp_path / "*.txt")], "text", sample_by="document", lanes=1)
    tokenizer = load_tokenizer(pieces)
    assert tokenizer.decode(one_epoch(cfg, 0)) == "one\n\ntwo\n" * 9


@pytest.mark.fault(40)
def test_a_cursor_of_other_data_is_refused(pieces, good, tmp_path):
    cfg = config(pieces, good, lanes=4)
    _, cursor = run(cfg, 1)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in good:
        (moved / Path(path).name).write_bytes(Path(path).read_bytes())
    elsewhere = config(pieces, [str(moved / Path(path).name) for path in good], lanes=4)
    with loader_of(elsewhere, cursor=cursor) as loader:  # the folder may move
        next(loader)
    (moved / "00.jsonl").write_bytes((moved / "00.jsonl").read_bytes() + b'{"text": "x", "n": 1}\n')
    with pytest.raises(StreamError, match=r"another stream: files was 2 files of \d+ bytes .*, is 2 files of .*Go on"):
        loader_of(elsewhere, cursor=cursor)
    for change, options, match in [
        ({"lanes": 2}, {}, "lanes was 4, is 2"),
        ({"shuffle_buffer": 9}, {}, "shuffle_buffer was 0, is 9"),
        ({}, {"seed": 6}, "seed was 5, is 6"),
        ({}, {"seq_len": 8}, "seq_len was 16, is 8"),
    ]:
        with pytest.raises(StreamError, match=rf"another stream: {match}\. Go on"):
            loader_of(config(pieces, good, **{"lanes": 4} | change), cursor=cursor, **options)
    with pytest.raises(StreamError, match=r"cursor has lanes \[0, 2\] of 4; expected every lane once"):
        loader_of(cfg, cursor=cursor | {"lanes": cursor["lanes"][::2]})
    with pytest.raises(StreamError, match=r"not one of a stream \(fingerprint: .*read prepared shards before"):
        loader_of(cfg, cursor={"samples": 3, "lanes": []})


def test_cursors_of_different_steps_or_ranks_do_not_merge(pieces, good):
    cfg = config(pieces, good, lanes=4)
    with loader_of(cfg, rank=0, ranks=2) as zero, loader_of(cfg, rank=1, ranks=2) as one:
        whole = StreamLoader.merge_cursors([one.cursor(), zero.cursor()])
        assert [lane["lane"] for lane in whole["lanes"]] == [0, 1, 2, 3]
        next(one)
        with pytest.raises(StreamError, match=r"not of one step of one run: they stand at samples \[0, 12\]"):
            StreamLoader.merge_cursors([zero.cursor(), one.cursor()])
        with pytest.raises(StreamError, match=r"lanes \[1, 3\] of 4; expected every lane once"):
            StreamLoader.merge_cursors([one.cursor()])
        with pytest.raises(StreamError, match=r"no data cursors to merge; give those of all ranks"):
            StreamLoader.merge_cursors([])


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until_gone(pid, seconds=20):
    end = time.monotonic() + seconds
    while not gone(pid):
        assert time.monotonic() < end, f"process {pid} is still there after {seconds} s"
        time.sleep(0.02)


def pids(loader):
    return [process.pid for process in loader._source._processes]


@pytest.mark.fault(3)
def test_workers_give_the_same_windows_and_a_killed_one_is_named(pieces, layouts):
    """One start of workers for several properties: they are slow to start."""
    cfg = config(pieces, layouts["parquet"], "parquet", lanes=4, shuffle_buffer=4)
    expected, _ = run(cfg, 6, G=8)
    with loader_of(cfg.model_copy(update={"workers": 2}), G=8, B=2) as loader:
        batches, workers = [], pids(loader)
        for _ in range(2):  # as they start, and at work
            for number in (signal.SIGTERM, signal.SIGINT):  # what reaches a whole job step does not end them
                os.kill(workers[0], number)
            batches += [next(loader) for _ in range(3)]
        cursor = loader.cursor()
        time.sleep(0.3)  # a signal that ended it would have by now
        assert not gone(workers[0])
        os.kill(workers[1], signal.SIGKILL)
        with pytest.raises(StreamError, match=r"worker process .*number 1\) was killed by SIGKILL .*out of memory"):
            take(loader, 100_000)  # what the worker had sent already still comes
    for worker in workers:
        wait_until_gone(worker)
    for batch in batches:
        for sample, row in zip(batch.samples.ravel(), batch.tokens.reshape(-1, T).tolist(), strict=True):
            assert row == expected[int(sample)][:-1]
    after, _ = run(cfg, 2, G=8, cursor=cursor)  # and a run without workers goes on from there
    longer, _ = run(cfg, 8, G=8)
    assert after == {sample: longer[sample] for sample in range(48, 64)}


@pytest.mark.fault(48)
def test_files_that_change_as_the_workers_start_are_refused(pieces, good):
    job = Job(config(pieces, good, lanes=1), "1 files of 7 bytes", (LaneState(lane=0),), T, 5, 0, 2)
    crew = Crew([job])
    with pytest.raises(StreamError, match=r"changed as the run started: 1 files of 7 bytes, then 2 files of \d+ bytes"):
        crew.take()
    crew.kill()
    with pytest.raises(StreamError, match="the stream is closed; it gives no further windows"):
        crew.take()
    crew.close()


def test_a_dead_thread_does_not_hang_the_step(pieces, good, monkeypatch):
    monkeypatch.setattr(StreamLoader, "_prefetch", lambda self, first: None)
    with pytest.raises(RuntimeError, match="thread is gone and left neither batch nor error"):
        next(loader_of(config(pieces, good, lanes=1), G=1))


def test_a_worker_s_error_reaches_the_step_and_close_leaves_no_process(pieces, good, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": null}')
    cfg = config(pieces, [*good, str(bad)], lanes=1, workers=1)
    with loader_of(cfg, G=1) as loader:
        with pytest.raises(StreamError, match=r"bad\.jsonl, row 1 .* is null or missing") as caught:
            take(loader, 10_000)
        assert "in _column" in caught.value.__notes__[0]  # where in the worker it happened
    loader = loader_of(cfg, G=1)
    (worker,) = pids(loader)
    loader.close()  # at whatever point of its start it is
    assert gone(worker)
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(loader)


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(pieces, layouts):
    cfg = config(pieces, layouts["jsonl"], lanes=2, workers=1)
    code = (
        "import sys; from data.lanes import Stream; from data.stream import *\n"
        f"stream = Stream.open(StreamConfig.model_validate_json({cfg.model_dump_json()!r}))\n"
        "loader = StreamLoader(stream, seq_len=16, seed=1,\n"
        "    global_batch_size=2, micro_batch_size=1, dp_rank=0, dp_size=1)\n"
        "next(loader); print(loader._source._processes[0].pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker = int(parent.stdout.readline())
    assert not gone(worker)
    parent.kill()
    parent.wait()
    wait_until_gone(worker)
