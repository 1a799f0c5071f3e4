"""A run that nothing disturbs, against which the others are held."""

import shutil

from launcher import audit
from parallel.checkpoint import committed_steps
from runs import assert_same_state, losses, run, torchrun, write_recipe

STEPS = 60
OPTIONS = (f"train.steps={STEPS}", "eval.every=0")


class Straight:
    """An undisturbed run of two ranks."""

    def __init__(self, folder, corpus):
        recipe = write_recipe(folder, corpus)
        run(torchrun(2, "--config", recipe, *OPTIONS), folder / "log")
        self.run_dir = folder / "runs/test"
        assert sorted(losses(self.run_dir)) == list(range(1, STEPS + 1))

    def begun(self, run_dir, step):
        """A copy of it as it would be had it been killed after a step."""
        shutil.copytree(self.run_dir, run_dir)
        for other in committed_steps(run_dir / "checkpoints"):
            if other > step:
                shutil.rmtree(run_dir / f"checkpoints/step-{other:08d}")
        (run_dir / "checkpoints/latest").write_text(f"step-{step:08d}\n")

    def assert_equal(self, run_dir):
        """The same losses, each once, and the same weights and moments, to the last bit; each sample read once."""
        assert losses(run_dir) == losses(self.run_dir)
        assert_same_state(run_dir, self.run_dir)
        assert audit.main([str(run_dir), "--verify"]) == 0
