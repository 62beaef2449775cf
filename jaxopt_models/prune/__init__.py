"""Pruning: what matters least is found, masked, measured, and cut out."""
