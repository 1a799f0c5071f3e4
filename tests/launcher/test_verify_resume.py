"""The command that proves a resume: on real runs of every recipe, on planted differences, and what it refuses."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from task_runs import make_origin, write_lines
from task_runs import write_recipe as write_task_recipe

from launcher import verify_resume
from launcher.config import load_config
from launcher.verify_resume import MARKER, Start, VerifyError, main, scratch_folder
from runs import ROOT, environment, write_recipe

STEPS = 8
# Masked models need a corpus of their own: tests/launcher/test_masked_run.py resumes one.
RECIPES = [path for path in sorted(Path("configs").glob("*.yaml")) if "family: hf" not in path.read_text()]

# Stands before launcher/pretrain.py in --launch and does not train: it writes a run's files as `act` says.
FAKE = """
import json, os, sys, time
from pathlib import Path
given = dict(word.split("=", 1) for word in sys.argv if "=" in word)
run = Path(json.loads(given["run.folder"])) / given["run.name"]
steps, again = int(given["train.stop_at"]), run.exists()
def log(step):
    with open(run / "metrics.jsonl", "a") as file:
        print(json.dumps({"step": step, "loss/train": 1.0}), file=file)
def tell(**event):
    with open(run / "ledger.jsonl", "a") as file:
        print(json.dumps(event), file=file)
def save(step):
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
"""


def fake(tmp_path, act):
    path = tmp_path / "fake.py"
    path.write_text(FAKE + act)
    return f"{sys.executable} {path}"


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, tmp_path / "corpus")


@pytest.fixture
def scratch(tmp_path):
    return tmp_path / "runs/test.verify-resume"


# -- real runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_of_a_recipe_with_dropout_are_equal(corpus, tmp_path, scratch, capfd):
    """Two micro-batches a step, ZeRO 2, dropout. The user's own run of that name stays as it is, and nothing is left."""
    recipe, own = write_recipe(tmp_path, corpus), tmp_path / "runs/test/ledger.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text("mine\n")
    code = main(["--config", str(recipe), "--steps", str(STEPS), "--ranks", "2", "parallel.zero_stage=2"])
    text = capfd.readouterr().out
    assert code == 0, text
    killed, saved = map(int, re.search(r"EQUAL: killed after step (\d+) and resumed from step (\d+)", text).groups())
    assert 0 < saved < killed < STEPS
    assert f"samples and a hash of their tokens, {STEPS} steps x 2 ranks" in text
    assert text.count(f"{STEPS} steps read 64 samples, each once, none lost") == 2
    assert "loss/train, optim/grad_norm, optim/lr" in text
    assert "loss/valid, loss/valid_bits_per_byte, loss/valid_perplexity, to the last digit" in text
    assert "with dropout=0.1 other ones would show in the losses" in text
    for name in ("weights", "first moments", "second moments"):
        assert re.search(rf"{name} +equal +21 tensors, 51,360 numbers, to the last bit", text)
    assert "none compared" not in text
    assert own.read_text() == "mine\n"
    assert not scratch.exists()


@pytest.mark.slow
@pytest.mark.long  # three starts, as of every kind of run
def test_a_fine_tuning_for_a_task_is_equal(tmp_path, capfd):
    origin = make_origin(tmp_path / "origin", ["import os\n", "def name(self):\n", "return x\n"] * 50)
    lines = [{"text": f"{word} {i}", "label": word} for i in range(8) for word in ("import", "define")]
    file = write_lines(tmp_path / "t.jsonl", lines)
    task = {"kind": "classify", "labels": ["import", "define"], "train": [file], "valid": [file]}
    code = main(["--config", str(write_task_recipe(tmp_path, origin, task)), "--steps", "8", "--ranks", "2"])
    text = capfd.readouterr().out
    assert code == 0, text
    assert "examples of a task are not audited; the records above tell alone" in text
    assert re.search("evaluation +equal +loss/valid, valid/accuracy, valid/f1, ", text)
    assert "EQUAL: killed after step" in text


@pytest.mark.slow
def test_raw_text_under_torchrun_is_equal(corpus, tmp_path, scratch, capfd, monkeypatch):
    """torchrun's ranks are in sessions of their own. There is no held-out text and no audit, and the report says so."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    stream = {"dataset": "text", "sample_by": "document", "data_files": [f"{corpus.parent}/texts/*.py"],
              "tokenizer": f"{corpus}/tokenizer", "lanes": 2, "workers": 0}  # fmt: skip
    changes = [f"data.stream={json.dumps(stream)}", f"data.corpus={tmp_path}/none"]
    launch = ["--launch", "torchrun --standalone --nproc-per-node 2"]
    code = main(["--config", str(write_recipe(tmp_path, corpus)), "--steps", str(STEPS), *launch, *changes])
    text = capfd.readouterr().out
    assert code == 0, text
    assert "EQUAL: killed after step" in text
    assert "there is no held-out text, so none was made and none compared" in text
    assert "raw text (data.stream) cannot be read again; the records above tell alone" in text


# A run resumed with one number of one tensor changed in its last checkpoint, as a resume that lost a moment would leave it.
PLANT = """
import subprocess, sys
from pathlib import Path
code = subprocess.run([sys.executable, *sys.argv[1:]]).returncode
checkpoint = Path({scratch!r}) / "resumed/checkpoints/step-{steps:08d}"
if checkpoint.exists():
    sys.path.insert(0, {tests!r})
    from made_runs import change_tensor
    print(change_tensor(checkpoint, "exp_avg_sq:norm.weight:0", element=3, by=1e-9))
sys.exit(code)
"""


@pytest.mark.slow
def test_a_difference_of_one_number_after_a_real_resume_is_found(corpus, tmp_path, scratch, capfd):
    recipe, plant = write_recipe(tmp_path, corpus), tmp_path / "plant.py"
    plant.write_text(PLANT.format(scratch=str(scratch), steps=STEPS, tests=str(Path(__file__).parent)))
    code = main(["--config", str(recipe), "--steps", str(STEPS), "--launch", f"{sys.executable} {plant}"])
    text = capfd.readouterr().out
    assert code == 1, text
    before, after = re.search(r"DIFFERENT: first at step 8: exp_avg_sq of norm.weight, element 3 of 32: straight (.*), "
                              r"resumed (.*)", text).groups()  # fmt: skip
    assert float(after) - float(before) == pytest.approx(1e-9, rel=0.1)
    assert len(re.findall(" DIFFERENT ", text)) == 1
    assert "does not compute the same twice" not in text
    assert f"both runs are kept in {scratch}" in text
    assert (scratch / "straight/checkpoints").is_dir()


def fits(cfg):
    """Whether a recipe is verified at its own size: its training here takes at most a minute of two cores (40 GFLOP/s)."""
    starts = 2.5  # one straight, one to the middle, one from before it
    return 6 * cfg.model.n_params * cfg.tokens_per_step * STEPS * starts < 60 * 40e9


def scaled_down(cfg):
    """The same kind of model, head groups, MLP shape, precision and sharding; width 32, 2 blocks, 8 sequences."""
    model = cfg.model
    heads = min(4, model.n_heads)
    per_group = min(heads, model.n_heads // model.kv_heads)
    batch = "train.tokens_per_step=256" if cfg.train.tokens_per_step else "train.global_batch_size=8"
    return ["model.seq_len=32", "model.d_model=32", f"model.d_ff={32 * model.d_ff // model.d_model}",
            f"model.n_layers={min(2, model.n_layers)}", f"model.n_heads={heads}", f"model.n_kv_heads={heads // per_group}",
            batch, "train.micro_batch_size=2"]  # fmt: skip


def on_small_corpus(cfg, corpus, mixture):
    """As many sources, with the recipe's weights, of the tests' corpora of 512 pieces; later weights from step 5 on."""
    if len(cfg.data.sources) == 1:
        sources, stages, corpus = [{"kind": "text", "paths": ["-"]}], [], corpus
    else:
        names = dict(zip([source.label for source in cfg.data.sources], ("json", "email", "asyncio"), strict=True))
        sources = [
            {"kind": "text", "name": names[s.label], "paths": ["-"], "weight": s.weight} for s in cfg.data.sources
        ]
        stages = [
            {"from_tokens": 4 * cfg.tokens_per_step, "weights": {names[name]: w for name, w in stage.weights.items()}}
            for stage in cfg.data.stages
        ]
        corpus = mixture
    return [f"data.corpus={corpus}", f"data.sources={json.dumps(sources)}", f"data.stages={json.dumps(stages)}",
            "data.tokenizer.vocab_size=512", "model.vocab_size=512", "eval.windows=8", "eval.sample_tokens=8"]  # fmt: skip


IN_CI = ("embedded",)


# embedded and mixture are verified at their own size, but for corpus and vocabulary; GPT-3's and Llama 2's scaled down.
@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in IN_CI else [pytest.mark.long]) for path in RECIPES],
)
def test_every_recipe_resumes_to_the_last_bit(path, corpus, mixture, tmp_path, capfd):
    cfg = load_config(str(path), [])
    assert fits(cfg) == (path.stem in ("embedded", "mixture"))
    overrides = [
        f"run.folder={tmp_path}",
        *on_small_corpus(cfg, corpus, mixture),
        *([] if fits(cfg) else scaled_down(cfg)),
    ]
    # one process where that is enough: two take twice as long to start
    two = path.stem in ("embedded", "mixture", "llama2-70b")  # ZeRO 1, 1 and 3
    launch = ["--ranks", "2"] if two else ["--launch", "python"]
    code = main(["--config", str(path), "--steps", str(STEPS), *launch, *overrides])
    text = capfd.readouterr().out
    assert code == 0, text
    assert "EQUAL: killed after step" in text
    small = load_config(str(path), overrides)
    assert small.parallel == cfg.parallel
    if not fits(cfg):
        sizes = {"vocab_size", "seq_len", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff"}
        assert small.model.model_dump(exclude=sizes) == cfg.model.model_dump(exclude=sizes)


# -- runs that do not go as they should ---------------------------------------------------------------------------------


def test_a_command_that_starts_no_run_is_shown(recipe, tmp_path, scratch, capsys):
    launch = fake(tmp_path, "print('x\\n' * 60 + 'pretrain: no such corpus\\n' + 'report\\n' * 60); sys.exit(2)")
    assert main(["--config", str(recipe), "--launch", launch]) == 2
    told = capsys.readouterr().err
    assert "verify_resume: the training command ended before its first step; from" in told
    assert ":\n  | pretrain: no such corpus\n  | report" in told
    assert f"It was started as\n  {launch} launcher/pretrain.py --config {recipe} 'run.folder=" in told
    assert "pretrain: no such corpus\n" in (scratch / "straight.log").read_text()


FAILS = """
run.mkdir(parents=True, exist_ok=True)
tell(event="start", step=2 if again else 0, dp_size=1, number=1 + again)
for step in range(1, steps + 1):
    log(step)
    if step == 2 and not again:
        save(step)
    if step == {at} and run.name == {name!r} and again == {again}:
        print("out of memory")
        sys.exit(1)
    if step == 5 and run.name == "resumed" and not again:
        time.sleep(60)
tell(event="stopped", step=steps)
"""


@pytest.mark.parametrize(
    ("name", "again", "log"),
    [("straight", False, "straight.log"), ("resumed", False, "killed.log"), ("resumed", True, "resumed.log")],
)
def test_a_start_that_fails_under_way_is_shown_and_kept(name, again, log, recipe, tmp_path, scratch, capsys):
    at = 3 if again else 1
    launch = fake(tmp_path, FAILS.format(name=name, again=again, at=at))
    assert main(["--config", str(recipe), "--steps", str(STEPS), "--launch", launch]) == 1
    told = capsys.readouterr().err
    assert (
        f"verify_resume: the training command failed at step {at}; from {scratch / log}:\n  | out of memory\n" in told
    )
    assert f"Nothing was proved; what it wrote is kept in {scratch}" in told
    assert (scratch / name / "metrics.jsonl").exists()


def test_a_run_too_fast_to_be_killed_is_tried_again_and_then_told(recipe, tmp_path, scratch, capsys):
    """Its last step is saved by the time it could be killed, each time."""
    act = "run.mkdir(parents=True)\nlog(steps)\nsave(steps)\ntell(event='stopped', step=steps)"
    assert main(["--config", str(recipe), "--steps", str(STEPS), "--launch", fake(tmp_path, act)]) == 2
    out, err = capsys.readouterr()
    assert out.count("it had come to step 8 when it was killed, too late; once more") == verify_resume.TRIES - 1
    assert (
        "in 5 tries the run could not be killed between a checkpoint (every 2 steps) and step 8: its steps are too short "
        "for that; give more --steps, such as 80"
    ) in err
    assert not scratch.exists()


def test_a_resume_that_begins_from_nothing_is_a_difference_however_equal_its_end(recipe, tmp_path, capsys, monkeypatch):
    act = FAILS.format(name="", again=None, at=0).replace("2 if again else 0", "0")
    monkeypatch.setattr(verify_resume, "compare", lambda a, b, step: [])
    monkeypatch.setattr(verify_resume, "audit_run", lambda run_dir, step: verify_resume.Finding("audit", ""))
    assert main(["--config", str(recipe), "--steps", str(STEPS), "--launch", fake(tmp_path, act)]) == 1
    out = capsys.readouterr().out
    assert "began at step 0, with the checkpoint of step 2 as the newest" in out
    assert "DIFFERENT: first at step 3: the newest checkpoint was not what the resume went on from" in out


def test_runs_that_part_before_the_kill_are_no_fault_of_the_resume(recipe, tmp_path, scratch, capsys):
    """Each start logs another loss. What else a real run has is missing here and told as different, too, but later."""
    act = FAILS.format(name="", again=None, at=0).replace(
        "    log(step)",
        "    (run / 'metrics.jsonl').open('a').write(json.dumps({'step': step, 'loss/train': time.time()}) + '\\n')",
    )
    assert main(["--config", str(recipe), "--steps", str(STEPS), "--launch", fake(tmp_path, act)]) == 1
    out = capsys.readouterr().out
    assert (
        "The runs part at or before step 2, which no kill had disturbed: this machine does not compute the same" in out
    )
    assert f"both runs are kept in {scratch}" in out


def test_every_process_of_a_start_is_killed_whatever_session_it_is_in(tmp_path):
    """As torchrun does, ranks are in sessions of their own; and one has lost its parent."""
    log = tmp_path / "log"
    start = Start(["bash", "-c", "setsid sleep 500 & (setsid bash -c 'sleep 501 & wait' & ) ; echo up; wait"], log)
    while len(start._pids()) < 4:
        time.sleep(0.01)
    pids = start._pids()
    start.kill()
    assert start.ended()
    for pid in pids:
        status = Path(f"/proc/{pid}/status")
        assert not status.exists() or "State:\tZ" in status.read_text()


def test_what_does_not_end_after_sigkill_is_told(tmp_path, monkeypatch):
    start = Start(["sleep", "500"], tmp_path / "log")
    monkeypatch.setattr(verify_resume, "DYING_S", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(start, "_pids", lambda: [2**22 + 1])  # larger than any pid
        with pytest.raises(
            VerifyError, match=r"processes \[\d+\] did not end within 0 s of SIGKILL; look at them with ps"
        ):
            start.kill()
    start.kill()


def test_told_to_end_it_ends_what_it_started(recipe, tmp_path, scratch):
    launch = fake(tmp_path, f"Path({str(tmp_path)!r}, 'pid').write_text(str(os.getpid())); time.sleep(500)")
    command = [sys.executable, "launcher/verify_resume.py", "--config", str(recipe), "--launch", launch]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; its processes are ended, nothing was proved" in err
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not scratch.exists()


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3"], "--steps 3 with train.steps=24; expected 4 to 24"),
        (["--steps", "25"], "--steps 25 with train.steps=24; expected 4 to 24"),
        (["--ranks", "0"], "--ranks 0; expected at least 1"),
        (["--launch", "no-such-launcher -n 2"], "'no-such-launcher -n 2': there is no program 'no-such-launcher'; expected "
         "what stands before launcher/pretrain.py when you train, such as 'srun python'"),
        (["--launch", ""], "--launch '': there is no program ''"),
        (["--launch", "srun 'python"], '''--launch "srun 'python": No closing quotation; quote it as in a shell'''),
        (["train.stepz=3"], "train.stepz: no such key; did you mean train.steps?"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_refused(arguments, message, recipe, scratch, capsys):
    assert main(["--config", str(recipe), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("verify_resume: ")
    assert message in told
    assert not scratch.exists()


@pytest.mark.parametrize("variable", [("RANK", "0"), ("SLURM_STEP_NUM_TASKS", "2")])
def test_it_is_started_once(variable, recipe, capsys, monkeypatch):
    monkeypatch.setenv(*variable)
    assert main(["--config", str(recipe)]) == 2
    assert (
        "this process is one of several ranks; start verify_resume once, with plain python" in capsys.readouterr().err
    )


def test_a_folder_that_is_not_its_own_is_not_touched(recipe, scratch, capsys):
    scratch.mkdir(parents=True)
    (scratch / "thesis.txt").write_text("all of it")
    assert main(["--config", str(recipe)]) == 2
    told = capsys.readouterr().err
    assert (
        f"{scratch} is there and was not made by this program, so it is not touched; move it away, or give another"
        in told
    )
    assert (scratch / "thesis.txt").read_text() == "all of it"


def test_what_an_earlier_verification_left_is_removed(recipe, scratch, tmp_path, capsys):
    (scratch / "straight").mkdir(parents=True)
    for name in (MARKER, "straight.log"):
        (scratch / name).write_text("{}")
    with scratch_folder(scratch):
        assert [entry.name for entry in scratch.iterdir()] == [MARKER]
        assert json.loads((scratch / MARKER).read_text())["pid"] == os.getpid()
    assert f"removing what an earlier verification left in {scratch}" in capsys.readouterr().out


def test_two_verifications_of_a_run_do_not_share_a_folder(recipe, scratch, capsys):
    with scratch_folder(scratch):
        (scratch / "straight.log").write_text("mine")
        assert main(["--config", str(recipe)]) == 2
        assert (scratch / "straight.log").exists()
    assert f"{scratch} is in use by another verification of the same run; wait for its end" in capsys.readouterr().err


def test_a_file_system_without_locks_is_no_obstacle(scratch, monkeypatch):
    def without(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", without)
    with scratch_folder(scratch):
        assert (scratch / MARKER).exists()


def test_a_folder_that_cannot_be_made_is_told(recipe, tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    assert main(["--config", str(recipe)]) == 2
    assert "runs/test.verify-resume cannot be written: Not a directory; give another place with run.folder=FOLDER" in (
        capsys.readouterr().err
    )


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python launcher/verify_resume.py --config configs/embedded.yaml" in capsys.readouterr().out
