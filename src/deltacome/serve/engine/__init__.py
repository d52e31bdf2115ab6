"""The running batch of the server: scheduler, cache, attention, sampling, text.

Imports `runtime`, and nothing of the registry or HTTP.
"""
