"""Where work runs, and how stores become Dask graphs. Only here: dask."""
