"""What a run's folder tells, for launcher/ and cluster/ alike; standard library alone."""
