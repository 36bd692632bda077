"""How an attached model is called: attention that is asked for or written out, positions, and losses of its class."""
