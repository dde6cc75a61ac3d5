"""Turning fine-tuning into super-network training."""
