"""Matrices as int8: the numbers, the layout that compressed-tensors reads, and how much memory the writing takes."""

import re
import sys

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from test_hf import build_hf, gpt2, llama, ours_from, qwen3
from test_hf_model import config_of
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from model import hf_tensors, int8
from model.hf import from_hf_config
from model.hf_config import TESTED
from model.hf_folder import WEIGHTS, int8_weights, plan_files, write_configs, write_weights
from model.hf_model import HfModel

EXACT = torch.tensor([[127.0, -127, 1, 0, -64, 3], [0.5, -1.27, 0.01, 0.02, 0, 0], [0, 0, 0, 0, 0, 0]])


def test_what_is_a_multiple_of_the_scale_stays_as_it_is():
    q, scale = int8.quantize(EXACT[:1])
    assert (q.tolist(), scale.tolist()) == ([[127, -127, 1, 0, -64, 3]], [[1.0]])
    assert torch.equal(int8.round_trip(EXACT[[0, 2]]), EXACT[[0, 2]])
    assert int8.quantize(EXACT[2:])[1] == 1  # of zeros: nothing is divided by 0


def test_each_weight_is_within_half_a_step_of_its_row():
    weight = torch.randn(64, 130, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    q, scale = int8.quantize(weight)
    assert q.dtype == torch.int8
    assert q.abs().amax(1).float().mean() > 126.5  # the scale, rounded to bf16, makes 127 of the largest, or nearly
    off = (int8.round_trip(weight) - weight).abs() / scale.float()
    assert 0.49 < off.max() <= 0.5 + 1e-5
    assert torch.equal(int8.round_trip(weight).double(), q.double() * scale.double())


@pytest.mark.parametrize(("n_out", "n_in"), [(5, 6), (7, 32), (3, 33), (1, 1)])
def test_the_layout_is_theirs_in_whatever_blocks(n_out, n_in, monkeypatch):
    monkeypatch.setattr(int8, "BLOCK", 2 * n_in)
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(1))
    entries = int8.int8_entries("theirs.weight", "ours.weight", weight.shape)
    found = {e.name: torch.cat(list(e.blocks(lambda _, a, b: weight.flatten()[a:b]))).view(e.shape) for e in entries}
    assert {name: tensor.dtype for name, tensor in found.items()} == {e.name: e.dtype for e in entries}
    assert found["theirs.weight_shape"].tolist() == [n_out, n_in]
    unpacked = unpack_from_int32(found["theirs.weight_packed"], 8, weight.shape)
    q, scale = int8.quantize(weight)
    assert torch.equal(unpacked, q)
    assert torch.equal(found["theirs.weight_scale"], scale)
    assert sum(entry.n_params for entry in entries) == n_out * n_in


def test_each_tensor_begins_at_a_multiple_of_its_element():
    """As safetensors' own writer has it; rows of an odd number have scales that would shift what follows."""
    cfg = from_hf_config(llama(intermediate_size=33))
    for entries in plan_files(cfg, torch.bfloat16, 10**4, int8=int8_weights(cfg)).values():
        at = 0
        for entry in entries:
            assert at % entry.dtype.itemsize == 0, entry.name
            at += entry.n_bytes


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_number_is_refused(bad):
    weight = torch.ones(4, 4)
    weight[2, 1] = bad
    packed = int8.int8_entries("theirs", "blocks.0.attn.wq.weight", weight.shape)[0]
    with pytest.raises(
        ValueError, match=f"blocks.0.attn.wq.weight holds {bad}, which has no int8; choose another step"
    ):
        list(packed.blocks(lambda _, a, b: weight.flatten()[a:b]))


def rss_anon():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def test_memory_does_not_grow_with_the_model(tmp_path):
    """250 MiB of weights in fp32: some blocks of 4 MiB."""
    cfg = from_hf_config(llama(hidden_size=1024, intermediate_size=10240))
    files = plan_files(cfg, torch.bfloat16, 10**9, int8=int8_weights(cfg))
    block, peaks = torch.ones(hf_tensors.BLOCK), []

    def read(name, start, stop):
        peaks.append(rss_anon())
        return block[: stop - start].clone()

    before = rss_anon()
    write_weights(tmp_path, files, read)
    assert (tmp_path / WEIGHTS).stat().st_size > 60 * 2**20
    assert len(peaks) > 20
    assert (max(peaks) - before) / 2**20 < 64


# -- as transformers reads it ------------------------------------------------------------------------------------------


def write(model, folder, cfg):
    int8_names, parameters = int8_weights(cfg), dict(model.named_parameters())
    files = plan_files(cfg, torch.bfloat16, 10**5, int8=int8_names)
    write_weights(folder, files, lambda name, start, stop: parameters[name].detach().flatten()[start:stop])
    write_configs(folder, cfg, torch.bfloat16, 2, 2, 0, n_known=cfg.vocab_size, int8=int8_names)
    return int8_names


@pytest.mark.parametrize("kind", ["llama", "qwen3", *(kind for kind in TESTED["masked"] if kind != "modernbert")])
def test_transformers_computes_with_the_rounded_weights(kind, tmp_path):
    """Of the blocks all matrices and nothing else is int8; what transformers makes of the folder is what is said of it."""
    if kind in TESTED["masked"]:
        cfg = config_of("masked", kind)
        model = HfModel(cfg).init_weights(3).eval()
    else:
        model = ours_from(build_hf(llama() if kind == "llama" else qwen3()))
        cfg = model.cfg
    names = write(model, tmp_path, cfg)
    tokens = torch.randint(0, cfg.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(int8.round_trip(parameter) if name in names else parameter.to(torch.bfloat16))
        expected = model(tokens)
    auto = AutoModelForMaskedLM if kind in TESTED["masked"] else AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        found = theirs(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - before).abs().max() > 1e-4
    linear = {name for name, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name for name, module in theirs.named_modules() if hasattr(module, "quantization_scheme")}
    assert quantized == {name for name in linear if re.search(r"layers?\.\d+\.", name)}
    assert len(quantized) == len(names) > 0


@pytest.mark.parametrize("make", [llama, qwen3])
def test_the_matrices_of_the_blocks_are_meant(make):
    names = int8_weights(from_hf_config(make()))
    kinds = {re.sub(r"\d+", "*", name) for name in names}
    assert kinds == {f"blocks.*.attn.{name}.weight" for name in ("wq", "wk", "wv", "wo")} | {
        f"blocks.*.mlp.{name}.weight" for name in ("w_gate", "w_up", "w_down")
    }


def test_a_modernbert_is_refused():
    with pytest.raises(
        ValueError, match="transformers loads no ModernBERT with int8 layers; export it with --dtype bf16"
    ):
        int8_weights(config_of("masked", "modernbert"))


def test_gpt2_is_refused_whoever_builds_it():
    for cfg in (from_hf_config(gpt2()), config_of("causal", "gpt2")):
        with pytest.raises(
            ValueError, match="--dtype int8 is for linear layers, and GPT-2's are Conv1D .*--dtype bf16"
        ):
            int8_weights(cfg)


def test_without_the_package_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(
        ValueError,
        match=r"--dtype int8 needs compressed-tensors \(.*\); run: pip install -c constraints.txt -e '.\[int8\]'",
    ):
        int8.require_package()
