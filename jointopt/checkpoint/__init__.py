"""A sub-network as a checkpoint: written as Hugging Face folders are, and verified without this package."""
