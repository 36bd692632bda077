"""Which tiles a query row visits: lists made once per mask, read by the kernels."""
