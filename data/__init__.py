"""Text to tokens to batches: sources, tokenizer, token shards, order, loader.  Imports nothing of ours."""
