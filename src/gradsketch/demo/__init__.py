"""Real models and data that ship inside packages, and the demonstration built on them."""
