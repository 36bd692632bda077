"""What a schedule costs on a cluster: kernels, links, memory, lower bounds, and a quick evaluator."""
