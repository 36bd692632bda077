"""Cluster files from the texts of other tools: `nvidia-smi topo -m` and nccl-tests."""
