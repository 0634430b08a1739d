"""The whole cluster on a fake clock, from a seed: two nodes, the arbiter, clients, and everything that goes wrong."""
