"""Offline prediction: rows in, a registered version's answers out, in parts that can be resumed."""
