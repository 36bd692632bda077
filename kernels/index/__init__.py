"""Which key tiles each query tile visits, and the reverse: lists made once per mask, on the device."""
