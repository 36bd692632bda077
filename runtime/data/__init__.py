"""Text to memory-mapped token shards, and the sequences that training cuts from them."""
