"""Runs a compiled library: implements the engine's ModelRunner."""
