"""The peer benchmark: ours and other engines on the same weights and tokens. See docs/peers.md."""
