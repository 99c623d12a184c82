"""Schedule profiles: named, ordered lists of DLight rules per backend."""
