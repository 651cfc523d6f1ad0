"""A page to ask an index in a browser: served on this machine, to one person, without a network."""
