"""What the runtime needs of a Hugging Face model: shape, loading, sharded batches, losses, guards."""
