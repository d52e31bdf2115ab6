"""A back end by which vLLM takes Triton to run on CPUs: it compiles nothing, and is for `TRITON_INTERPRET=1` alone.

With this folder in PYTHONPATH Triton finds it, by its entry point, in vLLM's other processes too.
"""
