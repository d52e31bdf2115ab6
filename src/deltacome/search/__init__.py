"""Which precision plan loses least at a ratio: plans to try, and trying them on data.

Imports `evaluate` and below; it compresses and evaluates many times, so it stands above both.
"""
