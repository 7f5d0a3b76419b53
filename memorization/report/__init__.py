"""What a run found, for others: a page, a section of a model card, and a gate."""
