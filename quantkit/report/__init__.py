"""The story of reports: results of any number of checkpoints collected, shown, and checked against what they were."""
