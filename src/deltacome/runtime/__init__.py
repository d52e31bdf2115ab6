"""One model in memory with many tenants: what each changes, the running batch, the layers, the kernels.

Imports `restore` (to check artifacts and copy tokenizers) and below.
"""
