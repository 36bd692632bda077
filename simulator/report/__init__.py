"""Pages: what `report`, `validate` and the demo write, each one self-contained HTML file."""
