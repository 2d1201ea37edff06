"""The versioned contracts of everything on disk. Reading them needs pydantic and nothing else."""
