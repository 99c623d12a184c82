"""Load tests against any OpenAI-compatible host; speaks HTTP only."""
