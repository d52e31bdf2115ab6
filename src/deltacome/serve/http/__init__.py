"""OpenAI's API over the engine: routes, protocol, guards, keys, answers in chunks.

Imports the registry and `serve.engine`.
"""
