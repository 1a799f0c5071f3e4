"""The checkpoint format: any topology in, whole or absent, verified, never stuck, nothing pickled."""

import json
import logging
import os
import shutil
import threading

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file

import parallel.checkpoint as module
from parallel.checkpoint import (
    CheckpointError,
    CheckpointReader,
    UnreadableError,
    body_hash,
    committed_steps,
    faults,
    newest_good,
)
from parallel.config import ParallelConfig
from parallel.state import KINDS
from ranks import ACCUM, BATCH, MODEL, Alone, build, run_ranks, run_steps, save, whole_state

WORLDS, STAGES = (1, 2, 3, 4), (0, 1, 2, 3)
TOPOLOGIES = [(stage, ranks) for ranks in WORLDS for stage in STAGES]
# Sizes that neither 2, 3 nor 4 divides, so that partitions are padded, and norms of heads with fewer elements than ranks.
ODD = MODEL.model_copy(update={"d_model": 107, "d_ff": 149, "head_dim": 2})


def accum_of(mesh):
    """Micro-batches a rank: two where the batch of 12 divides so."""
    return ACCUM if BATCH % (ACCUM * mesh.dp_size) == 0 else 1


def stages_of(precision):
    """Those that it can have. torch computes in fp16 on any CPU; DeepSpeed asks whether that is fast, and refuses it."""
    if precision != "fp16":
        return STAGES
    get_accelerator().is_fp16_supported = lambda: True
    return STAGES[1:]


def write_each_stage(mesh, folder, precision):
    """A checkpoint after 2 steps for each stage: its state, and how the run went on."""
    results = {}
    for stage in stages_of(precision):
        engine = build(mesh, ParallelConfig(zero_stage=stage, precision=precision), ODD, accum_of(mesh))
        run_steps(engine, range(2), accum_of(mesh))
        save(folder / f"z{stage}w{mesh.world_size}", engine, 2)
        results[stage] = whole_state(engine), run_steps(engine, range(2, 4), accum_of(mesh))
        engine.close()
    return results


def read_each(mesh, folder, sources, precision):
    """Each source's checkpoint read at each stage, by one engine after another: the state then, and how the run goes on."""
    results = {}
    for stage in stages_of(precision):
        engine = build(mesh, ParallelConfig(zero_stage=stage, precision=precision), ODD, accum_of(mesh))
        for source_stage, source_ranks in sources:
            reader = newest_good(folder / f"z{source_stage}w{source_ranks}", mesh)
            reader.check_shapes(engine.shapes)
            engine.load_state(reader, reader.manifest.adam_steps, reader.manifest.loss_scaler)
            state = whole_state(engine) if mesh.rank == 0 else whole_state(engine).clear()
            results[stage, source_stage, source_ranks] = (
                state,
                engine.adam_steps,
                run_steps(engine, range(2, 4), accum_of(mesh)),
            )
        engine.close()
    return results


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """Every topology written, every one read at every other."""
    folder = tmp_path_factory.mktemp("topologies")
    written, read = {}, {}
    for ranks in WORLDS:
        for stage, result in run_ranks(ranks, write_each_stage, folder, "fp32")[0].items():
            written[stage, ranks] = result
    for ranks in WORLDS:
        read[ranks] = run_ranks(ranks, read_each, folder, TOPOLOGIES, "fp32")[0]
    return written, read


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TOPOLOGIES, ids=lambda t: f"to-z{t[0]}w{t[1]}")
@pytest.mark.parametrize("source", TOPOLOGIES, ids=lambda t: f"from-z{t[0]}w{t[1]}")
def test_any_topology_reads_any(matrix, source, target):
    """Weights and moments to the last bit. An engine that has loaded and trained before is as good as a new one."""
    written, read = matrix
    state, continued = written[source]
    loaded, adam_steps, losses = read[target[1]][target[0], *source]
    assert adam_steps == 2
    assert loaded.keys() == state.keys()
    for key in state:
        assert torch.equal(loaded[key], state[key]), key
    if source == target:
        assert losses == continued  # to the last bit
    else:  # 1e-5: ranks and stages add up gradients in another order
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(continued), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_table_of_topologies(matrix, capsys):
    """With -s: the largest relative difference of the two losses after the load, source by target; none where equal."""
    written, read = matrix
    lines = ["from \\ to " + " ".join(f"  z{stage}w{ranks}" for stage, ranks in TOPOLOGIES)]
    for source in TOPOLOGIES:
        row = []
        for stage, ranks in TOPOLOGIES:
            pairs = zip(read[ranks][stage, *source][2], written[source][1], strict=True)
            row.append(max(abs(a[0] - b[0]) / b[0] for a, b in pairs))
        lines.append(f"z{source[0]}w{source[1]}      " + " ".join("     =" if not x else f"{x:.0e}" for x in row))
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert len(lines) == 17


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written_in", "read_in"),
    [("bf16", "fp32"), pytest.param("fp32", "bf16", marks=pytest.mark.fault(39)), ("fp16", "bf16"), ("fp32", "fp16")],
)
def test_a_checkpoint_is_read_in_another_precision(written_in, read_in, tmp_path):
    """The format holds fp32 whatever the run computes in."""
    written = run_ranks(2, write_each_stage, tmp_path, written_in)[0]
    read = run_ranks(2, read_each, tmp_path, [(stage, 2) for stage in written], read_in)[0]
    assert len(read) == len(written) * (3 if read_in == "fp16" else 4)
    for (_, source, _), (loaded, adam_steps, losses) in read.items():
        state, continued = written[source]
        steps = CheckpointReader(tmp_path / f"z{source}w2/step-00000002").manifest.adam_steps
        assert adam_steps == steps
        assert steps == 2 or written_in == "fp16"  # whose first updates are left out until the loss scale has come down
        for key in state:
            assert torch.equal(loaded[key], state[key]), key
        # bf16 keeps 8 bits: products are off by 0.4 %, the mean of a batch's losses by less
        assert losses[0][0] == pytest.approx(continued[0][0], rel=1e-2)
        assert losses[0][0] != continued[0][0]


def two_checkpoints(mesh, folder):
    """Steps 1 and 2 of one run."""
    engine = build(mesh, ParallelConfig(zero_stage=1))
    for step in (1, 2):
        run_steps(engine, range(step - 1, step))
        save(folder, engine, step)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_ranks(2, two_checkpoints, folder)
    return folder


@pytest.fixture
def checkpoints(original, tmp_path):
    shutil.copytree(original, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def edit(folder, rehash=False, **changes):
    """Change a manifest; with rehash, as somebody who knows the format would."""
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    if rehash:
        manifest.pop("xxh3")
        manifest["xxh3"] = body_hash(manifest)
    path.write_text(json.dumps(manifest))


def test_a_good_checkpoint_has_no_faults(checkpoints):
    assert committed_steps(checkpoints) == [1, 2]
    assert faults(checkpoints / "step-00000002") == []
    assert newest_good(checkpoints, Alone()).manifest.step == 2
    assert not list(checkpoints.glob("*.staging"))
    assert (checkpoints / "latest").read_text() == "step-00000002\n"


def files_opened(mesh, folder, stages):
    """What this rank had to open to load at each stage what ranks of the same world had written, and how the run goes on."""
    opened = {}
    for stage in stages:
        engine = build(mesh, ParallelConfig(zero_stage=stage), ODD)
        run_steps(engine, range(1))
        save(folder / f"z{stage}", engine, 1)
        continued = run_steps(engine, range(1, 2))
        reader = newest_good(folder / f"z{stage}", mesh)
        engine.load_state(reader, 1)
        assert run_steps(engine, range(1, 2)) == continued
        opened[stage] = sorted(reader._files)
        engine.close()
    return opened


@pytest.mark.slow
def test_ranks_of_the_same_world_open_their_own_file_alone(tmp_path, monkeypatch):
    """Else each of W ranks would open W files. With connections made at the first word, as many ranks have them."""
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")
    for rank, opened in enumerate(run_ranks(2, files_opened, tmp_path, (1, 3))):
        assert opened == {stage: [f"rank-{rank:05d}.safetensors"] for stage in (1, 3)}


def test_a_reader_opens_what_its_own_file_lacks(checkpoints):
    path = checkpoints / "step-00000002"
    every, few = CheckpointReader(path), CheckpointReader(path, own="rank-00001.safetensors")
    assert (len(every._files), len(few._files)) == (2, 1)
    for name in every.manifest.shapes:
        assert torch.equal(few.tensor(name), every.tensor(name))
    assert few._files.keys() == every._files.keys()
    assert len(CheckpointReader(path, own="rank-00007.safetensors")._files) == 2  # of a world that has grown


def test_every_element_is_in_exactly_one_file(checkpoints):
    reader = CheckpointReader(checkpoints / "step-00000002")
    covered = 0
    for name, shape in reader.manifest.shapes.items():
        for kind in KINDS:
            spans = reader._spans[name, kind]
            assert spans[0][0] == 0
            assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
            covered += spans[-1][1]
            assert spans[-1][1] == torch.Size(shape).numel()
    sizes = sum((reader.path / name).stat().st_size for name in reader.manifest.files)
    assert covered * 4 <= sizes <= covered * 4 + 100_000


@pytest.mark.parametrize("where", [0, 7, 100, 0.5, -1])
@pytest.mark.fault(12)
def test_a_truncated_shard_is_found(checkpoints, where):
    file = checkpoints / "step-00000002/rank-00001.safetensors"
    size = file.stat().st_size
    os.truncate(file, int(where * size) if isinstance(where, float) else where % size if where < 0 else where)
    assert "bytes, the manifest says" in faults(file.parent)[0]
    assert newest_good(checkpoints, Alone()).manifest.step == 1


@pytest.mark.parametrize("where", [3, 0.3, 0.6, 0.99])
@pytest.mark.fault(13)
def test_a_flipped_bit_is_found(checkpoints, where, caplog):
    file = checkpoints / "step-00000002/rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[int(where * len(data)) if isinstance(where, float) else where] ^= 4
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert newest_good(checkpoints, Alone()).manifest.step == 1
    assert "step-00000002 is damaged and set aside" in caplog.text
    assert "rank-00000.safetensors: xxh3" in caplog.text
    assert (checkpoints / "step-00000002.damaged").is_dir()
    assert committed_steps(checkpoints) == [1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "rank-00001.safetensors").unlink(), "No such file"),
        (lambda p: (p / "manifest.json").write_text("{"), "JSONDecodeError"),
        (lambda p: (p / "manifest.json").write_text("[" * 100_000), "RecursionError"),
        (lambda p: edit(p, format_version=9), "format version 9, this program reads 1"),  # one bit of it, and no hash
        (lambda p: (p / "manifest.json").write_text('{"format_version": 1}'), "its own xxh3 differs"),
        (lambda p: edit(p, files={}), "its own xxh3 differs"),
        (lambda p: edit(p, step=3), "its own xxh3 differs"),
        (lambda p: edit(p, step=3, rehash=True), "is of step 3, its folder is step-00000002"),
        (lambda p: edit(p, new=3, rehash=True), "TypeError"),
    ],
)
@pytest.mark.fault(13, 14)
def test_other_damage_is_found_and_the_one_before_is_used(checkpoints, damage, message, caplog):
    damage(checkpoints / "step-00000002")
    assert message in faults(checkpoints / "step-00000002")[0]
    assert newest_good(checkpoints, Alone()).manifest.step == 1


@pytest.mark.fault(51)
def test_a_manifest_that_points_outside_is_refused(checkpoints):
    path = checkpoints / "step-00000002"
    edit(path, files={"../step-00000001/rank-00000.safetensors": {"bytes": 1, "xxh3": "0"}}, rehash=True)
    assert "which is not a file beside it" in faults(path)[0]


@pytest.mark.fault(16)
def test_no_good_checkpoint_stops_and_goes_on_stopping(checkpoints):
    for step in (1, 2):
        (checkpoints / f"step-0000000{step}/rank-00000.safetensors").unlink()
    for _ in range(2):  # the second time all are set aside: still no fresh start
        with pytest.raises(
            CheckpointError, match="has checkpoints but none that is whole .*start a new run under another"
        ):
            newest_good(checkpoints, Alone())


@pytest.mark.fault(6, 16)
def test_checkpoints_without_manifests_are_no_fresh_run_either(checkpoints):
    for step in (1, 2):
        (checkpoints / f"step-0000000{step}/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none that is whole .damaged: step-00000001, step-00000002."):
        newest_good(checkpoints, Alone())


def test_one_that_was_being_replaced_is_used(checkpoints, caplog):
    """A process that ends between the two renames of such a save leaves the old one under its third name alone."""
    shutil.rmtree(checkpoints / "step-00000001")
    (checkpoints / "step-00000002").rename(checkpoints / "step-00000002.replaced")
    assert newest_good(checkpoints, Alone()).manifest.step == 2
    assert "had been moved aside by a save that was killed; it is step-00000002 again" in caplog.text


def test_one_that_has_been_replaced_stays_aside(checkpoints):
    shutil.copytree(checkpoints / "step-00000001", checkpoints / "step-00000001.replaced")
    shutil.rmtree(checkpoints / "step-00000002")
    assert newest_good(checkpoints, Alone()).manifest.step == 1
    assert (checkpoints / "step-00000001.replaced").is_dir()


STALE = OSError(116, "Stale file handle")


@pytest.mark.parametrize("where", ["file_hash", "read_text", "safe_open"])
@pytest.mark.fault(16)
def test_what_cannot_be_looked_at_is_not_damaged(checkpoints, where, monkeypatch):
    """A mount that is stale on one machine, or a limit of open files: all good checkpoints would be set aside for it."""

    def stale(*_, **__):
        raise STALE

    owner = {"file_hash": module, "read_text": module.Path, "safe_open": module.safetensors}[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, stale)
        with pytest.raises(UnreadableError, match=r"rank 0.*: .*step-00000002/.*Stale file handle"):
            newest_good(checkpoints, Alone())
    assert committed_steps(checkpoints) == [1, 2]
    assert newest_good(checkpoints, Alone()).manifest.step == 2


def test_a_checkpoint_of_a_later_program_is_not_damaged(checkpoints):
    edit(checkpoints / "step-00000002", format_version=2, rehash=True)
    with pytest.raises(UnreadableError, match="format version 2, this program reads 1; use the Longhaul that wrote it"):
        newest_good(checkpoints, Alone())
    assert committed_steps(checkpoints) == [1, 2]


def test_no_checkpoint_at_all_is_a_fresh_run(tmp_path):
    assert newest_good(tmp_path / "none", Alone()) is None


@pytest.mark.parametrize("content", ["", "garbage\n", "step-00000009\n", "../../etc\n", "step-00000001\n"])
@pytest.mark.fault(15)
def test_latest_is_only_a_hint(checkpoints, content, caplog):
    (checkpoints / "latest").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert newest_good(checkpoints, Alone()).manifest.step == 2
    assert "the newest committed checkpoint is step-00000002" in caplog.text


def make_link(latest, outside):
    latest.symlink_to(outside / "secret")


def make_fifo(latest, _):
    os.mkfifo(latest)


@pytest.mark.parametrize(
    "make", [make_link, make_fifo, lambda latest, _: latest.mkdir()], ids=["link", "fifo", "folder"]
)
@pytest.mark.fault(15)
def test_latest_that_is_no_file_is_not_followed(checkpoints, tmp_path, make, caplog):
    (tmp_path / "secret").write_text("step-00000001\n")
    (checkpoints / "latest").unlink()
    make(checkpoints / "latest", tmp_path)
    with caplog.at_level(logging.WARNING):
        assert newest_good(checkpoints, Alone()).manifest.step == 2
    assert "the newest committed checkpoint is step-00000002" in caplog.text or "going by the folders" in caplog.text
    assert "step-00000001" not in caplog.text  # what the link leads to


@pytest.mark.fault(14)
def test_a_stale_shard_besides_is_named_and_not_read(checkpoints, caplog):
    """Left by a save of more ranks, say: it has other values for elements that the manifest's files hold."""
    path = checkpoints / "step-00000002"
    before = CheckpointReader(path).tensor("embed.weight")
    stale = {f"weight:embed.weight:{start}": torch.full((7,), 9.0) for start in (0, 7)}
    save_file(stale, path / "rank-00007.safetensors")
    with caplog.at_level(logging.WARNING):
        reader = newest_good(checkpoints, Alone())
    assert reader.manifest.step == 2
    assert f"{path} holds what its manifest does not name, and is not read: rank-00007.safetensors" in caplog.text
    assert torch.equal(reader.tensor("embed.weight"), before)


class Second(Alone):
    """The second of two ranks, whose first sees everything."""

    rank, world_size = 1, 2

    def __init__(self, *of_rank_0):
        self.of_rank_0 = list(of_rank_0)

    def broadcast(self, _):
        return self.of_rank_0.pop(0)

    def gather(self, value):
        """Rank 0 has nothing to tell."""
        match value:
            case (str(), _):  # what it does not see
                return [("first", []), value]
            case (list(), _):  # what it finds wrong, and why it cannot tell
                return [([], ""), value]
        return ["", value]


@pytest.mark.fault(21)
def test_what_another_machine_sees_already_is_waited_for(checkpoints, monkeypatch, caplog):
    """A checkpoint that a rank sees late, in part or never is not damaged, and no other is used in its place."""
    shard, away = checkpoints / "step-00000002/rank-00001.safetensors", checkpoints / "away"
    names = {"manifest.json", "rank-00000.safetensors", shard.name}
    shard.rename(away)
    threading.Timer(0.5, away.rename, [shard]).start()
    assert newest_good(checkpoints, Second([1, 2], [], names)).manifest.step == 2
    assert "step-00000002 is not seen whole on this machine yet; waiting for it up to 60 s" in caplog.text
    shard.rename(away)
    monkeypatch.setattr(module, "SEEN_S", 0.3)
    with pytest.raises(
        CheckpointError, match=r"rank 1 on \S+ does not see .*rank-00001.safetensors, which rank 0 sees; is"
    ):
        newest_good(checkpoints, Second([1, 2], [], names))
    assert committed_steps(checkpoints) == [1, 2]


@pytest.mark.fault(6)
def test_a_half_deleted_or_staged_folder_is_no_checkpoint(checkpoints):
    (checkpoints / "step-00000002/manifest.json").unlink()
    (checkpoints / "step-00000003.0a1b2c3d.staging").mkdir()
    (checkpoints / "step-00000004").mkdir()
    assert committed_steps(checkpoints) == [1]
    assert newest_good(checkpoints, Alone()).manifest.step == 1


def test_a_checkpoint_of_another_model_is_named(checkpoints):
    reader = CheckpointReader(checkpoints / "step-00000002")
    shapes = {name: tuple(shape) for name, shape in reader.manifest.shapes.items()}
    first = next(iter(shapes))
    with pytest.raises(
        CheckpointError, match=rf"is of another model: it lacks \['new'\]; has {first} as .* the model as \(3,\)"
    ):
        reader.check_shapes({**shapes, "new": (1,), first: (3,)})


def test_a_missing_range_is_named(checkpoints):
    reader = CheckpointReader(checkpoints / "step-00000002")
    with pytest.raises(CheckpointError, match="lacks elements 0 to 5 of the weight of nothing; it has none"):
        reader.read("nothing", "weight", 0, 5)


def test_nothing_in_a_checkpoint_is_pickled(checkpoints):
    for path in checkpoints.rglob("*"):
        if path.is_file():
            assert path.suffix in (".safetensors", ".json") or path.name == "latest", path


class BrokenOnRank1:
    """A checkpoint that one machine cannot read to its end."""

    def __init__(self, rank):
        self.rank = rank

    def read(self, name, kind, start, stop):
        if self.rank == 1 and kind == "exp_avg_sq":
            raise STALE
        return torch.zeros(stop - start)


def load_broken(mesh):
    engine = build(mesh, ParallelConfig(zero_stage=3, precision="fp32"))
    try:
        engine.load_state(BrokenOnRank1(mesh.rank), 0)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()


@pytest.mark.slow
def test_a_rank_that_cannot_read_its_part_leaves_no_other_waiting():
    assert run_ranks(2, load_broken) == ["rank 1: [Errno 116] Stale file handle"] * 2
