"""What a run's folder says, for people: record, plots, page and model card."""
