"""SLURM: job scripts, submit, preempt and requeue, status, health; standard library and PyYAML alone."""
