"""Native Hugging Face models with TransformerLens' names. Only here: transformers, accelerate."""
