"""Token shards to train on."""
