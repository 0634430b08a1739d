"""Floating addresses: on this node while it owns the group, announced to neighbours and to clients.

Job: rule 12 (identity follows ownership), and that clients notice a new owner at once. `network` is what the
supervisor uses; inside, from the top: `addresses` (who keeps an address on this node), `announce` (gratuitous ARP,
neighbour advertisements), `tickle` (old connections end at once), `kernel` (netlink), `packets` (pure), `floating`.
"""
