"""One file per step of a run. Each only joins what the library has."""
