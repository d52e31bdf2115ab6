"""What is left of a fine-tune: metrics, comparisons, lm-evaluation-harness, what an artifact spends its bytes on.

Imports `runtime` and below.
"""
