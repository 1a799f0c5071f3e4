"""Everything that knows about ranks: process groups, DeepSpeed, recomputation, sharded checkpoints."""
