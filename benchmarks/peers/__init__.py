"""Agents as people write them today, to race against. The gate checks that each computes the same update as ours."""
