"""Graph passes: one pass a file, Graph -> Graph; analyses are functions Graph -> table."""
