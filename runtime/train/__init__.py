"""`sparsering train`: configuration, FSDP2 model, optimizer, checkpoints, metrics, export."""
