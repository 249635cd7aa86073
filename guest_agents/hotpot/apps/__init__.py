"""Programs on Hotpot: a key-value store and PageRank."""
