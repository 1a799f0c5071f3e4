"""A run that goes on with another batch, length, corpus or tokenizer than it began with is refused before it starts."""

import shutil

import pytest

from data.config import DataConfig
from data.prepare import prepare
from launcher import pretrain
from straight import OPTIONS


@pytest.fixture(scope="module")
def others(corpus, tmp_path_factory):
    """The same corpus in another place; the same texts with a tokenizer of another sample; other texts, same tokenizer."""
    folder = tmp_path_factory.mktemp("others")
    shutil.copytree(corpus, folder / "moved")
    texts = corpus.parent / "texts"
    shutil.copytree(texts, folder / "texts")
    with open(next((folder / "texts").glob("*.py")), "a") as file:
        file.write("# another line\n")
    base = {"valid_fraction": 0.1, "shard_bytes": 300_000, "workers": 1}
    trained = {"vocab_size": 512, "train_bytes": 2**18}
    for name, source, tokenizer in (
        ("tokenizer", texts, trained),
        ("texts", folder / "texts", {"path": str(corpus / "tokenizer"), "vocab_size": 512}),
    ):
        sources = [{"kind": "text", "paths": [f"{source}/*.py"]}]
        changes = {"corpus": str(folder / name / "prepared"), "sources": sources, "tokenizer": tokenizer}
        prepare(DataConfig.model_validate({**base, **changes}))
    return {"moved": folder / "moved", **{name: folder / name / "prepared" for name in ("tokenizer", "texts")}}


def go_on(straight, recipe, monkeypatch, *arguments):
    """The exit code of a start that goes on from step 20; 0 where it would begin."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pretrain, "run", lambda *_: 0)
    straight.begun(recipe.parent / "runs/test", 20)
    return pretrain.main(["--config", str(recipe), *OPTIONS, *map(str, arguments)])


@pytest.mark.slow
@pytest.mark.fault(40)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.global_batch_size=16", "train.global_batch_size: was 8, is 16"),
        ("model.seq_len=16", "model.seq_len: was 32, is 16"),
        ("data.corpus={texts}", "{texts}: shards of text was "),
        ("data.corpus={tokenizer}", "; tokenizer of text was "),
    ],
)
def test_refused(change, message, straight, others, recipe, monkeypatch, capsys):
    assert go_on(straight, recipe, monkeypatch, change.format(**others)) == 2
    assert message.format(**others) in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [("data.corpus={moved}",), ("train.global_batch_size=16", "--allow-change", "train.global_batch_size")],
    ids=["the same corpus elsewhere", "allowed"],
)
def test_what_is_the_same_or_meant_is_not_refused(arguments, straight, others, recipe, monkeypatch):
    assert go_on(straight, recipe, monkeypatch, *(argument.format(**others) for argument in arguments)) == 0
