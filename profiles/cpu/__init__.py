"""Our own schedule rules for the CPU, one a file."""
