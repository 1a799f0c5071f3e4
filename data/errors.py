"""The common ancestor of what a user can cause in data/, so that a command can catch it and show the message alone."""


class DataError(ValueError):
    """Something about the corpus, its sources, its tokenizer or its options that the user can put right."""
