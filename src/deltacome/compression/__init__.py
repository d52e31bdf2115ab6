"""From two checkpoints to an artifact: calibration, sharing out of bytes, methods, the journal, the executors.

Imports `checkpoints` and below. (Not `compress`, which is the function of that name in the package.)
"""
