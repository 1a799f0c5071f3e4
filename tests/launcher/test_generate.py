"""Text from a sharded checkpoint without its engine; a run whose numbers break."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from exports import FAMILIES, make_run
from launcher import export, generate
from launcher.continuation import Options, Row, continue_prompts
from launcher.sampling import draw, sample
from launcher.trained import load_trained
from runs import ROOT, environment, metrics, run, torchrun, write_recipe


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, corpus):
    """A short run of two ranks under ZeRO 3."""
    folder = tmp_path_factory.mktemp("generate")
    arguments = ("train.steps=6", "checkpoint.every=3", "parallel.zero_stage=3")
    run(torchrun(2, "--config", write_recipe(folder, corpus), *arguments), folder / "log")
    return folder / "runs/test"


def test_the_model_read_from_fragments_has_the_loss_that_the_engine_logged(run_dir, corpus):
    from data.corpus import Corpus
    from data.loader import eval_batches

    model, _ = generate.load_model(run_dir, None)
    total = count = 0
    with torch.inference_mode():
        for tokens, targets, _ in eval_batches(Corpus.open(corpus, "valid", 32), 10, 2, 0, 1):
            total += model(tokens, targets).item()
            count += int((targets != -100).sum())
    logged = [line["loss/valid"] for line in metrics(run_dir) if "loss/valid" in line][-1]
    assert total / count == pytest.approx(logged, rel=1e-5)


def test_a_run_can_be_used_from_anywhere_and_without_its_corpus(run_dir, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert generate.main([str(run_dir), "--prompt", "class ", "--tokens", "3", "--temperature", "1e-300"]) == 0
    assert capsys.readouterr().out.startswith("class ")


def test_text_is_printed_and_a_seed_repeats_it(run_dir, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert generate.main([str(run_dir), "--prompt", "def ", "--tokens", "20", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def ")
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "4"], r"has no checkpoint of step 4; it has: 3, 6"),
        (["--tokens", "0"], "n_tokens=0, temperature=0.8, top_k=50; expected at least 1, 0 and 0, and finite"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--temperature", "nan"], "temperature=nan"),
        (["--temperature", "inf"], "temperature=inf"),
        (["--step", "0"], "has no checkpoint of step 0; it has: 3, 6"),
        (["--top-k", "-1"], "top_k=-1"),
        (["--top-p", "0"], "top_p=0.0; expected more than 0 and at most 1, which keeps all"),
        (["--top-p", "1.5"], "top_p=1.5; expected more than 0 and at most 1"),
        (["--top-p", "nan"], "top_p=nan; expected more than 0 and at most 1"),
        (["--stop", ""], "a stop string is empty, and every text begins with it; leave it out"),
    ],
)
def test_bad_requests_are_refused(run_dir, capsys, arguments, message):
    assert generate.main([str(run_dir), "--prompt", "x", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path, capsys):
    (tmp_path / "mine/checkpoints").mkdir(parents=True)
    (tmp_path / "export").mkdir()
    (tmp_path / "export/config.json").touch()
    assert generate.main([str(tmp_path / "nothing"), "--prompt", "x"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/nothing is neither a run's folder (with checkpoints/) nor a Hugging Face folder such as" in said
    assert f"beside it: {tmp_path}/export, {tmp_path}/mine\n" in said


def test_a_damaged_checkpoint_is_named_and_another_taken_only_where_none_was_asked(run_dir, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    file = copy / "checkpoints/step-00000006/rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert generate.main([str(copy), "--prompt", "x"]) == 0
    assert re.search("step-00000006 is damaged: .*; taking step 3", capsys.readouterr().err)
    assert generate.main([str(copy), "--prompt", "x", "--step", "6"]) == 2
    assert re.search("is damaged: .*; choose another with --step", capsys.readouterr().err)


def test_sampling_draws_from_the_right_tokens():
    logits = torch.tensor([0.0, 5.0, 4.0, 3.0, 9.0])  # id 4 is a padded row that no tokenizer knows

    def model(tokens):
        return logits.expand(1, tokens.shape[1], 5)

    options = {"seq_len": 4, "eos_id": 0, "vocab_size": 4, "stop_at_eos": True}
    assert sample(model, [2], 3, temperature=0, **options) == [2, 1, 1, 1]
    drawn = {i for seed in range(20) for i in sample(model, [2], 5, temperature=3.0, top_k=2, seed=seed, **options)[1:]}
    assert drawn == {1, 2}
    drawn = sample(model, [2], 400, temperature=5.0, top_k=0, seed=1, **options)[1:]
    assert drawn[-1] == 0
    assert len(drawn) < 400


def test_top_p_keeps_the_likeliest_that_have_so_much_together():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()

    def drawn(top_p, top_k=0, temperature=1.0):
        generator = torch.Generator().manual_seed(0)
        return {draw(logits, temperature, top_k, top_p, generator) for _ in range(300)}

    assert drawn(1.0) == {0, 1, 2, 3}
    assert drawn(0.95) == {0, 1, 2, 3}
    assert drawn(0.85) == {1, 2, 3}
    assert drawn(0.65) == {1, 3}
    assert drawn(1e-9) == {1}
    assert drawn(0.5, top_k=2) == {1}  # of the two that are left the first has 4/7
    assert drawn(0.99, temperature=0) == {1}


# -- continuation ------------------------------------------------------------------------------------------------------

PROMPTS = ["def f(x):", "import os", "", "class", "a \u2581 b", "def f(y):", "x" * 60]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """family -> a model as the command loads it."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = load_trained(
                make_run(tmp_path_factory.mktemp("trained"), corpus, family), None, torch.float32
            )
        return made[family]

    return get


def expected_ids(trained, prompt, options):
    """By the plain loop, without a cache, alone."""
    with torch.inference_mode():
        return sample(
            trained.model, trained.prompt_ids(prompt), options.n_tokens, seq_len=trained.model.cfg.seq_len,
            eos_id=trained.tokenizer.eos_id, vocab_size=trained.tokenizer.vocab_size, temperature=options.temperature,
            top_k=options.top_k, top_p=options.top_p, seed=options.seed,
        )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [Options(n_tokens=40), Options(n_tokens=40, temperature=0), Options(n_tokens=9, top_p=0.7, seed=3),
     Options(n_tokens=40, cache=False)],
    ids=str,
)  # fmt: skip
def test_prompts_together_with_a_cache_get_what_each_gets_alone_without(trained, family, options):
    """Also beyond the context of 32 tokens. The draws are equal unless one falls within a rounding of a border."""
    rows = continue_prompts(
        trained(family).model, trained(family).tokenizer, [trained(family).prompt_ids(p) for p in PROMPTS], options
    )
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row.ids == expected_ids(trained(family), prompt, options), prompt
        assert row.finished
        assert row.prompt_text == prompt


def test_prompts_of_one_length_are_read_in_one_forward(trained, monkeypatch):
    shapes = []
    plain = trained("llama").model.hidden

    def watched(tokens, *rest, **more):
        shapes.append(tuple(tokens.shape))
        return plain(tokens, *rest, **more)

    monkeypatch.setattr(trained("llama").model, "hidden", watched)
    ids = [[5, 6, 7], [8, 9], [10, 11, 12]]
    continue_prompts(trained("llama").model, trained("llama").tokenizer, ids, Options(n_tokens=3, temperature=0))
    assert shapes == [(2, 3), (2, 1), (2, 1), (1, 2), (1, 1), (1, 1)]


def test_a_row_that_has_ended_leaves_the_batch(trained, monkeypatch):
    """One of two ends at once; the other goes on as if it were alone."""
    model, tokenizer = trained("llama").model, trained("llama").tokenizer
    prompts = [trained("llama").prompt_ids(text) for text in ("def f(x):", "def f(y):")]
    options = Options(n_tokens=12)
    alone = continue_prompts(model, tokenizer, prompts[1:], options)[0]
    plain = Row.extend

    def ends(self, logits):
        if self.ids[: self.n_prompt] == prompts[0]:
            logits = torch.full_like(logits, -100.0)
            logits[tokenizer.eos_id] = 100.0
        plain(self, logits)

    monkeypatch.setattr(Row, "extend", ends)
    first, second = continue_prompts(model, tokenizer, prompts, options)
    assert first.ids == [*prompts[0], tokenizer.eos_id]
    assert first.text == ""
    assert second.ids == alone.ids


class Fixed:
    """A tokenizer whose ids are the bytes of a text."""

    eos_id, vocab_size = 0, 256

    def decode(self, ids):
        return bytes(i for i in ids if i).decode(errors="replace")


def fed(text, stop=(), prompt=b"P:", n_tokens=100):
    """What is settled after each byte of a continuation, and the row."""
    row, seen = Row(Fixed(), list(prompt), Options(stop=tuple(stop), temperature=0, n_tokens=n_tokens)), []
    for byte in text.encode():
        logits = torch.zeros(256)
        logits[byte] = 1.0
        row.extend(logits)
        seen.append(row.settled)
        if row.finished:
            break
    return seen, row


def test_only_whole_characters_are_shown():
    seen, row = fed("aé🧑b")
    assert seen == ["a", "a", "aé", "aé", "aé", "aé", "aé🧑", "aé🧑b"]
    assert not row.finished


def test_a_stop_string_ends_a_text_before_it_and_no_part_of_it_is_shown():
    seen, row = fed("abSTxSTOPyz", ["STOP", "zzz"])
    assert seen == ["ab"[:1], "ab", "ab", "ab", "abSTx", "abSTx", "abSTx", "abSTx", "abSTx"]
    assert row.finished
    assert row.text == "abSTx"
    assert fed("ab12", ["2", "b1"])[1].text == "a"  # the first that is whole
    assert fed("P:STOP", ["P:S"])[1].text == ""  # in what is continued, not in the prompt
    assert fed("aST", ["STOP"], n_tokens=3)[0][-1] == "aST"  # nothing can come any more


@pytest.mark.parametrize("stop", [(), ("e", "\n\n")], ids=str)
def test_text_comes_piece_by_piece_and_is_the_whole(trained, stop):
    pieces, options = {0: [], 1: []}, Options(n_tokens=30, stop=stop)
    prompts = [trained("llama").prompt_ids(prompt) for prompt in PROMPTS[:2]]
    rows = continue_prompts(
        trained("llama").model, trained("llama").tokenizer, prompts, options, lambda i, text: pieces[i].append(text)
    )
    for number, row in enumerate(rows):
        assert "".join(pieces[number]) == row.text
        assert not any(text in row.text for text in stop)
    assert stop or len(pieces[0]) > 10


# -- Hugging Face folders ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    assert export.main([str(run_dir), "--output", str(folder)]) == 0
    return folder


def test_an_export_is_continued_as_its_run(run_dir, exported, capsys):
    """By its ids: what is no text, as an untrained model writes it, has another number of U+FFFD there."""
    ids = []
    for place in (run_dir, exported):
        found = load_trained(place, None)
        prompts = [found.prompt_ids(prompt) for prompt in PROMPTS]
        ids.append([row.ids for row in continue_prompts(found.model, found.tokenizer, prompts, Options(n_tokens=30))])
    assert ids[0] == ids[1]
    assert generate.main([str(exported), "--prompt", "def ", "--prompt", "x", "--tokens", "3"]) == 0
    first, *rest = capsys.readouterr().out.split("\nx")
    assert first.startswith("def ")
    assert rest


def test_one_prompt_is_shown_as_it_comes(run_dir):
    """In a process of its own, through a pipe: the prompt is there before the end."""
    command = [
        sys.executable,
        "launcher/generate.py",
        str(run_dir),
        "--prompt",
        "def ",
        "--tokens",
        "5",
        "--stop",
        "zz",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("def ")
    assert done.stdout.endswith("\n")


def test_a_folder_whose_tokenizer_begins_every_text(exported, tmp_path):
    """As a published Llama's does. A run's own ids have no such beginning, an export's neither."""
    folder = shutil.copytree(exported, tmp_path / "llama")
    tree = json.loads((folder / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps({**tree, "post_processor": template}))
    plain, begun = load_trained(exported, None), load_trained(folder, None)
    assert begun.prompt_ids("def ") == [1, *plain.prompt_ids("def ")]


@pytest.mark.parametrize(
    ("arguments", "spoil", "message"),
    [
        (["--step", "3"], None, "--step 3 is of a run's checkpoints; .* is a Hugging Face folder: leave it out"),
        ([], "config.json", "config.json: "),
        ([], "model.safetensors", "model.safetensors cannot be read: "),
        ([], "tokenizer.json", "cannot be read as a Hugging Face tokenizer"),
    ],
)
def test_folders_that_cannot_be_used(exported, tmp_path, capsys, arguments, spoil, message):
    import re

    folder = shutil.copytree(exported, tmp_path / "copy")
    if spoil:
        (folder / spoil).write_bytes(b"{")
    assert generate.main([str(folder), "--prompt", "x", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_tokenizer_of_another_model_is_refused(exported, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    assert generate.main([str(folder), "--prompt", "x"]) == 2
    assert (
        "the tokenizer has 512 ids, config.json has vocab_size=500; they are not of one model"
        in capsys.readouterr().err
    )


@pytest.mark.fault(35)
def test_numbers_that_break_are_reported_and_end_the_run(corpus, tmp_path):
    """A learning rate that throws the weights to 1e30: the second step breaks."""
    recipe = write_recipe(tmp_path, corpus)
    changes = (
        "optim.lr=1e30",
        "optim.warmup_steps=0",
        "train.bad_steps.max_skipped_in_a_row=3",
        "parallel.zero_stage=0",
    )
    text = run(torchrun(2, "--config", recipe, *changes), tmp_path / "log", code=None)
    assert "step 2 is bad (not_finite), update skipped: its loss is " in text
    assert "[rank 1] step 2 is bad (not_finite), update skipped" in text
    assert "documents of text/train-" in text
    assert "3 updates in a row were skipped, up to step 4, the last one because its loss is " in text
    ledger = [json.loads(line) for line in (tmp_path / "runs/test/ledger.jsonl").read_text().splitlines()]
    assert ledger[-1]["event"] == "failed"
    assert not (tmp_path / "runs/test/checkpoints").exists()
