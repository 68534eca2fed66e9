"""Everything that a run writes and prints: tables, checkpoints, pictures, the policy, the summary."""
