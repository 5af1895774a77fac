"""What is learnt from: records, the files they come from, canaries, datasets, demo data."""
