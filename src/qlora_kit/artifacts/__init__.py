"""What a run or an export leaves on disk: whole folders, shards, cards, configuration."""
