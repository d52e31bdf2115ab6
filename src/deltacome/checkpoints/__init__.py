"""Hugging Face checkpoints: read a tensor at a time, quantized or not, an adapter over them, folded norms; pairing.

And what a fine-tuned weight is, given a base and an artifact. Imports `format` and below.
"""
