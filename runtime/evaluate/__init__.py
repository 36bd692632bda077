"""`sparsering eval`: what far context is worth to a model, attended densely or sparsely: losses and retrieval."""
