"""Forward passes into a store: where models, stores and batches meet."""
