"""An exported folder is the run's model as plain transformers loads it, or it is not there."""

import fcntl
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_secrets import CANARIES, ENVIRONMENT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.tokenizer import TokenizerConfig, load_tokenizer, train
from exports import ARCHITECTURES, FAMILIES, change_config, contents, damage, make_run
from launcher import export, staging
from launcher.redaction import environment_secrets
from launcher.trained import Checkpoint, open_checkpoint
from model.hf import to_hf_state

PROMPTS = ["def ", "", "</s>", "a \u2581 b", "class A:\n    "]


@pytest.fixture(scope="session")
def runs_of(corpus, tmp_path_factory):
    """family -> a run's folder, made when it is first asked for."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = make_run(tmp_path_factory.mktemp("runs"), corpus, family)
        return made[family]

    return get


@pytest.fixture(autouse=True)
def short_proof(monkeypatch):
    """Less text than a user's proof takes; test_a_whole_proof has it all."""
    monkeypatch.setattr(export, "PROOF_CHARACTERS", 2**14)
    monkeypatch.setattr(export, "PROOF_TOKENS", 256)


@pytest.fixture
def llama(runs_of, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(runs_of("llama"), tmp_path / "run")


def run_export(run_dir, output, *more, code=0):
    assert export.main([str(run_dir), "--output", str(output), *map(str, more)]) == code
    return output


def report_in(folder):
    return json.loads((folder / "export_report.json").read_text())


def plain_python(program, cwd):
    """A fresh process in which nothing of this project is on the path."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.modules['launcher'] = sys.modules['data'] = None\n{program}"],
        cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_and_continues_it(family, runs_of, tmp_path, capsys):
    before = contents(runs_of(family))
    folder = run_export(runs_of(family), tmp_path / "exports/mine", "--shard-size", "60KB")
    assert contents(runs_of(family)) == before
    report = report_in(folder)
    assert report["logits"]["equal"]
    assert report["logits"]["tokens"] == 256
    assert report["architecture"] == ARCHITECTURES[family]
    assert report["step"] == 2
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    said = capsys.readouterr().out
    assert f"{report['parameters']:,} parameters as {ARCHITECTURES[family]}, fp32" in said
    assert "ids equal, of" in said
    assert str(folder / "export_report.json") in said

    tokenizer, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(runs_of(family) / "tokenizer")
    assert [tokenizer(text).input_ids for text in PROMPTS] == [ours.encode(text).tolist() for text in PROMPTS]
    card = (folder / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(program.splitlines()) == 5
    assert plain_python(program, folder.parent).startswith("The ")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_logits_and_weights_are_the_checkpoints(family, dtype, runs_of, tmp_path):
    """Looked at with nothing of the export's own proof: the tensors by the bridge, logits in transformers' own dtype."""
    folder = run_export(runs_of(family), tmp_path / "out", "--dtype", dtype)
    checkpoint, torch_dtype = open_checkpoint(runs_of(family), 2), export.DTYPES[dtype]
    ours = checkpoint.model()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.to(torch_dtype))
    cut = ours.cfg.model_copy(update={"vocab_size": 512, "dropout": 0.0 if family == "llama" else ours.cfg.dropout})
    state = {
        name: value[:512] if name in ("embed.weight", "head.weight") else value
        for name, value in ours.named_parameters()
    }
    expected, found = to_hf_state(cut, state), load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch_dtype
        assert torch.equal(tensor.float(), expected[name]), name

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch_dtype
    assert theirs.config.vocab_size == len(AutoTokenizer.from_pretrained(folder)) == 512
    tokens = torch.randint(0, 512, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        here, there = ours(tokens)[..., :512], theirs(tokens).logits.float()
    # fp32: the order of sums. Narrower ones also round every result: some ten roundings of 2**-9 or 2**-12
    limit = {"fp32": 1e-5, "bf16": 10 * 2**-9, "fp16": 10 * 2**-12}[dtype]
    assert (here - there).abs().max() < limit * here.abs().max()


def test_a_whole_proof(runs_of, tmp_path, monkeypatch):
    """As a user has it: a mebibyte of text, if there is that much, and 4096 tokens."""
    monkeypatch.undo()
    report = report_in(run_export(runs_of("gpt2"), tmp_path / "out"))
    assert report["text"] == "held-out text of the run"
    assert report["logits"]["tokens"] == 4096
    assert report["tokenizer"]["characters"] > 50_000


def test_a_checkpoint_is_taken_by_its_step(runs_of, tmp_path):
    first = run_export(runs_of("qwen3"), tmp_path / "1", "--step", 1)
    second = run_export(runs_of("qwen3"), tmp_path / "2")
    assert (report_in(first)["step"], report_in(second)["step"]) == (1, 2)
    assert (report_in(first)["tokens_seen"], report_in(second)["tokens_seen"]) == (192, 384)
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()
    assert report_in(first)["held_out"] == {"step": 1, "loss/valid": 6.5}
    assert "| valid | 6.2500 |" in (second / "README.md").read_text()


def test_the_same_request_gives_the_same_bytes(runs_of, tmp_path):
    for place in ("a", "b"):
        run_export(runs_of("qwen3"), tmp_path / place / "same")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# -- the vocabulary ----------------------------------------------------------------------------------------------------


def prefer_padding(run_dir, monkeypatch):
    """A model that finds the padded rows likelier than any token: their part of the head is a hundred times as large."""
    read = Checkpoint.read_weight

    def larger(self, name, start, stop):
        values = read(self, name, start, stop)
        places = torch.arange(start, stop) // 48
        return torch.where((places >= 512) & (places < 640), values * 100, values) if name == "head.weight" else values

    def model(self, dtype=torch.float32):
        made = plain(self, dtype)
        with torch.no_grad():
            made.head.weight[512:] *= 100
        return made

    plain = Checkpoint.model
    monkeypatch.setattr(Checkpoint, "read_weight", larger)
    monkeypatch.setattr(Checkpoint, "model", model)


def test_padded_rows_are_cut_and_so_never_generated(runs_of, tmp_path, monkeypatch):
    prefer_padding(runs_of("llama"), monkeypatch)
    folder = run_export(runs_of("llama"), tmp_path / "out")
    assert report_in(folder)["vocabulary"] == {"model": 640, "exported": 512, "tokenizer": 512}
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == model.get_output_embeddings().weight.shape[0]


def test_padded_rows_that_are_kept_are_never_generated_either(runs_of, tmp_path, monkeypatch):
    prefer_padding(runs_of("llama"), monkeypatch)
    folder = run_export(runs_of("llama"), tmp_path / "out", "--keep-padding")
    assert report_in(folder)["vocabulary"] == {"model": 640, "exported": 640, "tokenizer": 512}
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.vocab_size, len(tokenizer)) == (640, 512)
    inputs = tokenizer("def ", return_tensors="pt")
    with torch.inference_mode():
        assert model(**inputs).logits[0, -1].argmax() >= 512  # what it would take if it might
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 0}):
        assert model.generate(**inputs, max_new_tokens=20, **options).max() < 512


def test_special_ids_are_those_of_the_run(runs_of, tmp_path):
    """A document begins after </s>, as in training; <unk> is in no text, so that padding with it masks nothing."""
    folder = run_export(runs_of("llama"), tmp_path / "out")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for owner in (tokenizer, model.config, model.generation_config):
        assert (owner.bos_token_id, owner.eos_token_id, owner.pad_token_id) == (2, 2, 0)
    assert tokenizer.model_max_length == 32
    assert model.generate(max_new_tokens=3)[0, 0] == 2
    batch = tokenizer(["def f(", "x"], padding=True, padding_side="left", return_tensors="pt")
    assert batch["attention_mask"][1, 0] == 0
    alone = model.generate(**tokenizer("x", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert model.generate(**batch, max_new_tokens=8, do_sample=False)[1, -8:].tolist() == alone[0, -8:].tolist()


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def with_tokenizer(run_dir, folder):
    shutil.rmtree(run_dir / "tokenizer")
    load_tokenizer(folder).save(run_dir / "tokenizer")
    return run_dir


def python_texts():
    import argparse as a
    import inspect
    import typing as b

    return [inspect.getsource(module) for module in (a, b)]


def sentencepiece_of(model_type, folder):
    cfg = TokenizerConfig(model_type=model_type, vocab_size=350 if model_type == "char" else 512, train_bytes=2**18)
    texts = [*python_texts(), "".join(map(chr, range(0x3B1, 0x42F))) * 20]
    train([(texts, 2**18)], folder, cfg.model_copy(update={"vocab_size": 350 if model_type == "char" else 512}))
    return folder


@pytest.mark.parametrize("model_type", ["bpe", "char"])
def test_the_ids_are_those_of_training(model_type, llama, tmp_path):
    """Also without the run's corpus: then on the library of Python."""
    run_dir = with_tokenizer(llama, sentencepiece_of(model_type, tmp_path / "tokenizer"))
    folder = run_export(run_dir, tmp_path / "out")
    proof = report_in(folder)["tokenizer"]
    assert report_in(folder)["text"] == "Python's library"
    assert proof["auto_tokenizer"]
    assert proof["characters"] > 2**14
    ours, theirs = load_tokenizer(run_dir / "tokenizer"), AutoTokenizer.from_pretrained(folder)
    for text in [*PROMPTS, *python_texts()]:
        assert theirs(text).input_ids == ours.encode(text).tolist()
        assert theirs.decode(theirs(text).input_ids) == text


def test_a_unigram_model_is_written_as_it_is(llama, tmp_path, capsys):
    run_dir = with_tokenizer(llama, sentencepiece_of("unigram", tmp_path / "tokenizer"))
    folder = run_export(run_dir, tmp_path / "out")
    why = "no tokenizer.json is proved to give the same ids (SentencePiece unigram models have no equal there)"
    assert why in capsys.readouterr().out
    assert not report_in(folder)["tokenizer"]["auto_tokenizer"]
    assert not list(folder.glob("tokenizer*"))  # which AutoTokenizer would take for a Llama's
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert plain_python(program, tmp_path).startswith("The ")


def test_a_conversion_that_differs_is_not_used(llama, tmp_path, monkeypatch, capsys):
    """The proof finds one wrong merge, and what was written of it is taken away."""
    import data.tokenizer as module

    plain = module._bpe_as_json

    def wrong(*args):
        tree = json.loads(plain(*args))
        tree["model"]["merges"] = tree["model"]["merges"][::-1]
        return json.dumps(tree)

    monkeypatch.setattr(module, "_bpe_as_json", wrong)
    folder = run_export(llama, tmp_path / "out")
    assert "no tokenizer.json is proved to give the same ids (ids differ from token" in capsys.readouterr().out
    assert sorted(path.name for path in (folder / "sentencepiece").iterdir()) == [
        "tokenizer.model", "tokenizer_config.json"
    ]  # fmt: skip
    assert not list(folder.glob("tokenizer*"))


def hugging_face_tokenizer(folder, template):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(python_texts(), trainer)
    if template:
        backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    backend.enable_truncation(16)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", [False, True])
def test_a_hugging_face_tokenizer_gives_the_ids_of_training(template, llama, tmp_path, capsys):
    """The run reads no <|begin|>, so what the folder's users get by default has none either."""
    run_dir = with_tokenizer(llama, hugging_face_tokenizer(tmp_path / "theirs", template))
    folder = run_export(run_dir, tmp_path / "out")
    said = capsys.readouterr().out
    assert ("the template that adds the ids [0] to a text is left out" in said) == template
    assert "names of special tokens in a text become those tokens" in said
    ours, theirs = load_tokenizer(run_dir / "tokenizer"), AutoTokenizer.from_pretrained(folder)
    text = python_texts()[0]
    assert theirs(text).input_ids == ours.encode(text).tolist()
    config = AutoConfig.from_pretrained(folder)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 1, 1)
    if template:
        (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
        assert plain_python(program, tmp_path).startswith("The ")
    assert "fingerprint" not in (folder / "tokenizer_config.json").read_text()


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(capsys, run_dir, output, *more):
    before = sorted(output.parent.iterdir())
    run_export(run_dir, output, *more, code=2)
    assert sorted(output.parent.iterdir()) == before
    return capsys.readouterr().err


def test_models_without_an_equal(llama, tmp_path, capsys):
    change_config(llama, 2, model={"norm": "layernorm"})
    message = refused(capsys, llama, tmp_path / "out")
    assert "no Hugging Face architecture equals this model; the nearest is Llama, but model.norm='layernorm'" in message


def test_places_that_are_taken(runs_of, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("x")
    for name in ("file", "full"):
        message = refused(capsys, runs_of("llama"), tmp_path / name)
        assert f"{tmp_path / name} exists and is not an empty folder; nothing is overwritten: choose another" in message
    assert (tmp_path / "full/mine").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert report_in(run_export(runs_of("llama"), tmp_path / "empty"))["step"] == 2


def test_a_place_that_cannot_be_written(runs_of, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    run_export(runs_of("llama"), tmp_path / "file/out", code=2)
    assert "out.exporting cannot be made: Not a directory; choose another --output" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["5XB", "0", "-1GB", "1.2.3GB", "GB"])
def test_sizes_that_are_none(runs_of, tmp_path, capsys, size):
    message = refused(capsys, runs_of("llama"), tmp_path / "out", f"--shard-size={size}")
    assert f"--shard-size {size}: expected a size such as 5GB, 500MB or 2GiB" in message


@pytest.mark.parametrize(("text", "size"), [("5GB", 5e9), ("1.5 MB", 1.5e6), ("2GiB", 2**31), ("7", 7), ("3kb", 3000)])
def test_sizes(text, size):
    assert export.bytes_of(text) == size


def test_steps_that_are_not_there(runs_of, tmp_path, capsys):
    assert "has no checkpoint of step 7; it has: 1, 2" in refused(capsys, runs_of("llama"), tmp_path / "a", "--step", 7)
    assert "nothing is no folder of a run; beside it: none" in refused(capsys, tmp_path / "nothing", tmp_path / "b")


def test_a_damaged_checkpoint_is_named_and_another_taken_only_where_none_was_asked(llama, tmp_path, capsys):
    file = damage(llama, 2)
    message = refused(capsys, llama, tmp_path / "out", "--step", 2)
    assert re.search(f"is damaged: {file}: xxh3 .*; choose another with --step", message)
    folder = run_export(llama, tmp_path / "out")
    assert re.search("step-00000002 is damaged: .*xxh3 .*; taking step 1", capsys.readouterr().err)
    assert (report_in(folder)["step"], report_in(folder)["passed_over"]) == (1, ["step-00000002"])
    assert file.exists()  # it is not set aside, as a resume would do
    damage(llama, 1)
    message = refused(capsys, llama, tmp_path / "none")
    assert "has no checkpoint that is whole: " in message
    assert "restore one from a copy" in message


def test_a_damaged_tokenizer(llama, tmp_path, capsys):
    (llama / "tokenizer/tokenizer.model").write_bytes(b"x")
    assert "it was changed or damaged" in refused(capsys, llama, tmp_path / "out")


def test_weights_that_the_dtype_cannot_hold(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read_weight", lambda self, name, start, stop: torch.full((stop - start,), 1e5))
    assert "holds 1e+05, and torch.float16 ends at 6.55e+04" in refused(
        capsys, llama, tmp_path / "out", "--dtype", "fp16"
    )


@pytest.mark.fault(57)
def test_too_little_space(runs_of, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=30_000_000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    message = refused(capsys, runs_of("llama"), tmp_path / "out")
    assert f"{tmp_path} has 0.03 GB free, the export takes 0.03 GB; free some" in message


def test_two_exports_to_one_place(runs_of, tmp_path, capsys):
    (tmp_path / "out.exporting").mkdir()
    with open(tmp_path / "out.exporting/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = refused(capsys, runs_of("llama"), tmp_path / "out")
        assert "out.exporting is being written by another export; wait for it, or stop it" in message
    run_export(runs_of("llama"), tmp_path / "out")  # its process has ended
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_comes_to_be_meanwhile(runs_of, tmp_path, capsys, monkeypatch):
    plain = export.compare

    def slow(*arguments):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine").write_text("x")
        return plain(*arguments)

    monkeypatch.setattr(export, "compare", slow)
    run_export(runs_of("llama"), tmp_path / "out", code=2)
    assert "out has come to be meanwhile (Directory not empty); choose another" in capsys.readouterr().err
    assert contents(tmp_path) == {"out/mine": b"x"}


# -- the proof ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.fault(57)
def test_one_wrong_weight_is_found(dtype, runs_of, tmp_path, capsys, monkeypatch):
    """A norm's weight of one block, off by a hundredth."""
    read = Checkpoint.read_weight

    def wrong(self, name, start, stop):
        values = read(self, name, start, stop)
        if name == "blocks.1.mlp_norm.weight":
            values[7] += 0.01
        return values

    monkeypatch.setattr(Checkpoint, "read_weight", wrong)
    run_export(runs_of("llama"), tmp_path / "out", "--dtype", dtype, code=1)
    assert "transformers' logits differ from the run's by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_another_epsilon_is_found(runs_of, tmp_path, capsys, monkeypatch):
    import model.hf_folder as module

    plain = module.to_hf_config

    def wrong(cfg, **ids):
        return plain(cfg.model_copy(update={"norm_eps": 2e-5}), **ids)

    monkeypatch.setattr(module, "to_hf_config", wrong)
    run_export(runs_of("llama"), tmp_path / "out", code=1)
    assert "config.json says another norm_eps than the run" in capsys.readouterr().err


def test_numbers_that_are_none_are_not_equal():
    values = dict.fromkeys(export.Comparison.__dataclass_fields__, 1.0)
    assert export.Comparison(**values).equal
    for key in ("largest_difference", "largest_logit"):
        assert not export.Comparison(**values | {key: float("nan")}).equal


# -- what is in the folder ---------------------------------------------------------------------------------------------


def test_neither_secrets_nor_places_of_this_machine(runs_of, tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    environment_secrets.cache_clear()
    folder = run_export(runs_of("gpt2"), tmp_path / "out")
    environment_secrets.cache_clear()
    for name, payload in contents(folder).items():
        for text in [*CANARIES, str(tmp_path), str(runs_of("gpt2").parent), "/tmp", "/root", "/home"]:
            assert text.encode() not in payload, f"{text} is in {name}"


def test_the_report_lists_every_file(runs_of, tmp_path):
    from parallel.checkpoint import file_hash

    folder = run_export(runs_of("qwen3"), tmp_path / "out", "--shard-size", "50KB")
    listed = report_in(folder)["files"]
    assert set(contents(folder)) == {*listed, "README.md", "export_report.json"}
    for name, entry in listed.items():
        assert entry == {"bytes": (folder / name).stat().st_size, "xxh3": file_hash(folder / name)}


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        export.main(["--help"])
    assert "example: python launcher/export.py runs/embedded --output exports/embedded" in capsys.readouterr().out
