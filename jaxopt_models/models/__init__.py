"""Decoder-only language models as pure functions over parameter pytrees."""
