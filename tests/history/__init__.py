"""What several clients of one volume were answered, recorded, and checked: see docs/testing.md."""
