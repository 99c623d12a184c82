"""Named choices of TVM target, device and dtype."""
