"""Stores on disk: layout, parts, commits, reading. Only here: zarr."""
