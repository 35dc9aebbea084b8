"""Adapters as files, numbers and records: reading, checking, storing and naming them.

Nothing in this package speaks HTTP or knows an inference engine.
"""
