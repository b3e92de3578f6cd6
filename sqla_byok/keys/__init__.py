"""Tenants' keys over time: the keystore, the keyrings in memory, and whose turn it is."""
