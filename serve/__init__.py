"""The server: model, compiler, runtime, engine and API.

See docs/architecture.md for who may import whom.
"""
