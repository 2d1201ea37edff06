"""Stores to and from the formats that others read: SAELens, safetensors, Hugging Face datasets, `.npy`."""
