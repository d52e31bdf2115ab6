"""From a base and an artifact to what others read: a merged checkpoint, a LoRA adapter.

Imports `compression` (for its SVD) and below.
"""
