"""Runs that read raw text (data.stream) through the launcher: refused at the door, ended, killed and resumed."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.dataset import Dataset
from launcher import pretrain
from launcher.config import load_config, to_yaml
from parallel.checkpoint import committed_steps
from runs import losses, metrics, run, torchrun, write_recipe

LANES = 4


@pytest.fixture(scope="module", autouse=True)
def _library_cache(tmp_path_factory):
    """datasets keeps lock files of what it opens; not in the home folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)  # the runs'
        yield


def write_texts(folder, corpus, kind, documents):
    """The corpus's texts as 4 files of some documents of 400 characters each; returns a pattern."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((corpus.parent / "texts").iterdir()))
    pieces = iter([text[begin : begin + 400] for begin in range(0, len(text), 400)])
    folder.mkdir()
    for number in range(LANES):
        rows = [{"text": next(pieces), "n": n} for n in range(documents + number)]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet")
        else:
            (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / f"*.{kind}")


def write_stream_recipe(folder, corpus, kind="jsonl", documents=12, **more):
    """The recipe of runs.py on raw text: one rank and no workers unless told otherwise."""
    path = write_recipe(folder, corpus)
    files = write_texts(folder / "texts", corpus, kind, documents)
    dataset = {"jsonl": "json"}.get(kind, kind)
    stream = {"dataset": dataset, "data_files": [files], "tokenizer": str(corpus / "tokenizer"), "lanes": LANES}
    path.write_text(to_yaml(load_config(str(path), [f"data.stream={json.dumps(stream | {'workers': 0} | more)}"])))
    return path


def ledger(run_dir):
    return [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]


# -- refused ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_the_door(monkeypatch):
    """pretrain.main in this process, of which only the checks may run."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("the run was started"))


def refused(capsys, recipe, *arguments):
    assert pretrain.main(["--config", str(recipe), *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.stream.data_files=[/nowhere/a.jsonl]", "(/nowhere/a.jsonl), split train cannot be opened: FileNotFound"),
        ("data.stream.data_files=['/nowhere/*.jsonl']", "no file is named by data.stream.data_files="),
        ("data.stream.field=words", "has no field 'words'; its fields: text, n. Set data.stream.field"),
        ("data.stream.dataset=/nowhere/set", "dataset /nowhere/set"),
        ("data.stream.tokenizer=/nowhere", "/nowhere"),
        ("data.stream.workers=5", "data.stream.workers=5, but a rank of 1 has 4 of the 4 lanes; use at most 4 workers"),
    ],
)
@pytest.mark.usefixtures("at_the_door")
def test_refused_before_anything_is_started(capsys, corpus, tmp_path, override, message):
    assert message in refused(capsys, write_stream_recipe(tmp_path, corpus), override)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("at_the_door")
def test_lanes_that_the_ranks_cannot_share(capsys, corpus, tmp_path, monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    recipe = write_stream_recipe(tmp_path, corpus)
    text = refused(capsys, recipe, "train.global_batch_size=12")
    assert "data.stream.lanes=4 cannot be shared by dp_size=3 ranks; it can by 1, 2, 4." in text
    assert not (tmp_path / "runs").exists()


# -- the end of the text ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(tmp_path_factory, corpus):
    """(recipe, output) of a run whose text ended."""
    folder = tmp_path_factory.mktemp("ended")
    recipe = write_stream_recipe(folder, corpus, documents=4, epochs=1)
    return recipe, run(torchrun(1, "--config", recipe), folder / "log", code=1)


def last_step(run_dir):
    return committed_steps(run_dir / "checkpoints")[-1]


def test_the_end_of_the_text_is_saved_and_named(ended):
    recipe, text = ended
    run_dir = recipe.parent / "runs/test"
    step = last_step(run_dir)
    assert step % 5, "between two checkpoints, or the end has nothing to save"
    assert f"the text ends after data.stream.epochs=1 at step {step} of 24; that step is saved. Finish with" in text
    failed = ledger(run_dir)[-1]
    assert (failed["event"], failed["step"], failed["saved_step"]) == ("failed", step, step)
    assert failed["error"].startswith("StreamEnd: the text ends after data.stream.epochs=1")


def test_the_end_of_the_text_can_be_made_the_end_of_the_run(ended, tmp_path):
    """As the message says: no step is trained, the held-out loss is taken and the ledger says finished, once."""
    recipe, _ = ended
    run_dir = tmp_path / "runs/test"
    shutil.copytree(recipe.parent / "runs/test", run_dir)
    before, step = losses(run_dir), last_step(run_dir)
    command = torchrun(1, "--config", recipe, f"run.folder={tmp_path / 'runs'}", f"train.steps={step}")
    run([*command, "--allow-change", "train.steps"], tmp_path / "log")
    finished = ledger(run_dir)[-1]
    assert (finished["event"], finished["step"], finished["tokens"]) == ("finished", step, step * 8 * 32)
    assert finished["loss/valid"] == [line["loss/valid"] for line in metrics(run_dir) if "loss/valid" in line][-1]
    assert losses(run_dir) == before
    size = len(ledger(run_dir))
    assert f"is finished: {step} of {step} steps; nothing to do" in run(command, tmp_path / "again")
    assert len(ledger(run_dir)) == size


@pytest.mark.usefixtures("at_the_door")
def test_a_run_goes_on_with_the_stream_that_it_began_with(ended, capsys, corpus):
    recipe, _ = ended
    pretrain.check(pretrain.parse_arguments(["--config", str(recipe)]))
    files = recipe.parent / "texts/0.jsonl"
    before = files.read_bytes()
    files.write_bytes(before + b'{"text": "x", "n": 1}\n')
    try:
        text = refused(capsys, recipe)
    finally:
        files.write_bytes(before)
    assert "the checkpoint was trained on another stream: files was 4 files of " in text
    text = refused(capsys, recipe, "data.stream.lanes=8", "--allow-change", "data.stream.lanes")
    assert "the checkpoint was trained on another stream: lanes was 4, is 8. Go on" in text
    text = refused(capsys, recipe, "data.stream=null", "--allow-change", "data.stream")
    assert "read raw text before, and data.stream is not set now; set it as config.yaml there has it, or use" in text


@pytest.mark.usefixtures("at_the_door")
def test_a_run_on_a_prepared_corpus_does_not_go_on_with_a_stream(capsys, corpus, tmp_path, monkeypatch):
    recipe = write_stream_recipe(tmp_path, corpus)
    cfg = load_config(str(recipe), ["data.stream=null"])
    cursor = Dataset.open(cfg.data, cfg.model.seq_len).cursor(8)
    monkeypatch.setattr(pretrain, "saved_cursor", lambda _: cursor)
    assert "the data cursor is not one of a stream" in refused(capsys, recipe)
