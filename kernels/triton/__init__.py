"""The Triton backend: forward, backward, columns, and their launch settings by architecture."""
