"""launcher/checkpoint.py: what it says of whole and damaged checkpoints, and that it removes no more than asked."""

import pytest

from launcher.checkpoint import main
from launcher.lease import sole_writer
from parallel.checkpoint import committed_steps
from ranks import LoneEngine, save


@pytest.fixture
def run_dir(tmp_path):
    """A run with checkpoints of steps 1 to 6."""
    for step in range(1, 7):
        save(tmp_path / "checkpoints", LoneEngine(), step)
    return tmp_path


def command(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out + out.err


def damage(run_dir, step):
    path = run_dir / f"checkpoints/step-0000000{step}/rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_list(run_dir, capsys):
    (run_dir / "checkpoints/step-00000007.0a1b2c3d.staging").mkdir()
    (run_dir / "checkpoints/step-00000002/manifest.json").unlink()
    (run_dir / "checkpoints/step-00000003/manifest.json").write_text("{")
    code, text = command(capsys, "list", run_dir)
    assert code == 0
    assert "step-00000001  0.000 GB  1 files of 1 ranks  ZeRO 1  ?  0 tokens or other targets" in text
    assert "step-00000003  DAMAGED: " in text
    assert "step-00000002  0.000 GB  no checkpoint: its manifest is gone: its removal was begun" in text
    assert (
        "step-00000007.0a1b2c3d.staging  0.000 GB  no checkpoint: being written, or left by a save that was killed"
        in text
    )
    assert "5 checkpoints; " in text


def test_verify_names_what_is_damaged(run_dir, capsys):
    assert command(capsys, "verify", run_dir) == (0, "".join(f"step-0000000{step}  whole\n" for step in range(1, 7)))
    damage(run_dir, 4)
    code, text = command(capsys, "verify", run_dir)
    assert code == 1
    assert "step-00000004  DAMAGED\n    " in text
    assert "rank-00000.safetensors: xxh3" in text
    assert command(capsys, "verify", run_dir, "--step", 5) == (0, "step-00000005  whole\n")
    assert command(capsys, "verify", run_dir, "--step", 9)[0] == 2


def test_prune_keeps_what_is_asked_and_the_newest_whole_one(run_dir, capsys):
    damage(run_dir, 5)
    damage(run_dir, 6)
    (run_dir / "checkpoints/step-00000009.0a1b2c3d.staging").mkdir()
    code, text = command(capsys, "prune", run_dir, "--keep", 1, "--keep-every", 3, "--damaged", "--dry-run")
    assert code == 0
    assert "would remove step-00000001\nwould remove step-00000002\nwould remove step-00000005\n" in text
    assert committed_steps(run_dir / "checkpoints") == [1, 2, 3, 4, 5, 6]
    code, text = command(capsys, "prune", run_dir, "--keep", 1, "--keep-every", 3, "--damaged")
    assert code == 0
    assert committed_steps(run_dir / "checkpoints") == [3, 4, 6]  # 3 and 6 were asked for, 4 is the newest whole one
    assert text.endswith(
        "removed step-00000009.0a1b2c3d.staging: being written, or left by a save that was killed\n3 checkpoints stay\n"
    )


def test_prune_removes_nothing_where_none_is_whole(run_dir, capsys):
    for step in range(1, 7):
        damage(run_dir, step)
    code, text = command(capsys, "prune", run_dir, "--keep", 1)
    assert code == 2
    assert f"none of the checkpoints in {run_dir}/checkpoints is whole; nothing is removed" in text
    assert committed_steps(run_dir / "checkpoints") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("more", "match"), [(["--keep", 0], "--keep 0 --keep-every None; expected at least 1")])
def test_refusals(run_dir, capsys, more, match):
    code, text = command(capsys, "prune", run_dir, *more)
    assert code == 2
    assert match in text
    code, text = command(capsys, "list", run_dir / "other")
    assert code == 2
    assert "other/checkpoints is not there; name the folder of a run that has saved" in text


def test_prune_leaves_a_run_in_use_alone(run_dir, capsys):
    with sole_writer(run_dir):
        code, text = command(capsys, "prune", run_dir, "--keep", 1)
    assert code == 2
    assert "is in use by another job" in text
    assert committed_steps(run_dir / "checkpoints") == [1, 2, 3, 4, 5, 6]
