"""Past one process: parts as tasks of a Dask cluster."""
