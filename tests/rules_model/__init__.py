"""The safety rules of ownership as a small model, checked exhaustively (docs/rules-model.md). Change a rule here first.

``rules`` names the rules, ``world`` is the state, ``data``, ``link``, ``ownership``, ``arbiters`` and ``faults`` hold
the actions (one function each), ``invariants`` what must hold in every state, and ``search`` visits them all.
"""
