"""The supervisor of a node: child processes, control socket, metrics. It never touches volume data."""
