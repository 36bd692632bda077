"""The demo's report: one self-contained page."""
