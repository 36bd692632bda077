"""Where metrics of a training run are written: JSON lines, TensorBoard, Weights & Biases."""
