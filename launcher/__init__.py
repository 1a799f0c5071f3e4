"""The commands a person or a scheduler starts, the train loop, and the run's config composed from its parts."""
