"""Pure functions: arrays in, arrays out. No files, no clocks, no state."""
