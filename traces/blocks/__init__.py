"""Block masks: as heads have them, as traces keep them, and as synthetic ones are drawn."""
