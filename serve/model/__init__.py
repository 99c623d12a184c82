"""GPT-2's program and weights."""
