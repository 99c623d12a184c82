"""From a model, a backend and a profile to a cached library."""
