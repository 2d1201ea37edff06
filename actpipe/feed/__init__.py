"""Shuffled batches of activations for training: which rows, in which order, read ahead."""
