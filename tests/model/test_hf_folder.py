"""A Hugging Face folder: what is written is what transformers reads and what we read back, in little memory."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hf import CASES, EVERY_CASE, assert_same, build_hf, gpt2, llama, ours_from, qwen3
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from model import hf_tensors as module
from model.hf import from_hf_config, to_hf_state
from model.hf_folder import (
    DTYPES,
    INDEX,
    WEIGHTS,
    logits_of_transformers,
    plan_files,
    read_config,
    read_model,
    write_configs,
    write_weights,
)
from model.transformer import Transformer

IDS = {"bos_id": 2, "eos_id": 2, "pad_id": 0}


def reader_of(model):
    parameters = dict(model.named_parameters())
    return lambda name, start, stop: parameters[name].detach().flatten()[start:stop]


def write(model, folder, dtype=torch.float32, shard_bytes=10**9, cfg=None):
    folder.mkdir()
    cfg = cfg or model.cfg
    write_weights(folder, plan_files(cfg, dtype, shard_bytes), reader_of(model))
    write_configs(folder, cfg, dtype, **IDS, n_known=cfg.vocab_size)
    return folder


def tokens_of(cfg, seed=1):
    return torch.randint(0, cfg.vocab_size, (33,), generator=torch.Generator().manual_seed(seed))


@EVERY_CASE
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_what_the_bridge_says_to_the_bit(case, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 100)  # so that each tensor takes several blocks
    model = ours_from(build_hf(CASES[case]()))
    write(model, tmp_path / "hf", DTYPES[dtype])
    found = load_file(tmp_path / "hf" / WEIGHTS)
    expected = to_hf_state(model.cfg, model.state_dict())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(DTYPES[dtype])), name


@EVERY_CASE
def test_transformers_and_we_read_it(case, tmp_path):
    model = ours_from(build_hf(CASES[case]())).eval()
    folder = write(model, tmp_path / "hf", shard_bytes=20_000)
    assert (folder / INDEX).exists()
    window = tokens_of(model.cfg)
    with torch.inference_mode():
        expected = model(window.unsqueeze(0))[0]
        assert_same(logits_of_transformers(folder, [window])[0], expected, "logits there")
        assert read_config(folder).model_dump(exclude={"scale_residual_init"}) == model.cfg.model_dump(
            exclude={"scale_residual_init"}
        )
        assert torch.equal(read_model(folder, read_config(folder))(window.unsqueeze(0))[0], expected)


@EVERY_CASE
def test_a_folder_of_theirs_is_read(case, tmp_path):
    theirs = build_hf(CASES[case]())
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    model = read_model(tmp_path, read_config(tmp_path))
    assert model.head.weight is model.embed.weight or not model.cfg.tie_embeddings
    window = tokens_of(model.cfg)
    with torch.inference_mode():
        assert_same(model(window.unsqueeze(0))[0], theirs(window.unsqueeze(0)).logits[0], "logits")


def test_read_in_another_dtype(tmp_path):
    model = ours_from(build_hf(gpt2()))
    folder = write(model, tmp_path / "hf")
    assert {p.dtype for p in read_model(folder, model.cfg, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_shards_hold_at_most_what_was_asked(tmp_path):
    model = ours_from(build_hf(llama()))
    folder = write(model, tmp_path / "hf", shard_bytes=15_000)
    index = json.loads((folder / INDEX).read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    total = 0
    for name in files:
        tensors = load_file(folder / name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 15_000
        assert {key for key, file in index["weight_map"].items() if file == name} == tensors.keys()
    assert index["metadata"] == {"total_size": total, "total_parameters": model.cfg.n_params}


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    model = ours_from(build_hf(llama()))
    folder = write(model, tmp_path / "hf", shard_bytes=1)
    index = json.loads((folder / INDEX).read_text())
    assert len(set(index["weight_map"].values())) == len(index["weight_map"])
    assert len(AutoModelForCausalLM.from_pretrained(folder).state_dict()) == len(index["weight_map"])


@pytest.mark.parametrize("make", [gpt2, llama, qwen3])
def test_rows_that_no_token_has_are_cut(make, tmp_path):
    model = ours_from(build_hf(make()))
    cut = model.cfg.model_copy(update={"vocab_size": 64})
    folder = write(model, tmp_path / "hf", cfg=cut)
    window = tokens_of(cut)
    with torch.inference_mode():
        assert_same(
            logits_of_transformers(folder, [window])[0], model(window.unsqueeze(0))[0, :, :64], "logits of the rest"
        )


def test_configs_say_what_a_user_of_transformers_reads(tmp_path):
    cfg = from_hf_config(llama())
    assert write_configs(tmp_path, cfg, torch.bfloat16, **IDS, n_known=64) == "LlamaForCausalLM"
    config, generation = AutoConfig.from_pretrained(tmp_path), GenerationConfig.from_pretrained(tmp_path)
    for found in (config, generation):
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (2, 2, 0)
    assert config.dtype == torch.bfloat16
    assert generation.suppress_tokens == list(range(64, 71))
    write_configs(tmp_path, cfg, torch.bfloat16, **IDS, n_known=71)
    assert GenerationConfig.from_pretrained(tmp_path).suppress_tokens is None


def rss_anon():
    """Bytes of this process's memory that are no file's."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@pytest.mark.parametrize(("make", "allowed_mib"), [(llama, 40), (gpt2, 40 + 64)])
def test_memory_does_not_grow_with_the_model(make, allowed_mib, tmp_path):
    """250 MiB of weights: some blocks of 4 MiB, and of GPT-2 the largest tensor (64 MiB in fp32), which is turned."""
    names = {"n_embd": 1024, "n_inner": 16384} if make is gpt2 else {"hidden_size": 1024, "intermediate_size": 10240}
    cfg = from_hf_config(make(**names))
    files = plan_files(cfg, torch.float32, 10**9)
    assert sum(entry.n_bytes for entry in files[WEIGHTS]) > 250 * 2**20
    block, peaks = torch.ones(module.BLOCK), []

    def read(name, start, stop):
        peaks.append(rss_anon())
        return block[: stop - start].clone()

    before = rss_anon()
    write_weights(tmp_path, files, read)
    assert len(peaks) > 20
    grown_mib = (max(peaks) - before) / 2**20
    assert grown_mib < allowed_mib


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_a_dtype_cannot_hold_is_refused(tmp_path):
    model = ours_from(build_hf(llama()))
    with torch.no_grad():
        model.blocks[1].mlp.w_up.weight[3, 4] = -1e5
    with pytest.raises(ValueError, match=r"blocks.1.mlp.w_up.weight holds 1e\+05, and torch.float16 ends at 6.55e\+04"):
        write(model, tmp_path / "hf", torch.float16)


def test_a_model_without_an_equal_is_refused():
    cfg = from_hf_config(llama()).model_copy(update={"norm": "layernorm"})
    with pytest.raises(ValueError, match="no Hugging Face architecture equals this model; the nearest is Llama"):
        plan_files(cfg, torch.float32, 1)


def another(folder, kind):
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config.json: \[Errno 2\] No such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: Expecting property name"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: 'list' object has no attribute 'get'"),
        (lambda f: another(f, "roberta"), "model_type 'roberta' has no equal here; expected gpt2, llama, qwen3, bert"),
        (
            lambda f: another(f, "bert"),
            r"its weights do not match its config: missing (bert\.\S+, ){2}bert\.\S+ and \d+ more, unexpected",
        ),
        (lambda f: (f / WEIGHTS).write_bytes(b"short"), "model.safetensors cannot be read: .*; fetch or export"),
        (
            lambda f: (f / WEIGHTS).unlink(),
            r"has no weights, neither model.safetensors nor model.safetensors.index.json; fetch the folder whole",
        ),
        (
            lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
            "pytorch_model.bin may hold pickled code and is never loaded: convert it",
        ),
        (lambda f: shutil.move(f / WEIGHTS, f / INDEX), "index.json is damaged"),
    ],
)
def test_broken_folders_are_refused(spoil, message, tmp_path):
    folder = write(ours_from(build_hf(llama())), tmp_path / "hf")
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        read_model(folder, read_config(folder))


def test_an_index_that_leads_elsewhere_is_refused(tmp_path):
    folder = write(ours_from(build_hf(llama())), tmp_path / "hf")
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(ValueError, match=r"names '../secret.safetensors', which is not a file beside it"):
        read_model(folder, read_config(folder))


def test_weights_of_another_model_are_refused(tmp_path):
    folder = write(ours_from(build_hf(llama())), tmp_path / "hf")
    tensors = load_file(folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"{folder}: the Hugging Face Qwen3 state does not match .*missing"):
        read_model(folder, from_hf_config(qwen3(tie_word_embeddings=False)))
    with pytest.raises(ValueError, match=rf"{folder}: size mismatch for embed.weight: \(71, 32\)"):
        read_model(folder, from_hf_config(llama(vocab_size=72)))
    save_file({**tensors, "extra": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"unexpected \['extra'\]"):
        read_model(folder, read_config(folder))


def test_a_head_for_labels_is_named(tmp_path):
    folder = write(ours_from(build_hf(llama())), tmp_path / "hf")
    tensors = load_file(folder / WEIGHTS)
    tensors["score.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"has a head for labels \(score.weight\), and a language model is expected here; name the one",
    ):
        read_model(folder, read_config(folder))


def test_transformers_must_find_every_tensor(tmp_path):
    """It would draw what is missing at random, and only warn."""
    folder = write(ours_from(build_hf(llama())), tmp_path / "hf")
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not take the folder .* as it is: .*missing_keys.*model.norm.weight"):
        logits_of_transformers(folder, [torch.tensor([1])])


def test_meta_parameters_leave_none_behind(tmp_path):
    model = read_model(write(ours_from(build_hf(qwen3())), tmp_path / "hf"), from_hf_config(qwen3()))
    assert isinstance(model, Transformer)
    assert not any(p.is_meta for p in model.parameters())
    assert not model.training
