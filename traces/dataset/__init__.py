"""Traces on disk: rows in Parquet parts, vouched for by a manifest."""
