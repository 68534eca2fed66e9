"""Agents as people write them today, to race against: each computes the same update as ours, and is held to it."""
