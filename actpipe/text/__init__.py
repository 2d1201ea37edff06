"""Documents, tokens, sequences, batches. Only here: datasets."""
