"""Who may serve a group, and when: pure decisions, events in, effects out."""
