"""How evenly the experts of a model are used."""
