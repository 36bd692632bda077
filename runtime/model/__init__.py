"""What the runtime knows and needs of a Hugging Face model."""
