"""The artifact on disk: bits, rotation, terms, the manifest, reading it and describing it.

Imports errors, files and what else lies at the top of the package; no checkpoint, no method, no model.
"""
